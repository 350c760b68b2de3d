"""What people see around the login: Ctrl+C, the browser that opens, and where the output goes."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from odd_server import OddServer, Request, json_answer
from odd_server import log_in as log_in_at
from sandbox import Sandbox
from script import PATIENCE, SCRIPT, Script, answer_login_page, log_in, visit

from sipgate_oauth import KEYS, open_browser

Start = Callable[..., Script]

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sh, pty and SIGINT")

DEVELOPMENT = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}


def started_by(line: str, terminal: bool = False) -> tuple[str, ...]:
    """Options of Python that let a line of shell start the script, which is "$@" in the line.

    terminal: whether the shell runs in a terminal of its own
    """
    run = "pty.spawn(command)" if terminal else "os.execvp('sh', command)"
    command = f"['sh', '-c', {line!r}, 'sh', sys.executable, *sys.argv[1:]]"
    return ("-c", f"import os, pty, sys; command = {command}; {run}")


def watched(folder: Path, watcher: str) -> dict[str, str]:
    """Return the environment that lets Python run a watcher before the script."""
    (folder / "sitecustomize.py").write_text(watcher)
    return {"PYTHONPATH": str(folder)}


# --- Ctrl+C ---------------------------------------------------------------------------------------


def expect_ctrl_c_to_end(script: Script) -> None:
    """Press Ctrl+C as often as the impatient do: the script is ended by it, without a word."""
    for _ in range(5):
        script.interrupt()
    assert (script.status(), script.stderr) == (-signal.SIGINT, "")


def hanging_exchange(server: OddServer) -> threading.Event:
    """Let the exchange of the code hang, and return the event that it has begun."""
    begun = threading.Event()

    def hang(request: Request) -> bytes:
        begun.set()
        request.connection.recv(1)  # until the script has ended
        return b""

    server.answer_at("code for tokens", hang)
    return begun


@posix
def test_ctrl_c_ends_the_wait_though_a_browser_is_connected(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    script.until("3. Callback")
    uri = sandbox.environment["REDIRECT_URI"]
    with socket.create_connection(("127.0.0.1", urlsplit(uri).port or 0)) as connection:
        connection.sendall(b"GET /oauth")
        visit(f"{uri}/favicon.ico")  # now the script has accepted the first connection, too
        expect_ctrl_c_to_end(script)


@posix
def test_ctrl_c_ends_a_request_that_hangs(server: OddServer, start: Start) -> None:
    request = hanging_exchange(server)
    script = start(**server.environment)
    log_in_at(script, server)
    assert request.wait(PATIENCE)
    expect_ctrl_c_to_end(script)


# Starts a command as the first process of a container.
UNSHARE = "unshare --map-root-user --pid --fork"


def can_start_containers() -> bool:
    if not shutil.which("unshare"):
        return False
    result = subprocess.run([*UNSHARE.split(), "true"], capture_output=True)
    return result.returncode == 0


container = pytest.mark.skipif(
    not can_start_containers(), reason=f"this machine allows no containers: see {UNSHARE} true"
)
AS_PROCESS_1 = started_by(f'exec {UNSHARE} "$@"')


def expect_ctrl_c_to_end_process_1(script: Script) -> None:
    """Press Ctrl+C again and again, in the terminal that the container runs in."""
    deadline = time.monotonic() + PATIENCE
    while script.process.poll() is None:
        assert time.monotonic() < deadline
        os.killpg(script.process.pid, signal.SIGINT)
        time.sleep(0.1)
    assert (script.status(), script.stderr) == (130, "")


@container
def test_ctrl_c_ends_the_wait_of_process_1(sandbox: Sandbox, start: Start) -> None:
    script = start(python=AS_PROCESS_1, session=True, **sandbox.environment)
    script.until("3. Callback")
    expect_ctrl_c_to_end_process_1(script)


@container
def test_ctrl_c_ends_a_request_of_process_1_that_hangs(server: OddServer, start: Start) -> None:
    request = hanging_exchange(server)
    script = start(python=AS_PROCESS_1, session=True, **server.environment)
    log_in_at(script, server)
    assert request.wait(PATIENCE)
    expect_ctrl_c_to_end_process_1(script)


NOTEBOOK = """
import runpy, signal, sys
before = signal.getsignal(signal.SIGINT)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("status", end.code)
print("Ctrl+C", "as before" if signal.getsignal(signal.SIGINT) is before else "changed")
"""


def test_a_notebook_outlives_a_login_that_fails(sandbox: Sandbox, start: Start) -> None:
    in_a_notebook = ("-c", f"import sys; del sys.argv[0]\n{NOTEBOOK}")
    script = start("--timeout=0.1", python=in_a_notebook, **sandbox.environment)
    assert script.status() == 0
    assert script.stdout.endswith("\nstatus 1\nCtrl+C as before\n")


# --- The browser ----------------------------------------------------------------------------------


class Browser(ExitStack):
    """A noisy browser; its window is open in the `with`. environment: of a script that opens it"""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__()
        self._server = self.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._server.settimeout(PATIENCE)
        program = Path(__file__).with_name("noisy_browser.py")
        words = [sys.executable, str(program), str(self._server.getsockname()[1])]
        command = shlex.join(word.replace("\\", "/") for word in words)
        self.environment = {**environment, "BROWSER": f"{command} %s"}

    def opened_url(self) -> str:
        """Wait for the window, and return the URL that it was opened for."""
        self._window = self.enter_context(self._server.accept()[0])
        told = self._window.makefile()
        url = told.readline().strip()
        self.variables = set(told.readline().split())
        return url

    def is_open(self) -> bool:
        self._window.sendall(b"?")
        return self._window.recv(1) == b"?"


@pytest.fixture
def browser(environment: dict[str, str], sandbox: Sandbox) -> Browser:
    return Browser({**environment, **sandbox.environment})


def test_a_browser_that_blocks_and_makes_noise_changes_nothing(browser: Browser) -> None:
    with Script(environment={**browser.environment, **DEVELOPMENT}) as script, browser:
        assert browser.opened_url() == script.url()
        log_in(script)
        assert (script.status(), script.stderr) == (0, "")
        assert "noise" not in script.stdout
        assert browser.is_open()


def test_the_browser_does_not_get_the_configuration(browser: Browser) -> None:
    with Script(environment=browser.environment), browser:
        browser.opened_url()
        assert "BROWSER" in browser.variables
        assert not browser.variables & set(KEYS)


def test_a_webbrowser_py_in_the_current_folder_is_not_run(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "webbrowser.py").write_text("open('was-run', 'w')")
    monkeypatch.chdir(tmp_path)
    with Script(environment=browser.environment) as script, browser:
        assert browser.opened_url() == script.url()
    assert not (tmp_path / "was-run").exists()


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
    python, tried, opened = tmp_path / "python", tmp_path / "tried", tmp_path / "opened"
    python.write_text(f"#!/bin/sh\n'{sys.executable}' \"$@\"\n: >'{tried}'\n")
    (tmp_path / "www-browser").write_text(f"#!/bin/sh\n: >'{opened}'\n")
    for program in (python, tmp_path / "www-browser"):
        program.chmod(0o755)
    for name, value in {"PATH": str(tmp_path), "TERM": "xterm", "BROWSER": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", str(python))
    open_browser("https://localhost/")
    deadline = time.monotonic() + PATIENCE
    while not tried.exists():
        assert time.monotonic() < deadline
    assert not opened.exists()


# Python tells an audit hook when it starts a process.
TELL_OF_PROCESSES = """
import sys

