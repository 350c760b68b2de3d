"""The sandbox refuses what a Keycloak refuses, explains each mistake, and runs as a command."""

import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote_plus, urlsplit

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
Tokens = dict[str, Any]
Run = Callable[..., Script]
Output = pytest.CaptureFixture[str]
Changes = dict[str, Any]  # of the parameters of a step; None leaves one out


def authorize_url(config: Config, **changes: str | None) -> str:
    parameters = {"client_id": config["CLIENT_ID"], "redirect_uri": config["REDIRECT_URI"]}
    parameters |= {"response_type": "code", "scope": config["OAUTH_SCOPE"]}
    parameters |= {**CHALLENGE, "code_challenge_method": "S256", **changes}
    return str(requests.Request("GET", config["AUTH_URL"], params=parameters).prepare().url)


class Program:
    """A program that logs in: each step sends a request, with changes of the right parameters."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.client = {"client_id": config["CLIENT_ID"], "client_secret": config["CLIENT_SECRET"]}
        self.code = ""
        self.tokens: Tokens = {}

    def login(self, **changes: Any) -> requests.Response:
        return send("GET", authorize_url(self.config, **changes))

    def allow(self, **changes: Any) -> None:
        of_sandbox = self.config["CLIENT_ID"] == stand_in.CLIENT_ID
        answer = answer_login_page if of_sandbox else real.log_in
        callback = answer(authorize_url(self.config, **changes))
        self.code = dict(parse_qsl(urlsplit(callback).query))["code"]

    def exchange(self, **changes: Any) -> requests.Response:
        if not self.code:
            self.allow()
        form = {"grant_type": "authorization_code", "code": self.code, **VERIFIER, **self.client}
        form |= {"redirect_uri": self.config["REDIRECT_URI"], **changes}
        return self.keep(send("POST", self.config["TOKEN_URL"], data=form))

    def refresh(self, **changes: Any) -> requests.Response:
        """Refresh, and send the client's id and secret in the other way: in a header."""
        form = {"grant_type": "refresh_token", "refresh_token": self.tokens["refresh_token"]}
        user = (self.client["client_id"], quote_plus(self.client["client_secret"]))
        return self.keep(send("POST", self.config["TOKEN_URL"], data=form | changes, auth=user))

    def refresh_again(self) -> requests.Response:
        return self.refresh(refresh_token=self.tokens["old_refresh_token"])

    def keep(self, response: requests.Response) -> requests.Response:
        if response.ok:
            old_tokens = {f"old_{name}": value for name, value in self.tokens.items()}
            self.tokens = old_tokens | response.json()
        return response

    def account(self, header: str | None = "Bearer {access_token}") -> requests.Response:
        headers = {"Authorization": header.format(**self.tokens)} if header else {}
        return send("GET", self.config["TEST_API_ENDPOINT"], headers=headers)

    def logout(self, **changes: Any) -> requests.Response:
        form = {"refresh_token": self.tokens["refresh_token"], **self.client, **changes}
        return send("POST", self.config["TOKEN_URL"].removesuffix("token") + "logout", data=form)

    def logout_with_access_token(self) -> requests.Response:
        return self.logout(refresh_token=self.tokens["access_token"])

    def request(self, key: str, method: str = "POST", **content: Any) -> requests.Response:
        return send(method, self.config[key], **content)


def make_mistake(config: Config, steps: str, changes: Changes) -> requests.Response:
    """Take the steps, with a mistake in the last one; return the response to that."""
    program = Program(config)
    *before, last = steps.split(", ")
    for step in before:
        getattr(program, step)()
    response: requests.Response = getattr(program, last)(**changes)
    return response


