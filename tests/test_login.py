"""One login from start to end: what is asked of whom, in which order, and what the user sees."""

import re
import subprocess
import threading
from base64 import urlsafe_b64decode
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from odd_server import CODE, NEW_TOKENS, TOKENS, OddServer, json_answer, log_in
from sandbox import Sandbox
from script import PATIENCE, ROOT, SCRIPT, Script, answer_login_page, visit

from sipgate_oauth import SECRETS_SENT, code_challenge_for, describe, masked, say

Start = Callable[..., Script]


@pytest.fixture
def login(server: OddServer, start: Start) -> Script:
    """The script after a successful login, whose values have small and capital letters."""
    server.environment |= {"CLIENT_ID": "Id & Co", "OAUTH_SCOPE": "account:read Users:Read"}
    server.environment["REDIRECT_URI"] += "/CallBack"
    server.environment["AUTH_URL"] += "?hint=a%20b"
    server.answer_at("account", json_answer({"company": "Müller & Co"}))
    script = start(**server.environment)
    log_in(script, server)
    assert script.status() == 0, script.stderr
    return script


# --- What is sent ---------------------------------------------------------------------------------


def test_the_authorize_url_asks_for_a_code_with_pkce(login: Script, server: OddServer) -> None:
    parameters = dict(parse_qsl(urlsplit(login.url()).query, strict_parsing=True))
    assert parameters == {
        "hint": "a b",
        "response_type": "code",
        "client_id": "Id & Co",
        "redirect_uri": server.environment["REDIRECT_URI"],
        "scope": "account:read Users:Read",
        "state": login.state(),
        "code_challenge": code_challenge_for(server.requests[0].form["code_verifier"]),
        "code_challenge_method": "S256",
    }


def test_these_requests_are_sent_and_no_others(login: Script, server: OddServer) -> None:
    sent = []
    for request in server.requests:
        form = {**request.form}
        form.pop("code_verifier", "")  # see the test above
        sent.append((request.method, request.target, request.headers["Authorization"], form))
    client = {"client_id": "Id & Co", "client_secret": server.environment["CLIENT_SECRET"]}
    code = {"code": CODE, "redirect_uri": server.environment["REDIRECT_URI"]}
    assert sent == [
        ("POST", "/token", None, {"grant_type": "authorization_code", **code, **client}),
        ("GET", "/account", "Bearer aCCCCCCC-access-token", {}),
        (
            "POST",
            "/token",
            None,
            {"grant_type": "refresh_token", "refresh_token": "rDDDDDDD-refresh-token", **client},
        ),
        ("GET", "/account", "Bearer aEEEEEEE-new", {}),
    ]
    assert {request.headers["Accept"] for request in server.requests} == {"application/json"}


