"""Text that a server or a browser sent can't steer the terminal, and tells no secret."""

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from urllib.parse import quote, quote_plus, urlencode

import pytest
from odd_server import (
    CODE,
    STEPS,
    TOKENS,
    Answer,
    OddServer,
    Request,
    answer,
    failed_login,
    json_answer,
    log_in,
)
from script import Script

from sipgate_oauth import hide, printable

Start = Callable[..., Script]

CONTROLS = "".join(chr(number) for number in (*range(0x20), *range(0x7F, 0xA0)))
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HARMFUL = CONTROLS + BIDIRECTIONAL + "\u2028\u2029\ufeff\udfff\ud800"
ODD_TEXT = f"before \x1b[2J\x1b]0;title\x07\x9b31m\r\n{HARMFUL} after"
# What fits into a status line.
ODD_BYTES = f"before \x1b[2J\x1b]0;title\x07\x9b31m{CONTROLS} after".replace("\n", "").encode(
    "latin-1"
)
HARMLESS = "Grüße, Žižek, Ελλάδα, مرحبا, 東京, 😀, 50 €, <b> & \\"
BAD_REQUEST = "400 Bad Request"


@pytest.fixture
def server() -> Iterator[OddServer]:
    with OddServer() as running:
        yield running


def assert_harmless(output: str) -> None:
    """The only harmful character is the line break, with which the script ends its own lines."""
    assert set(HARMFUL) & set(output) == {"\n"}


# --- Characters that could steer the terminal ----------------------------------------------------


@pytest.mark.parametrize(
    ("step", "odd"),
    [
        ("code for tokens", json_answer({"error": ODD_TEXT}, BAD_REQUEST)),
        ("refresh", json_answer({"error": "odd", "error_description": ODD_TEXT}, BAD_REQUEST)),
        ("account", json_answer({"error": "odd", "error_description": ODD_TEXT}, BAD_REQUEST)),
        ("account again", b"HTTP/1.1 400 %s\r\nContent-Length: 0\r\n\r\n" % ODD_BYTES),
        ("code for tokens", ODD_BYTES + b"\r\n"),
    ],
    ids=["error", "description", "description of the account", "reason phrase", "no HTTP"],
)
def test_the_error_of_a_server_is_one_line_that_steers_nothing(
    server: OddServer, start: Start, step: str, odd: bytes
) -> None:
    server.answer_at(step, odd)
    script = start(**server.environment)
    what, _, to_do = failed_login(script, server).partition("\n")
    assert "before" in what
    assert "after" in what
    assert "TOKEN_URL" in to_do or "TEST_API_ENDPOINT" in to_do
    assert_harmless(script.stdout)
    assert_harmless(script.stderr)


@pytest.mark.parametrize("callback", ["error={}", "error=odd&error_description={}"])
def test_the_error_of_a_callback_is_one_line_that_steers_nothing(
    server: OddServer, start: Start, callback: str
) -> None:
    script = start(**server.environment)
    query = callback.format(quote(ODD_TEXT, errors="surrogatepass"))
    what, _, to_do = failed_login(script, server, query).partition("\n")
    assert "before" in what
    assert "after" in what
    assert "again" in to_do
    assert_harmless(script.stderr)


def test_an_account_steers_nothing_and_is_still_the_same_json(
    server: OddServer, start: Start
) -> None:
    account = {ODD_TEXT: [ODD_TEXT, {HARMLESS: None}]}
    server.answer_at("account", json_answer(account))
    script = start(**server.environment)
    log_in(script, server)
    assert script.status() == 0
    assert_harmless(script.stdout)
    shown = script.stdout[script.stdout.index("\n{") : script.stdout.index("\n}") + 2]
    assert json.loads(shown) == account


def test_harmless_text_is_shown_as_it_is(server: OddServer, start: Start) -> None:
    account = {HARMLESS[:-2]: HARMLESS[:-2]}
    server.answer_at("account", json_answer(account))
    content = {"error": "odd", "error_description": HARMLESS}
    server.answer_at("refresh", json_answer(content, BAD_REQUEST))
    script = start(**server.environment)
    error = failed_login(script, server)
    assert f"odd: {HARMLESS}" in error
    assert json.dumps(account, indent=2, ensure_ascii=False) in script.stdout


def test_a_terminal_without_utf_8_gets_escapes(server: OddServer, start: Start) -> None:
    server.answer_at("account", json_answer({"company": HARMLESS}))
    content = {"error": "odd", "error_description": HARMLESS}
    server.answer_at("refresh", json_answer(content, BAD_REQUEST))
    script = start(**server.environment, PYTHONIOENCODING="ascii")
    error = failed_login(script, server)
    for shown in (script.stdout, error):
        assert shown.isascii()
        assert "\\u6771\\u4eac" in shown  # 東京


def characters(*categories: str) -> Iterator[str]:
    """All characters of Unicode whose category begins so."""
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(character).startswith(categories):
            yield character


