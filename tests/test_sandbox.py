"""The sandbox refuses what a real Keycloak refuses, and it runs as a command."""

import io
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote_plus, urlsplit

import keycloak as real
import pytest
import requests
import sandbox as stand_in
from dotenv import dotenv_values
from joserfc import jwt
from sandbox import Sandbox
from script import Script, answer_login_page, free_port, ipv6_works, log_in, send

REDIRECT_URI = "http://localhost:12345/oauth"
# The pair of RFC 7636, appendix B.
VERIFIER = {"code_verifier": "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"}
CHALLENGE = {"code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"}
Config = Mapping[str, Any]
Run = Callable[..., Script]
Changes = dict[str, str | None]  # of the parameters of a request; None leaves one out


def authorize_url(config: Config, **changes: str | None) -> str:
    parameters = {"client_id": config["CLIENT_ID"], "redirect_uri": config["REDIRECT_URI"]}
    parameters |= {"response_type": "code", "scope": config["OAUTH_SCOPE"]}
    parameters |= {**CHALLENGE, "code_challenge_method": "S256", **changes}
    return str(requests.Request("GET", config["AUTH_URL"], params=parameters).prepare().url)


def get_code(config: Config, **changes: str | None) -> str:
    answer = answer_login_page if config["CLIENT_ID"] == stand_in.CLIENT_ID else real.log_in
    return dict(parse_qsl(urlsplit(answer(authorize_url(config, **changes))).query))["code"]


def exchange(config: Config, **changes: str | None) -> requests.Response:
    form = {"client_id": config["CLIENT_ID"], "client_secret": config["CLIENT_SECRET"]}
    form |= {"grant_type": "authorization_code", "redirect_uri": config["REDIRECT_URI"]}
    return send("POST", config["TOKEN_URL"], data={**form, **VERIFIER, **changes})


def refresh(config: Config, tokens: dict[str, str]) -> requests.Response:
    """Refresh, and show in the other way who is asking: in a header."""
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    user = (config["CLIENT_ID"], quote_plus(config["CLIENT_SECRET"]))
    return send("POST", config["TOKEN_URL"], data=form, auth=user)


def get_account(config: Config, tokens: dict[str, str]) -> requests.Response:
    header = {"Authorization": f"Bearer {tokens['access_token']}"}
    return send("GET", config["TEST_API_ENDPOINT"], headers=header)


