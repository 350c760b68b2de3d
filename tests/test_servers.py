"""What goes to the servers, and that each fault of theirs or of the network is one clear error."""

import json
import os
import re
import socket
import ssl
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import requests
import trustme
from odd_server import NEW_TOKENS, STEPS, TOKENS, OddServer, answer, failed_login, json_answer
from script import Script, clean_environment

from sipgate_oauth import (
    KEYS,
    LoginError,
    PrintingSession,
    exchange_code,
    get_account,
    refresh_tokens,
    request_json,
    tokens_from,
)

Start = Callable[..., Script]
Capture = pytest.CaptureFixture[str]
Step = Callable[[requests.Session, str], Any]
NOWHERE = "sipgate.invalid"  # the names under .invalid never exist: RFC 6761


def tokens_at(session: requests.Session, url: str) -> Any:
    return exchange_code(session, dict.fromkeys(KEYS, url), "code", "verifier")


def account_at(session: requests.Session, url: str) -> Any:
    return get_account(session, dict.fromkeys(KEYS, url), "access-token")


def environment_of(variables: Mapping[str, str]) -> Any:
    """In a `with` block: show requests these variables, and nothing of the machine's own."""
    return patch.dict(os.environ, {**clean_environment(Path("nowhere")), **variables}, clear=True)


def four_requests(server: OddServer, **variables: str) -> dict[str, Any]:
    """Send the requests of a login, and return the last tokens."""
    config = server.environment
    with environment_of(variables), requests.Session() as session:
        tokens = exchange_code(session, config, "code", "verifier")
        get_account(session, config, tokens["access_token"])
        tokens = refresh_tokens(session, config, tokens)
        get_account(session, config, tokens["access_token"])
    return tokens


def failure(url: str, step: Step = tokens_at, variables: Mapping[str, str] = {}) -> LoginError:
    """Take a step that fails, and return the error, which names the method and the URL."""
    session = PrintingSession(show_tokens=False)
    with environment_of(variables), session, pytest.raises(LoginError) as caught:
        step(session, url)
    method = "POST" if step is tokens_at else "GET"
    assert caught.value.what.startswith(f"{method} {url.partition('?')[0]} ")
    return caught.value


# --- What is sent ---------------------------------------------------------------------------------


def test_a_public_client_sends_no_client_secret(server: OddServer) -> None:
    server.environment["CLIENT_SECRET"] = ""
    four_requests(server)
    names = [sorted(request.form) for request in server.requests]
    assert names[0] == ["client_id", "code", "code_verifier", "grant_type", "redirect_uri"]
    assert names[2] == ["client_id", "grant_type", "refresh_token"]


