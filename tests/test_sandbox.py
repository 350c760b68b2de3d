"""What the sandbox checks, shown over real connections: it refuses what sipgate refuses."""

import ast
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest
import requests
import sandbox as sandbox_module
from sandbox import Sandbox, is_free

REDIRECT_URI = "http://localhost:12345/oauth"
# The pair of RFC 7636, appendix B.
CODE_VERIFIER = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
CODE_CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
STATE = "state with & = + % and ü"


def send(method: str, url: str, **arguments: Any) -> requests.Response:
    """One request on a connection of its own; a redirect is returned, not followed."""
    with requests.Session() as session:
        # A proxy from the environment would not find 127.0.0.1.
        session.trust_env = False
        return session.request(method, url, allow_redirects=False, timeout=10, **arguments)


def authorization(sandbox: Sandbox, **changes: str | None) -> dict[str, str | None]:
    """The parameters of a good authorization request, with the changes; None leaves one out."""
    return {
        "response_type": "code",
        "client_id": sandbox.environment["CLIENT_ID"],
        "redirect_uri": REDIRECT_URI,
        "scope": "account:read",
        "state": STATE,
        "code_challenge": CODE_CHALLENGE,
        "code_challenge_method": "S256",
    } | changes


def open_login_page(sandbox: Sandbox, **changes: str | None) -> requests.Response:
    return send("GET", sandbox.environment["AUTH_URL"], params=authorization(sandbox, **changes))


def press(button: str, sandbox: Sandbox, **changes: str | None) -> requests.Response:
    url, parameters = sandbox.environment["AUTH_URL"], authorization(sandbox, **changes)
    return send("POST", url, params=parameters, data={"answer": button})


def callback(response: requests.Response) -> dict[str, str]:
    """The parameters that a redirect brings to the redirect URI."""
    address, _, query = response.headers["Location"].partition("?")
    assert response.status_code in (302, 303)
    assert address == REDIRECT_URI
    return dict(parse_qsl(query))


def log_in(sandbox: Sandbox, **changes: str | None) -> str:
    """An authorization code."""
    return callback(press("allow", sandbox, **changes))["code"]


def ask_for_tokens(sandbox: Sandbox, **parameters: str | None) -> requests.Response:
    client = {
        "client_id": sandbox.environment["CLIENT_ID"],
        "client_secret": sandbox.environment["CLIENT_SECRET"],
    }
    return send("POST", sandbox.environment["TOKEN_URL"], data=client | parameters)


def exchange(sandbox: Sandbox, code: str, **changes: str | None) -> requests.Response:
    good: dict[str, str | None] = {"redirect_uri": REDIRECT_URI, "code_verifier": CODE_VERIFIER}
    return ask_for_tokens(
        sandbox, **{"grant_type": "authorization_code", "code": code} | good | changes
    )


def refresh(sandbox: Sandbox, refresh_token: str, **changes: str | None) -> requests.Response:
    return ask_for_tokens(
        sandbox, grant_type="refresh_token", refresh_token=refresh_token, **changes
    )


def get_account(sandbox: Sandbox, access_token: str) -> requests.Response:
    header = {"Authorization": f"Bearer {access_token}"}
    return send("GET", sandbox.environment["TEST_API_ENDPOINT"], headers=header)


def statuses_of_eight_at_once(sandbox: Sandbox, form: dict[str, str]) -> list[int]:
    """What eight equal token requests get that are completed in one moment."""
    url = urlsplit(sandbox.environment["TOKEN_URL"])
    client = {"client_id": "sandbox", "client_secret": sandbox.environment["CLIENT_SECRET"]}
    body = urlencode(client | form).encode()
    with contextlib.ExitStack() as stack:
        connections = [HTTPConnection(url.netloc, timeout=10) for _ in range(8)]
        for connection in connections:
            stack.callback(connection.close)
            connection.putrequest("POST", url.path)
            connection.putheader("Content-Type", "application/x-www-form-urlencoded")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[:-1])
        for connection in connections:
            connection.send(body[-1:])
        return sorted(connection.getresponse().status for connection in connections)


