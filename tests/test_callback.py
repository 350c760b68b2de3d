"""The callback: what ends the wait for it, and what never does, whatever reaches the port."""

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from odd_server import OddServer, Request, failed_login, json_answer
from sandbox import Sandbox
from script import PATIENCE, Script, answer_login_page, free_port, ipv6_works, visit

import sipgate_oauth as program
from sipgate_oauth import (
    FOREIGN_STATE,
    CallbackRefused,
    ConfigurationError,
    LoginError,
    StateMismatch,
    check_callback,
    listen_for_callback,
    wait_for_callback,
)

Start = Callable[..., Script]
needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")

STATE = "our-state"
QUERY = f"code=a-code&state={STATE}"
CALLBACK = {"code": "a-code", "state": STATE}

# What a request to the redirect URI has after the ?, and is not the callback of this login.
NOT_A_LOGIN_RESPONSE = {
    "nothing": "",
    "other parameters": "hello=world",
    "only a description": "error_description=no",
    "a code without a value": "code",
    "a code and an error, both empty": "code=&error=",
}
NEITHER_CODE_NOR_ERROR = {
    "only our state": f"state={STATE}",
    "our state, and an empty code": f"state={STATE}&code=",
    "our state, and an empty error": f"state={STATE}&error=",
    "our state, and a description": f"state={STATE}&error_description=no",
    "a code and an error": f"{QUERY}&error=e",
}
REPEATED = {
    "the same code twice": f"{QUERY}&code=a-code",
    "a second code, escaped": f"{QUERY}&c%6Fde=b",
    "a second code, empty": f"{QUERY}&code=",
    "another parameter twice": f"{QUERY}&x&x",
    "our state twice": f"{QUERY}&state={STATE}",
    "our state and another": f"{QUERY}&state=another",
    "our state and an empty one": f"{QUERY}&state=",
}
ANOTHER_STATE = {
    "a code without a state": "code=foreign",
    "an error without a state": "error=foreign",
    "only another state": "state=foreign",
    "an empty state": "code=a&state=",
    "our state in another parameter": f"code=a&STATE={STATE}",
    "our state in a parameter with a space": f"code=a&state%20={STATE}",
    "a semicolon for an ampersand": f"code=a;state={STATE}",
    "a letter before our state": f"code=a&state=x{STATE}",
    "a space before our state": f"code=a&state=+{STATE}",
    "a zero byte before our state": f"code=a&state=%00{STATE}",
    "a euro sign before our state": f"code=a&state=%E2%82%AC{STATE}",
    "an umlaut before our state": f"code=a&state=ü{STATE}",
    "our state without its last letter": f"code=a&state={STATE[:-1]}",
    "our state in capitals": f"code=a&state={STATE.upper()}",
    "half an escape": "code=a&state=%",
    "bytes that are not UTF-8": "code=a&state=%FF%FE",
    "a surrogate": "code=a&state=%ED%A0%80",
    "thousands of parameters": "code=a" + "".join(f"&p{number}=" for number in range(5000)),
}
REFUSED_WITH_400 = {**NOT_A_LOGIN_RESPONSE, **NEITHER_CODE_NOR_ERROR, **REPEATED}

ON_EVERY_PAGE = (
    "Content-Security-Policy: default-src 'none'\n"
    "Cache-Control: no-store\n"
    "Referrer-Policy: no-referrer\n"
)


def check(query: str) -> dict[str, str]:
    return check_callback(query, STATE)


@pytest.fixture
def uri() -> str:
    return f"http://localhost:{free_port()}/oauth"


