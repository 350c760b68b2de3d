"""What people see around the login: their terminal, their browser, and Ctrl+C."""

import contextlib
import itertools
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from sandbox import Sandbox
from script import PATIENCE, SCRIPT, Script, answer_login_page, ipv6_works, log_in, visit

Start = Callable[..., Script]
StartWithBrowser = Callable[..., Script]

can_interrupt = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows can't send Ctrl+C to one process alone"
)
posix_streams = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows starts a program anew instead of replacing one"
)
posix_terminal = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no /dev/tty")
only_our_browsers = pytest.mark.skipif(
    sys.platform in ("win32", "darwin"), reason="here it is the real browser that opens then"
)
has_a_full_device = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="this system has no /dev/full"
)

needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")

# Options of Python that put a terminal around the script. "\x03" typed there is Ctrl+C.
IN_A_TERMINAL = (
    "-c",
    "import os, pty, sys; status = pty.spawn([sys.executable, *sys.argv[1:]]);"
    "sys.exit(os.waitstatus_to_exitcode(status))",
)


def after(statements: str) -> tuple[str, ...]:
    """Return options of Python that execute statements before the script replaces them."""
    then = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return ("-c", f"import os, sys; {statements}; {then}")


INTO_A_CLOSED_PIPE = after("reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)")
INTO_A_FULL_DISK = after("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
ERRORS_INTO_A_FULL_DISK = after("os.dup2(os.open('/dev/full', os.O_WRONLY), 2)")


def shows_an_exception(script: Script) -> bool:
    return any(it in script.stdout + script.stderr for it in ("Traceback", "Exception", "Warning"))


def configuration_file(folder: Path, configuration: dict[str, str]) -> str:
    """Write a file with the configuration, and return its path."""
    file = folder / "config.env"
    lines = [f"{key}='{value}'\n" for key, value in configuration.items()]
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def silent_server() -> Iterator[socket.socket]:
    """A server that accepts connections, and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        yield server


# --- Ctrl+C ---------------------------------------------------------------------------------------


def expect_the_end(script: Script) -> None:
    """Expect that the script ends within a second, and without a word."""
    began = time.monotonic()
    assert script.status() == 130
    assert time.monotonic() - began < 1
    assert script.stderr == ""


@can_interrupt
def test_ctrl_c_ends_the_wait_for_the_callback(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    script.until("3. Callback")
    script.interrupt()
    expect_the_end(script)


@can_interrupt
def test_ctrl_c_ends_the_wait_also_if_a_browser_is_connected(
    sandbox: Sandbox, start: Start
) -> None:
    script = start(**sandbox.environment)
    script.until("3. Callback")
    port = urlsplit(sandbox.environment["REDIRECT_URI"]).port or 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /oauth")
        visit(f"http://127.0.0.1:{port}/")  # now the server has the first connection, too
        script.interrupt()
        expect_the_end(script)


@can_interrupt
@pytest.mark.parametrize("key", ["TOKEN_URL", "TEST_API_ENDPOINT"])
def test_ctrl_c_ends_a_request_that_hangs(
    sandbox: Sandbox, start: Start, silent_server: socket.socket, key: str
) -> None:
    url = f"http://127.0.0.1:{silent_server.getsockname()[1]}/"
    script = start(**{**sandbox.environment, key: url})
    log_in(script)
    connection, _ = silent_server.accept()
    with connection:
        assert connection.recv(1)
        script.interrupt()
        expect_the_end(script)


@can_interrupt
def test_ctrl_c_ends_the_paste_prompt(sandbox: Sandbox, start: Start) -> None:
    script = start("--paste", **sandbox.environment)
    script.until("Paste the address")
    script.interrupt()
    expect_the_end(script)


@can_interrupt
@pytest.mark.parametrize("times", [2, 20])
def test_ctrl_c_may_be_pressed_more_than_once(sandbox: Sandbox, start: Start, times: int) -> None:
    script = start(**sandbox.environment)
    script.until("3. Callback")
    for _ in range(times):
        script.interrupt()
    expect_the_end(script)


@can_interrupt
def test_ctrl_c_while_the_program_still_loads_its_libraries_shows_no_traceback(
    start: Start, tmp_path: Path
) -> None:
    """A library that takes its time stands in for a slow disk."""
    (tmp_path / "dotenv.py").write_text("import sys; print('loading', flush=True); input()")
    script = start(PYTHONPATH=str(tmp_path))
    script.until("loading")
    script.interrupt()
    expect_the_end(script)


# --- The browser ----------------------------------------------------------------------------------

BROWSER = """
import os, socket, sys

print("noise on stdout", flush=True)
print("noise on stderr", file=sys.stderr, flush=True)
try:
    terminal = os.open("/dev/tty", os.O_RDWR)
    os.write(terminal, b"noise on the terminal")
except OSError:
    terminal = None
port, status, url = sys.argv[1:]
with socket.create_connection(("127.0.0.1", int(port))) as test:
    test.sendall(f"{url} {terminal} {os.getppid()}\\n".encode())
    while byte := test.recv(1):
        test.sendall(byte)
sys.exit(int(status))
"""


class Window:
    """What a browser was started for: it stays open until it is closed.

    url, has_terminal; parent: the id of the process that started it
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.url, terminal, parent = connection.makefile().readline().split()
        self.has_terminal, self.parent = terminal != "None", int(parent)

    def is_open(self) -> bool:
        """Whether the browser still answers."""
        self._connection.sendall(b"?")
        return self._connection.recv(1) == b"?"

    def close(self) -> None:
        self._connection.close()


class FakeBrowser:
    """A noisy browser that tells the test what it is asked to open, and blocks.

    environment: the variables that make it the browser; status: with which it will end
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack, status: int = 0) -> None:
        self._stack = stack
        self._server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._server.settimeout(PATIENCE)
        program = folder / "browser.py"
        program.write_text(BROWSER)
        port = self._server.getsockname()[1]
        words = [Path(sys.executable).as_posix(), program.as_posix(), str(port), str(status)]
        self.environment = {"BROWSER": f"{shlex.join(words)} %s"}

    def window(self) -> Window:
        """Wait until the browser has started, and return its window."""
        connection = self._stack.enter_context(self._server.accept()[0])
        connection.settimeout(PATIENCE)
        return Window(connection)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path, stack: contextlib.ExitStack) -> FakeBrowser:
    return FakeBrowser(tmp_path, stack)


@pytest.fixture
def start_with_browser(
    environment: dict[str, str], stack: contextlib.ExitStack
) -> StartWithBrowser:
    """Start the script without --no-browser."""

    def start_script(*options: str, python: tuple[str, ...] = (), **variables: str) -> Script:
        script = Script(*options, environment={**environment, **variables}, python=python)
        return stack.enter_context(script)

    return start_script


def test_the_browser_opens_the_authorize_url(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, browser: FakeBrowser
) -> None:
    script = start_with_browser(**sandbox.environment, **browser.environment)
    assert browser.window().url == script.url()


def test_a_file_called_webbrowser_is_not_run_in_place_of_the_library(
    sandbox: Sandbox,
    start_with_browser: StartWithBrowser,
    browser: FakeBrowser,
    tmp_path: Path,
) -> None:
    (tmp_path / "webbrowser.py").write_text("")
    variables = {**sandbox.environment, **browser.environment, "PYTHONPATH": str(tmp_path)}
    script = start_with_browser(**variables)
    assert browser.window().url == script.url()


def test_a_browser_that_blocks_and_makes_noise_changes_nothing(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, browser: FakeBrowser
) -> None:
    script = start_with_browser(**sandbox.environment, **browser.environment)
    window = browser.window()
    log_in(script)
    began = time.monotonic()
    assert script.status() == 0  # this waits for the end of the output, too
    assert time.monotonic() - began < 5
    assert window.is_open()
    assert "noise" not in script.stdout + script.stderr
    assert script.stderr == ""


@only_our_browsers
@pytest.mark.parametrize("command", ["/does/not/exist", "/", "false", "%s", "'%s"])
def test_a_browser_that_can_not_be_opened_changes_nothing(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, command: str
) -> None:
    script = start_with_browser(**sandbox.environment, BROWSER=command)
    log_in(script)
    assert script.status() == 0
    assert script.stderr == ""


@only_our_browsers
def test_a_url_that_is_too_long_for_the_system_changes_nothing(
    start_with_browser: StartWithBrowser, sandbox: Sandbox, tmp_path: Path
) -> None:
    """No process can be started with it, so the first line of stderr is the time-out's."""
    configuration = {**sandbox.environment, "AUTH_URL": f"https://localhost/{'x' * 200_000}"}
    file = configuration_file(tmp_path, configuration)
    script = start_with_browser("--config", file, "--timeout", "1")
    assert script.status() == 1
    assert script.stderr.startswith("Error: No callback")


@pytest.mark.parametrize("option", ["--no-browser", "--paste"])
def test_no_browser_is_opened_if_it_is_not_wanted(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, browser: FakeBrowser, option: str
) -> None:
    """One that were, would be there before the one of a later run."""
    unwanted = start_with_browser(option, **sandbox.environment, **browser.environment)
    callback = answer_login_page(unwanted.url())
    if option == "--paste":
        unwanted.type(f"{callback}\n")
    else:
        visit(callback)
    assert unwanted.status() == 0
    later = start_with_browser(**sandbox.environment, **browser.environment)
    assert browser.window().url == later.url()


@posix_terminal
def test_the_browser_has_no_terminal(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, browser: FakeBrowser
) -> None:
    script = start_with_browser(python=IN_A_TERMINAL, **sandbox.environment, **browser.environment)
    assert not browser.window().has_terminal
    log_in(script)
    assert script.status() == 0
    assert "noise" not in script.stdout


@posix_terminal
@only_our_browsers
def test_no_text_browser_takes_over_the_terminal(
    sandbox: Sandbox,
    start_with_browser: StartWithBrowser,
    tmp_path: Path,
    stack: contextlib.ExitStack,
) -> None:
    """As over SSH. The browser before them fails, so it would be their turn."""
    started = tmp_path / "started"
    for name in ("www-browser", "links", "elinks", "lynx", "w3m"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} >>"{started}"\n')
        program.chmod(0o755)
    browser = FakeBrowser(tmp_path, stack, status=1)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    variables = {**sandbox.environment, **browser.environment, "PATH": path, "TERM": "xterm"}
    script = start_with_browser(python=IN_A_TERMINAL, **variables)
    script.until("3. Callback")
    window = browser.window()
    window.close()
    wait_until(lambda: not is_running(window.parent))
    assert not started.exists()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@can_interrupt
def test_ctrl_c_in_the_terminal_ends_the_script_while_the_browser_starts_but_not_the_browser(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, browser: FakeBrowser
) -> None:
    script = start_with_browser(python=IN_A_TERMINAL, **sandbox.environment, **browser.environment)
    window = browser.window()
    script.type("\x03")
    assert script.status() == 130
    assert window.is_open()
    assert not shows_an_exception(script)


# --- Closed and full streams ----------------------------------------------------------------------


@posix_streams
@pytest.mark.parametrize("options", [[], ["--paste"], ["--help"]])
def test_a_stdout_that_is_closed_from_the_start_ends_quietly(
    sandbox: Sandbox, start: Start, options: list[str]
) -> None:
    script = start(*options, python=INTO_A_CLOSED_PIPE, **sandbox.environment)
    assert script.status() != 0
    assert script.stderr == ""


@posix_streams
def test_a_stdout_that_is_closed_later_ends_quietly(
    sandbox: Sandbox, environment: dict[str, str]
) -> None:
    """As by `| head -3`."""
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--no-browser"],
        env={**environment, **sandbox.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as script:
        assert script.stdout
        assert script.stderr
        lines = list(itertools.takewhile(lambda line: "--paste" not in line, script.stdout))
        script.stdout.close()  # all is read that comes before the callback
        url = next(line for line in lines if "response_type" in line)
        visit(answer_login_page(url.strip()))
        assert script.wait(PATIENCE) == 1
        assert script.stderr.read() == ""


@has_a_full_device
@pytest.mark.parametrize("options", [[], ["--paste"]])
def test_a_full_disk_under_stdout_is_one_error(
    sandbox: Sandbox, start: Start, options: list[str]
) -> None:
    script = start(*options, python=INTO_A_FULL_DISK, **sandbox.environment)
    assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert "No space left" in script.stderr
    assert script.stderr.count("\n") == 2
    assert not shows_an_exception(script)


@has_a_full_device
def test_a_full_disk_under_the_help_shows_no_exception(start: Start) -> None:
    script = start("--help", python=INTO_A_FULL_DISK)
    assert script.status() != 0
    assert not shows_an_exception(script)


@has_a_full_device
def test_a_full_disk_under_stderr_keeps_back_no_answer(sandbox: Sandbox, start: Start) -> None:
    """The warning about the foreign state can't be printed, and nothing else comes of it."""
    script = start(python=ERRORS_INTO_A_FULL_DISK, **sandbox.environment)
    callback = answer_login_page(script.url())
    uri = sandbox.environment["REDIRECT_URI"]
    assert visit(f"{uri}?code=a-code&state=another").status_code == 403
    assert "The login came through" in visit(callback).text
    assert script.status() == 0
    assert script.stdout.count('"company"') == 2


@posix_streams
@pytest.mark.parametrize(
    "closed",
    [
        it
        for count in (1, 2, 3)
        for it in itertools.combinations(["stdin", "stdout", "stderr"], count)
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("option", ["--paste", "--timeout=0.2", "--timeout=0"])
def test_standard_streams_that_are_closed_cause_no_exception(
    sandbox: Sandbox, start: Start, closed: tuple[str, ...], option: str
) -> None:
    script = start(option, python=without(closed), **sandbox.environment)
    script.close_stdin()
    if option != "--timeout=0":
        assert script.status() == 1
    elif "stderr" not in closed:
        assert script.status() == 2
    else:  # where argparse itself fails in Python 3.10
        assert script.status() in (1, 2)
    assert not shows_an_exception(script)


def without(streams: tuple[str, ...]) -> tuple[str, ...]:
    return after("; ".join(f"os.close(sys.{name}.fileno())" for name in streams))


@posix_streams
def test_a_login_without_any_standard_stream_works(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, tmp_path: Path
) -> None:
    """The browser has the URL."""
    person = tmp_path / "person.py"
    person.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r});"
        "import script; script.visit(script.answer_login_page(sys.argv[1]))"
    )
    command = f"{shlex.join([sys.executable, str(person)])} %s"
    closed = without(("stdin", "stdout", "stderr"))
    script = start_with_browser(python=closed, **sandbox.environment, BROWSER=command)
    assert script.status() == 0
    assert sandbox.exchanges == 1


# --- What is shown --------------------------------------------------------------------------------


def test_a_time_out_tells_the_usual_reasons(sandbox: Sandbox, start: Start) -> None:
    script = start("--timeout", "0.3", **sandbox.environment)
    assert script.status() == 1
    assert "0.3 seconds" in script.stderr
    for reason, check in (
        ("Invalid parameter: redirect_uri", "REDIRECT_URI"),
        ("Client not found", "CLIENT_ID"),
        ("another machine", "--paste"),
        ("time", "--timeout"),
    ):
        assert any(reason in line and check in line for line in script.stderr.splitlines()), reason
    assert not shows_an_exception(script)


STEERING = (
    "\0 \a \b \t \v \f \r \x1b[2J \x1b]0;title\x07 \x7f \x85 \x9b31m \xa0 \xad "
    "\u061c \u200b \u200e \u200f \u2028 \u2029 \u202a \u202e \u2066 \u2069 \ufeff \U000e0041"
    "\nError: a line of its own"
)


@pytest.mark.parametrize("parameter", ["error", "error_description"])
def test_a_callback_can_not_steer_the_terminal(
    sandbox: Sandbox, start: Start, parameter: str
) -> None:
    script = start(**sandbox.environment)
    uri, error = sandbox.environment["REDIRECT_URI"], f"{quote(STEERING)}%ED%A0%80%FFend"
    before = "" if parameter == "error" else "&error=access_denied"
    visit(f"{uri}?state={script.state()}{before}&{parameter}={error}")
    assert script.status() == 1
    shown = script.stdout + script.stderr
    assert [it for it in shown if not it.isprintable() and it != "\n"] == []
    assert script.stderr.count("\n") == 2
    assert "a line of its own" in script.stderr
    assert "end" in script.stderr


def test_a_long_error_in_a_callback_does_not_flood_the_terminal(
    sandbox: Sandbox, start: Start
) -> None:
    script = start(**sandbox.environment)
    uri = sandbox.environment["REDIRECT_URI"]
    visit(f"{uri}?error=other&error_description={'long ' * 5000}&state={script.state()}")
    assert script.status() == 1
    assert "long long" in script.stderr
    assert len(script.stderr) < 2000


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"PYTHONIOENCODING": "ascii"}, id="ASCII"),
        pytest.param(
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            marks=pytest.mark.skipif(sys.platform == "win32", reason="Windows has code pages"),
            id="the C locale",
        ),
    ],
)
def test_a_terminal_without_utf_8_gets_escapes(
    sandbox: Sandbox, start: Start, tmp_path: Path, variables: dict[str, str]
) -> None:
    script = start("--config", configuration_file(tmp_path, sandbox.environment), **variables)
    log_in(script)
    assert script.status() == 0
    assert r"M\xfcller" in script.stdout
    assert script.stderr == ""