def error(response: requests.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(REDIRECT_URI, port=0) as running:
        yield running


# --- The login page ------------------------------------------------------------------------------


def test_the_login_page_says_who_asks_for_what(sandbox: Sandbox) -> None:
    page = open_login_page(sandbox, scope="account:read users:read").text
    assert "<strong>sandbox</strong>" in page
    assert "account:read" in page
    assert "users:read" in page


def test_the_login_page_has_one_form_and_no_script(sandbox: Sandbox) -> None:
    page = open_login_page(sandbox).text
    assert page.count("<form") == 1
    assert "<script" not in page


def test_looking_at_the_login_page_issues_no_code(sandbox: Sandbox) -> None:
    response = open_login_page(sandbox, answer="allow")
    assert response.status_code == 200
    assert "Location" not in response.headers


def test_allow_leads_back_with_code_state_session_state_and_iss(sandbox: Sandbox) -> None:
    brought = callback(press("allow", sandbox))
    assert brought["state"] == STATE
    assert brought["iss"] == f"{sandbox.url}/auth/realms/third-party"
    assert brought["code"]
    assert brought["session_state"]


def test_deny_leads_back_with_access_denied_and_state(sandbox: Sandbox) -> None:
    brought = callback(press("deny", sandbox))
    assert brought["error"] == "access_denied"
    assert brought["state"] == STATE
    assert "code" not in brought


def test_a_refusal_names_its_issuer_too(sandbox: Sandbox) -> None:
    refusal = callback(open_login_page(sandbox, scope="no:such"))
    assert refusal["iss"] == f"{sandbox.url}/auth/realms/third-party"


def test_an_unknown_client_gets_a_page_and_no_redirect(sandbox: Sandbox) -> None:
    response = open_login_page(sandbox, client_id="somebody-else")
    assert response.status_code == 400
    assert "<h1>Client not found.</h1>" in response.text
    assert "Location" not in response.headers


@pytest.mark.parametrize(
    "redirect_uri",
    [
        f"{REDIRECT_URI}/",
        f"{REDIRECT_URI}?a=b",
        REDIRECT_URI.replace("localhost", "127.0.0.1"),
        REDIRECT_URI.replace("localhost", "LOCALHOST"),
        'http://localhost:12345/oauth"ü',
        None,
    ],
)
def test_another_redirect_uri_gets_a_page_and_no_redirect(
    sandbox: Sandbox, redirect_uri: str | None
) -> None:
    response = press("allow", sandbox, redirect_uri=redirect_uri)
    assert response.status_code == 400
    assert "<h1>Invalid parameter: redirect_uri</h1>" in response.text
    assert "Location" not in response.headers


def test_an_unknown_scope_is_refused(sandbox: Sandbox) -> None:
    refusal = callback(open_login_page(sandbox, scope="account:read no:such"))
    assert refusal["error"] == "invalid_scope"
    assert refusal["state"] == STATE


@pytest.mark.parametrize(
    "changes",
    [
        {"code_challenge": None, "code_challenge_method": None},
        {"code_challenge": None},
        {"code_challenge_method": None},
        {"code_challenge_method": ""},
        {"code_challenge_method": "plain"},
        {"code_challenge_method": "s256"},
    ],
)
def test_a_login_without_pkce_by_s256_is_refused(
    sandbox: Sandbox, changes: dict[str, str | None]
) -> None:
    assert callback(press("allow", sandbox, **changes))["error"] == "invalid_request"


def test_a_parameter_that_cannot_be_quoted_gets_a_page(sandbox: Sandbox) -> None:
    assert open_login_page(sandbox, response_type='"').status_code == 400


# --- Codes become tokens -------------------------------------------------------------------------


def test_a_code_becomes_tokens_as_keycloak_describes_them(sandbox: Sandbox) -> None:
    brought = callback(press("allow", sandbox))
    tokens = exchange(sandbox, brought["code"]).json()
    assert tokens.pop("access_token")
    assert tokens.pop("refresh_token")
    assert tokens == {
        "token_type": "Bearer",
        "expires_in": 300,
        "refresh_expires_in": 1800,
        "scope": "account:read",
        "session_state": brought["session_state"],
    }


def test_an_unknown_code_is_refused(sandbox: Sandbox) -> None:
    response = exchange(sandbox, "made-up")
    assert error(response) == (400, "invalid_grant")
    assert response.json()["error_description"] == "Code not valid"


def test_a_code_works_only_once(sandbox: Sandbox) -> None:
    code = log_in(sandbox)
    assert exchange(sandbox, code).ok
    assert error(exchange(sandbox, code)) == (400, "invalid_grant")


def test_a_second_use_of_a_code_revokes_what_the_first_was_given(sandbox: Sandbox) -> None:
    code = log_in(sandbox)
    tokens = exchange(sandbox, code).json()
    exchange(sandbox, code)
    assert error(get_account(sandbox, tokens["access_token"])) == (401, "invalid_token")
    assert error(refresh(sandbox, tokens["refresh_token"])) == (400, "invalid_grant")


def test_a_failed_exchange_uses_the_code_up(sandbox: Sandbox) -> None:
    code = log_in(sandbox)
    exchange(sandbox, code, code_verifier="x" * 43)
    assert error(exchange(sandbox, code)) == (400, "invalid_grant")


def test_an_expired_code_is_refused() -> None:
    with Sandbox(REDIRECT_URI, port=0, code_lifetime=0) as sandbox:
        assert error(exchange(sandbox, log_in(sandbox))) == (400, "invalid_grant")


def test_eight_exchanges_of_one_code_at_once_succeed_once(sandbox: Sandbox) -> None:
    form = {"grant_type": "authorization_code", "code": log_in(sandbox)}
    form |= {"redirect_uri": REDIRECT_URI, "code_verifier": CODE_VERIFIER}
    assert statuses_of_eight_at_once(sandbox, form) == [200] + [400] * 7
    assert sandbox.exchanges == 1


def test_a_wrong_code_verifier_is_refused(sandbox: Sandbox) -> None:
    response = exchange(sandbox, log_in(sandbox), code_verifier="x" * 43)
    assert error(response) == (400, "invalid_grant")


def test_a_missing_code_verifier_is_refused(sandbox: Sandbox) -> None:
    response = exchange(sandbox, log_in(sandbox), code_verifier=None)
    assert error(response) == (400, "invalid_request")


@pytest.mark.parametrize("redirect_uri", [f"{REDIRECT_URI}/", None])
def test_the_exchange_repeats_the_redirect_uri(sandbox: Sandbox, redirect_uri: str | None) -> None:
    response = exchange(sandbox, log_in(sandbox), redirect_uri=redirect_uri)
    assert error(response) == (400, "invalid_grant")


@pytest.mark.parametrize(
    "credentials",
    [{"client_secret": "wrong"}, {"client_secret": None}, {"client_id": "somebody-else"}],
)
def test_wrong_credentials_get_401(sandbox: Sandbox, credentials: dict[str, str | None]) -> None:
    response = exchange(sandbox, log_in(sandbox), **credentials)
    assert error(response) == (401, "invalid_client")


def basic(sandbox: Sandbox, username: str, password: str) -> requests.Response:
    form = {"grant_type": "authorization_code", "code": log_in(sandbox)}
    form |= {"redirect_uri": REDIRECT_URI, "code_verifier": CODE_VERIFIER}
    return send("POST", sandbox.environment["TOKEN_URL"], data=form, auth=(username, password))


def test_the_credentials_may_come_in_a_header(sandbox: Sandbox) -> None:
    assert basic(sandbox, "sandbox", quote(sandbox.environment["CLIENT_SECRET"])).ok


def test_credentials_in_a_header_that_are_not_encoded_get_401(sandbox: Sandbox) -> None:
    response = basic(sandbox, "sandbox", sandbox.environment["CLIENT_SECRET"])
    assert error(response) == (401, "invalid_client")


# --- Refreshing ----------------------------------------------------------------------------------


def test_a_refresh_gives_two_new_tokens(sandbox: Sandbox) -> None:
    old = exchange(sandbox, log_in(sandbox)).json()
    new = refresh(sandbox, old["refresh_token"]).json()
    assert new["access_token"] != old["access_token"]
    assert new["refresh_token"] != old["refresh_token"]
    assert new["session_state"] == old["session_state"]
    assert get_account(sandbox, new["access_token"]).ok
    assert refresh(sandbox, new["refresh_token"]).ok


def test_the_old_access_token_dies_with_a_refresh(sandbox: Sandbox) -> None:
    old = exchange(sandbox, log_in(sandbox)).json()
    assert refresh(sandbox, old["refresh_token"]).ok
    assert error(get_account(sandbox, old["access_token"])) == (401, "invalid_token")


def test_the_old_refresh_token_dies_with_a_refresh(sandbox: Sandbox) -> None:
    old = exchange(sandbox, log_in(sandbox)).json()
    assert refresh(sandbox, old["refresh_token"]).ok
    assert error(refresh(sandbox, old["refresh_token"])) == (400, "invalid_grant")


def test_an_expired_refresh_token_is_refused() -> None:
    with Sandbox(REDIRECT_URI, port=0, refresh_expires_in=0) as sandbox:
        tokens = exchange(sandbox, log_in(sandbox)).json()
        assert error(refresh(sandbox, tokens["refresh_token"])) == (400, "invalid_grant")


def test_eight_refreshes_with_one_token_at_once_succeed_once(sandbox: Sandbox) -> None:
    # Without a lock, about one round in four goes wrong.
    for _ in range(25):
        token = exchange(sandbox, log_in(sandbox)).json()["refresh_token"]
        form = {"grant_type": "refresh_token", "refresh_token": token}
        assert statuses_of_eight_at_once(sandbox, form) == [200] + [400] * 7


def test_a_refresh_with_a_wrong_secret_gets_401(sandbox: Sandbox) -> None:
    tokens = exchange(sandbox, log_in(sandbox)).json()
    response = refresh(sandbox, tokens["refresh_token"], client_secret="wrong")  # noqa: S106 - wrong
    assert error(response) == (401, "invalid_client")


def test_a_refresh_cannot_widen_the_scope(sandbox: Sandbox) -> None:
    tokens = exchange(sandbox, log_in(sandbox, scope="account:read")).json()
    response = refresh(sandbox, tokens["refresh_token"], scope="account:read users:read")
    assert error(response) == (400, "invalid_scope")


# --- The account ---------------------------------------------------------------------------------


def test_an_access_token_opens_the_account(sandbox: Sandbox) -> None:
    tokens = exchange(sandbox, log_in(sandbox)).json()
    account = get_account(sandbox, tokens["access_token"]).json()
    assert set(account) == {"company", "mainProductType", "logoUrl", "verified"}
    assert "ü" in account["company"]


def test_the_account_stays_closed_without_a_token(sandbox: Sandbox) -> None:
    response = send("GET", sandbox.environment["TEST_API_ENDPOINT"])
    assert response.status_code == 401
    assert "WWW-Authenticate" in response.headers


def test_the_account_stays_closed_to_an_unknown_token(sandbox: Sandbox) -> None:
    response = get_account(sandbox, "made-up")
    assert error(response) == (401, "invalid_token")
    assert response.headers["WWW-Authenticate"].startswith("Bearer ")


def test_the_account_stays_closed_to_an_expired_token() -> None:
    with Sandbox(REDIRECT_URI, port=0, expires_in=0) as sandbox:
        tokens = exchange(sandbox, log_in(sandbox)).json()
        assert error(get_account(sandbox, tokens["access_token"])) == (401, "invalid_token")


def test_the_account_stays_closed_to_a_token_without_its_scope(sandbox: Sandbox) -> None:
    tokens = exchange(sandbox, log_in(sandbox, scope="users:read")).json()
    response = get_account(sandbox, tokens["access_token"])
    assert error(response) == (403, "insufficient_scope")


# --- The server ----------------------------------------------------------------------------------


def test_requests_are_noted_in_their_order(sandbox: Sandbox) -> None:
    get_account(sandbox, exchange(sandbox, log_in(sandbox)).json()["access_token"])
    realm = "/auth/realms/third-party/protocol/openid-connect"
    assert sandbox.requests == [
        ("POST", f"{realm}/auth"),
        ("POST", f"{realm}/token"),
        ("GET", "/v2/account"),
    ]
    assert sandbox.connections == 3


def test_exchanges_are_counted_and_refreshes_are_not(sandbox: Sandbox) -> None:
    refresh(sandbox, exchange(sandbox, log_in(sandbox)).json()["refresh_token"])
    exchange(sandbox, log_in(sandbox))
    exchange(sandbox, "made-up")
    assert sandbox.exchanges == 2


def test_one_connection_carries_several_requests(sandbox: Sandbox) -> None:
    with requests.Session() as session:
        session.trust_env = False
        for _ in range(3):
            session.get(sandbox.environment["TEST_API_ENDPOINT"], timeout=10)
            session.post(sandbox.environment["TOKEN_URL"], data={"a": "b"}, timeout=10)
            session.post(f"{sandbox.url}/nowhere", data={"a": "b"}, timeout=10)
    assert len(sandbox.requests) == 9
    assert sandbox.connections == 1


def test_an_idle_connection_ends_with_the_sandbox() -> None:
    with Sandbox(REDIRECT_URI, port=0) as sandbox:
        idle = socket.create_connection(("127.0.0.1", urlsplit(sandbox.url).port or 0), timeout=10)
        idle.sendall(b"HEAD / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert idle.recv(8).startswith(b"HTTP/1.1")
    with idle, idle.makefile("rb") as rest:
        rest.read()


def test_a_taken_port_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with Sandbox(REDIRECT_URI, port=port) as sandbox:
            assert (urlsplit(sandbox.url).port or 0) > port
            assert open_login_page(sandbox).ok


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_a_port_taken_on_either_loopback_address_is_not_free(
    family: socket.AddressFamily, host: str
) -> None:
    try:
        holder = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this computer has no {host}")
    with holder:
        assert not is_free(holder.getsockname()[1])


def test_the_redirect_uri_moves_when_port_8080_is_taken() -> None:
    with contextlib.ExitStack() as stack:
        # If this fails, somebody else holds the port, which serves as well.
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 8080)))
        with Sandbox(port=0) as sandbox:
            assert urlsplit(sandbox.environment["REDIRECT_URI"]).port != 8080


