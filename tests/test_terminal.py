"""What people see around the login: Ctrl+C, the browser that opens, and where the output goes."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from odd_server import Answer, OddServer, Request
from odd_server import log_in as log_in_at
from sandbox import Sandbox
from script import PATIENCE, SCRIPT, Script, answer_login_page, log_in, visit

from sipgate_oauth import KEYS, open_browser

Start = Callable[..., Script]

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no sh, pty and SIGINT")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")

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


NOTEBOOK = """
import runpy, signal, sys
sys.ps1 = "In : "  # which shells and notebooks set
before = signal.getsignal(signal.SIGINT)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("status", end.code)
print("Ctrl+C", "as before" if signal.getsignal(signal.SIGINT) is before else "changed")
"""


def test_a_notebook_outlives_the_program(sandbox: Sandbox, start: Start) -> None:
    script = start(python=("-c", "import sys; del sys.argv[0]\n" + NOTEBOOK), **sandbox.environment)
    log_in(script)
    assert script.status() == 0
    assert script.stdout.endswith("\nstatus 0\nCtrl+C as before\n")


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


# Python tells an audit hook when it loads a module and when it starts a process.
TELL_OF_PROCESSES = """
import sys

def tell(event, details):
    if event == "subprocess.Popen" or event == "import" and details[0] == "subprocess":
        print(f"<{event}>", flush=True)

sys.addaudithook(tell)
"""


def test_the_authorize_url_is_printed_before_the_browser_takes_its_time(
    browser: Browser, tmp_path: Path
) -> None:
    environment = {**browser.environment, **watched(tmp_path, TELL_OF_PROCESSES)}
    with Script(environment=environment) as script, browser:
        script.until("<subprocess.Popen>")
        before, _, _ = script.stdout.partition("<import>")
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


def test_only_the_main_thread_prints(sandbox: Sandbox, start: Start, tmp_path: Path) -> None:
    watcher = watched(tmp_path, ONLY_THE_MAIN_THREAD_PRINTS)
    script = start(**sandbox.environment, **watcher)
    callback = answer_login_page(script.url())
    visit(callback.replace("state=", "state=foreign"))
    script.until("old browser tab")
    script.type("hello\n")
    script.until("paste the whole URL")
    visit(callback)
    assert script.status() == 0
    assert "another thread" not in script.stderr


def test_lines_that_are_typed_at_any_time_do_not_mix_with_the_output(
    server: OddServer, start: Start
) -> None:
    def login(typed: str) -> list[str]:
        """Log in, type during the wait and before each answer, and return what is on stdout."""

        def typing(said: Any) -> Answer:
            def answer(_: Request) -> bytes:
                script.type(typed)
                return bytes(said)

            return answer

        script = start(**server.environment)
        server.answers = {path: [*map(typing, said)] for path, said in answers.items()}
        script.type(typed)
        script.until("not a login response" if typed else "3. Callback")
        log_in_at(script, server)
        assert script.status() == 0
        # What is typed after the callback is not read. During the wait, a wrong line gets a hint.
        assert script.stderr.count("\n") == typed.count("\n")
        random = re.compile("response_type=code|code_challenge: |code_verifier: |state: ")
        return [line for line in script.stdout.splitlines() if not random.search(line)]

    answers = server.answers
    assert login("hello\n") == login("")


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
def test_a_pipe_that_breaks_in_the_middle_of_a_step_is_a_quiet_end(
    sandbox: Sandbox, start: Start
) -> None:
    until_step_4 = 'while read -r line; do echo "$line"; case $line in 4.*) exit; esac; done'
    line = f'{{ "$@"; echo "status $?" >&2; }} | {until_step_4}'
    script = start(python=started_by(line), **sandbox.environment)
    log_in(script)
    script.status()
    assert script.stderr == "status 1\n"


@linux
def test_a_full_disk_under_stdout_is_one_error(sandbox: Sandbox, start: Start) -> None:
    script = start(python=started_by('exec "$@" >/dev/full'), **sandbox.environment)
    error = "Error: Cannot print: No space left on device. Check where the output goes.\n"
    assert (script.status(), script.stderr) == (1, error)


@linux
def test_a_full_disk_under_stderr_keeps_back_no_answer(sandbox: Sandbox, start: Start) -> None:
    script = start(python=started_by('exec "$@" 2>/dev/full'), **sandbox.environment)
    callback = answer_login_page(script.url())
    assert visit(callback.replace("state=", "state=foreign")).status_code == 403
    assert "Login accepted" in visit(callback).text
    assert script.status() == 0


@linux
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"], ids=["full", "closed"])
@pytest.mark.parametrize(
    ("options", "status"),
    [(["--timeout=0.1"], 1), (["--no-such-option"], 2), (["--config=/no/such/file"], 2)],
    ids=["login", "usage", "configuration"],
)
def test_the_exit_status_does_not_depend_on_stderr(
    sandbox: Sandbox, start: Start, stderr: str, options: list[str], status: int
) -> None:
    variables = {} if "--config" in options[0] else sandbox.environment
    script = start(*options, python=started_by(f'exec "$@" {stderr}'), **variables)
    assert script.status() == status


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_from_the_start_do_not_prevent_a_login(
    browser: Browser, closed: str
) -> None:
    shell = started_by(f'exec "$@" {closed}')
    with Script(environment=browser.environment, python=shell) as script, browser:
        assert "Login accepted" in visit(answer_login_page(browser.opened_url())).text
        assert (script.status(), script.stderr) == (0, "")


@posix
def test_in_the_background_of_a_terminal_the_login_goes_on(sandbox: Sandbox, start: Start) -> None:
    """A terminal stops a program there that reads from it, unless this takes care."""
    script = start(python=started_by('set -m; "$@" & wait', terminal=True), **sandbox.environment)
    log_in(script)
    script.until("Done: ")
    assert "Traceback" not in script.stdout


def test_a_terminal_without_utf_8_gets_escapes(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment, PYTHONIOENCODING="ascii")
    log_in(script)
    script.until(r"M\xfcller")


def test_the_help_names_a_folder_with_foreign_letters_without_utf_8(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Müller 東").mkdir()
    monkeypatch.setattr("script.SCRIPT", shutil.copy(SCRIPT, tmp_path / "Müller 東"))
    script = start("--help", PYTHONIOENCODING="ascii", COLUMNS="500")
    assert (script.status(), script.stderr) == (0, "")
    assert r"M\xfcller \u6771" in script.stdout


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


def test_a_time_out_causes_no_warning(sandbox: Sandbox, start: Start) -> None:
    script = start("--timeout=0.1", **sandbox.environment, **DEVELOPMENT)
    assert script.status() == 1
    assert script.stderr.startswith("Error: The browser did not come back within 0.1 seconds.\n")
    assert "Warning" not in script.stderr


def test_a_bug_ends_the_program_though_stdin_is_open(sandbox: Sandbox, start: Start) -> None:
    bug = "import contextlib, runpy, sys; contextlib.suppress = None; del sys.argv[0]"
    then = "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = start(python=("-c", f"{bug}; {then}"), **sandbox.environment)
    assert script.status() == 1
    assert "TypeError" in script.stderr
