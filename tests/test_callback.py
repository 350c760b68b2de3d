"""The callback: what ends the wait for it, and what never does, whatever reaches the port."""

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from odd_server import OddServer, Request, failed_login, json_answer
from sandbox import Sandbox
from script import PATIENCE, Script, answer_login_page, free_port, ipv6_works, visit

import sipgate_oauth as program
from sipgate_oauth import FOREIGN_STATE, LoginError, callback_server, check_callback

Start = Callable[..., Script]
needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")

STATE = "our-state"
QUERY = f"code=a-code&state={STATE}"
CALLBACK = {"code": "a-code", "state": STATE}
# What comes to the redirect URI and is no callback of this login, and the status of the answer.
REFUSED = {
    **dict.fromkeys(["", "hello=world", "error_description=no", "code", "code=&error="], 400),
    **{f"state={STATE}{rest}": 400 for rest in ("", "&code=", "&error=", "&error_description=no")},
    **{f"{QUERY}&{again}": 400 for again in ("code=a-code", "c%6Fde=b", "code=", "x&x", "error=e")},
    **{f"{QUERY}&state={again}": 400 for again in (STATE, "another", "")},
    **{f"{it}=foreign": 403 for it in ("code", "error", "state")},
    **{f"code=a&{it}": 403 for it in ("state=", f"STATE={STATE}", f"state%20={STATE}", ";state=x")},
    **{f"code=a&state={it}{STATE}": 403 for it in ("x", "+", "%00", "%E2%82%AC", "ü")},
    **{f"code=a&state={it}": 403 for it in (STATE[:-1], STATE.upper(), "%", "%FF%FE", "%ED%A0%80")},
    "code=a" + "".join(f"&p{number}=" for number in range(5000)): 403,
}
ON_EVERY_PAGE = "Content-Security-Policy: default-src 'none'\nCache-Control: no-store\n"
ON_EVERY_PAGE += "Referrer-Policy: no-referrer\n"


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


@pytest.mark.parametrize("query", REFUSED, ids=lambda query: query[:60])
def test_what_is_no_callback_of_this_login_is_refused(query: str) -> None:
    with pytest.raises(program.CallbackRefused) as refused:
        check_callback(query, STATE)
    assert refused.value.args[0] == REFUSED[query]


def test_without_a_state_of_our_own_nothing_is_the_callback() -> None:
    with pytest.raises(program.CallbackRefused):
        check_callback("code=a-code", "")


def test_a_code_or_an_error_with_our_state_is_the_callback() -> None:
    assert check_callback(f"{QUERY}&error=&x=1", STATE) == {**CALLBACK, "x": "1"}
    assert check_callback(f"state={STATE}&error=e&code=", STATE) == {"error": "e", "state": STATE}
    assert check_callback("code=%C3%BC+%26&state=%C3%BC", "ü") == {"code": "ü &", "state": "ü"}


