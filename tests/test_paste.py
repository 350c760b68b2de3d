"""Pasted addresses: the way in for a browser that can't come back to this machine."""

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import pytest
import requests
from sandbox import Sandbox
from script import Script, answer_login_page, free_port, log_in, visit

from sipgate_oauth import FOREIGN_STATE, Callbacks, callback_server, read_pasted

Start = Callable[..., Script]
Paste = Callable[[bytes], list[str]]

QUERY = b"code=a-code&state=our-state"
NO_ANSWER, TWICE = "This is no answer to a login.", "A parameter is there more than once."
WRONG = {
    **dict.fromkeys([b"", b"hello", b"http://[?", QUERY, b"x" * 100_000], NO_ANSWER),
    b"?code=b&" + QUERY: TWICE,
    b"?state=our-state": "There should be a code or an error.",
    **dict.fromkeys([b"?code=foreign&state=foreign", b"?state=\xff\x1b[2J"], FOREIGN_STATE),
    b"?state=" + b"x" * 100_000: FOREIGN_STATE,
}
JOB_IN_THE_BACKGROUND = """if True:
    import fcntl, os, subprocess, sys, termios
    _, terminal = os.openpty()
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    job = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=terminal, preexec_fn=os.setpgrp)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(job.pid, os.WUNTRACED)[1]))"""


@pytest.fixture
def paste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Paste:
    """Paste bytes, and return what is told of them, and the code if they hold a callback."""

    def paste(typed: bytes) -> list[str]:
        (tmp_path / "stdin").write_bytes(typed)
        callbacks = Callbacks()
        with (tmp_path / "stdin").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            read_pasted("our-state", callbacks, Event())
        codes = [callbacks.get()["code"] for _ in range(callbacks.qsize())]
        return [*capsys.readouterr().err.splitlines(), *codes]

    return paste


@pytest.mark.parametrize("start", [b"http://localhost:80/oauth", b"https://x/y", b"[::1]:80", b""])
def test_an_address_is_accepted_as_people_copy_it(paste: Paste, start: bytes) -> None:
    address = start + b"?" + QUERY
    for form in (b"%b\n", b" \t%b \r\n", b"'%b'\n", b' "%b" \n', b"<%b>\n", b"%b#_=_\n", b"%b"):
        assert paste(form % address) == ["a-code"], form


def test_a_wrong_address_is_told_and_the_next_one_counts(paste: Paste) -> None:
    for wrong, why in WRONG.items():
        told = [why, "Paste what the browser shows last."]
        assert paste(b"%b\n?%b\n?%b\n" % (wrong, QUERY, QUERY)) == [*told, "a-code"], wrong


@pytest.mark.skipif(sys.platform == "win32", reason="there, a pipe can not refuse to be read")
def test_an_stdin_that_can_not_be_read_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the program goes to the background of a terminal, and comes back."""
    callbacks, (reader, writer) = Callbacks(), os.pipe()
    os.set_blocking(reader, False)  # so it fails while there is nothing to read
    with open(reader) as stdin, open(writer, "wb", buffering=0) as person:
        monkeypatch.setattr(sys, "stdin", stdin)
        done = Mock(is_set=lambda: False, wait=lambda seconds: person.write(b"?%b\n" % QUERY))
        read_pasted("our-state", callbacks, done)
    assert callbacks.get_nowait()["code"] == "a-code"


@pytest.mark.parametrize("stdin", [None, io.StringIO()], ids=["closed", "without a descriptor"])
def test_reading_ends_with_the_wait(monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with callback_server(f"http://127.0.0.1:{free_port()}/", "state"):
        (reader,) = [it for it in threading.enumerate() if "read_pasted" in it.name]
    reader.join()


@pytest.mark.parametrize("silent", [True, False])
def test_stdin_may_end_or_be_silent(sandbox: Sandbox, start: Start, silent: bool) -> None:
    script = start(**sandbox.environment, PYTHONDEVMODE="1")
    if not silent:
        script.close_stdin()
    log_in(script)
    assert script.status() == 0
    assert script.stderr == ""


def test_a_paste_after_a_wrong_one_logs_in_once_also_if_the_browser_comes_back(
    sandbox: Sandbox, start: Start
) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    script.type("hello\n")
    script.until("Paste what the browser shows")
    script.type(f"{callback}\n")
    with contextlib.suppress(requests.ConnectionError):  # the port may be closed by then
        visit(callback)
    assert (script.status(), sandbox.exchanges) == (0, 1)


def test_a_pasted_error_ends_the_login_in_plain_text(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    text = "\x1b[2J\x9b31m\u202e\u2028\x85\x7f\b %1B[2J %C2%9B31m %0AError: none"
    script.type(f"?error=access_denied&state={script.state()}&error_description={text}\n")
    assert (script.status(), sandbox.exchanges) == (1, 0)
    assert script.stderr.startswith("Error: The login was refused: access_denied: ")
    assert script.stderr.count("\n") == 2
    assert all(it.isprintable() or it == "\n" for it in script.stdout + script.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no jobs in the background")
def test_in_the_background_of_a_terminal_it_is_not_stopped(sandbox: Sandbox, start: Start) -> None:
    script = start(python=("-c", JOB_IN_THE_BACKGROUND), **sandbox.environment)
    log_in(script)
    assert (script.status(), script.stderr) == (0, "")
