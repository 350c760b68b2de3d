"""Pasted addresses: the way in for a browser that cannot return to this machine."""

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import pytest
import requests
from sandbox import Sandbox
from script import PATIENCE, Script, answer_login_page, log_in, visit

from sipgate_oauth import FOREIGN_STATE, OLD_TAB, Events, check_callback, read_pasted

Start = Callable[..., Script]
Paste = Callable[[bytes], list[str]]

QUERY = b"code=a-code&state=our-state"
ADDRESS = b"http://localhost:8080/oauth?" + QUERY
# How an address arrives that people copy from browsers, chats and terminals.
AS_COPIED = {
    "as it is": ADDRESS + b"\n",
    "without a line end": ADDRESS,
    "from Windows": ADDRESS + b"\r\n",
    "with spaces": b" \t" + ADDRESS + b" \r\n",
    "in straight quotes": b"'" + ADDRESS + b"'\n",
    "in straight double quotes": b' "' + ADDRESS + b'" \n',
    "in curly quotes": "“".encode() + ADDRESS + "”\n".encode(),
    "in angle brackets": b"<" + ADDRESS + b">\n",
    "in parentheses, with a full stop": b"(" + ADDRESS + b").\n",
    "with a fragment": ADDRESS + b"#_=_\n",
    "with the marks that a terminal puts around a paste": b"\x1b[200~" + ADDRESS + b"\x1b[201~\n",
    "between no-break spaces": b"\xc2\xa0" + ADDRESS + b"\xc2\xa0\n",
    "between zero-width spaces": b"\xe2\x80\x8b" + ADDRESS + b"\xe2\x80\x8b\n",
    "after a question": b"Is this it? " + ADDRESS + b"\n",
    "without the scheme": b"localhost:8080/oauth?" + QUERY + b"\n",
    "from another scheme and host": b"https://[::1]/x?" + QUERY + b"\n",
    "only the query": b"?" + QUERY + b"\n",
}
ADVICE = "Log in first, then paste the whole URL."
TOO_MANY = "None of the 20 lines was the callback. Further input is ignored."
# What is not the address, and the reason that is told.
WRONG = {
    "an empty line": (b"", f"This is not a login response. {ADVICE}"),
    "a word": (b"hello", f"This is not a login response. {ADVICE}"),
    "half an address": (b"http://[?", f"This is not a login response. {ADVICE}"),
    "a query without its question mark": (QUERY, f"This is not a login response. {ADVICE}"),
    "a long line": (b"x" * 50_000, f"This is not a login response. {ADVICE}"),
    "two codes": (b"?code=b&" + QUERY, f"The URL contains a parameter more than once. {ADVICE}"),
    "no code": (b"?state=our-state", f"The URL must contain either a code or an error. {ADVICE}"),
    "another state": (b"?code=foreign&state=foreign", f"{FOREIGN_STATE} {OLD_TAB}"),
    "bytes that are not text": (b"?code=a&state=\xff\x1b[2J", f"{FOREIGN_STATE} {OLD_TAB}"),
    "a long state": (b"?state=" + b"x" * 50_000, f"{FOREIGN_STATE} {OLD_TAB}"),
}


def read_from(stdin: Any) -> list[str]:
    """Let read_pasted read a stream to its end, and return what it tells, and the codes."""
    events: Events = SimpleQueue()
    with patch.object(sys, "stdin", stdin):
        read_pasted(lambda query: check_callback(query, "our-state"), events)
    heard = [events.get() for _ in range(events.qsize())]
    return [event["code"] if isinstance(event, dict) else str(event) for event in heard]


@pytest.fixture
def paste(tmp_path: Path) -> Paste:
    """Paste bytes, and return what is told of them, and the code if they hold a callback."""

    def paste(typed: bytes) -> list[str]:
        (tmp_path / "stdin").write_bytes(typed)
        with (tmp_path / "stdin").open() as stdin:
            return read_from(stdin)

    return paste