def connect(uri: str, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((address, urlsplit(uri).port or 0), timeout=5)


def can_connect(uri: str, address: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), connect(uri, address):
        return True
    return False


def get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def send(uri: str, request: bytes, address: str = "127.0.0.1") -> str:
    """Send a request and then no more, and return the answer, or nothing if there is none."""
    with contextlib.suppress(ConnectionError), connect(uri, address) as connection:
        connection.sendall(request)
        with contextlib.suppress(OSError):  # from a connection that is closed by now
            connection.shutdown(socket.SHUT_WR)
        with connection.makefile(encoding="utf-8") as answer:
            return answer.read()
    return ""


def send_and_reset(uri: str, request: bytes) -> None:
    """Send a request, and close the connection as a crash does, without a goodbye."""
    with connect(uri) as connection:
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.sendall(request)


# --- What check_callback decides ------------------------------------------------------------------


@pytest.mark.parametrize("odd", REFUSED_WITH_400)
def test_what_is_not_a_callback_is_refused(odd: str) -> None:
    with pytest.raises(CallbackRefused) as refused:
        check(REFUSED_WITH_400[odd])
    assert refused.value.status == 400
    assert not isinstance(refused.value, StateMismatch)


@pytest.mark.parametrize("odd", ANOTHER_STATE)
def test_a_callback_with_another_state_is_refused(odd: str) -> None:
    with pytest.raises(StateMismatch) as refused:
        check(ANOTHER_STATE[odd])
    assert (refused.value.status, refused.value.reason) == (403, FOREIGN_STATE)


def test_without_a_state_of_our_own_nothing_is_the_callback() -> None:
    with pytest.raises(StateMismatch):
        check_callback("code=a-code", "")


def test_a_code_or_an_error_with_our_state_is_the_callback() -> None:
    assert check(f"{QUERY}&error=&x=1") == {**CALLBACK, "x": "1"}
    assert check(f"state={STATE}&error=e&code=") == {"error": "e", "state": STATE}
    assert check_callback("code=%C3%BC+%26&state=%C3%BC", "ü") == {"code": "ü &", "state": "ü"}


# --- What the callback server answers -------------------------------------------------------------

HEAD = f"GET /oauth?{QUERY} HTTP/1.1\r\nHost: localhost\r\n".encode()
WHOLE = HEAD + b"\r\n"
PREFLIGHT = b"Origin: https://x.example\r\nAccess-Control-Request-Method: GET\r\n\r\n"
# Requests with our state and a code that are not the callback, by what is odd about them, and the
# status of the answer.
ODD_REQUESTS: dict[str, tuple[bytes, int]] = {
    **{
        f"another path: /{path}": (WHOLE.replace(b"/oauth", f"/{path}".encode()), 404)
        for path in [
            "",
            "oauth/",
            "OAUTH",
            "%6Fauth",
            "oauth;x",
            "oauth%3F",
            "favicon.ico",
            "a/oauth",
        ]
    },
    **{
        f"another method: {method}": (WHOLE.replace(b"GET", method.encode()), 501)
        for method in ["HEAD", "POST", "OPTIONS", "PUT", "TRACE", "get", "X"]
    },
    "a preflight request": (HEAD.replace(b"GET", b"OPTIONS") + PREFLIGHT, 501),
    "a form": (HEAD.replace(b"GET", b"POST") + b"Content-Length: 5\r\n\r\nhello", 501),
    "half a host": (WHOLE.replace(b"/oauth", b"http://[/oauth"), 400),
    "a space in the address": (WHOLE.replace(b"/oauth", b"/oauth "), 400),
    "an endless address": (WHOLE.split(b" HTTP")[0].ljust(65537, b"x"), 414),
    "an endless header": (HEAD + b"X: ".ljust(65537, b"x"), 431),
    "too many headers": (HEAD + b"X: x\r\n" * 101 + b"\r\n", 431),
    **{odd: (get(f"/oauth?{query}"), 400) for odd, query in REFUSED_WITH_400.items()},
    **{odd: (get(f"/oauth?{query}"), 403) for odd, query in ANOTHER_STATE.items()},
}
LINE = HEAD.partition(b"\r\n")[0]
# What is so odd that it may get no answer at all. A line that is cut off may hold half of the code.
NO_REQUESTS = [
    *(LINE[:length] for length in range(len(LINE))),
    *(
        LINE.replace(b"HTTP/1.1", version) + b"\r\n\r\n"
        for version in [b"", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/11.1", b"HTTP/one", b"http/1.1"]
    ),
    *(LINE.replace(b"GET ", method) + b"\r\n\r\n" for method in [b"", b"GET", b"\0GET "]),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS
    b"x" * 65_537,
]


def test_an_odd_request_is_refused_and_is_not_the_callback(uri: str) -> None:
    with listen_for_callback(uri, check) as events:
        for odd, (request, status) in ODD_REQUESTS.items():
            answer = send(uri, request)
            assert answer.startswith(f"HTTP/1.0 {status} "), odd
            assert ON_EVERY_PAGE in answer, odd
            assert "access-control" not in answer.lower(), odd
            assert "foreign" not in answer, odd
        for request in NO_REQUESTS:
            assert "Login accepted" not in send(uri, request), request[:200]
        heard = [events.get() for _ in range(events.qsize())]
    assert {type(event) for event in heard} == {StateMismatch}
    assert len(heard) == len(ANOTHER_STATE)


def test_connections_that_break_or_stay_idle_do_not_delay_the_callback(uri: str) -> None:
    beginnings = [b"", b"G", HEAD, b"\x16", get("/favicon.ico")]
    began = time.monotonic()
    with listen_for_callback(uri, check) as events, contextlib.ExitStack() as idle:
        for beginning in beginnings:
            send_and_reset(uri, beginning)
            idle.enter_context(connect(uri)).sendall(beginning)
        assert "Login accepted" in send(uri, WHOLE)
        assert wait_for_callback(events, PATIENCE) == CALLBACK
    assert time.monotonic() - began < program.CallbackHandler.timeout
    with listen_for_callback(uri, check):
        pass  # the port is free again, though the system remembers the idle connections


def test_forged_callbacks_are_told_once_and_the_login_goes_on(
    sandbox: Sandbox, start: Start
) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    for _ in range(3):
        assert visit(callback.replace("state=", "state=x")).status_code == 403
    assert "Login accepted" in visit(callback).text
    assert (script.status(), sandbox.exchanges) == (0, 1)
    advice = "If you used an old browser tab, open the URL above instead."
    assert script.stderr == f"{FOREIGN_STATE}\n{advice}\n"


@needs_ipv6
@pytest.mark.parametrize("at", ["localhost:{}", "LOCALHOST:{}/", "127.0.0.1:{}/a", "[::1]:{}/b~/"])
def test_each_loopback_host_and_path_is_served(at: str) -> None:
    uri = f"http://{at.format(free_port())}"
    addresses = program.LOOPBACK[urlsplit(uri).hostname or ""]
    with listen_for_callback(uri, check) as events:
        for address in addresses:
            for target in (urlsplit(uri).path or "/", uri):  # as a browser and as a proxy say it
                assert "Login accepted" in send(uri, get(f"{target}?{QUERY}"), address)
                assert events.get(timeout=PATIENCE) == CALLBACK
        for address in {"127.0.0.1", "::1", "127.0.0.2"} - {*addresses}:
            assert not can_connect(uri, address)


def test_eight_callbacks_at_once_exchange_the_code_once(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    with ThreadPoolExecutor(8) as browsers:
        pages = list(browsers.map(send, [callback] * 8, [get(callback)] * 8))
    assert any("<h1>Login accepted</h1>" in page for page in pages)
    assert (script.status(), sandbox.exchanges) == (0, 1)


def test_the_port_closes_while_the_exchange_still_hangs(server: OddServer, start: Start) -> None:
    uri = server.environment["REDIRECT_URI"]

    def wait_for_the_port(_: Request) -> bytes:
        while can_connect(uri):
            pass
        return json_answer({"it is": "closed"})

    server.answer_at("code for tokens", wait_for_the_port)
    script = start(**server.environment)
    failed_login(script, server)
    assert '"it is": "closed"' in script.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="there, a reset throws away what came before")
def test_a_browser_that_hangs_up_before_the_page_still_logs_in(uri: str) -> None:
    with listen_for_callback(uri, check) as events:
        send_and_reset(uri, WHOLE)
        assert events.get(timeout=PATIENCE) == CALLBACK


def test_an_idle_connection_is_not_kept(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.CallbackHandler, "timeout", program.CallbackHandler.timeout / 50)
    with listen_for_callback(uri, check), connect(uri) as idle:
        assert idle.recv(1) == b""


def test_the_pages_say_how_the_login_went_and_lead_back_to_the_terminal(uri: str) -> None:
    refusal = f"state={STATE}&error=%3Cb%3E&error_description=You+said+no%26."
    pages = {
        "code=a&state=another": (
            403,
            FOREIGN_STATE,
            program.STILL_WAITING,
        ),
        refusal: (200, "Login failed", "&lt;b&gt;: You said no&amp;. Go back to the terminal."),
        QUERY: (200, "Login accepted", "Go back to the terminal, which shows the result."),
    }
    with listen_for_callback(uri, check):
        for query, (status, title, text) in pages.items():
            page = send(uri, get(f"/oauth?{query}"))
            assert page.startswith(f"HTTP/1.0 {status} ")
            assert page.endswith(f"<h1>{title}</h1><p>{text}</p>")
            assert "\nContent-Type: text/html;" in page
            assert ON_EVERY_PAGE in page


# --- What keeps the program from listening --------------------------------------------------------


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_port_in_use_is_told_before_the_url(sandbox: Sandbox, start: Start, host: str) -> None:
    uri = sandbox.environment["REDIRECT_URI"]
    with listen_for_callback(uri.replace("localhost", host), check):
        script = start(**sandbox.environment)
        assert script.status() == 1
    assert "response_type" not in script.stdout
    assert f"Cannot listen on port {urlsplit(uri).port} of {host.strip('[]')}: " in script.stderr
    assert "\nStop the program that uses this port." in script.stderr


def test_a_port_that_may_not_be_used_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(LoginError) as error, listen_for_callback("http://localhost/oauth", check):
        pass
    bind.assert_called_once_with(("127.0.0.1", 80))
    assert error.value.what == "Cannot listen on port 80 of 127.0.0.1: Permission denied"
    assert "another port, above 1023" in error.value.advice


@pytest.mark.parametrize(
    "uri",
    ["https://localhost:8443/oauth", "https://app.example.com/oauth", "http://example.com/oauth"],
)
def test_a_redirect_uri_that_only_a_web_server_can_serve_is_an_error(uri: str) -> None:
    with pytest.raises(ConfigurationError) as error, listen_for_callback(uri, check):
        pass
    assert uri in error.value.what
    assert "Use http, not https" in error.value.advice


def test_a_machine_without_the_address_of_ipv6_is_fine(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(program.LOOPBACK, "localhost", ["127.0.0.1", "2001:db8::1"])
    with listen_for_callback(uri, check):
        assert can_connect(uri)


def test_a_system_without_ipv6_is_fine(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_INET6", 999)  # which no system knows
    with listen_for_callback(uri, check):
        assert can_connect(uri)


def test_without_ipv6_an_ipv6_redirect_uri_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_INET6", 999)
    uri = f"http://[::1]:{free_port()}/oauth"
    with pytest.raises(LoginError, match="of ::1: "), listen_for_callback(uri, check):
        pass


def test_a_system_without_threads_is_an_error(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_threads = Mock(side_effect=RuntimeError("can't start new thread"))
    monkeypatch.setattr(threading.Thread, "start", out_of_threads)
    error = pytest.raises(LoginError, match="allows no more threads")
    with error, listen_for_callback(uri, check):
        pass
    monkeypatch.undo()
    with listen_for_callback(uri, check):
        pass  # the port was closed


# --- The wait -------------------------------------------------------------------------------------


def test_the_first_callback_wins(uri: str) -> None:
    with listen_for_callback(uri, check) as events:
        send(uri, get(f"/oauth?state={STATE}&error=first"))
        send(uri, WHOLE)
        callback = wait_for_callback(events, PATIENCE)
    assert callback == {"state": STATE, "error": "first"}


def test_an_error_in_the_callback_is_told_with_advice() -> None:
    callback = {"error": "access_denied", "error_description": "You said no."}
    with pytest.raises(LoginError) as refused:
        program.code_from_callback(callback)
    assert refused.value.what == "The login failed: access_denied: You said no"
    assert refused.value.error == "access_denied"
    assert "start again and allow access" in refused.value.advice


@pytest.mark.parametrize("error", ["consent_required", "login_required", "interaction_required"])
def test_an_error_of_openid_connect_has_advice_of_its_own(error: str) -> None:
    with pytest.raises(LoginError, match="remove prompt=none"):
        program.code_from_callback({"error": error})


def test_after_a_while_errors_in_the_browser_are_explained_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.HINT_AFTER == 30  # seconds
    monkeypatch.setattr(program, "HINT_AFTER", 0.01)
    with pytest.raises(LoginError, match=r"The browser did not come back within 0\.1 seconds"):
        wait_for_callback(SimpleQueue(), 0.1)
    assert capsys.readouterr() == ("", f"{program.BROWSER_ERRORS}\n")


def test_without_a_callback_the_wait_ends_and_errors_in_the_browser_are_explained(
    start: Start, sandbox: Sandbox
) -> None:
    script = start("--timeout=0.1", **sandbox.environment)
    assert script.status() == 1
    assert script.stderr.startswith("Error: The browser did not come back within 0.1 seconds.\n")
    assert script.stderr.endswith(f" {program.BROWSER_ERRORS}\n")
    for key in ("CLIENT_ID", "REDIRECT_URI", "OAUTH_SCOPE", "third-party", "sipgate-apps", "405"):
        assert key in program.BROWSER_ERRORS


def test_a_flood_of_notices_does_not_extend_the_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: program.Events = SimpleQueue()
    monkeypatch.setattr(program, "warn", lambda *lines: events.put("and another"))
    events.put("a notice")
    with pytest.raises(LoginError, match="did not come back"):
        wait_for_callback(events, 0.1)