def test_an_error_in_a_terminal_without_utf_8_gets_escapes(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment, PYTHONIOENCODING="ascii")
    uri = sandbox.environment["REDIRECT_URI"]
    visit(f"{uri}?error=other&error_description=Grüße 日本&state={script.state()}")
    assert script.status() == 1
    assert r"Gr\xfc\xdfe \u65e5\u672c" in script.stderr
    assert not shows_an_exception(script)


# --- Python's own checks --------------------------------------------------------------------------

DEVELOPMENT = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}


def test_a_login_causes_no_warning(sandbox: Sandbox, start: Start, tmp_path: Path) -> None:
    script = start("--config", configuration_file(tmp_path, sandbox.environment), **DEVELOPMENT)
    log_in(script)
    assert script.status() == 0
    assert script.stderr == ""


def test_a_login_with_idle_connections_causes_no_warning(
    sandbox: Sandbox, start: Start, stack: contextlib.ExitStack
) -> None:
    script = start(**sandbox.environment, **DEVELOPMENT)
    callback = answer_login_page(script.url())
    port = urlsplit(callback).port or 0
    for sent in (b"", b"GET /oauth", b"GET / HTTP/1.1\r\n\r\n") * 5:
        stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(sent)
    visit(callback)
    assert script.status() == 0
    assert script.stderr == ""


