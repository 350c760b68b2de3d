"""What goes to the servers, and that each fault of theirs or of the network is one clear error."""

import gzip
import json
import os
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

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
)

Start = Callable[..., Script]
ENDPOINTS = ["TOKEN_URL", "TEST_API_ENDPOINT"]
NOWHERE = "sipgate.invalid"  # the names under .invalid never exist: RFC 6761


def environment_of(variables: dict[str, str]) -> Any:
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


def ask(session: requests.Session, key: str, url: str) -> Any:
    """Send to the URL what one of the ENDPOINTS is asked, and return what comes back."""
    config = dict.fromkeys(KEYS, url)
    if key == "TOKEN_URL":
        return exchange_code(session, config, "code", "verifier")
    return get_account(session, config, "access-token")


def failure(url: str, key: str = "TOKEN_URL", **variables: str) -> LoginError:
    """Send a request that fails, and return the error, which names the host."""
    session = PrintingSession(show_tokens=False)
    with environment_of(variables), session, pytest.raises(LoginError) as caught:
        ask(session, key, url)
    assert urlsplit(url).netloc in caught.value.what
    return caught.value


def test_four_requests_share_one_connection_and_ask_for_json(server: OddServer) -> None:
    assert four_requests(server) == NEW_TOKENS
    sent = [request.form.get("grant_type", request.method) for request in server.requests]
    assert sent == ["authorization_code", "GET", "refresh_token", "GET"]
    assert {request.headers["Accept"] for request in server.requests} == {"application/json"}
    assert not any("client_id" in request.headers for request in server.requests)
    assert server.connections == 1