@pytest.fixture
def run(environment: dict[str, str]) -> Iterator[Run]:
    """Run the sandbox as a command: run(*arguments, **variables)."""
    with ExitStack() as scripts:

        def run_sandbox(*arguments: str, python: tuple[str, ...] = (), **variables: str) -> Script:
            variables = {**environment, **variables}
            path = Path(stand_in.__file__)
            script = Script(
                *arguments, environment=variables, python=python, path=path, session=True
            )
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
BAD_VERIFIER = "400 invalid_grant: PKCE verification failed: Invalid code verifier"
HEXADECIMAL = "a" * 64
JSON = {"key": "TOKEN_URL", "json": {"grant_type": "authorization_code"}}
# The steps, what is done wrong in the last one, and how the response begins.
MISTAKES: list[tuple[str, Changes, str]] = [
    ("login", {"client_id": "x"}, "400 Client not found."),
    ("login", {"redirect_uri": "http://localhost/x"}, "400 Invalid parameter: redirect_uri"),
    ("login", {"scope": "no:such"}, "302 invalid_scope"),
    ("login", NO_PKCE, "302 invalid_request: Missing parameter: code_challenge_method"),
    ("login", {"code_challenge_method": "plain"}, "302 invalid_request"),
    ("login", {"code_challenge": CHALLENGE["code_challenge"] + "="}, "302 invalid_request"),
    ("login", {"code_challenge": HEXADECIMAL}, "200"),  # and no code verifier fits
    ("exchange", {"client_id": "x"}, f"401 invalid_client: {CREDENTIALS}"),
    ("exchange", {"client_secret": "x"}, f"401 unauthorized_client: {CREDENTIALS}"),
    ("exchange", {"grant_type": None}, "400 invalid_request: Missing form parameter: grant_type"),
    ("request", JSON, "400 invalid_request: Missing form parameter: grant_type"),
    ("exchange", {"redirect_uri": "http://localhost/x"}, "400 invalid_grant"),
    ("exchange", {"code_verifier": None}, "400 invalid_grant: PKCE code verifier not specified"),
    ("exchange", {"code_verifier": "x" * 42}, BAD_VERIFIER),
    ("exchange", {"code_verifier": "x" * 43}, "400 invalid_grant: PKCE verification failed: Code"),
    ("exchange, exchange", {}, "400 invalid_grant: Code not valid"),
    ("exchange, refresh, refresh_again, account", {}, "401"),  # one of the two may be a thief
    ("exchange, account", {"header": "Token {access_token}"}, "401"),
    ("exchange, account", {"header": "Bearer {id_token}"}, "401"),
    ("exchange, logout_with_access_token", {}, "400 invalid_grant"),
]


def refusal(response: requests.Response) -> str:
    """Return the status and the error, from a redirect, from JSON, or from a page."""
    said = dict(parse_qsl(urlsplit(response.headers.get("Location", "")).query))
    assert not said or "/realms/third-party" in said["iss"]
    if "json" in response.headers.get("Content-Type", ""):
        said = response.json()
    texts = [said[name] for name in ("error", "error_description") if name in said]
    texts = texts or re.findall(r'(?:<h1>|<p class="instruction">)(.+?)<', response.text)
    return f"{response.status_code} {': '.join(texts)}"


@pytest.mark.parametrize(("steps", "changes", "expected"), MISTAKES)
def test_a_mistake_is_refused(config: Config, steps: str, changes: Changes, expected: str) -> None:
    assert refusal(make_mistake(config, steps, changes)).startswith(expected)


def test_tokens_come_as_at_sipgate(sandbox: Sandbox) -> None:
    scope = "history:read sessions:sms:write push_device:register"
    tokens = Program({**sandbox.environment, "OAUTH_SCOPE": scope}).exchange().json()
    assert (tokens["token_type"], tokens["scope"]) == ("bearer", scope)
    assert (tokens["expires_in"], tokens["refresh_expires_in"]) == (300, 30 * 24 * 3600)
    assert tokens["not-before-policy"] == 0
    kinds = {"access_token": "Bearer", "refresh_token": "Refresh", "id_token": "ID"}
    for name, kind in kinds.items():
        token = jwt.decode(tokens[name], stand_in.SIGNING_KEY)
        assert (token.header["alg"], token.claims["typ"]) == ("RS256", kind)
        assert token.claims["session_state"] == tokens["session_state"]


# --- What is printed ------------------------------------------------------------------------------

