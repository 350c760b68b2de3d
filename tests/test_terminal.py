"""What people see around the login: Ctrl+C, the browser that opens, and where the output goes."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from odd_server import OddServer, Request
from odd_server import log_in as log_in_at
from sandbox import Sandbox
from script import PATIENCE, SCRIPT, Script, answer_login_page, log_in, visit

from sipgate_oauth import BROWSER_ERRORS, open_browser

Start = Callable[..., Script]

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sh, pty and SIGINT")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")

DEVELOPMENT = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}


def started_by(line: str, terminal: bool = False) -> tuple[str, ...]:
    """Options of Python that let a line of shell start the script, "$@", in a terminal or not."""
    run = "pty.spawn(command)" if terminal else "os.execvp('sh', command)"
    command = f"['sh', '-c', {line!r}, 'sh', sys.executable, *sys.argv[1:]]"
    return ("-c", f"import os, pty, sys; command = {command}; {run}")


# --- Ctrl+C ---------------------------------------------------------------------------------------


def expect_ctrl_c_to_end(script: Script) -> None:
    """Press Ctrl+C, as often as the impatient do: the script dies of it, without a word."""
    for _ in range(5):
        script.interrupt()
    assert (script.status(), script.stderr) == (-signal.SIGINT, "")


@posix
def test_ctrl_c_ends_the_wait_though_a_browser_is_connected(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    script.until("3. Callback")
    uri = sandbox.environment["REDIRECT_URI"]
    with socket.create_connection(("127.0.0.1", urlsplit(uri).port or 0)) as connection:
        connection.sendall(b"GET /oauth")
        visit(uri)  # now the script has accepted the first connection, too
        expect_ctrl_c_to_end(script)


@posix
@pytest.mark.parametrize("step", ["code for tokens", "account"])
def test_ctrl_c_ends_a_request_that_hangs(server: OddServer, start: Start, step: str) -> None:
    def hang(request: Request) -> bytes:
        script.interrupt()
        script.status()
        return b""

    script = start(**server.environment)
    server.answer_at(step, hang)
    log_in_at(script, server)
    expect_ctrl_c_to_end(script)


@posix
def test_ctrl_c_ends_the_program_while_it_loads(start: Start, tmp_path: Path) -> None:
    """Even where Python sees no signal. (Such is the look-up of a host name, too.)"""
    (tmp_path / "dotenv.py").write_text("print('loading', flush=True); sum(iter(int, 1))")
    script = start(PYTHONPATH=str(tmp_path))
    script.until("loading")
    expect_ctrl_c_to_end(script)


# --- The browser ----------------------------------------------------------------------------------

NOISY_BROWSER = """
import contextlib, socket, sys
print("noise on stdout", flush=True)
print("noise on stderr", file=sys.stderr, flush=True)
with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
    terminal.write("noise in the terminal")
sys.stdin.read()
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as test:
    test.sendall(f"{sys.argv[2]}\\n".encode())
    while byte := test.recv(1):
        test.sendall(byte)
"""


class Browser(ExitStack):
    """A noisy browser; its window is open in the `with`. environment: of a script that opens it"""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        super().__init__()
        self._server = self.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._server.settimeout(PATIENCE)
        (folder / "browser.py").write_text(NOISY_BROWSER)
        (folder / "webbrowser.py").write_text("")  # not to be run in place of the library
        words = [sys.executable, str(folder / "browser.py"), str(self._server.getsockname()[1])]
        command = shlex.join(word.replace("\\", "/") for word in words)
        self.environment = {**environment, "PYTHONPATH": str(folder), "BROWSER": f"{command} %s"}

    def opened_url(self) -> str:
        """Wait for the window, and return the URL that it was opened for."""
        self._window = self.enter_context(self._server.accept()[0])
        return self._window.makefile().readline().strip()

    def is_open(self) -> bool:
        self._window.sendall(b"?")
        return self._window.recv(1) == b"?"


@pytest.fixture
def browser(environment: dict[str, str], sandbox: Sandbox, tmp_path: Path) -> Browser:
    return Browser({**environment, **sandbox.environment}, tmp_path)


def test_a_browser_that_blocks_and_makes_noise_changes_nothing(browser: Browser) -> None:
    with Script(environment={**browser.environment, **DEVELOPMENT}) as script, browser:
        assert browser.opened_url() == script.url()
        log_in(script)
        assert (script.status(), script.stderr) == (0, "")
        assert "noise" not in script.stdout
        assert browser.is_open()


@posix
def test_ctrl_c_ends_a_loop_of_the_shell_but_not_the_browser(browser: Browser) -> None:
    loop = started_by('for i in 1 2 3; do "$@"; done', terminal=True)
    with Script(environment=browser.environment, python=loop) as script, browser:
        assert browser.opened_url() == script.url()
        script.type("\x03")
        assert script.status() == 0
        assert script.stdout.count("1. Configuration") == 1
        assert not any(word in script.stdout for word in ("Traceback", "noise"))
        assert browser.is_open()


def test_a_url_that_is_too_long_for_any_command_changes_nothing() -> None:
    open_browser(f"https://localhost/{'x' * 2_000_000}")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the real browser would open")
def test_no_text_browser_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over SSH, where there is no other, it would take over the terminal."""
    (tmp_path / "www-browser").write_text(f"#!/bin/sh\n: >'{tmp_path}/started'\n")
    (tmp_path / "www-browser").chmod(0o755)
    for name, value in {"PATH": str(tmp_path), "TERM": "xterm", "BROWSER": ""}.items():
        monkeypatch.setenv(name, value)
    open_browser("https://localhost/")
    assert not (tmp_path / "started").exists()


