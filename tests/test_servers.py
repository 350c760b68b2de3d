"""What goes to the servers, and that each fault of theirs or of the network is one clear error."""

import gzip
import json
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest
import trustme
from odd_server import NEW_TOKENS, STEPS, TOKENS, OddServer, answer, failed_login, json_answer
from script import Script, clean_environment

from sipgate_oauth import KEYS, LoginError, Session, exchange_code, get_account, refresh_tokens

Start = Callable[..., Script]
ENDPOINTS = ["TOKEN_URL", "TEST_API_ENDPOINT"]
NOWHERE = "sipgate.invalid"  # the names under .invalid never exist: RFC 6761


def environment_of(variables: dict[str, str]) -> Any:
    """In a `with` block: show requests these variables, and nothing of the machine's own."""
    return patch.dict(os.environ, {**clean_environment(Path("nowhere")), **variables}, clear=True)


def four_requests(server: OddServer, **variables: str) -> dict[str, Any]:
    """Send the requests of a login, and return the last tokens."""
    config, account = server.environment, server.environment["TEST_API_ENDPOINT"]
    with environment_of(variables), Session(show_tokens=False) as session:
        tokens = exchange_code(session, config, "code", "verifier")
        get_account(session, account, tokens["access_token"])
        tokens = refresh_tokens(session, config, tokens)
        get_account(session, account, tokens["access_token"])
    return tokens


def ask(session: Session, key: str, url: str) -> None:
    """Send to the URL what one of the ENDPOINTS is asked."""
    if key == "TOKEN_URL":
        exchange_code(session, dict.fromkeys(KEYS, url), "code", "verifier")
    else:
        get_account(session, url, "access-token")


def failure(url: str, key: str = "TOKEN_URL", **variables: str) -> tuple[str, str]:
    """Send a request that fails, and return what happened at the host, and what to do about it."""
    with environment_of(variables), Session(False) as session, pytest.raises(LoginError) as caught:
        ask(session, key, url)
    what, to_do = caught.value.args
    assert urlsplit(url).netloc in what
    return what, to_do


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


def test_an_answer_is_shown_whatever_its_shape(server: OddServer, capsys: Any) -> None:
    said = {"message": "Nö", "errors": [{"id_token": None}]}
    server.answers["/token"] = [json_answer(said, "400 No"), answer(b"<p>Hello</p>")]
    shown = json.dumps(said, indent=2, ensure_ascii=False)
    for end in (f"\n   400 No\n{shown}\n", "\n   200 OK\n   (12 bytes that are no JSON)\n"):
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
        what, to_do = failure(server.environment["TOKEN_URL"], REQUESTS_CA_BUNDLE=trusted)
        assert bundle or "certificate verify failed" in what
        assert "REQUESTS_CA_BUNDLE" in to_do
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
    what, to_do = failure(f"https://{NOWHERE}/token", **{variable: url})
    assert len(what) < 300
    assert variable in to_do
    assert "pAss" not in what + to_do


@pytest.mark.parametrize("key", ENDPOINTS)
def test_a_server_that_cannot_be_reached_is_an_error(server: OddServer, key: str) -> None:
    assert "refused" in failure("http://127.0.0.1:1", key)[0]
    failure(f"https://{server.host}", key)  # has no TLS
    assert f"Check {key} and the network" in failure(f"https://{NOWHERE}", key)[1]


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
    **{repr(content): json_answer(content) for content in ([TOKENS], None, "error", 200)},
    **{status: answer(GOOD, "Location: /odd", status=status) for status in STATUSES},
}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_an_odd_answer_is_an_error_and_nothing_more_is_asked(server: OddServer, odd: str) -> None:
    server.answers.update(dict.fromkeys(["/token", "/account"], [ODD_ANSWERS[odd]]))
    for key in ENDPOINTS:
        assert f"Check {key}" in failure(server.environment[key], key)[1]
    assert len(server.requests) == 2


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


@pytest.mark.parametrize(
    "odd",
    [
        {"access_token": "a"},
        {"token_type": "Bearer"},
        *({**TOKENS, "access_token": value} for value in (None, "", 7, ["a"], {"a": 1})),
        *({**TOKENS, "access_token": f"pAss{end}"} for end in ("\nX: 1", "東", "\ud800")),
        *({**TOKENS, "token_type": value} for value in (None, "MAC", "Bearer ", ["Bearer"])),
    ],
)
def test_an_access_token_that_cannot_be_used_is_an_error(server: OddServer, odd: Any) -> None:
    for before in ([], [json_answer(TOKENS)]):
        server.answers["/token"] = [*before, json_answer(odd)]
        with pytest.raises(LoginError, match=" sent no bearer token|: [IU]") as caught:
            four_requests(server)
        assert "Check T" in caught.value.args[1]
        assert "pAss" not in str(caught.value)


@pytest.mark.parametrize("odd", [{}, {"refresh_token": None}, {"refresh_token": ""}])
def test_the_old_refresh_token_stays_unless_there_is_a_new_one(server: OddServer, odd: Any) -> None:
    said = {"access_token": "new", "token_type": "Bearer", **odd}
    server.answers["/token"] = [json_answer(TOKENS), json_answer(said)]
    assert four_requests(server) == {**said, "refresh_token": TOKENS["refresh_token"]}
    with pytest.raises(LoginError, match=f"{server.host} sent no refresh token"):
        four_requests(server)  # by now, the first answer has none either
    assert server.requests[-1].target == "/account"


@pytest.mark.parametrize(
    "case",
    [
        ("TOKEN_URL", "403 Forbidden", "access_denied", "allow"),
        ("TOKEN_URL", "401 Unauthorized", "invalid_client", "CLIENT_SECRET"),
        ("TOKEN_URL", "400 Bad Request", "unauthorized_client", "CLIENT_SECRET"),
        ("TOKEN_URL", "400 Bad Request", "invalid_grant", "expired"),
        ("TOKEN_URL", "200 OK", "invalid_scope", "OAUTH_SCOPE"),
        ("TOKEN_URL", "401 Unauthorized", "odd", "TOKEN_URL"),
        ("TEST_API_ENDPOINT", "401 Unauthorized", "invalid_client", "OAUTH_SCOPE"),
        ("TEST_API_ENDPOINT", "403 Forbidden", "odd", "OAUTH_SCOPE"),
    ],
)
def test_the_advice_fits_the_error(server: OddServer, case: tuple[str, str, str, str]) -> None:
    key, status, error, advice = case
    said = json_answer({"error": error, "error_description": "Told: by the server."}, status)
    server.answers.update({"/token": [said], "/account": [said]})
    what, to_do = failure(server.environment[key], key)
    assert what.endswith(f" answered {status}: {error}: Told: by the server")
    assert advice in to_do


CONTROLS = "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
HARMFUL = CONTROLS + "\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff\udfff\ud800"


def test_text_of_a_server_can_not_steer_a_terminal(server: OddServer, start: Start) -> None:
    odd, reason = f"<{HARMFUL}>", f"<{CONTROLS}>".replace("\n", "").encode("latin-1")
    refusal = json_answer({"error": odd, "error_description": "long " * 10_000}, "400 reason")
    server.answer_at("code for tokens", json_answer({**TOKENS, odd: odd}))
    server.answer_at("account", json_answer({odd: [odd]}))
    server.answer_at("refresh", refusal.replace(b"reason", reason))
    script = start(**server.environment)
    what, _ = failed_login(script, server).splitlines()
    assert what.count("<") == what.count(">") == 2
    assert len(what) < 2000
    assert set(HARMFUL) & set(script.stdout + script.stderr) == {"\n"}