WRONG_CHALLENGE = "code_challenge is wrong: it should be the SHA-256 of the code_verifier"
NOT_ENCODED = "client_secret is not encoded: form-encode it"
SECRET = "50%25 off & $HOME + more"
FORM = f"grant_type=refresh_token&client_id=sandbox&client_secret={SECRET}"
TYPE = {"Content-Type": "application/x-www-form-urlencoded"}
IN_FORM = {"key": "TOKEN_URL", "data": FORM, "headers": TYPE}
IN_URL = {"key": "TOKEN_URL", "method": "GET", "params": {"client_secret": "x"}}
IN_HEADER = {"key": "TOKEN_URL", "data": JSON["json"], "auth": ("sandbox", SECRET)}
WRONG_HEADER = "The Authorization header is wrong: it should be Bearer, a space, and"
LATEST = "it should be the one in the latest response from the token endpoint"
WAS_REPLACED = "This access_token was replaced in a refresh: use the new one"
# The steps, what is done wrong in the last one, and what the sandbox prints about it.
EXPLANATIONS: list[tuple[str, Changes, str]] = [
    ("login", {"client_id": "x"}, "client_id is wrong: it should be sandbox"),
    ("login", {"client_secret": "x"}, "The client_secret is now in the browser's history"),
    ("login", {"redirect_uri": "x"}, f"redirect_uri is wrong: it should be {REDIRECT_URI}"),
    ("login", {"response_type": "token"}, "response_type is wrong: it should be code"),
    ("login", {"scope": "account:read,users:read"}, "scope is wrong: it should be one or more of"),
    ("login", NO_PKCE, "code_challenge_method is missing: it should be S256 (PKCE, RFC 7636)"),
    ("login", {"code_challenge": None}, "code_challenge is missing: it should be the SHA-256"),
    ("login", {"code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw+cM="}, WRONG_CHALLENGE),
    ("login", {"code_challenge": HEXADECIMAL}, WRONG_CHALLENGE),
    ("login", {}, "No state was sent: without it, a program cannot"),
    ("request", {"key": "AUTH_URL", "method": "OPTIONS"}, "JavaScript cannot send this: "),
    ("exchange", {"client_id": None}, "client_id is missing: it should be sandbox"),
    ("exchange", {"client_secret": "x"}, "client_secret is wrong: it should be the CLIENT_SECRET"),
    ("request", IN_FORM, NOT_ENCODED),
    ("request", IN_HEADER, NOT_ENCODED),
    ("exchange", {"grant_type": None}, "grant_type is missing: it should be authorization_code or"),
    ("exchange", {"code": "x"}, "code is wrong: it should be the one in the callback"),
    ("exchange", {"code_verifier": None}, "code_verifier is missing: it should be the one"),
    ("exchange", {"code_verifier": "x" * 43}, "code_verifier is wrong: it should be the one"),
    ("exchange", {"code_verifier": "x"}, "code_verifier is wrong: it should be 43 to 128 letters"),
    ("request", JSON, "The body is application/json: it should be a form"),
    ("request", {"key": "TOKEN_URL", "method": "GET"}, "The method is wrong: it should be POST"),
    ("request", IN_URL, "The parameters are in the URL, which ends up in logs"),
    ("exchange, exchange", {}, "This code was used before: exchange each code only once. "),
    ("exchange, exchange, refresh", {}, "This login has ended because its code was used twice"),
    ("exchange, refresh, refresh_again", {}, "This refresh_token was used before: "),
    ("exchange, refresh", {"refresh_token": "x"}, f"refresh_token is wrong: {LATEST}"),
    ("exchange, logout", {"refresh_token": None}, f"refresh_token is missing: {LATEST}"),
    ("exchange, logout, refresh", {}, "This login has ended because the program logged out"),
    ("exchange, account", {"header": "{access_token}"}, WRONG_HEADER),
    ("exchange, account", {"header": None}, "The Authorization header is missing: it should be"),
    ("exchange, account", {"header": "Bearer {id_token}"}, "access_token is wrong: this is"),
    ("exchange, account", {"header": "Bearer x"}, f"access_token is wrong: {LATEST}"),
    ("exchange, refresh, account", {"header": "Bearer {old_access_token}"}, WAS_REPLACED),
    ("request", {"key": "TEST_API_ENDPOINT"}, "The method is wrong: it should be GET"),
]


@pytest.fixture
def printing() -> Iterator[Config]:
    """The environment of a sandbox that prints a line for each request."""
    with Sandbox(REDIRECT_URI, port=0, log=True) as running:
        yield running.environment


def explanations(capsys: Output) -> list[str]:
    """Return what the sandbox has printed about each request, after the outcome."""
    return [line.partition(". ")[2] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("steps", "changes", "expected"), EXPLANATIONS)