@pytest.mark.parametrize("how", AS_COPIED)
def test_an_address_is_accepted_as_people_copy_it(paste: Paste, how: str) -> None:
    assert paste(AS_COPIED[how]) == ["a-code"]


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_address_is_told_and_the_next_one_counts(paste: Paste, what: str) -> None:
    wrong, reason = WRONG[what]
    typed = wrong + b"\n" + ADDRESS + b"\n" + ADDRESS + b"\n"
    assert paste(typed) == [reason, "a-code"]


def test_after_20_wrong_lines_no_more_are_read(paste: Paste) -> None:
    told = [f"This is not a login response. {ADVICE}"] * 20 + [TOO_MANY]
    assert paste(b"y\n" * 20 + ADDRESS) == told
    assert paste(b"y\n" * 19 + ADDRESS) == [*told[:19], "a-code"]


def test_a_stream_without_line_ends_is_not_collected(paste: Paste) -> None:
    assert paste(b"\0" * 10_000_000)[-1] == TOO_MANY


def test_a_line_is_read_in_one_call_and_nothing_is_lost_between_two() -> None:
    """A Windows console may cut a line that is read in single bytes."""
    sizes = []
    parts = iter([b"hel", b"lo\n" + ADDRESS[:50], ADDRESS[50:], b"\n", b""])

    def read(descriptor: int, size: int) -> bytes:
        sizes.append(size)
        return next(parts)

    with open(os.devnull) as stdin, patch.object(os, "read", read):
        assert read_from(stdin) == [f"This is not a login response. {ADVICE}", "a-code"]
    assert min(sizes) >= 4096


@pytest.mark.skipif(sys.platform == "win32", reason="there, a pipe can not refuse to be read")
def test_a_stdin_that_cannot_be_read_is_tried_again() -> None:
    """As when the program goes to the background of a terminal, and comes back."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # so reading fails while there is nothing to read
    type_it = patch.object(time, "sleep", lambda _: os.write(writer, ADDRESS + b"\n"))
    with open(reader) as stdin, open(writer, "wb"), type_it:
        assert read_from(stdin) == ["a-code"]


@pytest.mark.parametrize("stdin", [None, io.StringIO()], ids=["closed", "of a notebook"])
def test_a_stdin_that_is_not_a_file_is_not_read(stdin: Any) -> None:
    assert read_from(stdin) == []


@pytest.mark.parametrize("silent", [True, False])
def test_stdin_may_end_or_be_silent(sandbox: Sandbox, start: Start, silent: bool) -> None:
    script = start(**sandbox.environment, PYTHONDEVMODE="1")
    if not silent:
        script.close_stdin()
    log_in(script)
    assert (script.status(), script.stderr) == (0, "")


def test_a_paste_after_a_wrong_one_logs_in_once_also_if_the_browser_comes_back(
    sandbox: Sandbox, start: Start
) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    script.type("hello\n")
    script.until(ADVICE)
    script.type(f"{callback}\n")
    with contextlib.suppress(requests.ConnectionError):  # the port may be closed by then
        visit(callback)
    assert (script.status(), sandbox.exchanges) == (0, 1)


def test_a_pasted_error_ends_the_login_in_plain_text(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    text = "%1B[2J%C2%9B31m%E2%80%AE%E2%80%A8%C2%85%7F%08 %0AError: none".replace(" ", "+")
    script.type(f"?error=access_denied&state={script.state()}&error_description={text}\n")
    assert (script.status(), sandbox.exchanges) == (1, 0)
    assert script.stderr.startswith("Error: The login failed: access_denied: ")
    assert "Error: none" in script.stderr
    assert script.stderr.count("\n") == 2
    assert all(it.isprintable() or it == "\n" for it in script.stdout + script.stderr)


def test_a_stdin_that_never_stops_is_read_no_further(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    writer = threading.Thread(target=type_without_end, args=[script])
    writer.start()
    script.until(TOO_MANY)
    log_in(script)
    assert script.status() == 0
    assert script.stderr.count("\n") == 21
    writer.join(PATIENCE)


def type_without_end(script: Script) -> None:
    """Do what `yes |` does."""
    with contextlib.suppress(OSError, ValueError):  # at the end of the script
        while True:
            script.type("y\n" * 1000)
