"""What goes to the servers, and that each fault of theirs or of the network is one clear error."""

import json
import os
import ssl
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import requests
import trustme
import urllib3
from odd_server import NEW_TOKENS, TOKENS, OddServer, answer, failed_login, json_answer
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


def tls_server(host: str) -> OddServer:
    """A server with this host in its URLs and in its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert(host).configure_cert(context)
    return OddServer(context, host)


def tunnel_to(server: Any, request: Any) -> bytes:
    """Do what a proxy does for CONNECT, but hand the connection to a server of this process."""
    request.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    with server.tls.wrap_socket(request.connection, server_side=True) as connection:
        server.finish_request(connection, None)
    return b""


def test_a_proxy_carries_https_and_nothing_else(server: OddServer) -> None:
    with OddServer() as proxy, tls_server(NOWHERE) as https:
        proxy.answers[https.host] = [lambda request: tunnel_to(https, request)]
        variables = {"ALL_PROXY": f"http://{proxy.host}", "HTTP_PROXY": f"http://{proxy.host}"}
        with CA.cert_pem.tempfile() as known:
            assert four_requests(https, REQUESTS_CA_BUNDLE=known, **variables) == NEW_TOKENS
        assert four_requests(server, **variables) == NEW_TOKENS
        assert {request.method for request in proxy.requests} == {"CONNECT"}


# --- What is shown --------------------------------------------------------------------------------


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


def test_text_of_a_server_cannot_control_a_terminal(server: OddServer, start: Start) -> None:
    odd = "\x1b[31m\x9b31m"
    server.answer_at("account", json_answer({odd: odd}))
    refusal = json_answer({"error": odd, "error_description": odd}, f"400 {odd}")
    server.answer_at("refresh", refusal)
    script = start(**server.environment)
    failed_login(script, server)
    assert script.stderr.count("[31m") == 2
    assert not {"\x1b", "\x9b"} & set(script.stdout + script.stderr)


# --- Faults of the network ------------------------------------------------------------------------


def test_a_certificate_that_proves_nothing_is_an_error() -> None:
    with tls_server("127.0.0.1") as server:
        error = failure(server.environment["TOKEN_URL"])
        assert "certificate verify failed: unable to get local issuer" in error.what
        assert server.requests == []


@pytest.mark.parametrize(
    "proxy", ["http://erika:pAss#word@proxy:8080", "http://erika:pAss@{server.host}"]
)
def test_a_proxy_that_cannot_be_used_is_an_error(server: OddServer, proxy: str) -> None:
    server.answers[f"{NOWHERE}:443"] = [answer(b"", status="407 Password please")]
    variables = {"HTTPS_PROXY": proxy.format(server=server)}
    error = failure(f"https://{NOWHERE}/token", variables=variables)
    assert "pAss" not in str(error)


def test_a_server_that_cannot_be_reached_is_an_error() -> None:
    error = failure("http://127.0.0.1:1/a?b=c")
    assert "refused" in error.what
    for setting in ("HTTPS_PROXY", "ALL_PROXY", "PySocks", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        assert setting in error.advice
    assert "LocationParseError" in failure("https://sipgate..invalid/a").what


def test_a_response_that_cannot_be_decompressed_has_a_reason(server: OddServer) -> None:
    server.answers["/a"] = [answer(b"{}", "Content-Encoding: gzip")]
    assert failure(f"http://{server.host}/a").what.endswith("/a failed: ContentDecodingError")


def test_a_server_that_never_responds_is_given_up_after_10_seconds(server: OddServer) -> None:
    # The other side has nothing more to send, so this returns when it has given up.
    server.answers["/token"] = [lambda request: request.connection.recv(1)]
    with pytest.raises(LoginError, match="timed out") as caught:
        four_requests(server)
    assert "timeout=10)" in str(caught.value.__context__)


def test_an_exception_that_the_caller_handles_is_not_the_reason() -> None:
    """It may contain a secret, such as the password of a database."""
    variables = {"HTTPS_PROXY": "socks5://127.0.0.1:1"}  # which needs PySocks
    try:
        raise ConnectionError("redis://:pAss@db")
    except ConnectionError:
        error = failure(f"https://{NOWHERE}/a", variables=variables)
    assert "pAss" not in str(error)


def test_a_request_of_ones_own_fails_with_advice(server: OddServer) -> None:
    with requests.Session() as session, pytest.raises(LoginError) as caught:
        request_json(session, "GET", f"http://{server.host}/devices")
    assert caught.value.what.endswith("/devices got 404 No: the response gives no reason")
    assert "Check this URL" in caught.value.advice


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (TypeError("a bug"), TypeError),
        # requests wraps most errors of urllib3, but not all.
        (urllib3.exceptions.HTTPError("a fault"), LoginError),
    ],
)
def test_a_bug_is_not_told_as_a_fault_of_the_network(
    raised: Exception, seen: type[Exception]
) -> None:
    class Failing(requests.Session):
        def send(self, *arguments: Any, **settings: Any) -> requests.Response:
            raise raised

    with Failing() as session, pytest.raises(seen):
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
        ("200 OK", b'{"a": "not UTF-8: \xff"}', NOT_JSON, FIREWALL),
        ("200 OK", b'"error"', NO_REASON, CHECK),
        ("404 Not Found", b"", NO_REASON, CHECK),
        ("404 Not Found", GOOD, NO_REASON, CHECK),
        ("400 Bad Request", b'{"error": ["a"], "error_description": {}}', NO_REASON, CHECK),
        ("200 OK", GOOD.replace(b"{", b'{"error": "server_error", '), "server_error", CHECK),
        ("401 A", b'{"error": "invalid_client"}', "invalid_client", "Check CLIENT_ID and CLIENT_S"),
        ("400 B", b'{"error": "unauthorized_client"}', "unauthorized_client", "grant is enabled"),
        ("400 B", b'{"error": "invalid_grant"}', "invalid_grant", "or already used. Start again"),
        ("400 B", b'{"error": "invalid_scope"}', "invalid_scope", "List all that the server"),
    ],
)
def test_an_unusable_response_is_an_error_with_advice(
    server: OddServer, status: str, body: bytes, reason: str, advice: str
) -> None:
    server.answers["/a?xyz"] = [answer(body, status=status)]
    error = failure(f"http://{server.host}/a?xyz")
    assert error.what.endswith(f" got {status}: {reason}")
    assert advice in error.advice
    assert "xyz" not in str(error)


def test_a_redirect_is_an_error_and_not_followed(server: OddServer) -> None:
    server.answers["/a"] = [answer(GOOD, "Location: /account?code=xyz", status="302 Found")]
    error = failure(f"http://{server.host}/a")
    assert " got 302 Found: redirects are not followed" in error.what
    assert "the URL in Location" in error.advice
    assert "xyz" not in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "body", "reason", "advice", "code"),
    [
        ("401 Unauthorized", b'{"error": "odd"}', "odd", EXPIRED, "invalid_token"),
        ("401 Unauthorized", b"<h1>No</h1>", NOT_JSON, FIREWALL, "invalid_token"),
        ("403 Forbidden", b"", NO_REASON, SCOPE, NO_SCOPE),
        ("403 Forbidden", b'{"message": "Forbidden"}', "Forbidden", SCOPE, NO_SCOPE),
        ("403 No", b'{"error": "insufficient_scope"}', NO_SCOPE, SCOPE, NO_SCOPE),
        ("403 Forbidden", b'{"message": "Account suspended"}', "Account suspended", CHECK, ""),
        ("500 Server Error", b"{}", NO_REASON, CHECK, ""),
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


def test_only_a_403_gives_its_reason_in_plain_text(server: OddServer) -> None:
    """As one of sipgate's API does. Other plain text may contain what the server received."""
    text = b"This endpoint requires a sipgate Classic PBX Account.\n"
    for status in ("403 Forbidden", "500 Server Error"):
        server.answers[f"/{status[:3]}"] = [answer(text, "Content-Type: text/plain", status=status)]
    error = failure(f"http://{server.host}/403", account_at)
    assert error.what.endswith(" got 403 Forbidden: " + text.decode()[:-2])
    assert (error.advice, error.error) == (CHECK + ".", "")
    assert failure(f"http://{server.host}/500").what.endswith(NOT_JSON)