def test_whatever_steers_a_terminal_is_replaced() -> None:
    """The categories: control, format (with the bidirectional ones), surrogate, separator."""
    for character in characters("Cc", "Cf", "Cs", "Zl", "Zp"):
        assert character == "\n" or json.loads(f'"{printable(character)}"') == character
        assert character == "\n" or character not in printable(character)


def test_letters_marks_numbers_punctuation_and_symbols_stay() -> None:
    text = "".join(characters("L", "M", "N", "P", "S"))
    assert printable(text) == text


# --- Too much text -------------------------------------------------------------------------------

LONG = "long " * 10_000


@pytest.mark.parametrize(
    "odd",
    [
        json_answer({"error": LONG}, BAD_REQUEST),
        json_answer({"error": "invalid_grant", "error_description": LONG}, BAD_REQUEST),
        answer(b"", status=f"400 {LONG}"),
        LONG.encode(),
        json_answer({"error": "odd", "error_description": "\x1b" * 50_000}, BAD_REQUEST),
    ],
    ids=["error", "description", "reason phrase", "no HTTP", "escapes"],
)
def test_a_long_error_is_cut_and_the_advice_is_not(
    server: OddServer, start: Start, odd: bytes
) -> None:
    server.answer_at("code for tokens", odd)
    what, _, to_do = failed_login(start(**server.environment), server).partition("\n")
    assert server.host in what
    assert len(what) < 4000
    assert to_do.rstrip().endswith(".")


def test_a_long_error_of_a_callback_is_cut(server: OddServer, start: Start) -> None:
    callback = f"error=access_denied&error_description={quote(LONG[:20_000])}"
    what, _, to_do = failed_login(start(**server.environment), server, callback).partition("\n")
    assert "access_denied" in what
    assert len(what) < 4000
    assert "again" in to_do


# --- Secrets in the text -------------------------------------------------------------------------


def received(request: Request) -> str:
    """All that a request held."""
    return ", ".join([*request.form.values(), request.headers.get("Authorization", "")])


ECHOES: dict[str, Answer] = {
    "error": lambda request: json_answer({"error": received(request)}, BAD_REQUEST),
    "description": lambda request: json_answer(
        {"error": "odd", "error_description": f"before {received(request)} after"}, BAD_REQUEST
    ),
    "success": lambda request: json_answer({"error_description": received(request), "error": 1}),
    "reason phrase": lambda request: answer(b"", status=f"400 {received(request)}"),
    "no HTTP": lambda request: received(request).encode() + b"\r\n",
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("echo", ECHOES)
def test_what_a_server_repeats_tells_no_secret(
    server: OddServer, start: Start, step: str, echo: str
) -> None:
    server.answer_at(step, ECHOES[echo])
    what = failed_login(start(**server.environment), server).partition("\n")[0]
    assert server.host in what
    if echo == "description":
        assert "before" in what
        assert "after" in what


@pytest.mark.parametrize("secret", [CODE, TOKENS["access_token"]])
def test_what_a_server_remembers_tells_no_secret(
    server: OddServer, start: Start, secret: str
) -> None:
    content = {"error": "invalid_grant", "error_description": f"Of the session {secret}"}
    server.answer_at("refresh", json_answer(content, BAD_REQUEST))
    assert "expired" in failed_login(start(**server.environment), server)


@pytest.mark.parametrize("encode", [urlencode, str], ids=["as it came", "decoded"])
def test_a_form_that_a_server_repeats_tells_no_secret(
    server: OddServer, start: Start, encode: Callable[[dict[str, str]], str]
) -> None:
    secret = "50% schön & $HOME + more"
    server.answer_at(
        "code for tokens",
        lambda request: json_answer({"error": encode(request.form)}, BAD_REQUEST),
    )
    error = failed_login(start(**{**server.environment, "CLIENT_SECRET": secret}), server)
    assert "grant_type" in error
    assert secret not in error
    assert quote_plus(secret) not in error


def test_an_address_that_a_server_repeats_tells_no_password(
    server: OddServer, start: Start
) -> None:
    content = {"error": "odd", "error_description": "no way to http://me:pAssword@proxy.invalid/"}
    server.answer_at("code for tokens", json_answer(content, BAD_REQUEST))
    error = failed_login(start(**server.environment), server)
    assert "proxy.invalid" in error
    assert "pAssword" not in error


def test_a_secret_that_is_a_common_word_does_not_make_an_error_unreadable(
    server: OddServer, start: Start
) -> None:
    content = {"error": "invalid_grant", "error_description": "The code has expired"}
    server.answer_at("code for tokens", json_answer(content, BAD_REQUEST))
    script = start(**server.environment)
    log_in(script, server, "code=code")
    assert script.status() == 1
    assert "The code has expired" in script.stderr


def test_a_secret_that_begins_with_another_is_hidden_whole() -> None:
    secrets = {f"beginning{end}" for end in ("", "-and", "-and-middle", "-and-middle-and-end")}
    assert hide("beginning-and-middle-and-end", secrets) == "***"