def test_a_password_in_netrc_replaces_no_token(server: OddServer, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("default login somebody password of-netrc\n")
    four_requests(server, NETRC=str(tmp_path / "netrc"))
    sent = [request.headers["Authorization"] for request in server.requests]
    assert sent == [None, "Bearer aCCCCCCC-access-token", None, "Bearer aEEEEEEE-new"]


def test_the_steps_print_nothing(server: OddServer, capsys: Any) -> None:
    four_requests(server)
    assert capsys.readouterr() == ("", "")


def test_an_answer_is_shown_whatever_its_shape(server: OddServer, capsys: Any) -> None:
    said = {"message": "Nö", "errors": [{"id_token": None}]}
    server.answers["/token"] = [json_answer(said, "400 No"), answer(b"<p>Hello</p>")]
    shown = json.dumps(said, indent=2, ensure_ascii=False)
    for end in (f"\n   400 No\n{shown}\n", "\n   200 OK\n   (12 bytes that are not JSON)\n"):
        failure(server.environment["TOKEN_URL"])
        assert capsys.readouterr().out.endswith(end)


CA = trustme.CA()  # a certificate authority that no machine knows


def tls_server(host: str, name: str | None = None, not_after: Any = None) -> OddServer:
    """A server with this host in its URLs; name, not_after: what is odd about its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert(name or host, not_after=not_after).configure_cert(context)
    return OddServer(context, host)


@pytest.mark.parametrize(
    ("odd", "bundle"),
    [
        ({"not_after": datetime(2001, 1, 1)}, None),
        ({"name": NOWHERE}, None),
        ({}, ""),
        ({}, "missing.pem"),
        ({}, __file__),
    ],
)
def test_a_certificate_that_proves_nothing_is_an_error(odd: Any, bundle: str | None) -> None:
    with CA.cert_pem.tempfile() as known, tls_server("127.0.0.1", **odd) as server:
        trusted = known if bundle is None else bundle
        error = failure(server.environment["TOKEN_URL"], REQUESTS_CA_BUNDLE=trusted)
        assert bundle or "certificate verify failed" in error.what
        assert "REQUESTS_CA_BUNDLE" in error.advice
        assert server.requests == []


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
    server.answers[f"{NOWHERE}:443"] = [answer(b"", status="407 Password " + "please " * 99)]
    variable, _, url = proxy.format(server=server).partition("=")
    error = failure(f"https://{NOWHERE}/token", **{variable: url})
    assert len(error.what) < 300
    assert variable in error.advice
    assert "pAss" not in error.what + error.advice


def test_a_key_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    error = failure(f"https://{NOWHERE}/token", SSLKEYLOGFILE=str(tmp_path / "missing" / "keys"))
    assert "SSLKEYLOGFILE" in error.advice


@pytest.mark.parametrize("key", ENDPOINTS)
def test_a_server_that_cannot_be_reached_is_an_error(server: OddServer, key: str) -> None:
    assert "refused" in failure("http://127.0.0.1:1", key).what
    failure(f"https://{server.host}", key)  # has no TLS
    advice = failure(f"https://{NOWHERE}", key).advice
    assert advice.startswith(f"Try again. If this happens again, check {key} and the network")


def reset(request: Any) -> bytes:
    """Break the connection off, as a firewall does."""
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()
    return b""


GOOD = json.dumps(TOKENS).encode()
CHUNKED = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
STATUSES = ("301 A", "302 B", "303 C", "307 D", "308 E", "404 Not Found", "500 F", "599")
ODD_ANSWERS: dict[str, Any] = {
    "nothing": b"",
    "an empty body": answer(b""),
    "reset": reset,
    "an SSH server": b"SSH-2.0-OpenSSH_9.9\r\n",
    "a header of 100 kB": answer(GOOD, f"X-Odd: {'x' * 100_000}"),
    "ends early": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + GOOD,
    "broken chunks": CHUNKED + b"a lot\r\n{}\r\n0\r\n\r\n",
    "no gzip": answer(GOOD, "Content-Encoding: gzip"),
    "HTML": answer(b"<!DOCTYPE html><title>Log in to the Wi-Fi</title>"),
    "half of it": answer(GOOD[:-9]),
    "not UTF-8": answer(b'{"access_token": "\xff\xfe"}'),
    "a hundred thousand lists": answer(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    **{status: f"HTTP/1.1 {status} No\r\n\r\n".encode() for status in ("204", "304", "429")},
    "an error in a success": json_answer({**TOKENS, "error": "server_error"}),
    "an error that is a list": json_answer({"error": ["a"], "error_description": {}}, "400 No"),
    **{f"JSON: {content!r}": json_answer(content) for content in (None, "error", 200)},
    **{status: answer(GOOD, "Location: /odd?code=xyz", status=status) for status in STATUSES},
}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_an_odd_answer_is_an_error_and_nothing_more_is_asked(server: OddServer, odd: str) -> None:
    server.answers.update(dict.fromkeys(["/token", "/account"], [ODD_ANSWERS[odd]]))
    for key in ENDPOINTS:
        assert f"heck {key}" in failure(server.environment[key], key).advice
    assert len(server.requests) == 2


# How a server explains an error, and what is told: the response, what happened, and the advice.
EXPLAINED_ERRORS = {
    "in a redirect": (
        answer(b"", "Location: /token/?code=xyz", status="301 Moved Permanently"),
        "   301 Moved Permanently\n      Location: /token/\n   (empty)\n",
        "301 Moved Permanently: redirects are not followed",
        "Check",
    ),
    "in a header": (
        answer(b"", 'WWW-Authenticate: Bearer error="insufficient_scope"', status="403 Forbidden"),
        '      WWW-Authenticate: Bearer error="insufficient_scope"\n',
        "403 Forbidden: insufficient_scope",
        "Check OAUTH_SCOPE",
    ),
    "in a header, beside a web page": (
        answer(b"<h1>No", 'WWW-Authenticate: Bearer error="invalid_token"', status="401 No"),
        "   401 No\n",
        "401 No: invalid_token",
        "The access token has expired",
    ),
    "in a message": (
        json_answer({"message": "token is required"}, "400 Bad Request"),
        '  "message": "token is required"\n',
        "400 Bad Request: token is required",
        "Check",
    ),
    "with a web page": (
        answer(b"<h1>Blocked</h1>", status="403 Forbidden"),
        "   403 Forbidden\n   (16 bytes that are not JSON)\n",
        "403 Forbidden: the response is not JSON",
        "Check",
    ),
    "without a reason phrase": (
        json_answer({"error": "invalid_request"}, "400 "),
        "   400 Bad Request\n",
        "400 Bad Request: invalid_request",
        "Check",
    ),
    "with an unknown status and no phrase": (
        answer(b"", status="599 "),
        "   599\n   (empty)\n",
        "599: the response gives no reason",
        "Check",
    ),
    "with an endless phrase": (
        answer(b"", status="500 " + "x" * 60_000),
        f"   500 {'x' * 100}\n",
        f"500 {'x' * 100}: the response gives no reason",
        "Check",
    ),
}


@pytest.mark.parametrize("how", EXPLAINED_ERRORS)
@pytest.mark.parametrize("key", ENDPOINTS)
def test_an_error_is_told_as_the_server_explains_it(
    server: OddServer, capsys: Any, key: str, how: str
) -> None:
    said, shown, told, advice = EXPLAINED_ERRORS[how]
    server.answers.update(dict.fromkeys(["/token", "/account"], [said]))
    error = failure(server.environment[key], key)
    assert shown in capsys.readouterr().out
    assert f" responded with {told}" in error.what
    assert error.advice.startswith(advice)
    assert "xyz" not in error.what


def test_an_endless_header_of_words_is_no_trouble(server: OddServer) -> None:
    header = f"WWW-Authenticate: {'x' * 60_000}"
    server.answers["/token"] = [answer(b"", header, status="401 Unauthorized")]
    began = time.monotonic()
    failure(server.environment["TOKEN_URL"])
    assert time.monotonic() - began < 5  # seconds; with a careless pattern, it takes 20


def test_a_failure_after_another_error_has_its_own_reason(server: OddServer) -> None:
    """As when a program asks again with a new token."""
    server.answers["/account"] = [json_answer({}, "401 Unauthorized")]
    told = ""
    try:
        ask(requests.Session(), "TEST_API_ENDPOINT", server.environment["TEST_API_ENDPOINT"])
    except LoginError:
        told = failure("http://127.0.0.1:1", "TEST_API_ENDPOINT").what
    assert "refused" in told


def test_an_error_is_a_sentence_for_those_who_print_it() -> None:
    assert str(LoginError("It failed", "Start again.")) == "It failed. Start again."


def test_a_wrong_realm_is_suggested_if_token_url_does_not_work(server: OddServer) -> None:
    said = json_answer({"error": "Realm does not exist"}, "404 Not Found")
    server.answers["/token"] = [said, ODD_ANSWERS["HTML"]]
    for _ in range(2):
        advice = failure(server.environment["TOKEN_URL"]).advice
        assert "realm" in advice
        assert "AUTH_URL" in advice


@pytest.mark.parametrize("odd", ["reset", "HTML", "307 D", "an error that is a list"])
@pytest.mark.parametrize("step", STEPS)
def test_each_step_ends_in_one_error(server: OddServer, start: Start, step: str, odd: str) -> None:
    server.answer_at(step, ODD_ANSWERS[odd])
    assert server.host in failed_login(start(**server.environment), server)
    assert len(server.requests) == [*STEPS].index(step) + 1


def test_a_server_that_never_answers_is_given_up_after_10_seconds(server: OddServer) -> None:
    # The other side has nothing more to send, so this returns when it has given up.
    server.answers["/token"] = [lambda request: request.connection.recv(1)]
    with pytest.raises(LoginError, match="timed out") as caught:
        four_requests(server)
    assert "timeout=10)" in str(caught.value.__cause__)


UNUSUAL_ANSWERS = {
    "201": answer(GOOD, status="201 Created"),
    "299": answer(GOOD, status="299 Odd"),
    **{f"error {error!r}": json_answer({**TOKENS, "error": error}) for error in (None, "")},
    "100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" + json_answer(TOKENS),
    "a byte order mark": answer(b"\xef\xbb\xbf" + GOOD),
    "gzip": answer(gzip.compress(GOOD), "Content-Encoding: gzip"),
    "chunks": CHUNKED + b"%x;odd=1\r\n%s\r\n0\r\nX-Odd: 1\r\n\r\n" % (len(GOOD), GOOD),
    "the end of the connection": b"HTTP/1.0 200 OK\r\n\r\n" + GOOD,
    "odd headers": answer(GOOD, "Content-Type: a/b; charset=klingon", "Set-Cookie: ;;=\x01;"),
    "odd members": json_answer({**TOKENS, "scope": None, "": [float("nan"), "\ud800"]}),
    "upper case": json_answer({**TOKENS, "token_type": "BEARER"}),
}


@pytest.mark.parametrize("odd", UNUSUAL_ANSWERS)
def test_an_unusual_answer_is_good_enough(server: OddServer, odd: str) -> None:
    server.answers.update(dict.fromkeys(["/token", "/account"], [UNUSUAL_ANSWERS[odd]]))
    assert four_requests(server)["access_token"] == TOKENS["access_token"]


@pytest.mark.parametrize("content", [{}, [], [{"id": 1}], {"error": None}])
def test_an_api_may_answer_with_any_object_or_list(server: OddServer, content: Any) -> None:
    server.answers["/account"] = [json_answer(content)]
    with requests.Session() as session:
        assert get_account(session, server.environment, "access-token") == content


# What is odd about tokens, and the error.
UNUSABLE_TOKENS: dict[str, tuple[Any, str]] = {
    "no access token": ({"token_type": "Bearer"}, "sent no access_token"),
    "an access token that is null": ({**TOKENS, "access_token": None}, "sent no access_token"),
    "an empty access token": ({**TOKENS, "access_token": ""}, "sent no access_token"),
    "a number": ({**TOKENS, "access_token": 7}, "sent no access_token"),
    "a list": ({**TOKENS, "access_token": ["a"]}, "sent no access_token"),
    "an object": ({**TOKENS, "access_token": {"a": 1}}, "sent no access_token"),
    "a list of tokens": ([TOKENS], "sent no access_token"),
    "no type": ({"access_token": "a"}, "sent no token_type"),
    "a type that is null": ({**TOKENS, "token_type": None}, "sent no token_type"),
    "a type that is a list": ({**TOKENS, "token_type": ["Bearer"]}, "sent no token_type"),
    "another type": ({**TOKENS, "token_type": "MAC"}, "sent a token that is not a bearer token"),
    "a type with a space": (
        {**TOKENS, "token_type": "Bearer "},
        "sent a token that is not a bearer token",
    ),
    "a line break": ({**TOKENS, "access_token": "pAss\nX: 1"}, "InvalidHeader"),
    "letters that are not Latin": ({**TOKENS, "access_token": "pAss東"}, "UnicodeEncodeError"),
    "a surrogate": ({**TOKENS, "access_token": "pAss\ud800"}, "UnicodeEncodeError"),
}


@pytest.mark.parametrize("odd", UNUSABLE_TOKENS)
@pytest.mark.parametrize("before", [[], [json_answer(TOKENS)]], ids=["first", "refreshed"])
def test_an_access_token_that_cannot_be_used_is_an_error(
    server: OddServer, odd: str, before: Any
) -> None:
    tokens, told = UNUSABLE_TOKENS[odd]
    server.answers["/token"] = [*before, json_answer(tokens)]
    with pytest.raises(LoginError) as caught:
        four_requests(server)
    assert told in caught.value.what
    assert "heck T" in caught.value.advice
    assert "pAss" not in caught.value.what + caught.value.advice


@pytest.mark.parametrize("odd", [{}, {"refresh_token": None}, {"refresh_token": ""}])
def test_the_old_refresh_token_stays_unless_there_is_a_new_one(server: OddServer, odd: Any) -> None:
    said = {"access_token": "new", "token_type": "Bearer", **odd}
    server.answers["/token"] = [json_answer(TOKENS), json_answer(said)]
    assert four_requests(server) == {**said, "refresh_token": TOKENS["refresh_token"]}
    with pytest.raises(LoginError, match=f"{server.host} sent no refresh token"):
        four_requests(server)  # by now, the first answer has none either
    assert server.requests[-1].target == "/account"


# Where an error was sent, its status and code, and a word of the advice.
ADVICE = [
    ("TOKEN_URL", "403 Forbidden", "access_denied", "allow"),
    ("TOKEN_URL", "401 Unauthorized", "invalid_client", "CLIENT_SECRET"),
    ("TOKEN_URL", "401 Unauthorized", "invalid_client", "in a header"),
    ("TOKEN_URL", "400 Bad Request", "unauthorized_client", "CLIENT_SECRET"),
    ("TOKEN_URL", "400 Bad Request", "unauthorized_client", "in a header"),
    ("TOKEN_URL", "400 Bad Request", "invalid_grant", "expired"),
    ("TOKEN_URL", "200 OK", "invalid_scope", "OAUTH_SCOPE"),
    ("TOKEN_URL", "401 Unauthorized", "odd", "TOKEN_URL"),
    ("TOKEN_URL", "403 Forbidden", "odd", "TOKEN_URL"),
    ("TEST_API_ENDPOINT", "401 Unauthorized", "invalid_client", "expired, was revoked"),
    ("TEST_API_ENDPOINT", "403 Forbidden", "odd", "OAUTH_SCOPE"),
]


@pytest.mark.parametrize(("key", "status", "code", "advice"), ADVICE)
def test_the_advice_fits_the_error(
    server: OddServer, key: str, status: str, code: str, advice: str
) -> None:
    said = json_answer({"error": code, "error_description": "Told: by the server."}, status)
    server.answers.update({"/token": [said], "/account": [said]})
    error = failure(server.environment[key], key)
    assert error.what.endswith(f" responded with {status}: {code}: Told: by the server")
    assert advice in error.advice
    assert "sipgate's" not in error.advice


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        ("TOKEN_URL", "400 Bad Request", "invalid_grant"),
        ("TEST_API_ENDPOINT", "401 Unauthorized", "invalid_token"),
        ("TEST_API_ENDPOINT", "403 Forbidden", "insufficient_scope"),
        ("TEST_API_ENDPOINT", "500 Internal Server Error", ""),
    ],
)
def test_an_error_has_the_code_that_a_program_decides_by(
    server: OddServer, key: str, status: str, code: str
) -> None:
    content = {"error": code} if key == "TOKEN_URL" else {}
    server.answers.update(dict.fromkeys(["/token", "/account"], [json_answer(content, status)]))
    assert failure(server.environment[key], key).error == code


CONTROLS = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
HARMFUL = CONTROLS + "\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff\udfff\ud800"


def test_text_of_a_server_can_not_steer_a_terminal(server: OddServer, start: Start) -> None:
    odd, reason = f"<{HARMFUL}>", f"<{CONTROLS}>".replace("\n", "").encode("latin-1")
    refusal = json_answer({"error": odd, "error_description": "long " * 10_000}, "400 reason")
    server.answer_at("code for tokens", json_answer({**TOKENS, odd: odd}))
    server.answer_at("account", json_answer({odd: [odd]}))
    server.answer_at("refresh", refusal.replace(b"reason", reason))
    script = start(**server.environment)
    what = failed_login(script, server).splitlines()[0]
    assert what.count("<") == what.count(">") == 2
    assert len(what) < 2000
    assert set(HARMFUL) & set(script.stdout + script.stderr) == {"\n"}