def test_nothing_else_ends_or_delays_the_wait(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    callback, state = answer_login_page(script.url()), script.state()
    whole = get(f"/oauth?code=a-code&state={state}")
    head = whole.removesuffix(b"\r\n")
    paths = ["", "oauth/", "OAUTH", "%6Fauth", "oauth;x", "oauth%3F", "favicon.ico", "a/oauth"]
    preflight = b"Origin: https://x.example\r\nAccess-Control-Request-Method: GET\r\n\r\n"
    strays = {
        **{whole.replace(b"oauth", path.encode()): 404 for path in paths},
        **{get(f"/oauth?{query.replace(STATE, state)}"): REFUSED[query] for query in REFUSED},
        **{whole.replace(b"GET", it): 501 for it in b"HEAD POST OPTIONS PUT TRACE get X".split()},
        head.replace(b"GET", b"OPTIONS") + preflight: 501,
        head.replace(b"GET", b"POST") + b"Content-Length: 5\r\n\r\nhello": 501,
        **{whole.replace(b"/oauth", it): 400 for it in (b"http://[/oauth", b"/oauth ")},
        whole.split(b" HTTP")[0].ljust(65537, b"x"): 414,
        head + b"X: ".ljust(65537, b"x"): 431,
        head + b"X: x\r\n" * 101 + b"\r\n": 431,
    }
    for request, status in strays.items():
        answer = send(callback, request)
        assert answer.startswith(f"HTTP/1.0 {status} "), request[:200]
        assert ON_EVERY_PAGE in answer, request[:200]
        assert "access-control" not in answer.lower(), request[:200]
        assert "foreign" not in answer, request[:200]
    # What follows gets no status. A line that is cut off could hold a part of the code.
    line = f"GET /oauth?state={state}&code=a-code HTTP/1.1".encode()
    versions = [b"", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/11.1", b"HTTP/one", b"http/1.1"]
    no_requests = [
        *(line[:length] for length in range(len(line))),
        *(line.replace(b"HTTP/1.1", version) + b"\r\n\r\n" for version in versions),
        *(line.replace(b"GET ", start) + b"\r\n\r\n" for start in (b"", b"GET", b"\0GET ")),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS
        b"x" * 65_537,
    ]
    for request in no_requests:
        assert "came through" not in send(callback, request), request[:200]
    for request in (b"", b"G", head, get("/favicon.ico")):
        send_and_reset(callback, request)
    began = time.monotonic()
    with contextlib.ExitStack() as idle:
        for request in (b"", b"G", head, b"\x16"):
            idle.enter_context(connect(callback)).sendall(request)
        assert "came through" in visit(callback).text
        assert (script.status(), sandbox.exchanges) == (0, 1)
    assert time.monotonic() - began < program.CallbackHandler.timeout
    with callback_server(callback, STATE):
        pass  # the port is free again, though the system keeps it back for the idle connections
    assert script.stderr == f"{FOREIGN_STATE}\nIf it is an old tab, use the URL above.\n"


@needs_ipv6
@pytest.mark.parametrize("at", ["localhost:{}", "LOCALHOST:{}/", "127.0.0.1:{}/a", "[::1]:{}/b~/"])
def test_each_loopback_host_and_path_is_served(at: str) -> None:
    uri = f"http://{at.format(free_port())}"
    addresses = program.LOOPBACK[urlsplit(uri).hostname or ""]
    with callback_server(uri, STATE) as callbacks:
        for address in addresses:
            for target in (urlsplit(uri).path or "/", uri):  # as a browser and as a proxy say it
                assert "came through" in send(uri, get(f"{target}?{QUERY}"), address)
                assert callbacks.get(timeout=PATIENCE) == CALLBACK
        for address in {"127.0.0.1", "::1", "127.0.0.2"} - {*addresses}:
            assert not can_connect(uri, address)


def test_eight_callbacks_at_once_exchange_the_code_once(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    with ThreadPoolExecutor(8) as browsers:
        pages = list(browsers.map(send, [callback] * 8, [get(callback)] * 8))
    assert any(page.startswith("HTTP/1.0 200 The login came through") for page in pages)
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
    with callback_server(uri, STATE) as callbacks:
        send_and_reset(uri, get(f"/oauth?{QUERY}"))
        assert callbacks.get(timeout=PATIENCE) == CALLBACK


def test_an_idle_connection_is_not_kept(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.CallbackHandler, "timeout", program.CallbackHandler.timeout / 50)
    with callback_server(uri, STATE), connect(uri) as idle:
        assert idle.recv(1) == b""


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_port_in_use_is_told_before_the_url(sandbox: Sandbox, start: Start, host: str) -> None:
    uri = sandbox.environment["REDIRECT_URI"]
    with callback_server(uri.replace("localhost", host), STATE):
        script = start(**sandbox.environment)
        assert script.status() == 1
    assert "response_type" not in script.stdout
    assert f"Can't listen on port {urlsplit(uri).port} of {host.strip('[]')}: " in script.stderr
    assert script.stderr.endswith(" Or stop what uses this port.\n")


def test_a_port_that_may_not_be_used_has_other_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(LoginError) as error, callback_server("http://localhost/oauth", STATE):
        pass
    bind.assert_called_once_with(("127.0.0.1", 80))
    what = "Can't listen on port 80 of 127.0.0.1: Permission denied"
    assert error.value.args == (what, program.OTHER_PORT)


def test_a_machine_without_ipv6_is_fine(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.LOOPBACK, "localhost", ["127.0.0.1", "2001:db8::1"])
    with callback_server(uri, STATE):
        assert can_connect(uri)
    monkeypatch.setitem(program.LOOPBACK, "localhost", ["2001:db8::1"])
    with pytest.raises(LoginError, match="of 2001:db8::1: "), callback_server(uri, STATE):
        pass


def test_the_pages_say_how_the_login_went_and_the_first_answer_wins(uri: str) -> None:
    refusal = f"state={STATE}&error=%3Cb%3E&error_description=You+said+no%26."
    pages = {
        "code=a&state=another": f"<h1>{FOREIGN_STATE}</h1>The terminal still waits for the login.",
        refusal: "<h1>The login did not come through</h1>&lt;b&gt;: You said no&amp;",
        QUERY: "<h1>The login came through</h1>The terminal goes on from here.",
    }
    with callback_server(uri, STATE) as callbacks:
        for query, text in pages.items():
            page = send(uri, get(f"/oauth?{query}"))
            assert page.endswith(text)
            assert ON_EVERY_PAGE in page
        with pytest.raises(LoginError, match=r"refused: <b>: You said no&'.*Start again\."):
            program.wait_for_callback(uri, callbacks, PATIENCE)


def test_after_30_s_errors_are_explained(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with callback_server(uri, STATE):
        timers = [it for it in threading.enumerate() if isinstance(it, threading.Timer)]
        hint = next(timer for timer in timers if timer.interval == 30)
        send(uri, get("/favicon.ico"))  # which is not worth a word
        hint.function(*hint.args, **hint.kwargs)  # as it will, then
    assert hint.finished.is_set()  # so it will not, after the wait
    assert capsys.readouterr() == ("", f"{program.BROWSER_ERRORS}\n")