def test_a_mistake_is_explained(
    printing: Config, capsys: Output, steps: str, changes: Changes, expected: str
) -> None:
    make_mistake(printing, steps, changes)
    assert explanations(capsys)[-1].startswith(expected)


@pytest.mark.parametrize(("state", "name"), [("12345", "state"), (None, "code_challenge")])
def test_what_should_be_new_for_each_login_is_told(
    printing: Config, capsys: Output, state: str | None, name: str
) -> None:
    program = Program(printing)
    for _ in range(2):
        program.allow(state=state)
        assert program.exchange().ok
    expected = f"{name} was used in an earlier login: it should be new for each, and random"
    assert explanations(capsys)[2::3] == ["", expected]


def test_what_has_expired_is_refused_and_explained(
    printing: Config, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "LIFETIMES", dict.fromkeys(stand_in.LIFETIMES, 0))
    assert make_mistake(printing, "exchange", {}).status_code == 400
    monkeypatch.setitem(stand_in.LIFETIMES, "code", 60)
    assert make_mistake(printing, "exchange, account", {}).status_code == 401
    assert make_mistake(printing, "exchange, refresh", {}).status_code == 400
    assert [text for text in explanations(capsys) if "expired" in text] == [
        "This code has expired: log in again",
        "This access_token has expired: refresh the tokens",
        "This refresh_token has expired: log in again",
    ]


def test_the_scope_for_the_account_is_explained(printing: Config, capsys: Output) -> None:
    config = {**printing, "OAUTH_SCOPE": "users:read"}
    response = make_mistake(config, "exchange, account", {})
    assert refusal(response).startswith("403 insufficient_scope")
    assert explanations(capsys)[-1].endswith("add it to scope in the authorize URL")


def test_no_secret_is_printed(printing: Config, capsys: Output) -> None:
    program = Program(printing)
    program.allow()
    program.exchange(client_secret="wrong-secret")
    tokens = program.exchange().json()
    program.account()
    program.logout()
    printed = capsys.readouterr().out
    secrets = [program.code, "wrong-secret", printing["CLIENT_SECRET"], *VERIFIER.values()]
    secrets += [tokens[name] for name in ("access_token", "refresh_token", "id_token")]
    assert [secret for secret in secrets if secret in printed] == []


def test_a_request_without_a_mistake_gets_no_explanation(printing: Config, capsys: Output) -> None:
    program = Program(printing)
    program.allow(state="s")
    for step in (program.exchange, program.refresh, program.account, program.logout):
        step()
    outcomes = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    codes = ["200 OK", "code issued", "tokens issued", "tokens issued", "200 OK", "204 NO CONTENT"]
    assert outcomes == codes


def test_the_page_names_the_registered_redirect_uri(sandbox: Sandbox) -> None:
    page = send("GET", authorize_url(sandbox.environment, redirect_uri="http://x"))
    assert f"it should be {sandbox.redirect_uri}" in page.text


# --- The wrong state ------------------------------------------------------------------------------


def test_the_login_page_has_three_buttons_and_explains_the_third(sandbox: Sandbox) -> None:
    page = send("GET", authorize_url(sandbox.environment)).text
    buttons = re.findall(r'name="answer" value="(.+?)">(.+?)</button>', page)
    third = ("wrong-state", "Allow, but return a wrong state")
    assert buttons == [("allow", "Allow"), ("deny", "Deny"), third]
    assert "This plays an attack." in page


@pytest.mark.parametrize("state", ["our-state", None])
def test_a_wrong_state_that_is_not_checked_is_told_at_the_token_request(
    printing: Config, capsys: Output, state: str | None
) -> None:
    url = answer_login_page(authorize_url(printing, state=state), "wrong-state")
    callback = parse_qs(urlsplit(url).query)
    (wrong_state,) = callback["state"]
    assert wrong_state != state
    assert explanations(capsys)[-1].startswith("This was an attack: the callback has a wrong state")
    assert Program(printing).exchange(code=callback["code"]).ok  # as with Allow
    expected = "The code came with a wrong state: the program did not check the state"
    assert explanations(capsys)[-1] == expected


def test_the_terminal_tells_of_each_attack_and_how_to_go_on(run: Run) -> None:
    script = run("--no-browser", AUTH_URL="mine")  # which must not interfere
    for _ in range(2):
        assert log_in(script, "wrong-state").status_code == 403
    assert log_in(script).ok
    assert script.status() == 0
    told = re.findall("^Sandbox: This was an attack.*click Allow$", script.stdout, re.MULTILINE)
    assert len(told) == 2