@pytest.fixture
def run(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the sandbox as a command: run(*arguments, **variables)."""
    monkeypatch.setattr("script.SCRIPT", Path(stand_in.__file__))
    with ExitStack() as scripts:

        def run_sandbox(*arguments: str, python: tuple[str, ...] = (), **variables: str) -> Script:
            variables = {**environment, **variables}
            script = Script(*arguments, environment=variables, python=python, session=True)
            return scripts.enter_context(script)

        yield run_sandbox


# --- As at Keycloak -------------------------------------------------------------------------------


@pytest.fixture(
    params=["sandbox", pytest.param("keycloak", marks=pytest.mark.xdist_group("keycloak"))]
)
def config(request: pytest.FixtureRequest) -> Config:
    server: Sandbox | real.Keycloak = request.getfixturevalue(request.param)
    return server.environment if isinstance(server, Sandbox) else server.environment(REDIRECT_URI)


CREDENTIALS = "Invalid client or Invalid client credentials"
NO_PKCE: Changes = {"code_challenge": None, "code_challenge_method": None}
BAD_CHALLENGE = "302 invalid_request: Invalid parameter: code_challenge"
# What is done wrong, at which step, and how the refusal begins.
MISTAKES: list[tuple[str, Changes, str]] = [
    ("login", {"client_id": "x"}, "400 Client not found."),
    ("login", {"redirect_uri": "http://localhost/x"}, "400 Invalid parameter: redirect_uri"),
    ("login", {"scope": "no:such"}, "302 invalid_scope"),
    ("login", NO_PKCE, "302 invalid_request: Missing parameter: code_challenge_method"),
    ("login", {"code_challenge_method": "plain"}, "302 invalid_request"),
    ("login", {"code_challenge": CHALLENGE["code_challenge"] + "="}, BAD_CHALLENGE),
    ("login", {"code_challenge": CHALLENGE["code_challenge"][:42]}, BAD_CHALLENGE),
    ("login", {"code_challenge": "a" * 64}, "200"),  # the SHA-256 in hexadecimal digits: too late
    ("exchange", {"client_id": "x"}, f"401 invalid_client: {CREDENTIALS}"),
    ("exchange", {"client_id": None}, f"401 invalid_client: {CREDENTIALS}"),
    ("exchange", {"client_secret": "x"}, f"401 unauthorized_client: {CREDENTIALS}"),
    ("exchange", {"client_secret": None}, f"401 unauthorized_client: {CREDENTIALS}"),
    ("exchange", {"grant_type": None}, "400 invalid_request: Missing form parameter: grant_type"),
    ("exchange as JSON", {}, "400 invalid_request: Missing form parameter: grant_type"),
    ("exchange", {"redirect_uri": None}, "400 invalid_grant"),
    ("exchange", {"redirect_uri": "http://localhost/x"}, "400 invalid_grant"),
    ("exchange", {"code_verifier": None}, "400 invalid_grant: PKCE code verifier not specified"),
    ("exchange", {"code_verifier": "x" * 43}, "400 invalid_grant"),
    ("second exchange", {}, "400 invalid_grant: Code not valid"),
    ("second refresh", {}, "400 invalid_grant"),
]


def refusal(response: requests.Response) -> str:
    """The status and the error, from a redirect, from JSON, or from a page."""
    said = dict(parse_qsl(urlsplit(response.headers.get("Location", "")).query))
    assert not said or "/realms/third-party" in said["iss"]
    if "json" in response.headers.get("Content-Type", ""):
        said = response.json()
    texts = [said[name] for name in ("error", "error_description") if name in said]
    texts = texts or re.findall(r'(?:<h1>|<p class="instruction">)(.+?)<', response.text)
    return f"{response.status_code} {': '.join(texts)}"


def make_mistake(config: Config, step: str, changes: Changes) -> requests.Response:
    """Log in with a mistake at one step, and return the answer to that step."""
    if step == "login":
        return send("GET", authorize_url(config, **changes))
    code = get_code(config)
    if step == "exchange as JSON":
        return send("POST", config["TOKEN_URL"], json={"grant_type": "authorization_code"})
    response = exchange(config, **{"code": code, **changes})
    if step == "exchange":
        return response
    old = response.json()
    new = refresh(config, old).json()
    response = exchange(config, code=code) if step == "second exchange" else refresh(config, old)
    assert get_account(config, new).status_code == 401  # one of the two may be a thief
    return response


@pytest.mark.parametrize(("step", "changes", "expected"), MISTAKES)
def test_a_mistake_is_refused(config: Config, step: str, changes: Changes, expected: str) -> None:
    assert refusal(make_mistake(config, step, changes)).startswith(expected)


def get_tokens(sandbox: Sandbox, **changes: str | None) -> dict[str, Any]:
    config = sandbox.environment
    return dict(exchange(config, code=get_code(config, **changes)).json())


def test_tokens_come_as_at_sipgate(sandbox: Sandbox) -> None:
    tokens = get_tokens(sandbox)
    assert (tokens["token_type"], tokens["scope"]) == ("bearer", "account:read balance:read")
    assert (tokens["expires_in"], tokens["refresh_expires_in"]) == (300, 30 * 24 * 3600)
    assert jwt.decode(tokens["id_token"], stand_in.SIGNING_KEY).claims["aud"] == "sandbox"


def test_a_refresh_replaces_both_tokens(sandbox: Sandbox) -> None:
    old = get_tokens(sandbox)
    new = refresh(sandbox.environment, old).json()
    assert refusal(get_account(sandbox.environment, old)).startswith("401 invalid_token")
    assert get_account(sandbox.environment, new).headers["Cache-Control"] == "no-store"
    assert refresh(sandbox.environment, new).ok


def test_codes_and_tokens_expire() -> None:
    with Sandbox(REDIRECT_URI, port=0, code_lifetime=0) as sandbox:
        assert get_tokens(sandbox)["error_description"] == "Code not valid"
    with Sandbox(REDIRECT_URI, port=0, expires_in=0, refresh_expires_in=0) as sandbox:
        tokens = get_tokens(sandbox)
        assert get_account(sandbox.environment, tokens).status_code == 401
        assert "invalid_grant" in refusal(refresh(sandbox.environment, tokens))


def test_the_account_needs_its_scope(sandbox: Sandbox) -> None:
    response = get_account(sandbox.environment, get_tokens(sandbox, scope="users:read"))
    assert refusal(response).startswith("403 insufficient_scope")
    assert "insufficient_scope" in response.headers["WWW-Authenticate"]


# --- What is printed ------------------------------------------------------------------------------

CHALLENGE_RULE = "the SHA-256 of the code_verifier in base64url: 43 characters, no = at the end"
SCOPES = "account:read balance:read numbers:read openid users:read"
# What is done wrong, at which step, and what the sandbox prints beside the refusal.
EXPLANATIONS: list[tuple[str, Changes, str]] = [
    ("login", {"client_id": "x"}, "client_id is wrong: it should be sandbox"),
    ("login", {"client_id": None}, "client_id is missing: it should be sandbox"),
    ("login", {"redirect_uri": None}, f"redirect_uri is missing: it should be {REDIRECT_URI}"),
    ("login", {"redirect_uri": "x"}, f"redirect_uri is wrong: it should be {REDIRECT_URI}"),
    ("login", {"response_type": "x"}, "response_type is wrong: it should be code"),
    ("login", {"scope": "no:such"}, f"scope is wrong: it should be one or more of {SCOPES}"),
    ("login", NO_PKCE, "code_challenge_method is missing: it should be S256 (PKCE, RFC 7636)"),
    ("login", {"code_challenge_method": "plain"}, "code_challenge_method is wrong: "),
    ("login", {"code_challenge": "x"}, f"code_challenge is wrong: it should be {CHALLENGE_RULE}"),
    ("login", {"code_challenge": "a" * 64}, "No code_verifier will fit"),
    ("login", {}, "No state was sent: without it, a program cannot"),
    ("exchange", {"client_id": None}, "client_id is missing: it should be sandbox"),
    ("exchange", {"client_id": "x"}, "client_id is wrong: it should be sandbox"),
    ("exchange", {"client_secret": None}, "client_secret is missing: it should be"),
    ("exchange", {"client_secret": "x"}, "client_secret is wrong: it should be the CLIENT_SECRET"),
    ("exchange", {"grant_type": None}, "grant_type is missing: it should be authorization_code or"),
    ("exchange", {"grant_type": "x"}, "grant_type is wrong: it should be authorization_code or"),
    ("exchange", {"code": None}, "code is missing: it should be a new one"),
    ("exchange", {"code": "x"}, "code is wrong: it should be a new one"),
    ("exchange", {"redirect_uri": None}, f"redirect_uri is missing: it should be {REDIRECT_URI}"),
    ("exchange", {"redirect_uri": "x"}, f"redirect_uri is wrong: it should be {REDIRECT_URI}"),
    ("exchange", {"code_verifier": None}, "code_verifier is missing: it should be"),
    ("exchange", {"code_verifier": "x" * 43}, "code_verifier is wrong: it should be"),
    ("exchange", {"code_verifier": "x"}, "code_verifier is wrong: it should be"),
    ("exchange as JSON", {}, "The body is application/json: it should be a form"),
    ("second exchange", {}, "code is wrong: it should be a new one: each works once"),
    ("second refresh", {}, "refresh_token is wrong: it should be the newest: each works once"),
]


@pytest.fixture
def printing_sandbox() -> Iterator[Sandbox]:
    with Sandbox(REDIRECT_URI, port=0, log=True) as running:
        yield running


def last_line(capsys: pytest.CaptureFixture[str], request: str) -> str:
    """Return what the sandbox has printed about the last of these requests, after the outcome."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(request)]
    return lines[-1].partition(". ")[2]


@pytest.mark.parametrize(("step", "changes", "expected"), EXPLANATIONS)
def test_a_mistake_is_explained(
    printing_sandbox: Sandbox,
    capsys: pytest.CaptureFixture[str],
    step: str,
    changes: Changes,
    expected: str,
) -> None:
    make_mistake(printing_sandbox.environment, step, changes)
    assert last_line(capsys, "GET /auth" if step == "login" else "POST /auth").startswith(expected)


def test_a_secret_that_is_not_encoded_in_a_header_is_explained(
    printing_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printing_sandbox.environment
    form = {"grant_type": "authorization_code", "code": "x"}
    user = (config["CLIENT_ID"], config["CLIENT_SECRET"])
    assert send("POST", config["TOKEN_URL"], data=form, auth=user).status_code == 401
    assert last_line(capsys, "POST").startswith("Form-encode the id and the secret before")


def test_no_secret_is_printed(
    printing_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printing_sandbox.environment
    code = get_code(config)
    exchange(config, code=code, client_secret="wrong-secret")
    tokens = exchange(config, code=code).json()
    printed = capsys.readouterr().out
    for secret in (code, "wrong-secret", config["CLIENT_SECRET"], *VERIFIER.values()):
        assert secret not in printed
    assert tokens["access_token"] not in printed


def test_a_request_without_a_mistake_gets_no_explanation(
    printing_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printing_sandbox.environment
    tokens = exchange(config, code=get_code(config, state="s")).json()
    get_account(config, refresh(config, tokens).json())
    realm = "/auth/realms/third-party/protocol/openid-connect"
    assert capsys.readouterr().out.splitlines() == [
        f"GET {realm}/auth: 200 OK",
        f"POST {realm}/auth: code issued",
        f"POST {realm}/token: tokens issued",
        f"POST {realm}/token: tokens issued",
        "GET /v2/account: 200 OK",
    ]


def test_the_page_names_the_registered_redirect_uri() -> None:
    with Sandbox("http://localhost:1/?a=<b>&c", port=0) as sandbox:
        page = send("GET", authorize_url(sandbox.environment, redirect_uri="http://x"))
    assert "it should be http://localhost:1/?a=&lt;b&gt;&amp;c<" in page.text


# --- The wrong state ------------------------------------------------------------------------------


def test_the_login_page_has_three_buttons(sandbox: Sandbox) -> None:
    page = send("GET", authorize_url(sandbox.environment)).text
    assert re.findall(r'name="answer" value="(.+?)">(.+?)</button>', page) == [
        ("allow", "Allow"),
        ("deny", "Deny"),
        ("wrong-state", "Allow, but return a wrong state"),
    ]


@pytest.mark.parametrize("state", ["our-state", None])
def test_the_third_button_returns_a_code_with_a_wrong_state(
    sandbox: Sandbox, state: str | None
) -> None:
    url = answer_login_page(authorize_url(sandbox.environment, state=state), "wrong-state")
    callback = dict(parse_qsl(urlsplit(url).query))
    assert callback["state"] not in ("our-state", "")
    assert exchange(sandbox.environment, code=callback["code"]).ok  # as with Allow


def test_a_wrong_state_is_explained(
    printing_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_login_page(authorize_url(printing_sandbox.environment, state="s"), "wrong-state")
    assert last_line(capsys, "POST").startswith(
        "The state in the redirect is wrong: if a token request follows"
    )


def test_a_state_that_is_not_checked_is_told_at_the_token_request(
    printing_sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printing_sandbox.environment
    callback = answer_login_page(authorize_url(config, state="s"), "wrong-state")
    exchange(config, code=dict(parse_qsl(urlsplit(callback).query))["code"])
    expected = "The code came with a wrong state: the program did not check it"
    assert last_line(capsys, "POST") == expected


def test_an_authorize_url_without_parameters_is_explained(sandbox: Sandbox) -> None:
    page = send("GET", sandbox.environment["AUTH_URL"])
    assert page.status_code == 400
    assert "should be" in page.text


def test_the_script_notices_the_wrong_state(run: Run) -> None:
    script = run("--no-browser")
    assert log_in(script, "wrong-state").status_code == 403
    assert log_in(script).ok
    assert script.status() == 0


# --- Ports ----------------------------------------------------------------------------------------


def test_the_callbacks_port_is_the_one_below_the_servers() -> None:
    with Sandbox(port=free_port()) as sandbox:
        port = urlsplit(sandbox.url).port or 0
        assert sandbox.redirect_uri == f"http://localhost:{port - 1}/oauth"


@pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_pair_whose_callback_port_is_taken_is_skipped(host: str) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        taken = other.getsockname()[1]
        with Sandbox(port=taken + 1) as sandbox:
            assert (urlsplit(sandbox.url).port or 0) in range(taken + 3, 65536, 2)


def test_three_sandboxes_start_at_once(run: Run) -> None:
    scripts = [run("--no-browser") for _ in range(3)]
    assert [log_in(script).status_code for script in scripts] == [200, 200, 200]
    assert [script.status() for script in scripts] == [0, 0, 0]


# --- The command ----------------------------------------------------------------------------------

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


def test_serve_prints_a_configuration_that_programs_can_read(run: Run) -> None:
    script = run("--serve", "http://localhost:1/a?b=&c")
    script.until("The requests:")
    config = dotenv_values(stream=io.StringIO(script.stdout), interpolate=False)
    assert config["REDIRECT_URI"] == "http://localhost:1/a?b=&c"
    assert shlex.split(script.stdout, comments=True) == [f"{k}={v}" for k, v in config.items()]


def test_serve_prints_a_line_for_each_request_and_escapes_it(run: Run) -> None:
    script = run("--serve")
    script.until("The requests:")
    config: Config = dotenv_values(stream=io.StringIO(script.stdout), interpolate=False)
    send("GET", authorize_url(config, client_id="x"))
    send("GET", config["TEST_API_ENDPOINT"] + "/%1b%0a")  # would steer the terminal
    script.until("NOT FOUND")
    assert script.stdout.partition("The requests:\n")[2].splitlines() == [
        "GET /auth/realms/third-party/protocol/openid-connect/auth: 400 Client not found. "
        "client_id is wrong: it should be sandbox",
        r"GET /v2/account/\x1b\n: 404 NOT FOUND. "
        "There is nothing at this address: use those that were printed at the start",
    ]


def test_help_speaks_of_the_sandbox_and_names_the_options_that_are_passed_on(run: Run) -> None:
    script = run("--help")
    assert (script.status(), script.stderr) == (0, "")
    assert script.stdout.startswith("usage: sandbox.py [-h] [--serve [REDIRECT_URI]]")
    for option in ("--no-browser", "--timeout SECONDS", "--show-tokens"):
        assert f"\n  {option}  " in script.stdout.partition("options of sipgate_oauth.py:")[2]


# Wrong arguments, and what is said of them.
WRONG_ARGUMENTS = {
    "--server": "unrecognized arguments: --server",
    "--no-brow": "unrecognized arguments: --no-brow",
    "--config x": "unrecognized arguments: --config x",
    "--timeout x": "argument --timeout: invalid float value: 'x'",
    "--serve localhost:8080": "REDIRECT_URI should look like http://localhost:8080/oauth",
    "--serve --no-browser": "--serve does not run sipgate_oauth.py: leave out its options",
}


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_a_usage_error_of_the_sandbox(run: Run, arguments: str) -> None:
    script = run(*arguments.split())
    assert (script.status(), script.stdout) == (2, "")
    assert script.stderr.startswith("usage: sandbox.py [-h] [--serve [REDIRECT_URI]]")
    assert script.stderr.endswith(f"sandbox.py: error: {WRONG_ARGUMENTS[arguments]}\n")


def test_the_options_of_the_script_are_passed_on(run: Run) -> None:
    script = run("--no-browser", "--timeout", "0.1")
    assert script.status() == 1
    assert "within 0.1 seconds" in script.stderr


@posix_only
@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 128 + 9)]
)
def test_the_exit_status_is_the_scripts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, status: int
) -> None:
    """A copy of the sandbox runs another script, which lies where sipgate_oauth.py would."""
    (tmp_path / "tests").mkdir()
    copy = shutil.copy(stand_in.__file__, tmp_path / "tests")
    (tmp_path / "sipgate_oauth.py").write_text(f"import os, sys; {end}")
    monkeypatch.setattr("script.SCRIPT", Path(copy))
    assert run().status() == status


def test_the_script_logs_in_whatever_the_environment_says(run: Run) -> None:
    script = run("--no-browser", AUTH_URL="mine")
    assert log_in(script).ok
    assert (script.status(), script.stderr) == (0, "")


def in_a_shell(status: int) -> int:
    """Return the exit status as a shell has it; Python has -N for a process that signal N ended."""
    return status if status >= 0 else 128 - status


@posix_only
@pytest.mark.parametrize("mode", ["--no-browser", "--serve"])
@pytest.mark.parametrize(("kill", "number"), [("killpg", 2), ("kill", 2), ("kill", 15)])
def test_a_signal_ends_all(run: Run, mode: str, kill: str, number: int) -> None:
    script = run(mode)
    script.until("http://localhost")
    getattr(os, kill)(script.process.pid, number)
    assert (in_a_shell(script.status()), script.stderr) == (128 + number, "")
    with pytest.raises(AssertionError, match="ended"):
        script.until("no such line")  # nor is there a process that could print it


@posix_only
@pytest.mark.parametrize("mode", ["--no-browser", "--serve"])
def test_ctrl_c_may_be_pressed_again_and_again(run: Run, mode: str) -> None:
    script = run(mode)
    script.until("http://localhost")
    while script.process.poll() is None:
        script.interrupt()
    assert (in_a_shell(script.status()), script.stderr) == (130, "")


@posix_only
def test_ctrl_c_ends_the_sandbox_while_it_loads(run: Run, tmp_path: Path) -> None:
    """Even where Python sees no signal."""
    (tmp_path / "authlib.py").write_text("print('loading', flush=True); sum(iter(int, 1))")
    script = run(PYTHONPATH=str(tmp_path))
    script.until("loading")
    script.interrupt()
    assert (in_a_shell(script.status()), script.stderr) == (130, "")


def test_a_test_that_fails_leaves_no_process(run: Run) -> None:
    with run("--no-browser") as script:
        script.until("3. Callback")
    with pytest.raises(AssertionError, match="ended"):
        script.until("no such line")  # nor is there a process that could print it


def test_a_missing_package_gets_one_line_of_advice(run: Run) -> None:
    script = run(python=("-S",))  # none is found
    assert script.status() == 1
    assert re.fullmatch(r'Error: .*"Try it now" in README.md.\n', script.stderr)
