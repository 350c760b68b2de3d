"""The sandbox refuses what a real Keycloak refuses, and it runs as a command."""

import io
import os
import re
import shlex
import sys
from collections.abc import Mapping
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
from script import Script, answer_login_page, log_in, send

REDIRECT_URI = "http://localhost:12345/oauth"
# The pair of RFC 7636, appendix B.
VERIFIER = {"code_verifier": "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"}
CHALLENGE = {"code_challenge": "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"}
Config = Mapping[str, Any]
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


# --- As at Keycloak -------------------------------------------------------------------------------


@pytest.fixture(
    params=["sandbox", pytest.param("keycloak", marks=pytest.mark.xdist_group("keycloak"))]
)
def config(request: pytest.FixtureRequest) -> Config:
    server: Sandbox | real.Keycloak = request.getfixturevalue(request.param)
    return server.environment if isinstance(server, Sandbox) else server.environment(REDIRECT_URI)


CREDENTIALS = "Invalid client or Invalid client credentials"
NO_PKCE: Changes = {"code_challenge": None, "code_challenge_method": None}
# What is done wrong, at which step, and how the refusal begins.
MISTAKES: list[tuple[str, Changes, str]] = [
    ("login", {"client_id": "x"}, "400 Client not found."),
    ("login", {"redirect_uri": "http://localhost/x"}, "400 Invalid parameter: redirect_uri"),
    ("login", {"scope": "no:such"}, "302 invalid_scope"),
    ("login", NO_PKCE, "302 invalid_request: Missing parameter: code_challenge_method"),
    ("login", {"code_challenge_method": "plain"}, "302 invalid_request"),
    ("exchange", {"client_id": "x"}, f"401 invalid_client: {CREDENTIALS}"),
    ("exchange", {"client_secret": "x"}, f"401 unauthorized_client: {CREDENTIALS}"),
    ("exchange", {"grant_type": None}, "400 invalid_request: Missing form parameter: grant_type"),
    ("exchange", {"redirect_uri": None}, "400 invalid_grant"),
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


@pytest.mark.parametrize(("step", "changes", "expected"), MISTAKES)
def test_a_mistake_is_refused(config: Config, step: str, changes: Changes, expected: str) -> None:
    if step == "login":
        response = send("GET", authorize_url(config, **changes))
    else:
        code: Changes = {"code": get_code(config)}
        response = exchange(config, **code | changes)
    if step.startswith("second"):
        first = response.json()
        tokens = refresh(config, first).json()
        response = exchange(config, **code) if "exchange" in step else refresh(config, first)
        assert get_account(config, tokens).status_code == 401  # one of the two may be a thief
    assert refusal(response).startswith(expected)


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


# --- The command ----------------------------------------------------------------------------------

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
# Starts Python in a session of its own, as a terminal does.
OWN_SESSION = "import os, sys; os.setsid(); it = sys.executable; os.execv(it, [it, *sys.argv[1:]])"


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("script.SCRIPT", Path(stand_in.__file__))


def test_serve_tells_what_came_of_each_request(environment: dict[str, str]) -> None:
    with Script("--serve", "http://localhost:1/a?b=&c", environment=environment) as script:
        script.until("# The requests:")
        config: Config = dotenv_values(stream=io.StringIO(script.stdout), interpolate=False)
        assert config["REDIRECT_URI"] == "http://localhost:1/a?b=&c"
        assert shlex.split(script.stdout, comments=True) == [f"{k}={v}" for k, v in config.items()]
        code = get_code(config)
        exchange(config, code=code)
        exchange(config, code=code)
        send("GET", authorize_url(config, redirect_uri="x"))
        send("GET", config["TEST_API_ENDPOINT"] + "/%1b%0a")  # would steer the terminal
        script.until("NOT FOUND")
    realm = "/auth/realms/third-party/protocol/openid-connect"
    assert script.stdout.partition("# The requests:\n")[2].splitlines() == [
        f"GET {realm}/auth: 200 OK",
        f"POST {realm}/auth: code issued",
        f"POST {realm}/token: tokens issued",
        f"POST {realm}/token: invalid_grant: Code not valid",
        f"GET {realm}/auth: 400 Invalid parameter: redirect_uri",
        r"GET /v2/account/\x1b\n: 404 NOT FOUND",
    ]


@posix_only
def test_the_exit_status_is_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "SCRIPT", tmp_path / "script.py")
    stand_in.SCRIPT.write_text("import os, sys; eval(sys.argv[-1])")
    assert stand_in.run_script(["sys.exit(2)"]) == 2
    assert stand_in.run_script(["os.kill(os.getpid(), 9)"]) == 128 + 9


@pytest.mark.xdist_group("port 8080")
def test_the_script_logs_in_whatever_the_environment_says(environment: dict[str, str]) -> None:
    with Script("--no-browser", environment={**environment, "AUTH_URL": "mine"}) as script:
        assert log_in(script).ok
        assert (script.status(), script.stderr) == (0, "")


@posix_only
@pytest.mark.xdist_group("port 8080")
@pytest.mark.parametrize("run", ["--no-browser", "--serve"])
@pytest.mark.parametrize(("kill", "number"), [("killpg", 2), ("kill", 2), ("kill", 15)])
def test_a_signal_ends_all(environment: dict[str, str], run: str, kill: str, number: int) -> None:
    with Script(run, environment=environment, python=("-c", OWN_SESSION)) as script:
        script.until("http://localhost")
        getattr(os, kill)(script.process.pid, number)
        assert (script.status(), script.stderr) == (128 + number, "")
        with pytest.raises(AssertionError, match="ended"):
            script.until("no such line")  # nor is there a process that could print it


def test_a_missing_package_gets_one_line_of_advice(environment: dict[str, str]) -> None:
    with Script(environment=environment, python=("-S",)) as script:  # none is found
        assert script.status() == 1
        assert re.fullmatch(r'Error: .*"Try it now" in README.md.\n', script.stderr)