def tell(event, details):
    if event == "subprocess.Popen":
        print(f"<{event}>", flush=True)

sys.addaudithook(tell)
"""


def test_the_authorize_url_is_printed_before_the_browser_takes_its_time(
    browser: Browser, tmp_path: Path
) -> None:
    environment = {**browser.environment, **watched(tmp_path, TELL_OF_PROCESSES)}
    with Script(environment=environment) as script, browser:
        script.until("<subprocess.Popen>")
        before, _, _ = script.stdout.partition("<subprocess.Popen>")
        assert f"\n{script.url()}\n" in before


def test_no_browser_opens_if_it_is_not_wanted(
    sandbox: Sandbox, start: Start, tmp_path: Path
) -> None:
    script = start("--no-browser", **sandbox.environment, **watched(tmp_path, TELL_OF_PROCESSES))
    log_in(script)
    assert script.status() == 0
    assert "<subprocess.Popen>" not in script.stdout


# --- Who prints -----------------------------------------------------------------------------------

ONLY_THE_MAIN_THREAD_PRINTS = """
import builtins, os, threading
real = builtins.print

def print(*words, **options):
    if threading.current_thread() is not threading.main_thread():
        os.write(2, b"printed by another thread\\n")
    real(*words, **options)

builtins.print = print
"""


def test_only_the_main_thread_prints_and_nothing_about_later_lines(
    server: OddServer, start: Start, tmp_path: Path
) -> None:
    def type_in(_: Request) -> bytes:
        script.type("hello\n\n")
        return json_answer({"it is": "typed"})

    server.answer_at("code for tokens", type_in)
    script = start(**server.environment, **watched(tmp_path, ONLY_THE_MAIN_THREAD_PRINTS))
    visit(f"{server.environment['REDIRECT_URI']}?code=a&state=foreign-{script.state()}")
    script.until("old browser tab")
    script.type("hello\n")
    script.until("Any other error")
    before = script.stderr
    log_in_at(script, server)
    assert script.status() == 1
    assert '"it is": "typed"' in script.stdout
    assert "another thread" not in script.stderr
    assert script.stderr.removeprefix(before).startswith("Error: ")


# --- Where the output goes ------------------------------------------------------------------------


def test_a_broken_pipe_is_a_quiet_end(sandbox: Sandbox, environment: dict[str, str]) -> None:
    """As of `| head`."""
    command = [sys.executable, str(SCRIPT), "--no-browser"]
    variables = {**environment, **sandbox.environment}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        script = subprocess.run(command, env=variables, stdout=pipe, stderr=subprocess.PIPE)
    assert (script.returncode, script.stderr) == (1, b"")


@posix
@pytest.mark.parametrize(
    "streams",
    ["<&-", "<&- >&- 2>&-", "0>/dev/null"],
    ids=["stdin closed", "all closed", "stdin for writing, as with nohup"],
)
def test_streams_that_are_closed_do_not_prevent_a_login(browser: Browser, streams: str) -> None:
    shell = started_by(f'exec "$@" {streams}')
    with Script(environment=browser.environment, python=shell) as script, browser:
        visit(answer_login_page(browser.opened_url()))
        assert (script.status(), script.stderr) == (0, "")


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