def test_all_requests_of_the_program_share_one_connection(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    of_the_browser = set(sandbox.ports)
    visit(callback)
    assert script.status() == 0
    assert len(sandbox.ports - of_the_browser) == 1


def test_secrets_are_sent_in_forms_and_in_authorization_only(
    login: Script, server: OddServer
) -> None:
    form = server.requests[0].form
    secrets = [form["code"], form["code_verifier"], form["client_secret"], login.state()]
    for tokens in (TOKENS, NEW_TOKENS):
        secrets += [tokens["access_token"], tokens["refresh_token"]]
    for request in server.requests:
        del request.headers["Authorization"]
        elsewhere = f"{request.target}\n{request.headers}"
        assert [secret for secret in secrets if secret in elsewhere] == []


def test_state_and_code_verifier_are_random_throughout(server: OddServer, start: Start) -> None:
    states = []
    for _ in range(5):
        script = start(**server.environment)
        log_in(script, server)
        assert script.status() == 0
        states.append(script.state())
    forms = [request.form for request in server.requests]
    verifiers = [form["code_verifier"] for form in forms if "code_verifier" in form]
    assert len({*states, *verifiers}) == 10
    for values in (states, verifiers):
        decoded = [urlsafe_b64decode(value + "=") for value in values]
        assert [len(value) for value in decoded] == [32] * 5
        # At no place do five random bytes agree (once in 256 ** 4 times).
        assert min(len(set(place)) for place in zip(*decoded, strict=True)) > 1


def test_the_challenge_is_the_one_of_rfc_7636_appendix_b() -> None:
    challenge = code_challenge_for("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
    assert challenge == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


# --- What is shown --------------------------------------------------------------------------------


def test_every_message_is_shown_with_its_secrets_masked(login: Script, server: OddServer) -> None:
    pattern = r"^ *(\d\. \w+|\w+: GET|\w+: POST|\w+: 200 OK|http:.+|Done)"
    assert " ".join(re.findall(pattern, login.stdout, re.MULTILINE)) == (
        f"1. Configuration 2. Authorize Browser: GET {login.url()} 3. Callback Browser: GET "
        "4. Tokens Program: POST Response: 200 OK 5. Account Program: GET Response: 200 OK "
        "6. Refresh Program: POST Response: 200 OK Program: GET Response: 200 OK Done"
    )
    url = f"http://{server.host}"
    account = '   Response: 200 OK\n      {\n        "company": "Müller & Co"\n      }\n'
    for part in [
        f"GET {url}/auth\n      hint: a b\n      response_type: code\n      client_id: Id & Co\n",
        f"\n\n{login.url()}\n\n",
        "waiting up to 300 seconds for the browser to come back",
        f"GET {server.environment['REDIRECT_URI']}\n      code: cBB... (13 characters)\n",
        f"POST {url}/token\n      grant_type: authorization_code\n      code: cBB... (13 char",
        "      client_secret: ...\n   Response: 200 OK\n      {\n"
        '        "access_token": "aCCCC... (21 characters)",\n',
        f"GET {url}/account\n      Authorization: Bearer ... (28 characters)\n{account}6. ",
    ]:
        assert part in login.stdout


def test_show_tokens_shows_the_tokens_and_no_other_secret(server: OddServer, start: Start) -> None:
    script = start("--show-tokens", **server.environment)
    log_in(script, server)
    assert script.status() == 0
    for tokens in (TOKENS, NEW_TOKENS):
        assert tokens["access_token"] in script.stdout
        assert tokens["refresh_token"] in script.stdout
    for name in ("code", "code_verifier", "client_secret"):
        assert server.requests[0].form[name] not in script.stdout


def test_page_and_request_are_shown_before_the_response(server: OddServer, start: Start) -> None:
    go_on = threading.Event()
    tokens = json_answer(TOKENS)
    server.answer_at("code for tokens", lambda _: tokens if go_on.wait(PATIENCE) else b"")
    script = start(**server.environment)
    log_in(script, server)  # returns when the page is there
    script.until("grant_type: authorization_code")
    go_on.set()
    assert script.status() == 0


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("code", "12345678", "12... (8 characters)"),
        ("Authorization", 100 * "x", "xxxxxxxxxx... (100 characters)"),
        ("CODE_VERIFIER", "123", "... (3 characters)"),
        ("api_key", "12345678", "12... (8 characters)"),
        ("client_secret", "12345678", "..."),
        ("refresh_token", ["12345678"], "..."),
        ("id_token", None, None),
        ("token_type", "Bearer", "Bearer"),
        ("code_challenge_method", "S256", "S256"),
    ],
)
def test_secrets_are_masked_by_their_names(name: str, value: Any, shown: Any) -> None:
    assert masked({name: value, "a": "b"}, SECRETS_SENT) == {name: shown, "a": "b"}


def test_what_could_control_a_terminal_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say("Köln 東京 \\", "", "\x1b[31m\r\n\t\x9b\xa0\u202e\u2028\ud800\U000e0001")
    escaped = r"\u001b[31m\r\n\t\u009b\u00a0\u202e\u2028\ud800\udb40\udc01"
    assert capsys.readouterr().out == f"Köln 東京 \\\n\n{escaped}\n"


def test_an_error_is_described_in_the_words_of_the_server() -> None:
    assert describe({"error": "a", "error_description": "b."}) == "a: b"
    assert describe({"error": "a", "error_description": "a", "message": "c"}) == "a: c"
    assert describe({"error": "", "error_description": "b", "error_uri": "c"}) == "b"
    assert describe({"error": {"code": 5}, "error_description": None}) == ""


# --- What is published ----------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone that git knows about")
def test_git_ignores_every_configuration_but_the_example() -> None:
    names = ["config.env", ".env", "config.example.env"]
    ignored = ["git", "-C", str(ROOT), "check-ignore", "--no-index", *names]
    assert subprocess.check_output(ignored, text=True) == "config.env\n.env\n"


def test_uv_run_gets_what_requirements_txt_lists() -> None:
    block = SCRIPT.read_text(encoding="utf-8").partition("# ///\n")[0]
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert re.findall('"(.+?)"', block) == [">=3.10", *listed]