def test_a_traceback_of_the_error_shows_nothing_that_the_error_leaves_out() -> None:
    error = failure("http://127.0.0.1:1/a?api_key=sAAAAAAA")
    assert "sAAAAAAA" not in "".join(traceback.format_exception(error))


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


@pytest.mark.parametrize(
    ("response", "account"),
    [
        (json_answer({}), {}),
        (json_answer([]), []),
        (answer(b"", status="204 No Content"), None),  # as after a message that the API has sent
    ],
)
def test_an_account_may_be_any_object_or_list_or_nothing(
    server: OddServer, response: bytes, account: Any
) -> None:
    server.answers["/a"] = [response]
    with requests.Session() as session:
        assert account_at(session, f"http://{server.host}/a") == account


@pytest.mark.parametrize(
    "response",
    [
        {"token_type": "Bearer", "access_token": 7},
        {"access_token": "a"},
        {"access_token": "a", "token_type": "MAC"},
        [TOKENS],
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


@pytest.mark.parametrize("tokens", [{}, {"refresh_token": ""}])
def test_without_a_refresh_token_nothing_is_sent(server: OddServer, tokens: Any) -> None:
    with requests.Session() as session, pytest.raises(LoginError) as caught:
        refresh_tokens(session, server.environment, tokens)
    assert f"{server.host} sent no refresh token" in caught.value.what
    assert caught.value.error == "invalid_grant"
    assert "offline_access" in caught.value.advice
    assert "?prompt=consent" in caught.value.advice
    assert server.requests == []
