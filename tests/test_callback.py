"""The callback server: only the one callback ends the wait, whatever else reaches the port."""

import contextlib
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from sandbox import Sandbox
from script import (
    PATIENCE,
    Script,
    answer_login_page,
    free_port,
    ipv6_works,
    log_in,
    visit,
)

Start = Callable[..., Script]

FOREIGN_STATE = "State in the callback does not match the state in the original request"

needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the more specific address takes precedence"
)


# --- What a test sends, and what it gets ----------------------------------------------------------


def connect(port: int, address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((address, port), timeout=PATIENCE)


def can_connect(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2):
        return True
    return False


def read_to_the_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def send(port: int, request: bytes, address: str = "127.0.0.1") -> bytes:
    """Send a request and then no more, and return all that comes back."""
    with connect(port, address) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return read_to_the_end(connection)


def send_at_once(port: int, requests: list[bytes]) -> list[bytes]:
    """Send requests that are all completed in the same moment, and return what comes back."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in requests]
        for connection, request in zip(connections, requests, strict=True):
            connection.sendall(request[:-1])
        for connection, request in zip(connections, requests, strict=True):
            with contextlib.suppress(ConnectionError):  # the program may have ended
                connection.sendall(request[-1:])
        return [answer_on(connection) for connection in connections]


def answer_on(connection: socket.socket) -> bytes:
    """Return what comes back, or nothing if the program has ended."""
    with contextlib.suppress(ConnectionError):
        return read_to_the_end(connection)
    return b""


def reset(connection: socket.socket) -> None:
    """Close a connection as a crash does: with a reset, and without a goodbye."""
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def status_of(answer: bytes) -> int:
    """Return the status in an answer, which has to begin with a status line."""
    version, status = answer.split(b" ", 2)[:2]
    assert version in (b"HTTP/1.0", b"HTTP/1.1"), answer
    return int(status)


def client_hello() -> bytes:
    """Return what a browser sends first to an https address."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


class Wait:
    """A script that waits, and the callback that it waits for, of a person who has logged in."""

    def __init__(self, script: Script, sandbox: Sandbox) -> None:
        self.script, self.sandbox = script, sandbox
        self.state = script.state()
        self.callback = answer_login_page(script.url())
        uri = urlsplit(self.callback)
        self.port, self.target = uri.port or 0, f"{uri.path}?{uri.query}"

    def refuses(self, request: bytes) -> bool:
        """Whether the answer to a request is a refusal that a client understands as its fault."""
        return status_of(send(self.port, request)) in {*range(400, 500), 501, 505}

    def goes_on(self) -> bool:
        """Whether the real callback still leads to the account, and is the first to do so."""
        page = visit(self.callback)
        return (
            "The login came through" in page.text
            and self.script.status() == 0
            and self.sandbox.exchanges == 1
        )


@pytest.fixture
def wait(sandbox: Sandbox, start: Start) -> Wait:
    return Wait(start(**sandbox.environment), sandbox)


# --- What does not end the wait -------------------------------------------------------------------


def test_a_stray_favicon_does_not_end_the_wait(wait: Wait) -> None:
    assert status_of(send(wait.port, get("/favicon.ico"))) == 404
    assert wait.goes_on()
    assert wait.script.stderr == ""


def test_a_request_for_another_path_does_not_end_the_wait(wait: Wait) -> None:
    query = f"code=a-code&state={wait.state}"
    targets = [
        "/",
        f"/?{query}",
        f"/oauth/?{query}",
        f"/oauth/callback?{query}",
        f"/OAUTH?{query}",
        f"/%6Fauth?{query}",
        f"/oauth;x?{query}",
        f"/oauth%3F{query}",
        f"/favicon.ico?{query}",
        "*",
    ]
    for target in targets:
        assert status_of(send(wait.port, get(target))) == 404, target
    assert wait.goes_on()
    assert wait.script.stderr == ""


def test_the_path_without_an_answer_does_not_end_the_wait(wait: Wait) -> None:
    state = f"state={wait.state}"
    queries = ["", "?", "?hello=world", f"?{state}", f"?{state}&code=", f"?{state}&code"]
    queries += [f"?{state}&error=", f"?{state}&code=&error=", f"?{state}&error_description=no"]
    for query in queries:
        assert wait.refuses(get(f"/oauth{query}")), query
    assert wait.goes_on()
    assert wait.script.stderr == ""


@pytest.mark.parametrize("answer", ["code=a-code", "error=access_denied"])
def test_an_answer_with_a_wrong_state_does_not_end_the_wait(wait: Wait, answer: str) -> None:
    state = wait.state
    wrong = ["another", state[:1], state[:-1], state[1:], f"{state}x", state * 2, state.swapcase()]
    odd = [f"{state}%20", f"+{state}", f"{state}%00", "%00", "%", "%zz", "%FF%FE", "%ED%A0%80"]
    non_ascii = ["ü", "%C3%BC", f"{state}ü", "%E2%82%AC" * 43]
    absent = ["", "&state", "&state=", f"&STATE={state}", f"&state%20={state}", f";state={state}"]
    for parameter in absent + [f"&state={value}" for value in wrong + odd + non_ascii]:
        assert wait.refuses(get(f"/oauth?{answer}{parameter}")), parameter
    assert wait.goes_on()


def test_a_repeated_parameter_does_not_end_the_wait(wait: Wait) -> None:
    state, code = f"state={wait.state}", "code=a-code"
    queries = [
        f"{code}&{state}&{code}",
        f"{code}&{state}&code=another",
        f"{code}&{state}&code=",
        f"{code}&{state}&c%6Fde=another",
        f"{code}&{state}&{state}",
        f"{code}&state=another&{state}",
        f"{code}&{state}&state=another",
        f"{code}&state=&{state}",
        f"error=access_denied&{state}&error=access_denied",
        f"{code}&{state}&unknown=1&unknown=2",
        f"{code}&{state}&unknown&unknown",
    ]
    for query in queries:
        assert wait.refuses(get(f"/oauth?{query}")), query
    assert wait.goes_on()


def test_a_code_and_an_error_together_do_not_end_the_wait(wait: Wait) -> None:
    assert wait.refuses(get(f"/oauth?code=a-code&error=access_denied&state={wait.state}"))
    assert wait.goes_on()


def test_thousands_of_parameters_do_not_end_the_wait(wait: Wait) -> None:
    thousands = "".join(f"&p{number}=" for number in range(5000))
    assert wait.refuses(get(wait.target + thousands))
    assert wait.goes_on()


def test_another_method_does_not_end_the_wait(wait: Wait) -> None:
    """Not even with the real code, which it does not spend either."""
    methods = ["HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "get", "X"]
    for method in methods:
        request = get(wait.target).replace(b"GET", method.encode())
        assert status_of(send(wait.port, request)) in (405, 501), method
    assert wait.goes_on()
    assert wait.script.stderr == ""


def test_the_answer_to_head_has_no_body(wait: Wait) -> None:
    answer = send(wait.port, get(wait.target).replace(b"GET", b"HEAD"))
    assert answer.endswith(b"\r\n\r\n")


def test_a_cors_preflight_is_not_allowed_anything(wait: Wait) -> None:
    preflight = get(wait.target).replace(b"GET", b"OPTIONS").removesuffix(b"\r\n")
    preflight += b"Origin: https://example.com\r\nAccess-Control-Request-Method: GET\r\n\r\n"
    answer = send(wait.port, preflight)
    assert status_of(answer) in (405, 501)
    assert b"access-control" not in answer.lower()
    assert wait.goes_on()


def test_a_post_with_a_large_body_gets_its_answer_and_no_reset(wait: Wait) -> None:
    length = 5_000_000
    head = get(wait.target).replace(b"GET", b"POST").removesuffix(b"\r\n")
    head += f"Content-Length: {length}\r\n\r\n".encode()
    assert status_of(send(wait.port, head + b"x" * length)) in (405, 501)
    assert wait.goes_on()


def test_bytes_that_are_no_http_do_not_end_the_wait(wait: Wait) -> None:
    requests = [
        client_hello(),
        bytes(1000),
        bytes(range(256)),
        bytes(reversed(range(256))),
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"x" * 200_000,
    ]
    for request in requests:
        assert wait.refuses(request), request[:50]
    assert wait.goes_on()
    assert wait.script.stderr == ""


def test_a_malformed_request_line_does_not_end_the_wait(wait: Wait) -> None:
    target = wait.target
    lines = [
        "GET",
        target,
        f"{target} HTTP/1.1",
        f"GET{target} HTTP/1.1",
        f"GET {target}HTTP/1.1",
        f"GET {target} HTTP/1.1 HTTP/1.1",
        f"GET {target.replace('?', ' ?')} HTTP/1.1",
        f"GET {target} HTTP",
        f"GET {target} HTTP/1",
        f"GET {target} HTTP/1.",
        f"GET {target} HTTP/1.1.1",
        f"GET {target} HTTP/one",
        f"GET {target} HTTPS/1.1",
        f"GET {target} http/1.1",
        f"GET http://[{target} HTTP/1.1",
    ]
    for line in lines:
        assert wait.refuses(f"{line}\r\nHost: localhost\r\n\r\n".encode()), line
    assert wait.goes_on()
    assert wait.script.stderr == ""


@pytest.mark.parametrize("version", ["HTTP/0.9", "HTTP/2.0", "HTTP/11.1"])
def test_another_version_of_http_does_not_end_the_wait(wait: Wait, version: str) -> None:
    assert wait.refuses(f"GET {wait.target} {version}\r\n\r\n".encode())
    assert wait.goes_on()


def test_a_request_without_a_version_does_not_end_the_wait(wait: Wait) -> None:
    """As HTTP/0.9 had it; what is cut off looks the same."""
    for ending in ("\r\n", "\r\n\r\n", "\n", " \r\n", ""):
        assert wait.refuses(f"GET {wait.target}{ending}".encode()), ending
    assert wait.goes_on()


def test_a_request_line_that_is_cut_off_does_not_end_the_wait(wait: Wait) -> None:
    """The state is whole, so a part of the code would be taken for it."""
    start = f"GET /oauth?state={wait.state}&code="
    line = f"{start}{'c' * 32} HTTP/1.1"
    for length in range(len(start), len(line)):
        assert wait.refuses(line[:length].encode()), line[:length]
    assert wait.goes_on()


def test_an_overlong_request_line_does_not_end_the_wait(wait: Wait) -> None:
    assert wait.refuses(get(f"{wait.target}&x={'x' * 66_000}"))
    assert wait.goes_on()


def test_an_overlong_header_does_not_end_the_wait(wait: Wait) -> None:
    assert wait.refuses(get(wait.target).replace(b"localhost", b"x" * 70_000))
    assert wait.goes_on()


def test_too_many_headers_do_not_end_the_wait(wait: Wait) -> None:
    headers = "".join(f"X-{number}: x\r\n" for number in range(500))
    assert wait.refuses(get(wait.target).removesuffix(b"\r\n") + headers.encode() + b"\r\n")
    assert wait.goes_on()


def test_a_connection_without_a_request_does_not_end_the_wait(wait: Wait) -> None:
    for sent in (b"", b"\r\n", b"\n\n", b"  \r\n\r\n"):
        send(wait.port, sent)
    assert wait.goes_on()
    assert wait.script.stderr == ""


def test_connections_that_are_reset_do_not_end_the_wait(wait: Wait) -> None:
    whole = get("/favicon.ico")
    for sent in (b"", b"G", b"GET /oa", whole[:-2], whole, whole.replace(b"GET", b"POST")):
        for page_awaited in (False, True):
            connection = connect(wait.port)
            connection.sendall(sent)
            if page_awaited and sent.endswith(b"\r\n\r\n"):
                connection.recv(1)
            reset(connection)
    assert wait.goes_on()
    assert wait.script.stderr == ""


def test_a_browser_that_hangs_up_before_the_page_still_logs_in(wait: Wait) -> None:
    connection = connect(wait.port)
    connection.sendall(get(wait.target))
    reset(connection)
    assert wait.script.status() == 0
    assert wait.script.stderr == ""


# --- A foreign state ------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["code=a-code", "error=access_denied"])
def test_a_foreign_state_is_told_with_what_to_do(wait: Wait, answer: str) -> None:
    page = send(wait.port, get(f"/oauth?{answer}&state=foreign-value"))
    assert FOREIGN_STATE.encode() in page
    assert wait.goes_on()
    _, told, advice = wait.script.stderr.partition(FOREIGN_STATE)
    assert told
    assert len(advice.splitlines()) == 2


def test_a_flood_of_foreign_states_is_told_once_and_not_repeated(wait: Wait) -> None:
    foreign = get("/oauth?code=foreign-code&state=foreign-value")
    answers = send_at_once(wait.port, [foreign] * 50)
    assert [answer for answer in answers if status_of(answer) // 100 != 4] == []
    assert [answer for answer in answers if b"foreign-value" in answer] == []
    assert wait.goes_on()
    assert wait.script.stderr.count(FOREIGN_STATE) == 1
    assert "foreign-" not in wait.script.stderr


# --- The first answer wins ------------------------------------------------------------------------


def requests_for_tokens(sandbox: Sandbox) -> int:
    path = urlsplit(sandbox.environment["TOKEN_URL"]).path
    return sandbox.requests.count(("POST", path))


def test_eight_callbacks_at_once_exchange_the_code_once(wait: Wait) -> None:
    answers = send_at_once(wait.port, [get(wait.target)] * 8)
    assert any(b"The login came through" in answer for answer in answers)
    assert wait.script.status() == 0
    assert wait.sandbox.exchanges == 1
    assert requests_for_tokens(wait.sandbox) == 2  # the code, and later the refresh
    assert wait.script.stderr == ""


def test_eight_callbacks_of_which_one_is_an_error_have_one_outcome(wait: Wait) -> None:
    error = get(f"/oauth?error=access_denied&state={wait.state}")
    send_at_once(wait.port, [*[get(wait.target)] * 3, error, *[get(wait.target)] * 4])
    refused = "access_denied" in wait.script.stderr
    assert (wait.script.status(), wait.sandbox.exchanges) == ((1, 0) if refused else (0, 1))


def test_an_error_that_comes_first_wins_over_a_code(wait: Wait) -> None:
    send(wait.port, get(f"/oauth?error=access_denied&state={wait.state}"))
    with contextlib.suppress(OSError):  # the port may be closed by now
        send(wait.port, get(wait.target))
    assert wait.script.status() == 1
    assert wait.sandbox.exchanges == 0


def test_the_port_is_closed_after_the_callback(sandbox: Sandbox, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/token"
        wait = Wait(start(**{**sandbox.environment, "TOKEN_URL": url}), sandbox)
        visit(wait.callback)
        with silent.accept()[0]:  # the script goes on, and waits for its tokens
            deadline = time.monotonic() + PATIENCE
            for address in ("127.0.0.1", "::1"):
                while can_connect(address, wait.port):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            assert wait.script.process.poll() is None


# --- Connections ----------------------------------------------------------------------------------


def test_an_idle_connection_is_not_kept_for_long(wait: Wait) -> None:
    with socket.create_connection(("127.0.0.1", wait.port), timeout=PATIENCE) as idle:
        assert idle.recv(1) == b""


def test_idle_connections_and_half_requests_delay_neither_the_page_nor_the_end(wait: Wait) -> None:
    halves = [b"GET", b"GET /oauth?code=", get(wait.target)[:-2], b"POST / HTTP/1.1\r\nHo", b"\x16"]
    with contextlib.ExitStack() as stack:
        for sent in [b""] * 100 + halves * 4:
            stack.enter_context(connect(wait.port)).sendall(sent)
        began = time.monotonic()
        assert "The login came through" in visit(wait.callback).text
        assert time.monotonic() - began < 2
        assert wait.script.status() == 0
        assert time.monotonic() - began < 4


# --- Addresses and ports --------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_localhost_gets_the_callback_on_either_address(wait: Wait, address: str) -> None:
    assert b"The login came through" in send(wait.port, get(wait.target), address)
    assert wait.script.status() == 0


def addresses_of_this_machine() -> Iterator[str]:
    """Yield addresses of this machine that are not those of localhost, as far as it has some."""
    yield "127.0.0.2"
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))  # this looks up the way there, and sends nothing
            yield probe.getsockname()[0]


def test_other_addresses_of_the_machine_are_not_served(wait: Wait) -> None:
    reached = [it for it in addresses_of_this_machine() if can_connect(it, wait.port)]
    assert reached == []
    assert wait.goes_on()


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "127.0.0.1", pytest.param("[::1]", marks=needs_ipv6)]
)
def test_each_loopback_host_works_in_the_redirect_uri(start: Start, host: str) -> None:
    with Sandbox(redirect_uri=f"http://{host}:{free_port()}/oauth", port=0) as sandbox:
        script = start(**sandbox.environment)
        assert "The login came through" in log_in(script).text
        assert script.status() == 0