@posix
def test_the_authorize_url_is_printed_before_the_browser_takes_its_time(browser: Browser) -> None:
    """Python lists what it imports, which is put among the output."""
    environment = {**browser.environment, "PYTHONPROFILEIMPORTTIME": "1"}
    with Script(environment=environment, python=started_by('exec "$@" 2>&1')) as script, browser:
        script.until("| subprocess")
        assert "response_type=code" in script.stdout.partition("| subprocess")[0]


def test_no_browser_opens_if_it_is_not_wanted(sandbox: Sandbox, start: Start) -> None:
    script = start("--no-browser", **sandbox.environment, PYTHONPROFILEIMPORTTIME="1")
    log_in(script)
    assert script.status() == 0
    assert "| subprocess" not in script.stderr


# --- Streams, and Python's own checks -------------------------------------------------------------


def test_a_broken_pipe_is_a_quiet_end(sandbox: Sandbox, environment: dict[str, str]) -> None:
    """As of `| head`."""
    command = [sys.executable, str(SCRIPT), "--no-browser"]
    variables = {**environment, **sandbox.environment}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        script = subprocess.run(command, env=variables, stdout=pipe, stderr=subprocess.PIPE)
    assert (script.returncode, script.stderr) == (1, b"")


@linux
def test_a_full_disk_under_stdout_is_one_error(sandbox: Sandbox, start: Start) -> None:
    script = start(python=started_by('exec "$@" >/dev/full'), **sandbox.environment)
    error = "Error: can't print: No space left on device. Check the output.\n"
    assert (script.status(), script.stderr) == (1, error)


@linux
def test_a_full_disk_under_stderr_keeps_back_no_answer(sandbox: Sandbox, start: Start) -> None:
    script = start(python=started_by('exec "$@" 2>/dev/full'), **sandbox.environment)
    callback = answer_login_page(script.url())
    assert visit(callback.replace("state=", "state=foreign")).status_code == 403
    assert "The login came through" in visit(callback).text
    assert script.status() == 0


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_from_the_start_hold_nothing_up(
    sandbox: Sandbox, start: Start, closed: str
) -> None:
    script = start("--timeout=0.1", python=started_by(f'exec "$@" {closed}'), **sandbox.environment)
    assert script.status() == 1
    assert "Traceback" not in script.stderr


@posix
def test_in_the_background_of_a_terminal_the_login_goes_on(sandbox: Sandbox, start: Start) -> None:
    """A terminal stops a program there that reads from it, unless this takes care."""
    script = start(python=started_by('set -m; "$@" & wait', terminal=True), **sandbox.environment)
    log_in(script)
    script.until("6. Refresh")
    assert "Traceback" not in script.stdout


def test_a_terminal_without_utf_8_gets_escapes(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment, PYTHONIOENCODING="ascii")
    log_in(script)
    script.until(r"M\xfcller")


def test_a_login_among_strays_causes_no_warning(sandbox: Sandbox, start: Start) -> None:
    """Without assertions (-OO), a wrong state is refused, too."""
    script = start(python=("-OO",), **sandbox.environment, **DEVELOPMENT)
    callback = answer_login_page(script.url())
    address = ("127.0.0.1", urlsplit(callback).port or 0)
    with ExitStack() as connections:
        for sent in (b"", b"GET /oauth", b"GET / HTTP/1.1\r\n\r\n") * 5:
            connections.enter_context(socket.create_connection(address)).sendall(sent)
        assert visit(callback.replace("state=", "state=foreign")).status_code == 403
        visit(callback)
        assert (script.status(), sandbox.exchanges) == (0, 1)
    assert script.stderr.count("\n") == 2  # about the wrong state


def test_a_bug_ends_the_program_though_stdin_is_open(sandbox: Sandbox, start: Start) -> None:
    bug = "import json, runpy, sys; json.dumps = None; del sys.argv[0]"
    then = "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = start(python=("-c", f"{bug}; {then}"), **sandbox.environment)
    log_in(script)
    assert script.status() == 1
    assert "TypeError" in script.stderr


def test_a_time_out_causes_no_warning(sandbox: Sandbox, start: Start) -> None:
    script = start("--timeout=0.1", **sandbox.environment, **DEVELOPMENT)
    assert script.status() == 1
    assert script.stderr.startswith("Error: No callback came in 0.1 seconds.\n")
    assert script.stderr.endswith(f" {BROWSER_ERRORS}\n")
    assert "the realm, third-party or\n  sipgate-apps: " in script.stderr
