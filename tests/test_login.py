"""One login from start to end: what is asked of whom, in which order, and what the person sees."""

import json
import re
import subprocess
import threading
from base64 import urlsafe_b64decode
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from odd_server import CODE, NEW_TOKENS, TOKENS, OddServer, failed_login, json_answer, log_in
from sandbox import Sandbox
from script import PATIENCE, ROOT, SCRIPT, Script, answer_login_page, visit

from sipgate_oauth import (
    authorize_url,
    code_challenge_for,
    describe,
    masked,
    say,
    warn,
)

Start = Callable[..., Script]


@pytest.fixture
def login(server: OddServer, start: Start) -> Script:
    """The script after a login at the server that went well."""
    server.environment |= {"CLIENT_ID": "id & co", "OAUTH_SCOPE": "account:read users:read"}
    server.environment["AUTH_URL"] += "?hint=a%20b"
    server.answer_at("account", json_answer({"company": "Müller & Co"}))
    script = start(**server.environment)
    log_in(script, server)
    assert script.status() == 0, script.stderr
    return script


def query(script: Script) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(script.url()).query, strict_parsing=True))


def test_the_authorize_url_asks_for_a_code_with_pkce(login: Script, server: OddServer) -> None:
    verifier = server.requests[0].form["code_verifier"]
    assert query(login) == {
        "hint": "a b",
        "response_type": "code",
        "client_id": "id & co",
        "redirect_uri": server.environment["REDIRECT_URI"],
        "scope": "account:read users:read",
        "state": login.state(),
        "code_challenge": code_challenge_for(verifier),
        "code_challenge_method": "S256",
    }
    assert [len(urlsafe_b64decode(it + "=")) for it in (verifier, login.state())] == [32, 32]