@pytest.mark.parametrize("path", ["", "/", "/a/long~path/with-a.dot_/"])
def test_each_path_works_in_the_redirect_uri(start: Start, path: str) -> None:
    with Sandbox(redirect_uri=f"http://localhost:{free_port()}{path}", port=0) as sandbox:
        script = start(**sandbox.environment)
        assert "The login came through" in log_in(script).text
        assert script.status() == 0


def listen(address: str, port: int, dual_stack: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, dualstack_ipv6=dual_stack)


@pytest.mark.parametrize(
    ("address", "dual_stack"),
    [
        ("127.0.0.1", False),
        pytest.param("::1", False, marks=needs_ipv6),
        pytest.param("0.0.0.0", False, marks=linux_only),
        pytest.param("::", False, marks=[needs_ipv6, linux_only]),
        pytest.param("::", True, marks=[needs_ipv6, linux_only]),
    ],
)
def test_a_port_in_use_is_an_error_before_the_url_is_printed(
    sandbox: Sandbox, start: Start, address: str, dual_stack: bool
) -> None:
    port = urlsplit(sandbox.environment["REDIRECT_URI"]).port or 0
    with listen(address, port, dual_stack):
        script = start(**sandbox.environment)
        assert script.status() == 1
    assert "response_type" not in script.stdout
    assert script.stderr.startswith("Error: ")
    assert str(port) in script.stderr
    assert "REDIRECT_URI" in script.stderr
    assert "Traceback" not in script.stderr


