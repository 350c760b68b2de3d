"""What leaves the script, and that each fault of a server or of the network is one clear error."""

import functools
import gzip
import json
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import trustme
from odd_server import (
    STEPS,
    TOKENS,
    Answer,
    OddServer,
    Request,
    answer,
    failed_login,
    json_answer,
    log_in,
)
from script import PATIENCE, Script, free_port

from sipgate_oauth import in_words

Start = Callable[..., Script]
SURELY_NOWHERE = "sipgate.invalid"  # the names under .invalid never exist: RFC 6761


@pytest.fixture
def server() -> Iterator[OddServer]:
    with OddServer() as running:
        yield running


@pytest.fixture
def other_server() -> Iterator[OddServer]:
    with OddServer() as running:
        yield running


def key_at(step: str) -> str:
    """The configuration key that names the server of one of the STEPS."""
    return "TOKEN_URL" if STEPS[step][0] == "/token" else "TEST_API_ENDPOINT"


def each(cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test with the values; the keys say what they are."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


# --- Where the requests go, and with what --------------------------------------------------------


@pytest.mark.parametrize("step", ["code for tokens", "account"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(
    server: OddServer, other_server: OddServer, start: Start, step: str, status: int
) -> None:
    path, _ = STEPS[step]
    there = f"Location: http://{other_server.host}{path}"
    server.answer_at(step, answer(b"", there, status=f"{status} Elsewhere"))
    error = failed_login(start(**server.environment), server)
    assert server.host in error
    assert str(status) in error
    assert key_at(step) in error
    assert other_server.connections == 0


@each({"the host": "machine 127.0.0.1", "all hosts": "default"})
@pytest.mark.parametrize("variable", ["HOME", "NETRC"])
def test_a_password_in_netrc_replaces_no_token(
    server: OddServer, start: Start, tmp_path: Path, variable: str, case: str
) -> None:
    file = tmp_path / (".netrc" if variable == "HOME" else "passwords")
    file.write_text(f"{case} login somebody password of-netrc\n")
    named = {"NETRC": str(file)} if variable == "NETRC" else {}
    script = start(**server.environment, **named)
    log_in(script, server)
    assert script.status() == 0
    sent = [(request.target, request.headers["Authorization"]) for request in server.requests]
    assert sent == [
        ("/token", None),
        ("/account", "Bearer aCCCCCCC-access-token"),
        ("/token", None),
        ("/account", "Bearer aEEEEEEE-new"),
    ]


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("AUTH_URL", "http://sipgate.invalid/auth"),
        ("TEST_API_ENDPOINT", "http://sipgate.invalid/v2/account"),
        ("TOKEN_URL", "http://sipgate.invalid/token"),
        ("TOKEN_URL", "http://localhost.sipgate.invalid/token"),
        ("TOKEN_URL", "http://127.0.0.1.sipgate.invalid/token"),
        ("TOKEN_URL", "http://0.0.0.0:{port}/token"),
        ("TOKEN_URL", "http://127.1:{port}/token"),
        ("TOKEN_URL", "http://somebody@127.0.0.1:{port}/token"),
        ("TOKEN_URL", "ftp://127.0.0.1:{port}/token"),
    ],
)
def test_only_loopback_may_do_without_tls(
    server: OddServer, start: Start, key: str, url: str
) -> None:
    url = url.format(port=server.server_address[1])
    script = start(**{**server.environment, key: url})
    assert script.status() == 2
    assert f"{key} should" in script.stderr
    assert "https" in script.stderr
    assert script.stdout == ""
    assert server.connections == 0


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_secret_in_clear_text_goes_to_no_proxy(
    server: OddServer, other_server: OddServer, start: Start, variable: str
) -> None:
    script = start(**server.environment, **{variable: f"http://{other_server.host}"})
    log_in(script, server)
    assert script.status() == 0
    assert other_server.connections == 0


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """A certificate authority that no machine knows."""
    return trustme.CA()


def tls_server(ca: trustme.CA, host: str = "127.0.0.1", **certificate: Any) -> OddServer:
    """A server behind TLS; certificate: what is odd about it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(certificate.pop("name", host), **certificate).configure_cert(context)
    return OddServer(context, host)


@pytest.fixture
def ca_bundle(ca: trustme.CA, tmp_path: Path) -> dict[str, str]:
    """The environment that makes the script know the certificate authority."""
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return {"REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem")}


def test_the_environment_can_name_the_authority_of_a_certificate(
    ca: trustme.CA, ca_bundle: dict[str, str], start: Start
) -> None:
    with tls_server(ca) as server:
        script = start(**server.environment, **ca_bundle)
        log_in(script, server)
        assert script.status() == 0
        assert len(server.requests) == 4


NOW = datetime.now(timezone.utc)


@each(
    {
        "expired": {"not_after": NOW - timedelta(days=1)},
        "not yet valid": {"not_before": NOW + timedelta(days=1)},
        "for another name": {"name": "sipgate.invalid"},
        "for another address": {"name": "127.0.0.2"},
    }
)
def test_a_certificate_that_does_not_fit_is_an_error(
    ca: trustme.CA, ca_bundle: dict[str, str], start: Start, case: dict[str, Any]
) -> None:
    with tls_server(ca, **case) as server:
        error = failed_login(start(**server.environment, **ca_bundle), server)
        assert "certificate" in error.partition("\n")[0]
        assert server.host in error
        assert "TOKEN_URL" in error
        assert server.requests == []


def test_an_unknown_authority_at_the_account_is_an_error(
    ca: trustme.CA, server: OddServer, start: Start
) -> None:
    with tls_server(ca) as api:
        endpoint = api.environment["TEST_API_ENDPOINT"]
        error = failed_login(start(**{**server.environment, "TEST_API_ENDPOINT": endpoint}), server)
        assert api.host in error
        assert "TEST_API_ENDPOINT" in error
        assert "REQUESTS_CA_BUNDLE" in error
        assert api.requests == []


@each(
    {
        "nothing": {},
        "an empty bundle": {"REQUESTS_CA_BUNDLE": "", "CURL_CA_BUNDLE": ""},
        "Python's switch": {"PYTHONHTTPSVERIFY": "0"},
    }
)
def test_nothing_switches_the_verification_off(
    ca: trustme.CA, start: Start, case: dict[str, str]
) -> None:
    with tls_server(ca) as server:
        error = failed_login(start(**server.environment, **case), server)
        what, _, to_do = error.partition("\n")
        assert "certificate verify failed" in what
        assert server.host in what
        assert "TOKEN_URL" in to_do
        assert "REQUESTS_CA_BUNDLE" in to_do
        assert "certificate" in to_do
        assert server.requests == []


@each({"missing": None, "empty": "", "no certificate": "just text\n"})
def test_an_authority_that_cannot_be_read_is_an_error(
    ca: trustme.CA, start: Start, tmp_path: Path, case: str | None
) -> None:
    bundle = tmp_path / "bundle.pem"
    if case is not None:
        bundle.write_text(case)
    with tls_server(ca) as server:
        script = start(**server.environment, REQUESTS_CA_BUNDLE=str(bundle))
        error = failed_login(script, server)
        assert server.host in error
        assert "REQUESTS_CA_BUNDLE" in error
        assert server.requests == []


def test_a_server_without_tls_behind_https_is_an_error(server: OddServer, start: Start) -> None:
    url = f"https://{server.host}/token"
    error = failed_login(start(**{**server.environment, "TOKEN_URL": url}), server)
    assert server.host in error
    assert "TOKEN_URL" in error
    assert server.requests == []


def test_a_server_with_tls_behind_http_is_an_error(ca: trustme.CA, start: Start) -> None:
    with tls_server(ca) as server:
        url = f"http://{server.host}/token"
        error = failed_login(start(**{**server.environment, "TOKEN_URL": url}), server)
        assert server.host in error
        assert "TOKEN_URL" in error


# --- Proxies -------------------------------------------------------------------------------------


def tunnel_to(port: int, request: Request) -> bytes:
    """Do what a proxy does for CONNECT, but connect to a port of this machine."""
    with socket.create_connection(("127.0.0.1", port)) as upstream:
        request.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=pump, args=[upstream, request.connection])
        back.start()
        pump(request.connection, upstream)
        back.join(PATIENCE)
    return b""


def pump(source: socket.socket, target: socket.socket) -> None:
    """Send on all that comes in."""
    with suppress(OSError):
        while block := source.recv(65536):
            target.sendall(block)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_carries_the_login(
    ca: trustme.CA, ca_bundle: dict[str, str], start: Start, variable: str
) -> None:
    with tls_server(ca, SURELY_NOWHERE) as server, OddServer() as proxy:
        proxy.answers[server.host] = [functools.partial(tunnel_to, server.server_address[1])]
        script = start(**server.environment, **ca_bundle, **{variable: f"http://{proxy.host}"})
        log_in(script, server)
        assert script.status() == 0
        assert {request.method for request in proxy.requests} == {"CONNECT"}
        assert len(server.requests) == 4


def through(proxy: str, server: OddServer) -> dict[str, str]:
    """The environment for a token endpoint that only the proxy could reach."""
    token_url = f"https://{SURELY_NOWHERE}/token"
    return {**server.environment, "TOKEN_URL": token_url, "HTTPS_PROXY": proxy}


@each(
    {
        "asks for a password": answer(b"", status="407 Proxy Authentication Required"),
        "forbids it": answer(b"<p>No</p>", status="403 Forbidden"),
        "does not reach it": answer(b"", status="502 Bad Gateway"),
        "is no proxy": b"SSH-2.0-OpenSSH_9.9\r\n",
        "says nothing": b"",
    }
)
def test_a_proxy_that_refuses_is_an_error(server: OddServer, start: Start, case: bytes) -> None:
    server.answers[f"{SURELY_NOWHERE}:443"] = [case]
    script = start(**through(f"http://somebody:pAssword@{server.host}", server))
    error = failed_login(script, server)
    assert SURELY_NOWHERE in error
    assert "HTTPS_PROXY" in error
    assert "pAssword" not in error


@pytest.mark.parametrize(
    "proxy",
    [
        "http://somebody:pAssword@127.0.0.1:{free_port}",
        "http://somebody:pAssword@proxy.invalid:3128",
        "http://somebody:pAssword@",
        "http://somebody:pAssword@127.0.0.1:port",
        "gopher://somebody:pAssword@127.0.0.1",
        "socks5://somebody:pAssword@127.0.0.1",
    ],
)
def test_a_proxy_that_cannot_be_used_is_an_error(
    server: OddServer, start: Start, proxy: str
) -> None:
    script = start(**through(proxy.format(free_port=free_port()), server))
    error = failed_login(script, server)
    assert SURELY_NOWHERE in error
    assert "HTTPS_PROXY" in error
    assert "pAssword" not in error


# --- No answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["TOKEN_URL", "TEST_API_ENDPOINT"])
def test_a_name_that_does_not_resolve_is_an_error(
    server: OddServer, start: Start, key: str
) -> None:
    url = f"https://{SURELY_NOWHERE}/token"
    error = failed_login(start(**{**server.environment, key: url}), server)
    assert SURELY_NOWHERE in error
    assert key in error
    assert "network" in error


@pytest.mark.parametrize("key", ["TOKEN_URL", "TEST_API_ENDPOINT"])
def test_a_refused_connection_is_an_error(server: OddServer, start: Start, key: str) -> None:
    host = f"127.0.0.1:{free_port()}"
    error = failed_login(start(**{**server.environment, key: f"http://{host}/token"}), server)
    assert host in error
    assert key in error
    assert "network" in error


def keep_silent(request: Request) -> bytes:
    """Wait until the other side gives up."""
    request.connection.recv(1)
    return b""


def test_a_server_that_never_answers_is_an_error(server: OddServer, start: Start) -> None:
    server.answer_at("code for tokens", keep_silent)
    error = failed_login(start(**server.environment), server)
    assert server.host in error
    assert "timed out" in error
    assert "TOKEN_URL" in error


# --- Odd answers ---------------------------------------------------------------------------------


def reset(request: Request) -> bytes:
    """Break the connection off, as a firewall does."""
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()
    return b""


GOOD = json.dumps(TOKENS).encode()
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ODD_ANSWERS: dict[str, Answer] = {
    # No HTTP
    "nothing": b"",
    "reset": reset,
    "an SSH server": b"SSH-2.0-OpenSSH_9.9\r\n",
    "JSON without HTTP": b'{"odd": 1}',
    "binary": bytes(range(256)),
    "a status that is no number": b"HTTP/1.1 two hundred\r\n\r\n",
    "a version of the future": b"HTTP/9.0 200 OK\r\n\r\n",
    "the end after 100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n",
    "a thousand headers": answer(GOOD, *["X-Odd: 1"] * 1000),
    "a header of 100 kB": answer(GOOD, f"X-Odd: {'x' * 100_000}"),
    "a line between the headers": b"HTTP/1.1 200 OK\r\nno header\r\n\r\n<p>Hello</p>",
    "a redirect to nowhere": answer(b"", "Location: http://[", status="302 Found"),
    # A body that is not what the headers say
    "ends early": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + GOOD,
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "broken chunks": CHUNKED + b"a lot\r\n{}\r\n0\r\n\r\n",
    "a chunk that ends early": CHUNKED + b"999\r\n" + GOOD,
    "no last chunk": CHUNKED + b"%x\r\n%s\r\n" % (len(GOOD), GOOD),
    "no gzip": answer(GOOD, "Content-Encoding: gzip"),
    "half a gzip": answer(gzip.compress(GOOD)[:40], "Content-Encoding: gzip"),
    "no deflate": answer(GOOD, "Content-Encoding: deflate"),
    # No JSON object
    "an empty body": answer(b""),
    "HTML": answer(b"<!DOCTYPE html><title>Log in to the Wi-Fi</title>"),
    "half of it": answer(GOOD[:-9]),
    "two at once": answer(GOOD + GOOD),
    "a list": json_answer([TOKENS]),
    "null": json_answer(None),
    "a string": json_answer("error"),
    "a number": json_answer(200),
    "not a number": answer(b"NaN"),
    "not UTF-8": answer(b'{"access_token": "\xff\xfe"}'),
    "half of a UTF-16 character": answer(GOOD.decode().encode("utf-16")[:-1]),
    "a hundred thousand lists": answer(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a hundred thousand objects": answer(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "lists without an end": answer(b"[" * 100_000),
    "ten thousand digits": answer(b'{"a": ' + b"9" * 10_000 + b"}"),
    # No success
    "201": answer(GOOD, status="201 Created"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "404": answer(b"<title>Not found</title>", status="404 Not Found"),
    "429": json_answer({"message": "Slow down"}, "429 Too Many Requests"),
    "500": answer(GOOD, status="500 Internal Server Error"),
    "a status without a name": answer(GOOD, status="599"),
    "an OAuth error": json_answer({"error": "server_error"}, "400 Bad Request"),
    "an OAuth error in a success": json_answer({**TOKENS, "error": "server_error"}),
    "an error that is null": json_answer({**TOKENS, "error": None}),
    "an error that is a number": json_answer({"error": 42}, "400 Bad Request"),
    "an error that is a list": json_answer({"error": ["a"], "error_description": {}}, "400 No"),
}


ONE_OF_EACH = ["reset", "ends early", "HTML", "500"]


@pytest.mark.parametrize(
    ("step", "odd"),
    [(step, odd) for step in ("code for tokens", "account") for odd in ODD_ANSWERS]
    + [(step, odd) for step in ("refresh", "account again") for odd in ONE_OF_EACH],
)
def test_an_odd_answer_is_one_error(server: OddServer, start: Start, step: str, odd: str) -> None:
    server.answer_at(step, ODD_ANSWERS[odd])
    error = failed_login(start(**server.environment), server)
    assert server.host in error
    assert key_at(step) in error
    path, before = STEPS[step]
    assert [request.target for request in server.requests].count(path) == before + 1


@each(
    {
        "a hint before it": b"HTTP/1.1 100 Continue\r\n\r\n" + json_answer(TOKENS),
        "a byte order mark": answer(b"\xef\xbb\xbf" + GOOD),
        "gzip": answer(gzip.compress(GOOD), "Content-Encoding: gzip"),
        "chunks": b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"%x;odd=1\r\n%s\r\n0\r\nX-Odd: 1\r\n\r\n" % (len(GOOD), GOOD),
        "a body that the end of the connection ends": b"HTTP/1.0 200 OK\r\n\r\n" + GOOD,
        "an unknown charset": answer(GOOD, "Content-Type: application/json; charset=klingon"),
        "a name twice": answer(b'{"token_type": "MAC", ' + GOOD[1:]),
        "odd cookies": answer(GOOD, "Set-Cookie: a=b; Max-Age=9e999", "Set-Cookie: ;;=\x01;"),
        "more than is needed": json_answer({**TOKENS, "scope": None, "": [float("nan"), "\ud800"]}),
    }
)
def test_an_unusual_answer_is_good_enough(server: OddServer, start: Start, case: bytes) -> None:
    for step in ("code for tokens", "account"):
        server.answer_at(step, case)
    script = start(**server.environment)
    log_in(script, server)
    assert script.status() == 0
    assert script.stderr == ""


@pytest.mark.parametrize("depth", [900, 985, 990, 1200])
def test_nesting_that_python_can_just_read_shows_an_account_or_one_error(
    server: OddServer, start: Start, depth: int
) -> None:
    """How deep that is depends on the version of Python."""
    server.answer_at("account", answer(b'{"a":' + b"[" * depth + b"]" * depth + b"}"))
    script = start(**server.environment)
    log_in(script, server)
    if script.status() == 0:
        assert script.stdout.count("[") == 2 * depth
        assert script.stderr == ""
    else:
        assert script.stderr.startswith(f"Error: {server.host} ")
        assert "Traceback" not in script.stderr


# --- What the token endpoint sends ---------------------------------------------------------------


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in TOKENS.items() if key != name}


@each(
    {
        "no access token": without("access_token"),
        **{
            f"access token {value!r}": {**TOKENS, "access_token": value}
            for value in (None, "", 7, True, ["a"], {"a": 1}, "a\nb", "a\0b", "a\x7fb", "tökén")
        },
        "a lone surrogate": {**TOKENS, "access_token": "a\ud800b"},
        "no token type": without("token_type"),
        **{
            f"token type {value!r}": {**TOKENS, "token_type": value}
            for value in (None, "", "MAC", "DPoP", "Bearer ", ["Bearer"], 7)
        },
    }
)
def test_an_access_token_that_cannot_be_used_is_an_error(
    server: OddServer, start: Start, case: dict[str, Any]
) -> None:
    server.answer_at("code for tokens", json_answer(case))
    what, _, to_do = failed_login(start(**server.environment), server).partition("\n")
    assert server.host in what
    assert "token" in what
    assert "TOKEN_URL" in to_do
    assert [request.target for request in server.requests] == ["/token"]


@each({"missing": without("access_token"), "of another type": {**TOKENS, "token_type": "MAC"}})
def test_a_refreshed_access_token_that_cannot_be_used_is_an_error(
    server: OddServer, start: Start, case: dict[str, Any]
) -> None:
    server.answer_at("refresh", json_answer(case))
    error = failed_login(start(**server.environment), server)
    assert server.host in error
    assert "TOKEN_URL" in error
    assert server.requests[-1].target == "/token"


@pytest.mark.parametrize("token_type", ["bearer", "BEARER"])
def test_the_case_of_the_token_type_does_not_matter(
    server: OddServer, start: Start, token_type: str
) -> None:
    server.answer_at("code for tokens", json_answer({**TOKENS, "token_type": token_type}))
    script = start(**server.environment)
    log_in(script, server)
    assert script.status() == 0


@each(
    {
        "missing": without("refresh_token"),
        **{
            repr(value): {**TOKENS, "refresh_token": value}
            for value in (None, "", 7, ["a"], "a\nb", "tökén")
        },
    }
)
def test_without_a_refresh_token_the_account_is_shown_and_the_rest_is_an_error(
    server: OddServer, start: Start, case: dict[str, Any]
) -> None:
    server.answer_at("code for tokens", json_answer(case))
    script = start(**server.environment)
    error = failed_login(script, server)
    assert "Odd Ltd" in script.stdout
    assert server.host in error
    assert "refresh" in error
    assert [request.target for request in server.requests] == ["/token", "/account"]


@each(
    {
        "missing": without("expires_in"),
        **{
            repr(value)[:9]: {**TOKENS, "expires_in": value}
            for value in ("300", None, -1, 0, True, 1.5, [300], 10**400, -(10**400))
        },
        "no number": {**TOKENS, "expires_in": float("nan")},
        "infinite": {**TOKENS, "expires_in": float("inf")},
    }
)
def test_a_lifetime_that_makes_no_sense_is_left_out(
    server: OddServer, start: Start, case: dict[str, Any]
) -> None:
    server.answer_at("code for tokens", json_answer(case))
    script = start(**server.environment)
    log_in(script, server)
    assert script.status() == 0
    assert "valid for" not in script.stdout
    assert script.stderr == ""


def test_a_lifetime_is_shown_with_each_pair_of_tokens(server: OddServer, start: Start) -> None:
    server.answers["/token"] = [
        json_answer({**TOKENS, "expires_in": 300}),
        json_answer({**TOKENS, "expires_in": 7200}),
    ]
    script = start(**server.environment)
    log_in(script, server)
    assert script.status() == 0
    assert "valid for 5 minutes" in script.stdout
    assert "valid for 2 hours" in script.stdout


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "1 second"),
        (2, "2 seconds"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (3600, "60 minutes"),
        (7199, "119 minutes"),
        (7200, "2 hours"),
        (86400, "24 hours"),
        (172_799, "47 hours"),
        (172_800, "2 days"),
        (31_536_000, "365 days"),
    ],
)
def test_a_lifetime_in_words_has_the_largest_unit_of_which_there_are_two(
    seconds: int, words: str
) -> None:
    assert in_words(seconds) == words


# --- What to do about it -------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["code for tokens", "refresh"])
@pytest.mark.parametrize(
    ("oauth_error", "status", "advice"),
    [
        ("invalid_client", "401 Unauthorized", ["CLIENT_ID", "CLIENT_SECRET"]),
        ("unauthorized_client", "400 Bad Request", ["CLIENT_ID", "CLIENT_SECRET"]),
        ("invalid_grant", "400 Bad Request", ["used", "expired", "again"]),
        ("invalid_scope", "400 Bad Request", ["OAUTH_SCOPE"]),
        ("access_denied", "403 Forbidden", ["no", "again"]),
        ("invalid_grant", "200 OK", ["used", "expired", "again"]),
        ("temporarily_unavailable", "503 Service Unavailable", ["TOKEN_URL", "later"]),
    ],
)
def test_the_advice_fits_the_error_of_the_token_endpoint(
    server: OddServer, start: Start, step: str, oauth_error: str, status: str, advice: list[str]
) -> None:
    content = {"error": oauth_error, "error_description": "Told: by the server"}
    server.answer_at(step, json_answer(content, status))
    what, _, to_do = failed_login(start(**server.environment), server).partition("\n")
    assert f"{server.host} answered {status}" in what
    assert f"{oauth_error}: Told: by the server" in what
    for words in advice:
        assert words in to_do


@pytest.mark.parametrize(
    ("oauth_error", "advice"),
    [
        ("access_denied", ["no", "again"]),
        ("invalid_scope", ["OAUTH_SCOPE"]),
        ("unauthorized_client", ["CLIENT_ID", "CLIENT_SECRET"]),
        ("server_error", ["again"]),
    ],
)
def test_the_advice_fits_the_error_of_the_callback(
    server: OddServer, start: Start, oauth_error: str, advice: list[str]
) -> None:
    callback = f"error={oauth_error}&error_description=Told+by+the+server"
    error = failed_login(start(**server.environment), server, callback)
    what, _, to_do = error.partition("\n")
    assert f"{oauth_error}: Told by the server" in what
    for words in advice:
        assert words in to_do
    assert server.connections == 0


@pytest.mark.parametrize("step", ["account", "account again"])
@each(
    {
        "401": json_answer({"error": "invalid_token"}, "401 Unauthorized"),
        "401 as HTML": answer(b"<title>No</title>", status="401 Unauthorized"),
        "401 without a body": answer(b"", status="401 Unauthorized"),
        "403": json_answer({"error": "insufficient_scope"}, "403 Forbidden"),
        "403 of another kind": json_answer({"error": "invalid_client"}, "403 Forbidden"),
    }
)
def test_an_account_that_is_refused_leads_to_the_scope(
    server: OddServer, start: Start, step: str, case: bytes
) -> None:
    server.answer_at(step, case)
    what, _, to_do = failed_login(start(**server.environment), server).partition("\n")
    assert f"{server.host} answered 40" in what
    assert "OAUTH_SCOPE" in to_do
