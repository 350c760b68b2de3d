"""The callback: what ends the wait for it, and what never does, whatever reaches the port."""

import contextlib
import socket
import struct
import sys
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import pytest
from odd_server import OddServer, Request, failed_login, json_answer
from sandbox import Sandbox
from script import PATIENCE, Script, answer_login_page, free_port, ipv6_works, visit

from sipgate_oauth import (
    BROWSER_ERRORS,
    LOOPBACK,
    OLD_TAB,
    STATE_MISMATCH,
    STILL_WAITING,
    CallbackRefused,
    CallbackServer,
    LoginError,
    check_callback,
    code_from_callback,
    listen_for_callback,
    wait_for_callback,
)

Start = Callable[..., Script]
needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")

STATE = "our-state"
QUERY = f"code=a-code&state={STATE}"
CALLBACK = {"code": "a-code", "state": STATE}
DONE = "Your browser has done its part."
ON_EVERY_PAGE = [
    "\nContent-Security-Policy: default-src 'none'\n",
    "\nCache-Control: no-store\n",
    "\nReferrer-Policy: no-referrer\n",
]


@pytest.fixture
def uri() -> str:
    return f"http://localhost:{free_port()}/oauth"


def connect(uri: str, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((address, urlsplit(uri).port or 0), timeout=5)


def can_connect(uri: str, address: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), connect(uri, address):
        return True
    return False


def request_for(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def send(uri: str, request: bytes, address: str = "127.0.0.1") -> str:
    """Send a request and return the response."""
    with connect(uri, address) as connection:
        connection.sendall(request)
        with connection.makefile(encoding="utf-8") as response:
            return response.read()


def send_and_reset(uri: str, request: bytes) -> None:
    """Send a request, and break off the connection as a crash does."""
    with connect(uri) as connection:
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.sendall(request)


# --- What check_callback decides ------------------------------------------------------------------


@pytest.mark.parametrize(
    "query", ["", f"state={STATE}&code=&error=", f"state={STATE}&error_description=no"]
)
def test_without_a_code_or_an_error_nothing_is_the_callback(query: str) -> None:
    with pytest.raises(CallbackRefused, match="neither a code nor an error"):
        check_callback(query, STATE)


@pytest.mark.parametrize(
    "query",
    [
        "code=a",
        "error=a",
        "code=a&state=",
        f"code=a&state={STATE.upper()}",
        f"code=a&state={STATE[:-1]}",
        f"code=a&state={STATE}x",
        f"code=a&state=x{STATE}",
        f"code=a&state=ü{STATE}",
    ],
)
def test_a_callback_with_another_state_is_refused(query: str) -> None:
    with pytest.raises(CallbackRefused) as refused:
        check_callback(query, STATE)
    assert str(refused.value) == STATE_MISMATCH


def test_without_a_state_of_our_own_nothing_is_the_callback() -> None:
    with pytest.raises(CallbackRefused):
        check_callback("code=a-code", "")


def test_a_code_or_an_error_with_our_state_is_the_callback() -> None:
    assert check_callback(f"{QUERY}&x=1", STATE) == {**CALLBACK, "x": "1"}
    assert check_callback(f"state={STATE}&error=e", STATE) == {"error": "e", "state": STATE}
    assert check_callback("code=%C3%BC+%26&state=%C3%BC", "ü") == {"code": "ü &", "state": "ü"}


def test_an_error_in_the_callback_is_told_with_advice() -> None:
    with pytest.raises(LoginError) as refused:
        code_from_callback({"error": "access_denied", "error_description": "You said no."})
    assert refused.value.what == "The login failed: access_denied: You said no"
    assert refused.value.error == "access_denied"
    assert "start again and allow access" in refused.value.advice


# --- How the callback server responds -------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [f"/?{QUERY}", f"/oauth/?{QUERY}", f"/OAUTH?{QUERY}", f"/a/oauth?{QUERY}"]
)
def test_another_path_is_not_the_callback(uri: str, target: str) -> None:
    with listen_for_callback(uri, STATE) as events:
        page = send(uri, request_for(target))
        assert events.empty()
    assert page.startswith("HTTP/1.0 404 ")
    assert page.endswith(f"<h1>This is not the redirect URI.</h1><p>{STILL_WAITING}</p>")


def test_another_method_is_not_the_callback(uri: str) -> None:
    with listen_for_callback(uri, STATE) as events:
        page = send(uri, request_for(f"/oauth?{QUERY}", "POST"))
        assert events.empty()
    assert page.startswith("HTTP/1.0 501 ")
    assert [header for header in ON_EVERY_PAGE if header not in page] == []


def test_the_page_after_the_callback_is_true_whatever_follows(uri: str) -> None:
    with listen_for_callback(uri, STATE):
        page = send(uri, request_for(f"/oauth?error=access_denied&state={STATE}"))
    assert page.startswith("HTTP/1.0 200 ")
    assert "\nContent-Type: text/html; charset=utf-8\n" in page
    assert [header for header in ON_EVERY_PAGE if header not in page] == []
    assert page.endswith(f"<h1>{DONE}</h1><p>Go back to the terminal.</p>")


def test_forged_callbacks_are_told_once_and_the_login_goes_on(
    sandbox: Sandbox, start: Start
) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    for _ in range(3):
        page = visit(callback.replace("state=", "state=x"))
        assert page.status_code == 403
        assert page.text.endswith(f"<h1>{STATE_MISMATCH}</h1><p>{STILL_WAITING}</p>")
    assert DONE in visit(callback).text
    assert (script.status(), sandbox.exchanges) == (0, 1)
    assert script.stderr == f"{STATE_MISMATCH}\n{OLD_TAB}\n"


@needs_ipv6
@pytest.mark.parametrize(
    ("at", "path", "addresses"),
    [
        ("LOCALHOST:{}", "/", {"127.0.0.1", "::1"}),
        ("127.0.0.1:{}/Login/Callback", "/Login/Callback", {"127.0.0.1"}),
        ("[::1]:{}/b~/", "/b~/", {"::1"}),
    ],
)
def test_each_loopback_host_is_served_at_its_addresses_and_no_others(
    at: str, path: str, addresses: set[str]
) -> None:
    uri = f"http://{at.format(free_port())}"
    with listen_for_callback(uri, STATE) as events:
        for address in addresses:
            assert DONE in send(uri, request_for(f"{path}?{QUERY}"), address)
            assert wait_for_callback(events, PATIENCE) == CALLBACK
        for address in {"127.0.0.1", "::1", "127.0.0.2"} - addresses:
            assert not can_connect(uri, address)


def test_a_callback_from_a_proxy_counts(uri: str) -> None:
    root = uri.removesuffix("/oauth")
    with listen_for_callback(root, STATE) as events:
        assert DONE in send(uri, request_for(f"{root}?{QUERY}"))
        assert wait_for_callback(events, PATIENCE) == CALLBACK


def test_connections_that_break_or_stay_idle_do_not_delay_the_callback(
    uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = request_for(f"/oauth?{QUERY}")
    tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    with contextlib.ExitStack() as idle, listen_for_callback(uri, STATE) as events:
        for beginning in [b"", b"G", whole[:-2], tls, request_for("/favicon.ico")]:
            send_and_reset(uri, beginning)
            idle.enter_context(connect(uri)).sendall(beginning)
        assert DONE in send(uri, whole)
        assert wait_for_callback(events, PATIENCE) == CALLBACK
    with listen_for_callback(uri, STATE):
        pass  # the port is free again, though the system remembers the idle connections
    assert capfd.readouterr() == ("", "")


def test_many_connections_at_once_need_not_wait(uri: str) -> None:
    """Until the server accepts them, they are in its queue."""
    server = CallbackServer("127.0.0.1", urlsplit(uri), STATE, SimpleQueue())
    with server, contextlib.ExitStack() as connections:
        for _ in range(100):
            connections.enter_context(connect(uri)).settimeout(0.5)


def test_the_wait_ends_after_the_page_is_sent(uri: str) -> None:
    """Not earlier, because the program could end then, and the browser would show an error."""
    pages: list[str] = []

    class Watched(SimpleQueue[Any]):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            pages.append(browser.recv(10_000).decode())
            super().put(item)

    events = Watched()
    server = CallbackServer("127.0.0.1", urlsplit(uri), STATE, events)
    with server, connect(uri) as browser:
        browser.sendall(request_for(f"/oauth?{QUERY}"))
        server.handle_request()
        assert events.get(timeout=PATIENCE) == CALLBACK
    assert DONE in pages[0]


@pytest.mark.skipif(sys.platform == "win32", reason="there, a reset throws away what came before")
def test_a_browser_that_hangs_up_before_the_page_still_logs_in(uri: str) -> None:
    with listen_for_callback(uri, STATE) as events:
        send_and_reset(uri, request_for(f"/oauth?{QUERY}"))
        assert wait_for_callback(events, PATIENCE) == CALLBACK


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


# --- What keeps the program from listening --------------------------------------------------------


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_port_in_use_is_told_before_the_url(sandbox: Sandbox, start: Start, host: str) -> None:
    uri = sandbox.environment["REDIRECT_URI"]
    with listen_for_callback(uri.replace("localhost", host), STATE):
        error = start(**sandbox.environment)
        assert error.status() == 1
    assert "response_type" not in error.stdout
    assert f"Cannot listen on port {urlsplit(uri).port} of {host.strip('[]')}: " in error.stderr
    assert "\nStop the program that uses this port." in error.stderr


def test_without_a_port_it_is_80() -> None:
    with contextlib.ExitStack() as in_use:
        with contextlib.suppress(OSError):  # it is in use already, or may not be used
            in_use.enter_context(socket.create_server(("127.0.0.1", 80)))
        with pytest.raises(LoginError) as error, listen_for_callback("http://127.0.0.1/x", STATE):
            pass
    assert error.value.what.startswith("Cannot listen on port 80 of 127.0.0.1: ")
    assert "another port, above 1023" in error.value.advice


@pytest.mark.parametrize("uri", ["https://localhost:8443/oauth", "http://example.com/oauth"])
def test_a_redirect_uri_that_only_a_web_server_can_serve_is_an_error(uri: str) -> None:
    with pytest.raises(LoginError) as error, listen_for_callback(uri, STATE):
        pass
    assert uri in error.value.what
    assert "Use http, not https" in error.value.advice


def test_a_machine_without_ipv6_is_fine_unless_the_redirect_uri_needs_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOOPBACK, "localhost", ["127.0.0.1", "2001:db8::1"])  # no machine's
    with listen_for_callback(uri, STATE):
        assert can_connect(uri)
    monkeypatch.setattr(socket, "AF_INET6", 999)  # which no system knows
    with listen_for_callback(uri, STATE):
        assert can_connect(uri)
    error = pytest.raises(LoginError, match="of ::1: ")
    with error, listen_for_callback(uri.replace("localhost", "[::1]"), STATE):
        pass


# --- The wait -------------------------------------------------------------------------------------


@pytest.mark.timeout(PATIENCE)
def test_a_flood_of_texts_does_not_extend_the_wait() -> None:
    class Flood(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> str:
            return "the same again"

    with pytest.raises(LoginError, match="did not come back"):
        wait_for_callback(Flood(), 0.1)


def test_without_a_callback_the_wait_ends_and_errors_in_the_browser_are_explained(
    start: Start, sandbox: Sandbox
) -> None:
    script = start("--timeout=0.1", **sandbox.environment, PYTHONDEVMODE="1")
    assert script.status() == 1
    assert script.stderr.startswith("Error: The browser did not come back within 0.1 seconds.\n")
    assert script.stderr.endswith(f" {BROWSER_ERRORS}\n")  # and no warning follows
    for key in ("CLIENT_ID", "REDIRECT_URI", "OAUTH_SCOPE", "third-party", "sipgate-apps", "405"):
        assert key in BROWSER_ERRORS