def test_a_second_run_at_the_same_time_leaves_the_first_alone(wait: Wait, start: Start) -> None:
    assert start(**wait.sandbox.environment).status() == 1
    assert wait.goes_on()


def can_bind(address: str, port: int, option: str = "") -> bool:
    """Whether a program could take a port, with a socket option where there is such a one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family) as program:
        if hasattr(socket, option):
            program.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
        program.bind((address, port))
        return True
    return False


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_another_program_can_not_take_the_port(wait: Wait, address: str) -> None:
    assert not can_bind(address, wait.port, "SO_REUSEADDR")
    assert not can_bind(address, wait.port, "SO_REUSEPORT")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no port back")
def test_a_second_run_right_after_the_first_can_use_the_port_again(
    wait: Wait, start: Start
) -> None:
    with connect(wait.port) as browser:
        browser.sendall(get(wait.target))
        read_to_the_end(browser)  # so it is the server that closes first, and has to wait
    assert wait.script.status() == 0
    assert not can_bind("127.0.0.1", wait.port)
    second = start(**wait.sandbox.environment)
    log_in(second)
    assert second.status() == 0


# --- The page -------------------------------------------------------------------------------------


def test_no_page_is_stored_or_loads_anything_or_tells_its_address(wait: Wait) -> None:
    requests = [
        get("/favicon.ico"),
        get("/oauth?code=1&state=2"),
        get(wait.target).replace(b"GET", b"POST"),
        b"\x16\x03\x01",
        get(wait.target),
    ]
    for request in requests:
        head, _, page = send(wait.port, request).decode().lower().partition("\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
        assert headers["cache-control"] == "no-store", request
        assert headers["referrer-policy"] == "no-referrer", request
        assert "default-src 'none'" in headers["content-security-policy"], request
        assert headers["content-type"] == "text/html; charset=utf-8", request
        assert int(headers["content-length"]) == len(page.encode()), request
        assert not any(it in page for it in ("src=", "href=", "url(", "@import", "//", "<script"))


@pytest.mark.parametrize("parameter", ["error", "error_description"])
def test_the_page_escapes_what_it_repeats(wait: Wait, parameter: str) -> None:
    markup = "%3Cscript%3Ealert(1)%3C/script%3E%3Cb%20a=%22'%26amp;"
    error = "" if parameter == "error" else "&error=access_denied"
    page = visit(
        f"{wait.callback.split('?')[0]}?state={wait.state}{error}&{parameter}={markup}"
    ).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;b a=&quot;&#x27;&amp;amp;" in page
    assert "<script" not in page
    assert "<b " not in page


def test_requests_are_not_logged(wait: Wait) -> None:
    send(wait.port, get("/favicon.ico"))
    send(wait.port, b"nonsense")
    assert wait.goes_on()
    assert wait.script.stderr == ""
    assert "GET" not in wait.script.stdout
    assert "session_state" not in wait.script.stdout
