"""Pasted URLs: the way in for a browser that cannot connect to this machine."""

import contextlib
import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import requests
from sandbox import Sandbox
from script import PATIENCE, Script, answer_login_page, log_in, visit

from sipgate_oauth import (
    BROWSER_ERRORS,
    OLD_TAB,
    STATE_MISMATCH,
    CallbackRefused,
    Events,
    check_pasted,
    read_pasted,
)

Start = Callable[..., Script]

STATE = "our-state"
URI = "http://localhost:8080/oauth"
URL = f"{URI}?code=a-code&state={STATE}"
CALLBACK = {"code": "a-code", "state": STATE}

AS_COPIED = {
    "as it is": URL,
    "with spaces": f" \t{URL} \r",
    "in straight quotes": f"'{URL}'",
    "in double quotes, with a full stop": f' "{URL}". ',
    "in curly quotes": f"“{URL}”",
    "in angle brackets": f"<{URL}>",
    "in parentheses, with a full stop": f"({URL}).",
    "in square brackets": f"[{URL}],",
    "with a fragment": f"{URL}#_=_",
    "with the marks that a terminal puts around a paste": f"\x1b[200~{URL}\x1b[201~",
    "between no-break spaces": f"\xa0{URL}\xa0",
    "between zero-width spaces": f"\u200b{URL}\u200b",
    "after a question": f"Is this it? {URL}",
    "without the scheme": URL.removeprefix("http://"),
    "only the query": URL.removeprefix(URI),
}
# Codes as they stand in a URL, and as they are meant
CODES = {
    "a.": "a.",
    "a)": "a)",
    "a]": "a]",
    "4/a-b_c~d!e*f,g;h:i@j$k": "4/a-b_c~d!e*f,g;h:i@j$k",
    "a%2Bb+c%26d%3De%22%27%3C%3E%23%C3%BC": "a+b c&d=e\"'<>#ü",
}
NOT_THE_CALLBACK = f"This is not the URL of the callback, which begins with {URI}\n{BROWSER_ERRORS}"
NOT_THE_WHOLE = "This is not the whole URL. Copy all of it from the address bar."
OLD = f"{STATE_MISMATCH}\n{OLD_TAB}"
LOGIN_PAGE = "https://login.example.com/auth"
WRONG = {
    "an empty line": ("", BROWSER_ERRORS),
    "a line of spaces": (" \t ", BROWSER_ERRORS),
    "a word": ("hello", NOT_THE_CALLBACK),
    "no character of a URL": ("“”", NOT_THE_CALLBACK),
    "the authorize URL": (f"{LOGIN_PAGE}?client_id=a&state={STATE}", NOT_THE_CALLBACK),
    "an error page": (f"{LOGIN_PAGE}/authenticate?session_code=a&tab_id=b", NOT_THE_CALLBACK),
    "a foreign callback": ("https://app.example.com/?code=a&state=b", NOT_THE_CALLBACK),
    "only the redirect URI": (URI, NOT_THE_WHOLE),
    "cut off before the state": (f"{URI}?code=a-code", NOT_THE_WHOLE),
    "cut off in the state": (URL[:-1], NOT_THE_WHOLE),
    "cut off before the code": (f"{URI}?state={STATE}&co", NOT_THE_WHOLE),
    "another state": (f"{URI}?code=a&state=foreign", OLD),
    "more than our state": (f"{URL}x", OLD),
    "another state, in quotes": (f"“{URI}?code=a&state=foreign”", OLD),
    "another state, without the scheme": ("localhost:8080/oauth?code=a&state=foreign", OLD),
}


@pytest.mark.parametrize("how", AS_COPIED)
def test_a_url_is_accepted_as_people_copy_it(how: str) -> None:
    assert check_pasted(AS_COPIED[how], URI, STATE) == CALLBACK


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("around", ["{}", "'{}'", "\x1b[200~{}\x1b[201~"])
def test_a_code_arrives_exactly_as_it_was_issued(code: str, around: str) -> None:
    line = around.format(f"{URI}?state={STATE}&code={code}")
    assert check_pasted(line, URI, STATE) == {"state": STATE, "code": CODES[code]}


def test_an_error_can_be_pasted_too() -> None:
    callback = check_pasted(f"{URI}?error=access_denied&state={STATE}", URI, STATE)
    assert callback == {"error": "access_denied", "state": STATE}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_another_line_is_told(what: str) -> None:
    line, text = WRONG[what]
    with pytest.raises(CallbackRefused) as refused:
        check_pasted(line, URI, STATE)
    assert str(refused.value) == text


def read_from(stdin: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str] | str]:
    """Let read_pasted read a stream to its end, and return the events."""
    events: Events = SimpleQueue()
    monkeypatch.setattr(sys, "stdin", stdin)
    read_pasted(URI, STATE, events)
    return [events.get() for _ in range(events.qsize())]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""], ids=["as it is", "from Windows", "cut off"])
def test_lines_are_read_until_one_of_them_is_the_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    lines = b"\xff\x1b[2J\r\n\n" + f"{URL}{end}".encode() + (b"more\n" if end else b"")
    (tmp_path / "stdin").write_bytes(lines)
    with (tmp_path / "stdin").open() as stdin:
        assert read_from(stdin, monkeypatch) == [NOT_THE_CALLBACK, BROWSER_ERRORS, CALLBACK]


@pytest.mark.timeout(PATIENCE)
def test_nothing_is_read_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdin").write_text("hello")
    with (tmp_path / "stdin").open() as stdin:
        assert read_from(stdin, monkeypatch) == [NOT_THE_CALLBACK]


@pytest.mark.parametrize("stdin", [None, io.StringIO()], ids=["closed", "of a notebook"])
def test_a_stdin_that_is_not_a_file_is_not_read(
    stdin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_from(stdin, monkeypatch) == []


def test_stdin_may_end_before_the_callback(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment, PYTHONDEVMODE="1")
    script.close_stdin()
    log_in(script)
    assert (script.status(), script.stderr) == (0, "")


def test_a_paste_after_a_wrong_one_logs_in_once_also_if_the_browser_comes_back(
    sandbox: Sandbox, start: Start
) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    script.type("hello\n")
    script.until("This is not the URL of the callback")
    script.type(f"{callback}\n")
    with contextlib.suppress(requests.ConnectionError):  # the port may be closed by then
        visit(callback)
    assert (script.status(), sandbox.exchanges) == (0, 1)


def test_a_flood_on_stdin_is_told_once_and_the_login_goes_on(
    sandbox: Sandbox, start: Start
) -> None:
    """As of `yes | python sipgate_oauth.py`."""
    script = start(**sandbox.environment)
    writer = threading.Thread(target=type_without_end, args=[script])
    writer.start()
    script.until("This is not the URL of the callback")
    log_in(script)
    assert script.status() == 0
    assert script.stderr.count("This is not the URL of the callback") == 1
    writer.join(PATIENCE)


def type_without_end(script: Script) -> None:
    with contextlib.suppress(OSError, ValueError):  # at the end of the script
        while True:
            script.type("y\n" * 1000)