def test_a_login_with_a_browser_that_blocks_causes_no_warning(
    sandbox: Sandbox, start_with_browser: StartWithBrowser, browser: FakeBrowser
) -> None:
    script = start_with_browser(**sandbox.environment, **browser.environment, **DEVELOPMENT)
    window = browser.window()
    log_in(script)
    assert script.status() == 0
    assert script.stderr == ""
    assert window.is_open()


def test_a_paste_login_causes_no_warning(sandbox: Sandbox, start: Start) -> None:
    script = start("--paste", **sandbox.environment, **DEVELOPMENT)
    script.type(f"{answer_login_page(script.url())}\n")
    assert script.status() == 0
    assert script.stderr == ""


def test_a_time_out_causes_no_warning(sandbox: Sandbox, start: Start) -> None:
    script = start("--timeout", "0.2", **sandbox.environment, **DEVELOPMENT)
    assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert not shows_an_exception(script)


def test_the_end_of_the_callback_server_causes_no_warning(
    sandbox: Sandbox, start: Start, silent_server: socket.socket
) -> None:
    url = f"http://127.0.0.1:{silent_server.getsockname()[1]}/"
    script = start(**{**sandbox.environment, "TOKEN_URL": url}, **DEVELOPMENT)
    callback = answer_login_page(script.url())
    visit(callback)
    with silent_server.accept()[0]:
        wait_until(lambda: not is_served(urlsplit(callback).port or 0))
    assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert not shows_an_exception(script)


def is_served(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_a_port_in_use_causes_no_warning(sandbox: Sandbox, start: Start, address: str) -> None:
    port = urlsplit(sandbox.environment["REDIRECT_URI"]).port or 0
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family):
        script = start(**sandbox.environment, **DEVELOPMENT)
        assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert not shows_an_exception(script)


def test_a_wrong_state_is_refused_without_assertions_too(sandbox: Sandbox, start: Start) -> None:
    script = start(python=("-OO",), **sandbox.environment)
    uri = sandbox.environment["REDIRECT_URI"]
    callback = answer_login_page(script.url())
    assert visit(f"{uri}?code=a-code&state=another").status_code == 403
    assert visit(callback.replace("code=", "code=1&code=")).status_code == 400
    assert "The login came through" in visit(callback).text
    assert script.status() == 0
    assert sandbox.exchanges == 1