# --- The script's process ------------------------------------------------------------------------


needs_signals = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no signals to send to a process"
)


def start_with(script: str, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the sandbox with another script in the place of sipgate_oauth.py."""
    file = folder / "script.py"
    file.write_text(script, encoding="utf-8")
    start = "import pathlib, sys, sandbox; sandbox.SCRIPT = pathlib.Path(sys.argv.pop(1))"
    return subprocess.Popen(  # noqa: S603 - our own
        [sys.executable, "-c", f"{start}; sys.exit(sandbox.main())", str(file), *arguments],
        cwd=Path(sandbox_module.__file__).parent,
        # Buffered, as it is by default: what is not flushed comes too late.
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, as a terminal gives it, so that Ctrl+C can be sent to it.
        start_new_session=True,
    )


def wait_until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout
    assert "ready\n" in iter(process.stdout.readline, "")


def test_the_script_gets_all_arguments(tmp_path: Path) -> None:
    with start_with("import sys; print(sys.argv[1:])", tmp_path, "--help", "-x") as process:
        output, _ = process.communicate(timeout=30)
    assert output.endswith(", '--help', '-x']\n")


def test_the_greeting_comes_first_and_is_plain_ascii(tmp_path: Path) -> None:
    with start_with("print('hello')", tmp_path) as process:
        output, _ = process.communicate(timeout=30)
    assert output.isascii()
    assert output.startswith("Sandbox: ")
    assert output.count("\n") == 2


def test_requests_leave_no_trace_on_the_terminal(tmp_path: Path) -> None:
    script = "import os, requests; requests.get(os.environ['TEST_API_ENDPOINT'])"
    with start_with(script, tmp_path) as process:
        output, errors = process.communicate(timeout=30)
    assert output.count("\n") == 1
    assert errors == ""


def test_the_secret_survives_the_environment(tmp_path: Path) -> None:
    with start_with("import os; print(ascii(os.environ['CLIENT_SECRET']))", tmp_path) as process:
        output, _ = process.communicate(timeout=30)
    secret = ast.literal_eval(output.splitlines()[-1])
    assert secret == sandbox_module.CLIENT_SECRET
    assert set("$&+% ö") <= set(secret)


def test_the_exit_status_is_the_scripts(tmp_path: Path) -> None:
    with start_with("import sys; sys.exit(7)", tmp_path) as process:
        assert process.wait(timeout=30) == 7


@needs_signals
def test_the_exit_status_tells_the_signal_that_ended_the_script(tmp_path: Path) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    with start_with(script, tmp_path) as process:
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


@needs_signals
def test_ctrl_c_leaves_the_script_time_to_say_goodbye(tmp_path: Path) -> None:
    script = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("goodbye")
"""
    with start_with(script, tmp_path) as process:
        wait_until_ready(process)
        # The whole group, as a terminal does it: that is what a negative number means.
        os.kill(-process.pid, signal.SIGINT)
        assert process.communicate(timeout=30) == ("goodbye\n", "")
    assert process.returncode == 130


@needs_signals
def test_an_interrupt_of_the_sandbox_alone_ends_the_script_too(tmp_path: Path) -> None:
    script = "import time; print('ready', flush=True); time.sleep(60)"
    with start_with(script, tmp_path) as process:
        wait_until_ready(process)
        process.send_signal(signal.SIGINT)
        # The output ends when the script does, which holds it open as well.
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_a_missing_package_gets_one_line_of_advice() -> None:
    # Without the site module there are no installed packages.
    command = [sys.executable, "-S", sandbox_module.__file__]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "pip install -r tests/requirements-sandbox.txt" in ended.stderr


def test_the_inline_dependencies_are_those_of_the_requirements_files() -> None:
    tests = Path(sandbox_module.__file__).parent
    inline = re.findall(r'^#     "(.+)",$', (tests / "sandbox.py").read_text("utf-8"), re.MULTILINE)
    listed = [
        line
        for file in (tests / "requirements-sandbox.txt", tests.parent / "requirements.txt")
        for line in file.read_text("utf-8").splitlines()
        if line and not line.startswith(("#", "-r"))
    ]
    assert sorted(inline) == sorted(listed)
