"""--paste: the browser is on another machine, so a person brings the callback here."""

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sandbox import Sandbox
from script import PATIENCE, SCRIPT, Script, answer_login_page

Start = Callable[..., Script]

PROMPT = "Paste the address"
FOREIGN_STATE = "State in the callback does not match the state in the original request"


@pytest.fixture
def script(sandbox: Sandbox, start: Start) -> Script:
    """A script that asks for the address."""
    started = start("--paste", **sandbox.environment)
    started.until(PROMPT)
    return started


@pytest.mark.parametrize(
    "around",
    ["{}\n", "  {} \t\n", '"{}"\n', "'{}'\n", ' "{}" \n', "{}\r\n", "{}"],
    ids=["nothing", "blanks", "quotes", "single quotes", "both", "CR LF", "the end of the input"],
)
def test_the_address_is_accepted_with_blanks_or_quotes_around_it(
    script: Script, around: str
) -> None:
    script.type(around.format(answer_login_page(script.url())))
    script.close_stdin()
    assert script.status() == 0
    assert script.stdout.count('"company"') == 2
    assert script.stderr == ""


def test_the_address_is_accepted_as_a_browser_shows_it_without_its_scheme(script: Script) -> None:
    script.type(answer_login_page(script.url()).removeprefix("http://") + "\n")
    assert script.status() == 0
    assert script.stderr == ""


@pytest.mark.parametrize(
    ("part", "replacement", "why"),
    [
        pytest.param("http.*", "", "path", id="an empty line"),
        pytest.param("http.*", "hello", "path", id="something else"),
        pytest.param("/oauth", "/elsewhere", "path", id="another path"),
        pytest.param("http:", "http://[", "read", id="a malformed address"),
        pytest.param("[?].*", "", "no answer", id="only the start"),
        pytest.param("[?&]code=[^&]*", "", "code", id="no code"),
        pytest.param("$", "&code=another", "more than once", id="two codes"),
        pytest.param("$", "&error=access_denied", "code or an error", id="code and error"),
        pytest.param("&state=", "&state=x", FOREIGN_STATE, id="another state"),
        pytest.param("&state=", "&no-state=", FOREIGN_STATE, id="no state"),
        pytest.param("&state=", "&state=\udcff\udcfe", FOREIGN_STATE, id="no UTF-8"),
        pytest.param("http", "\0\x1b", "path", id="control characters"),
        pytest.param("&state=", "&state=" + "x" * 100_000, FOREIGN_STATE, id="too long"),
    ],
)
def test_a_wrong_address_is_told_why_and_asked_for_again(
    script: Script, part: str, replacement: str, why: str
) -> None:
    callback = answer_login_page(script.url())
    script.type(f"{re.sub(part, replacement, callback, count=1)}\n{callback}\n")
    assert script.status() == 0
    assert script.stdout.count(PROMPT) == 2
    assert why in script.stderr
    assert "Traceback" not in script.stderr


def test_a_foreign_state_is_not_repeated(script: Script) -> None:
    callback = answer_login_page(script.url())
    script.type(f"{callback.split('?')[0]}?code=foreign-code&state=foreign-value\n{callback}\n")
    assert script.status() == 0
    assert FOREIGN_STATE in script.stderr
    assert "foreign-" not in script.stdout + script.stderr


@pytest.mark.parametrize("typed", ["", "hello\n", "\n\n"])
def test_the_end_of_the_input_is_an_error_that_says_what_to_do(script: Script, typed: str) -> None:
    script.type(typed)
    script.close_stdin()
    assert script.status() == 1
    what, advice = script.stderr.splitlines()[-2:]
    assert what.startswith("Error: ")
    assert "input ended" in what
    assert "paste" in advice


def test_an_error_that_is_pasted_ends_the_login(sandbox: Sandbox, script: Script) -> None:
    script.type(f"{answer_login_page(script.url(), 'deny')}\n")
    assert script.status() == 1
    assert "access_denied" in script.stderr
    assert sandbox.exchanges == 0


def test_text_that_is_pasted_can_not_steer_the_terminal(script: Script) -> None:
    uri = answer_login_page(script.url()).split("?")[0]
    text = "\x1b[2J\x9b31m\u202e\u2028\x85\x7f\b\udcff %1B[2J %C2%9B31m %0AError: none"
    script.type(f"{uri}?error=access_denied&state={script.state()}&error_description={text}\n")
    assert script.status() == 1
    shown = script.stdout + script.stderr
    assert [it for it in shown if not it.isprintable() and it != "\n"] == []
    assert script.stderr.count("\n") == 2


@pytest.mark.parametrize("path", ["", "/"])
def test_an_empty_line_is_asked_for_again_also_if_the_path_is_empty(
    start: Start, path: str
) -> None:
    with Sandbox(redirect_uri=f"http://localhost:8080{path}", port=0) as sandbox:
        script = start("--paste", **sandbox.environment)
        script.type(f"\n{answer_login_page(script.url())}\n")
        assert script.status() == 0
        assert script.stdout.count(PROMPT) == 2


def test_paste_listens_on_no_port(sandbox: Sandbox, script: Script) -> None:
    port = urlsplit(sandbox.environment["REDIRECT_URI"]).port or 0
    for address in ("127.0.0.1", "::1"):
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
            pytest.fail(f"somebody listens on {address}")


def test_paste_works_while_the_port_is_in_use(sandbox: Sandbox, start: Start) -> None:
    port = urlsplit(sandbox.environment["REDIRECT_URI"]).port or 0
    with socket.create_server(("127.0.0.1", port)):
        script = start("--paste", **sandbox.environment)
        script.type(f"{answer_login_page(script.url())}\n")
        assert script.status() == 0


@pytest.mark.parametrize("typed", ["Grüße", "\udcff"])
def test_input_that_the_terminal_has_no_characters_for_is_told_too(
    sandbox: Sandbox, start: Start, typed: str
) -> None:
    script = start("--paste", **sandbox.environment, PYTHONIOENCODING="ascii")
    script.type(f"{typed}\n{answer_login_page(script.url())}\n")
    assert script.status() == 0
    assert script.stdout.count(PROMPT) == 2
    assert "Traceback" not in script.stderr


def test_an_input_that_can_not_be_read_has_ended(
    sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> None:
    with (tmp_path / "only for writing").open("wb") as unreadable:
        result = subprocess.run(
            [sys.executable, SCRIPT, "--paste"],
            stdin=unreadable,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**environment, **sandbox.environment},
        )
    assert result.returncode == 1
    assert "The input ended" in result.stderr
