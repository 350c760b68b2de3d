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

import pytest
from odd_server import OddServer, Request
from odd_server import log_in as log_in_at
from sandbox import Sandbox
from script import PATIENCE, SCRIPT, Script, answer_login_page, log_in, visit

from sipgate_oauth import KEYS, open_browser

Start = Callable[..., Script]

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sh, pty and SIGINT")


def started_by(line: str, terminal: bool = False) -> tuple[str, ...]:
    """Options of Python that let a line of shell start the script, which is "$@" in the line, in
    this terminal or in one of its own."""
    run = "pty.spawn(command)" if terminal else "os.execvp('sh', command)"
    command = f"['sh', '-c', {line!r}, 'sh', sys.executable, *sys.argv[1:]]"
    return ("-c", f"import os, pty, sys; command = {command}; {run}")


# --- Ctrl+C ---------------------------------------------------------------------------------------


@posix
def test_ctrl_c_ends_a_request_that_hangs(server: OddServer, start: Start) -> None:
    begun = threading.Event()

    def hang(request: Request) -> bytes:
        begun.set()
        request.connection.recv(1)  # until the script has ended
        return b""

    server.answer_at("code for tokens", hang)
    script = start(**server.environment)
    log_in_at(script, server)
    assert begun.wait(PATIENCE)
    for _ in range(5):  # as the impatient do
        script.interrupt()
    assert (script.status(), script.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_ends_process_1_of_a_container(
    sandbox: Sandbox, environment: dict[str, str]
) -> None:
    """Press Ctrl+C again and again, in the terminal that the container runs in."""
    container = "unshare --map-root-user --pid --fork"
    if not shutil.which("unshare") or subprocess.call([*container.split(), "true"]):
        pytest.skip(f"this machine allows no containers: see {container} true")
    variables = {**environment, **sandbox.environment}
    python = started_by(f'exec {container} "$@"')
    with Script("--no-browser", environment=variables, python=python, session=True) as script:
        script.until("3. Callback")
        deadline = time.monotonic() + PATIENCE
        while script.process.poll() is None:
            assert time.monotonic() < deadline
            os.killpg(script.process.pid, signal.SIGINT)
            time.sleep(0.1)
        assert (script.status(), script.stderr) == (130, "")


NOTEBOOK = """
import runpy, signal, sys
del sys.argv[0]
before = signal.getsignal(signal.SIGINT)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("status", end.code)
print("Ctrl+C", "as before" if signal.getsignal(signal.SIGINT) is before else "changed")
"""


def test_a_notebook_outlives_a_login_that_fails(sandbox: Sandbox, start: Start) -> None:
    script = start("--timeout=0.1", python=("-c", NOTEBOOK), **sandbox.environment)
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
    strict = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    with Script(environment={**browser.environment, **strict}) as script, browser:
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
sys.addaudithook(lambda event, _: print(event) if event == "subprocess.Popen" else None)
"""


@pytest.mark.parametrize(("option", "processes"), [("--timeout=300", 1), ("--no-browser", 0)])
def test_a_browser_opens_unless_it_is_not_wanted(
    browser: Browser, tmp_path: Path, option: str, processes: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(TELL_OF_PROCESSES)
    environment = {**browser.environment, "PYTHONPATH": str(tmp_path)}
    with Script(option, environment=environment) as script, browser:
        log_in(script)
        assert script.status() == 0
        assert script.stdout.count("subprocess.Popen") == processes


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
    ["</dev/null", "<&-", "<&- >&- 2>&-", "0>/dev/null"],
    ids=["no input", "stdin closed", "all closed", "stdin for writing, as with nohup"],
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