# --- Ports ----------------------------------------------------------------------------------------


def test_the_callbacks_port_is_the_one_below_the_servers(capsys: Output) -> None:
    port = free_port()
    with Sandbox(port=port) as sandbox:
        assert sandbox.redirect_uri == f"http://localhost:{port - 1}/oauth"
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_pair_whose_callback_port_is_taken_is_skipped(host: str, capsys: Output) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        taken = other.getsockname()[1]
        with Sandbox(port=taken + 1) as sandbox:
            assert (urlsplit(sandbox.url).port or 0) in range(taken + 3, 65536, 2)
    assert capsys.readouterr().out.startswith("# The usual ports are taken: adapt SSH tunnels")


# --- The command ----------------------------------------------------------------------------------

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


def test_serve_prints_a_configuration_and_then_the_requests(run: Run) -> None:
    script = run("--serve", "http://localhost:1/a?b=&c")
    script.until("Requests appear below.")
    config: Config = dotenv_values(stream=io.StringIO(script.stdout), interpolate=False)
    assert config["REDIRECT_URI"] == "http://localhost:1/a?b=&c"
    assert shlex.split(script.stdout, comments=True) == [f"{k}={v}" for k, v in config.items()]
    assert "Get-Clipboard | Set-Content config.env\n" in script.stdout
    send("GET", config["TEST_API_ENDPOINT"] + "/%1b%0a")  # would control the terminal
    expected = r"GET /v2/account/\x1b\n: 404 NOT FOUND. This URL does not exist: use those that"
    assert script.until("NOT FOUND").startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--server", "unrecognized arguments: --server"),  # by sipgate_oauth.py
        ("--serve localhost:80", "REDIRECT_URI must look like http://localhost:8080/oauth"),
        ("--serve --no-browser", "--serve takes no other options: leave out --no-browser"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(run: Run, arguments: str, error: str) -> None:
    script = run(*arguments.split())
    assert script.status() == 2
    assert script.stderr.endswith(f".py: error: {error}\n")


@posix_only
@pytest.mark.parametrize("mode", ["--no-browser", "--serve"])
@pytest.mark.parametrize(("kill", "number"), [("killpg", 2), ("kill", 2), ("kill", 15)])
def test_a_signal_ends_all(run: Run, mode: str, kill: str, number: int) -> None:
    script = run(mode)
    script.until("http://localhost")
    getattr(os, kill)(script.process.pid, number)
    assert script.status() in (-number, 128 + number)  # by Python, and as in a shell
    assert script.stderr == ""
    with pytest.raises(AssertionError, match="ended"):
        script.until("no such line")  # nor is there a process that could print it


@posix_only
def test_ctrl_c_ends_the_sandbox_while_it_loads(run: Run, tmp_path: Path) -> None:
    """Even where Python sees no signal."""
    (tmp_path / "authlib.py").write_text("print('loading', flush=True); sum(iter(int, 1))")
    script = run(PYTHONPATH=str(tmp_path))
    script.until("loading")
    script.interrupt()
    assert (script.status(), script.stderr) == (-signal.SIGINT, "")


# What runs a program as process 1, as in a container.
UNSHARE = shlex.split("unshare --user --map-root-user --pid --fork --kill-child --mount-proc")


@posix_only
@pytest.mark.parametrize("mode", ["--no-browser", "--serve"])
def test_ctrl_c_ends_process_1_of_a_container(run: Run, mode: str) -> None:
    if not shutil.which("unshare") or subprocess.call([*UNSHARE, "true"]):
        pytest.skip("this needs Linux, and the right to make namespaces")
    start = f"import os, sys; os.execvp('unshare', {UNSHARE} + [sys.executable, *sys.argv[1:]])"
    script = run(mode, python=("-c", start))
    script.until("http://localhost")
    pid = script.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    os.kill(int(child), signal.SIGINT)
    assert (script.status(), script.stderr) == (130, "")


def test_a_missing_package_gets_one_line_of_advice(run: Run) -> None:
    script = run(python=("-S",))  # none is found
    assert script.status() == 1
    assert re.fullmatch(r'Error: .*"Try it now" in README.md.\n', script.stderr)