def test_a_password_in_netrc_replaces_no_token(server: OddServer, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("default login somebody password of-netrc\n")
    four_requests(server, NETRC=str(tmp_path / "netrc"))
    sent = [request.headers["Authorization"] for request in server.requests]
    assert sent == [None, "Bearer aCCCCCCC-access-token", None, "Bearer aEEEEEEE-new"]


CA = trustme.CA()  # a certificate authority that no machine knows


def tls_server(host: str, name: str | None = None) -> OddServer:
    """A server with this host in its URLs, and perhaps another name in its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert(name or host).configure_cert(context)
    return OddServer(context, host)


def tunnel_to(server: Any, request: Any) -> bytes:
    """Do what a proxy does for CONNECT, but hand the connection to a server of this process."""
    request.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    with server.tls.wrap_socket(request.connection, server_side=True) as connection:
        server.finish_request(connection, None)
    return b""


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY"])
def test_a_proxy_carries_https_and_nothing_else(server: OddServer, variable: str) -> None:
    with OddServer() as proxy, tls_server(NOWHERE) as https:
        proxy.answers[https.host] = [lambda request: tunnel_to(https, request)]
        variables = {variable: f"http://{proxy.host}", "HTTP_PROXY": f"http://{proxy.host}"}
        with CA.cert_pem.tempfile() as known:
            assert four_requests(https, REQUESTS_CA_BUNDLE=known, **variables) == NEW_TOKENS
        assert four_requests(server, **variables) == NEW_TOKENS
        assert [request.method for request in proxy.requests] == ["CONNECT"]


# --- What is shown --------------------------------------------------------------------------------


def test_the_steps_print_nothing(server: OddServer, capsys: Capture) -> None:
    four_requests(server)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("header", "body", "shown"),
    [
        ("X-Odd: 1", b"<p>Hello</p>", "(12 bytes that are not JSON)\n"),
        ("Location: /token/?code=xyz", b"[]", "Location: /token/\n      []\n"),
        ("Location: http://a/#access_token=xyz", b"[]", "Location: http://a/\n      []\n"),
        ('WWW-Authenticate: Bearer realm="a"', b"[]", 'WWW-Authenticate: Bearer realm="a"\n'),
    ],
)
def test_a_response_is_shown_whatever_its_shape(
    server: OddServer, capsys: Capture, header: str, body: bytes, shown: str
) -> None:
    server.answers["/a"] = [answer(body, header, status="499 Odd")]
    with PrintingSession(show_tokens=False) as session:
        session.get(f"http://{server.host}/a")
    assert f"   Response: 499 Odd\n      {shown}" in capsys.readouterr().out


@pytest.mark.parametrize("show_tokens", [False, True])
def test_tokens_in_a_response_are_masked_at_every_depth(
    server: OddServer, capsys: Capture, show_tokens: bool
) -> None:
    tokens = ["pAss1-long-token", "pAss2-long-token", "pAss3-long-token", "pAss4-long-token"]
    content = {
        "code": "ACCOUNT_LOCKED",
        "a": [{"b": {"ID_Token": tokens[0]}}],
        "tokens": tokens[1:3],
        "api_token": {"value": tokens[3]},
        "client_secret": "sEcret-long",
        "nested": [{"secret": {"a": "sEcret-long"}}],
    }
    server.answers["/account"] = [json_answer([content])]
    with PrintingSession(show_tokens) as session:
        session.get(f"http://{server.host}/account")
    shown = capsys.readouterr().out
    assert '"code": "ACCOUNT_LOCKED"' in shown
    assert [token in shown for token in tokens] == [show_tokens] * 4
    assert "sEcret-long" not in shown


CONTROLS = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
HARMFUL = CONTROLS + "\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff\udfff\ud800"


def test_text_of_a_server_cannot_control_a_terminal(server: OddServer, start: Start) -> None:
    odd = f"<{HARMFUL}>"
    reason = f"<{CONTROLS}>".replace("\n", "").encode("latin-1")
    refusal = json_answer({"error": odd, "error_description": odd}, "400 reason")
    server.answer_at("code for tokens", json_answer({**TOKENS, odd: odd}))
    server.answer_at("account", json_answer({odd: [odd]}))
    server.answer_at("refresh", refusal.replace(b"reason", reason))
    script = start(**server.environment)
    what = failed_login(script, server).splitlines()[0]
    assert what.count("<") == what.count(">") == 2
    assert set(HARMFUL) & set(script.stdout + script.stderr) == {"\n"}


# --- Faults of the network ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bundle", "told"),
    [
        (NOWHERE, None, "certificate verify failed: IP address mismatch"),
        ("127.0.0.1", "", "certificate verify failed: unable to get local issuer"),
        ("127.0.0.1", "missing.pem", "missing.pem"),
    ],
)
def test_a_certificate_that_proves_nothing_is_an_error(
    name: str, bundle: str | None, told: str
) -> None:
    with CA.cert_pem.tempfile() as known, tls_server("127.0.0.1", name) as server:
        trusted = known if bundle is None else bundle
        error = failure(server.environment["TOKEN_URL"], variables={"REQUESTS_CA_BUNDLE": trusted})
        assert told in error.what
        assert server.requests == []


@pytest.mark.parametrize(
    "proxy",
    [
        "HTTPS_PROXY=http://erika:pAss@127.0.0.1:1",
        "HTTPS_PROXY=http://erika:pAss#word@proxy:8080",
        "HTTPS_PROXY=erika:pAss@127.0.0.1:3128",
        "HTTPS_PROXY=http://erika:pAss@{server.host}",
        "ALL_PROXY=socks5://erika:pAss@127.0.0.1:1",
    ],
)
def test_a_proxy_that_cannot_be_used_is_an_error(server: OddServer, proxy: str) -> None:
    server.answers[f"{NOWHERE}:443"] = [answer(b"", status="407 Password please")]
    variable, _, url = proxy.format(server=server).partition("=")
    error = failure(f"https://{NOWHERE}/token", variables={variable: url})
    assert "pAss" not in str(error)


def test_a_server_that_cannot_be_reached_is_an_error(server: OddServer) -> None:
    assert "refused" in failure("http://127.0.0.1:1/a?b=c").what
    assert "SSL" in failure(f"https://{server.host}/a").what  # has no TLS
    assert "[Errno " in failure(f"https://{NOWHERE}/a").what
    assert "LocationParseError" in failure("https://sipgate..invalid/a").what


def test_the_advice_names_what_decides_about_a_connection() -> None:
    advice = " ".join(failure("http://127.0.0.1:1/a").advice.split())
    assert "the proxy in the settings of Windows or macOS" in advice
    for setting in ("HTTPS_PROXY", "ALL_PROXY", "PySocks", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        assert setting in advice


def reset(request: Any) -> bytes:
    """Break the connection off, as a firewall does."""
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()
    return b""


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (b"", "Remote end closed connection without response"),
        (reset, "reset by peer|forcibly closed"),  # Windows has words of its own
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{}", "ChunkedEncodingError"),
        (answer(b"{}", "Content-Encoding: gzip"), "ContentDecodingError"),
    ],
)
def test_a_broken_response_is_an_error_with_its_reason(
    server: OddServer, response: Any, reason: str
) -> None:
    server.answers["/a"] = [response]
    error = failure(f"http://{server.host}/a")
    assert re.search(f"/a failed: .*({reason})$", error.what)


def test_a_server_that_never_responds_is_given_up_after_10_seconds(server: OddServer) -> None:
    # The other side has nothing more to send, so this returns when it has given up.
    server.answers["/token"] = [lambda request: request.connection.recv(1)]
    with pytest.raises(LoginError, match="timed out") as caught:
        four_requests(server)
    assert "timeout=10)" in str(caught.value.__context__)


def test_an_exception_that_the_caller_handles_is_not_the_reason() -> None:
    """It may contain a secret, such as the password of a database."""
    proxy_without_support = {"HTTPS_PROXY": "socks5://127.0.0.1:1"}
    try:
        raise ConnectionError("redis://:pAss@db")
    except ConnectionError:
        errors = [
            failure("http://127.0.0.1:1/a"),
            failure(f"https://{NOWHERE}/a", variables=proxy_without_support),
        ]
    assert "refused" in errors[0].what
    assert "pAss" not in "".join(map(str, errors))


def test_a_request_of_ones_own_fails_with_advice(server: OddServer) -> None:
    def devices_at(session: requests.Session, url: str) -> Any:
        return request_json(session, "GET", url)

    error = failure(f"http://{server.host}/devices", devices_at)
    assert error.what.endswith("/devices got 404 No: the response gives no reason")
    assert "Check this URL" in error.advice
    assert "check the URL" in failure("http://127.0.0.1:1/devices", devices_at).advice


def test_a_bug_is_not_told_as_a_fault_of_the_network() -> None:
    class Buggy(requests.Session):
        def send(self, *arguments: Any, **settings: Any) -> requests.Response:
            raise TypeError("a bug")

    with Buggy() as session, pytest.raises(TypeError):
        request_json(session, "GET", "http://127.0.0.1:1")


# --- Faults of the servers ------------------------------------------------------------------------

GOOD = json.dumps(TOKENS).encode()
# What is told
NOT_JSON = "the response is not JSON"
NO_REASON = "the response gives no reason"
# Parts of the advice
FIREWALL = "A firewall or a proxy may have responded"
CHECK = "Check this URL. If it is right, try again later"
EXPIRED = "The access token is expired"
SCOPE = "OAUTH_SCOPE must contain the scope that the API requires"
# A code that programs decide by
NO_SCOPE = "insufficient_scope"


@pytest.mark.parametrize(
    ("status", "body", "reason", "advice"),
    [
        ("200 OK", b"<h1>Log in to the Wi-Fi</h1>", NOT_JSON, FIREWALL),
        ("200 OK", GOOD[:-9], NOT_JSON, FIREWALL),
        ("200 OK", b'{"a": "not UTF-8: \xff"}', NOT_JSON, FIREWALL),
        ("200 OK", b'"error"', NO_REASON, CHECK),
        ("404 Not Found", b"", NO_REASON, CHECK),
        ("404 Not Found", GOOD, NO_REASON, CHECK),
        ("400 Bad Request", b'{"error": ["a"], "error_description": {}}', NO_REASON, CHECK),
        ("200 OK", GOOD.replace(b"{", b'{"error": "server_error", '), "server_error", CHECK),
    ],
)
def test_an_unusable_response_is_an_error(
    server: OddServer, status: str, body: bytes, reason: str, advice: str
) -> None:
    server.answers["/a?xyz"] = [answer(body, status=status)]
    error = failure(f"http://{server.host}/a?xyz")
    assert error.what.endswith(f" got {status}: {reason}")
    assert advice in error.advice
    assert "xyz" not in str(error)


@pytest.mark.parametrize("status", ["301 A", "302 B", "303 C", "307 D", "308 E"])
def test_a_redirect_is_an_error_and_not_followed(server: OddServer, status: str) -> None:
    server.answers["/a"] = [answer(GOOD, "Location: /account?code=xyz", status=status)]
    error = failure(f"http://{server.host}/a")
    assert f" got {status}: redirects are not followed" in error.what
    assert "the URL in Location" in error.advice
    assert "xyz" not in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("access_denied", "allow access"),
        ("invalid_client", "Check CLIENT_ID and CLIENT_SECRET"),
        ("invalid_client", '"At another provider"'),
        ("unauthorized_client", "whether the authorization code grant is enabled"),
        ("invalid_grant", "expired, or already used. Start again"),
        ("invalid_scope", "Separate the scopes in OAUTH_SCOPE with spaces"),
        ("invalid_scope", "all that it requires"),  # Missing required scope(s) ["openid"]
        ("server_error", CHECK),
    ],
)
@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized", "403 Forbidden"])
def test_the_advice_fits_an_error_of_the_token_endpoint(
    server: OddServer, status: str, code: str, advice: str
) -> None:
    content = {"error": code, "error_description": "Told: by the server."}
    server.answers["/a"] = [json_answer(content, status)]
    error = failure(f"http://{server.host}/a")
    assert error.what.endswith(f" got {status}: {code}: Told: by the server")
    assert advice in error.advice
    assert error.error == code


@pytest.mark.parametrize(
    ("status", "body", "reason", "advice", "code"),
    [
        ("401 Unauthorized", b"{}", NO_REASON, EXPIRED, "invalid_token"),
        ("401 Unauthorized", b'{"error": "odd"}', "odd", EXPIRED, "invalid_token"),
        ("401 Unauthorized", b"<h1>No</h1>", NOT_JSON, FIREWALL, "invalid_token"),
        ("403 Forbidden", b"", NO_REASON, SCOPE, NO_SCOPE),
        ("403 Forbidden", b'{"message": "Forbidden"}', "Forbidden", SCOPE, NO_SCOPE),
        ("403 No", b'{"error": "insufficient_scope"}', NO_SCOPE, SCOPE, NO_SCOPE),
        ("403 Forbidden", b'{"error": "rate_limited"}', "rate_limited", CHECK, "rate_limited"),
        ("403 Forbidden", b'{"message": "Account suspended"}', "Account suspended", CHECK, ""),
        ("500 Internal Server Error", b'{"message": "No."}', "No", CHECK, ""),
    ],
)
def test_the_advice_fits_an_error_of_the_api(
    server: OddServer, status: str, body: bytes, reason: str, advice: str, code: str
) -> None:
    server.answers["/a"] = [answer(body, status=status)]
    error = failure(f"http://{server.host}/a", account_at)
    assert error.what.endswith(f" got {status}: {reason}")
    assert advice in error.advice
    assert error.error == code


def test_a_403_may_give_its_reason_in_plain_text(server: OddServer) -> None:
    """As one of sipgate's API does."""
    text = b"This endpoint requires a sipgate Classic PBX Account.\n"
    server.answers["/a"] = [answer(text, "Content-Type: text/plain", status="403 Forbidden")]
    error = failure(f"http://{server.host}/a", account_at)
    assert error.what.endswith("/a got 403 Forbidden: " + text.decode()[:-2])
    assert (error.advice, error.error) == (CHECK + ".", "")


def test_no_other_plain_text_is_told(server: OddServer) -> None:
    """A framework that is being debugged may respond with all that it received."""

    def everything(request: Any) -> bytes:
        body = json.dumps(request.form).encode()
        return answer(body + b".", "Content-Type: text/plain", status="500 Server Error")

    server.answers["/token"] = [everything]
    with pytest.raises(LoginError) as caught:
        four_requests(server)
    assert caught.value.what.endswith(f"500 Server Error: {NOT_JSON}")


def test_a_traceback_of_the_error_shows_nothing_that_the_error_leaves_out() -> None:
    error = failure("http://127.0.0.1:1/a?api_key=sAAAAAAA")
    assert "sAAAAAAA" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("step", STEPS)
def test_each_step_ends_in_one_error(server: OddServer, start: Start, step: str) -> None:
    server.answer_at(step, json_answer({"error": "server_error"}, "500 No"))
    assert server.host in failed_login(start(**server.environment), server)
    assert len(server.requests) == [*STEPS].index(step) + 1


def test_an_error_is_a_sentence_for_those_who_print_it() -> None:
    assert str(LoginError("It failed", "Start again.")) == "It failed. Start again."


# --- What is accepted, and what the tokens must have ----------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        answer(GOOD, status="201 Created"),
        answer(b"\xef\xbb\xbf" + GOOD),  # with a byte order mark
        json_answer({**TOKENS, "error": None}),
        json_answer({**TOKENS, "token_type": "BEARER"}),
    ],
)
def test_an_unusual_response_is_good_enough(server: OddServer, response: bytes) -> None:
    server.answers.update({"/token": [response], "/account": [response]})
    assert four_requests(server)["access_token"] == TOKENS["access_token"]


