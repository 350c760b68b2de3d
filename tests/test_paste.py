"""Pasted URLs: the way in for a browser that cannot connect to this machine."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest
import requests
from sandbox import Sandbox
from script import PATIENCE, Script, answer_login_page, visit

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
    "with spaces": f" \t{URL} \r",
    "in straight quotes": f"'{URL}'",
    "in double quotes, with a full stop": f' "{URL}". ',
    "in curly quotes": f"“{URL}”",
    "in angle brackets": f"<{URL}>",
    "in parentheses, with a full stop": f"({URL}).",
    "in square brackets": f"[{URL}],",
    "with a fragment": f"{URL}#_=_",
    "between a no-break space and a zero-width space": f"\xa0{URL}\u200b",
    "after a question": f"Is this it? {URL}",
    "before a letter of another script": f"{URL}です",
    "as a browser that allows only https shows it": URL.replace("http:", "https:"),
    "only the query": URL.removeprefix(URI),
}
# Codes as they stand in a URL, and as they are meant
CODES = {
    "a.,:;!?)]": "a.,:;!?)]",
    "4/a-b_c~d!e*f,g;h:i@j$k": "4/a-b_c~d!e*f,g;h:i@j$k",
    "a%2Bb+c%26d%3De%22%27%3C%3E%23%C3%BC": "a+b c&d=e\"'<>#ü",
}
NOT_THE_CALLBACK = f"This is not the URL of the callback, which begins with {URI}\n{BROWSER_ERRORS}"
NOT_THE_WHOLE = "This is not the whole URL. Copy all of it from the address bar."
OLD = f"{STATE_MISMATCH}\n{OLD_TAB}"
WRONG = {
    "a line of spaces": (" \t ", BROWSER_ERRORS),
    "a word": ("hello", NOT_THE_CALLBACK),
    "no character of a URL": ("“”", NOT_THE_CALLBACK),
    "the authorize URL": (f"https://login.example.com/?state={STATE}", NOT_THE_CALLBACK),
    "a foreign callback": ("https://app.example.com/?code=a&state=b", NOT_THE_CALLBACK),
    "cut off before the state": (f"{URI}?code=a-code", NOT_THE_WHOLE),
    "cut off in the state": (URL[:-1], NOT_THE_WHOLE),
    "cut off before the code": (f"{URI}?state={STATE}&co", NOT_THE_WHOLE),
    "another state": (f"{URI}?code=a&state=foreign", OLD),
    "more than our state": (f"{URL}x", OLD),
    "another state, without the scheme": ("localhost:8080/oauth?code=a&state=foreign", OLD),
}


@pytest.mark.parametrize("how", AS_COPIED)
def test_a_url_is_accepted_as_people_copy_it(how: str) -> None:
    assert check_pasted(AS_COPIED[how], URI, STATE) == CALLBACK


@pytest.mark.parametrize("code", CODES)
def test_a_code_arrives_exactly_as_it_was_issued(code: str) -> None:
    """Also between the marks that a terminal puts around a paste."""
    line = f"\x1b[200~{URI}?state={STATE}&code={code}\x1b[201~"
    assert check_pasted(line, URI, STATE) == {"state": STATE, "code": CODES[code]}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_another_line_is_told(what: str) -> None:
    line, text = WRONG[what]
    with pytest.raises(CallbackRefused) as refused:
        check_pasted(line, URI, STATE)
    assert str(refused.value) == text


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (f"\n{URL}\r\nmore\n".encode(), [BROWSER_ERRORS, CALLBACK]),
        (b"\xff\x1b[2J", [NOT_THE_CALLBACK]),
    ],
)
def test_lines_are_read_until_the_callback_or_the_end(
    typed: bytes, expected: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stdin").write_bytes(typed)
    events: Events = SimpleQueue()
    with (tmp_path / "stdin").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        read_pasted(URI, STATE, events)
    assert [events.get() for _ in range(events.qsize())] == expected


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