def test_the_challenge_is_the_one_of_rfc_7636_appendix_b() -> None:
    challenge = code_challenge_for("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
    assert challenge == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_state_and_challenge_are_always_new(login: Script, server: OddServer, start: Start) -> None:
    first, second = query(login), query(start(**server.environment))
    assert {it for it in first if first[it] != second[it]} == {"state", "code_challenge"}


def test_what_a_provider_wants_beside_can_follow_in_auth_url() -> None:
    """And a whole authorize URL that was pasted there does not change what we ask for."""
    config = {
        "CLIENT_ID": "ours",
        "REDIRECT_URI": "http://localhost/oauth",
        "OAUTH_SCOPE": "account:read",
        "AUTH_URL": "https://host/auth?prompt=consent&client_id=old&x=1&x=2&empty=&state=old",
    }
    url = authorize_url(config, "our-state", "our-challenge")
    pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    assert pairs[:4] == [("prompt", "consent"), ("x", "1"), ("x", "2"), ("empty", "")]
    assert dict(pairs[4:])["client_id"] == "ours"
    assert [value for name, value in pairs if name == "state"] == ["our-state"]


def test_these_requests_are_sent_and_no_others(login: Script, server: OddServer) -> None:
    config, verifier = server.environment, server.requests[0].form["code_verifier"]
    client = {"client_id": config["CLIENT_ID"], "client_secret": config["CLIENT_SECRET"]}
    code = {"code": CODE, "code_verifier": verifier, "redirect_uri": config["REDIRECT_URI"]}
    refresh = {"grant_type": "refresh_token", "refresh_token": TOKENS["refresh_token"]}
    sent = [(it.method, it.target, it.headers["Authorization"], it.form) for it in server.requests]
    assert sent == [
        ("POST", "/token", None, {"grant_type": "authorization_code", **code, **client}),
        ("GET", "/account", f"Bearer {TOKENS['access_token']}", {}),
        ("POST", "/token", None, {**refresh, **client}),
        ("GET", "/account", f"Bearer {NEW_TOKENS['access_token']}", {}),
    ]
    assert {it.headers["Accept"] for it in server.requests} == {"application/json"}


def test_all_requests_share_one_connection(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    of_the_browser = sandbox.connections
    visit(callback)
    assert script.status() == 0
    assert (sandbox.connections, sandbox.exchanges) == (of_the_browser + 1, 1)


def test_without_a_refresh_token_the_account_is_shown(server: OddServer, start: Start) -> None:
    server.answer_at("code for tokens", json_answer({**TOKENS, "refresh_token": None}))
    script = start(**server.environment)
    error = failed_login(script, server)
    assert " sent no refresh token.\nThere is nothing to refresh: " in error
    assert "offline_access" in error
    assert "?prompt=consent" in error
    assert '"company": "Odd Ltd"' in script.stdout
    assert "Done." not in script.stdout


def test_every_message_is_shown_with_its_secrets_masked(login: Script, server: OddServer) -> None:
    events = re.findall(r"^ *(\d\. \w+|GET|POST|200 OK|http:.+|Done)", login.stdout, re.MULTILINE)
    assert " ".join(events) == (
        f"1. Configuration 2. Authorize GET {login.url()} 3. Callback GET 4. Code POST 200 OK "
        "5. Account GET 200 OK 6. Refresh POST 200 OK GET 200 OK Done"
    )
    url, account = f"http://{server.host}", '   200 OK\n{\n  "company": "Müller & Co"\n}\n'
    for part in [
        f"\n\n{login.url()}\n\n3. Callback",
        f"GET {url}/auth\n      hint: a b\n      response_type: code\n      client_id: id & co\n",
        "waiting up to 300 seconds for the browser to come back",
        f"press Enter.\n   GET {server.environment['REDIRECT_URI']}\n      code: cBB... (13 char",
        f"POST {url}/token\n      grant_type: authorization_code\n      code: cBB... (13 char",
        '      client_secret: ...\n   200 OK\n{\n  "access_token": "aCCCC... (21 characters)",\n',
        f"GET {url}/account\n      Authorization: Bearer ... (28 characters)\n{account}6. ",
        f"Authorization: Bear... (19 characters)\n{account}Done: ",
    ]:
        assert part in login.stdout


def test_a_request_without_an_answer_is_shown(server: OddServer, start: Start) -> None:
    server.answer_at("refresh", b"")
    script = start(**server.environment)
    failed_login(script, server)
    *_, last = script.stdout.split("   POST ")
    assert last.startswith(f"http://{server.host}/token\n      grant_type: refresh_token\n")


def test_show_tokens_shows_the_tokens_and_no_other_secret(server: OddServer, start: Start) -> None:
    script = start("--show-tokens", **server.environment)
    log_in(script, server)
    assert script.status() == 0
    assert json.dumps(TOKENS, indent=2) in script.stdout
    assert json.dumps(NEW_TOKENS, indent=2) in script.stdout
    for name in ("code", "code_verifier", "client_secret"):
        assert server.requests[0].form[name] not in script.stdout


def test_page_and_request_are_shown_before_the_answer(server: OddServer, start: Start) -> None:
    go_on, tokens = threading.Event(), json_answer(TOKENS)
    server.answer_at("code for tokens", lambda _: tokens if go_on.wait(PATIENCE) else b"")
    script = start(**server.environment)
    log_in(script, server)  # until the page is there
    script.until("grant_type: authorization_code")
    go_on.set()
    assert script.status() == 0


def test_secrets_are_masked_by_their_names_at_every_depth() -> None:
    for name, value, shown in [
        ("code", "12345678", "12... (8 characters)"),
        ("Authorization", 100 * "x", "xxxxxxxxxx... (100 characters)"),
        ("ID_Token", "123", "... (3 characters)"),
        ("CLIENT_SECRET", "12345678", "..."),
        ("token_type", "Bearer", "Bearer"),
        ("", [{"a": {"verifier": "1234"}}], [{"a": {"verifier": "1... (4 characters)"}}]),
        ("token", {"a": ["1234", 5]}, {"a": ["1... (4 characters)", 5]}),
    ]:
        assert masked(value, name) == shown
        assert masked(value, name, True) == (value if name.endswith("oken") else shown)


@pytest.mark.parametrize("show", [say, warn])
def test_what_could_steer_a_terminal_is_escaped(
    capsys: pytest.CaptureFixture[str], show: Callable[..., None]
) -> None:
    show("Köln 東京 \\", "", "\x1b[31m\r\n\t\x9b\xa0\u202e\u2028\ud800\U000e0001")
    escaped = r"\u001b[31m\r\n\t\u009b\u00a0\u202e\u2028\ud800\udb40\udc01"
    printed = f"Köln 東京 \\\n\n{escaped}\n"
    assert capsys.readouterr() == ((printed, "") if show == say else ("", printed))


def test_an_error_is_described_in_the_words_of_the_server() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"error": "a", "error_description": "b."}, "a: b"),
        ({"error": "", "error_description": "b", "error_uri": "c"}, "b"),
        ({"message": "token is required", "url": "c"}, "token is required"),
        ({"error": "x" * 501}, "x" * 500),
        ({"error": {"code": 5}, "error_description": None}, ""),
    ]
    for said, described in cases:
        assert describe(said) == described


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone that git knows about")
def test_the_repository_holds_the_program_and_no_configuration() -> None:
    git = ["git", "-C", str(ROOT)]
    files = subprocess.check_output([*git, "ls-files"], text=True).split()
    top = " ".join(sorted({it.partition("/")[0] for it in files if it[0] != "."}))
    assert top == f"LICENSE README.md config.example.env requirements.txt {SCRIPT.name} tests"
    ignored = [*git, "check-ignore", "--no-index", "config.env", "config.example.env"]
    assert subprocess.check_output(ignored, text=True) == "config.env\n"


def test_uv_run_gets_what_requirements_txt_lists() -> None:
    block = SCRIPT.read_text(encoding="utf-8").partition("# ///\n")[0]
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert re.findall('"(.+?)"', block) == [">=3.10", *listed]