@pytest.mark.parametrize("content", [{}, [], [{"id": 1}], {"error": None}])
def test_an_account_may_be_any_object_or_list(server: OddServer, content: Any) -> None:
    server.answers["/a"] = [json_answer(content)]
    with requests.Session() as session:
        assert account_at(session, f"http://{server.host}/a") == content


def test_no_content_is_a_success(server: OddServer) -> None:
    """As after a message that the API has sent."""
    server.answers["/a"] = [answer(b"", status="204 No Content")]
    with requests.Session() as session:
        assert account_at(session, f"http://{server.host}/a") is None


@pytest.mark.parametrize(
    "response",
    [
        {"token_type": "Bearer"},
        {"token_type": "Bearer", "access_token": 7},
        {"access_token": "a"},
        {"access_token": "a", "token_type": "MAC"},
        [TOKENS],
        None,
    ],
)
def test_a_response_without_a_bearer_token_is_an_error(response: Any) -> None:
    with pytest.raises(LoginError) as caught:
        tokens_from(response, "https://host/token?a=b")
    told = "https://host/token sent no access_token of token_type bearer"
    assert caught.value.what == told


@pytest.mark.parametrize("before", [[], [json_answer(TOKENS)]], ids=["first", "refreshed"])
def test_tokens_must_be_in_both_responses(server: OddServer, before: list[bytes]) -> None:
    server.answers["/token"] = [*before, json_answer({})]
    with pytest.raises(LoginError, match="sent no access_token"):
        four_requests(server)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"refresh_token": "new"}, "new"),
        ({}, "old"),
        ({"refresh_token": None}, "old"),
        ({"refresh_token": ""}, "old"),
    ],
)
def test_the_old_refresh_token_stays_unless_there_is_a_new_one(
    server: OddServer, sent: dict[str, Any], kept: str
) -> None:
    response = {"access_token": "a", "token_type": "Bearer", **sent}
    server.answers["/token"] = [json_answer(response)]
    with requests.Session() as session:
        tokens = refresh_tokens(session, server.environment, {"refresh_token": "old"})
    assert tokens == {"access_token": "a", "token_type": "Bearer", "refresh_token": kept}


@pytest.mark.parametrize("tokens", [{}, {"refresh_token": None}, {"refresh_token": ""}])
def test_without_a_refresh_token_nothing_is_sent(server: OddServer, tokens: Any) -> None:
    with requests.Session() as session, pytest.raises(LoginError) as caught:
        refresh_tokens(session, server.environment, tokens)
    assert f"{server.host} sent no refresh token" in caught.value.what
    assert caught.value.error == "invalid_grant"
    assert server.requests == []
