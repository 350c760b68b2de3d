"""One login from start to end: what is asked of whom, in which order, and what the person sees.

Most tests log in to a provider that checks nothing, so that each request and each answer is known;
the sandbox, which does check, stands in for sipgate where that is what counts.
"""

import base64
import json
import re
import shlex
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import pytest
from sandbox import Sandbox
from script import PATIENCE, Script, answer_login_page, free_port, log_in, visit

import sipgate_oauth

Start = Callable[..., Script]

CODE = "the-code-of-this-test"
SECRET = "the-secret-of-this-test"
TOKENS = {
    "access_token": "first-access-token-of-this-test",
    "refresh_token": "first-refresh-token-of-this-test",
    "token_type": "Bearer",
    "expires_in": 300,
}
NEW_TOKENS = {
    "access_token": "second-access-token-of-this-test",
    "refresh_token": "second-refresh-token-of-this-test",
    "token_type": "Bearer",
    "expires_in": 7200,
}
ALL_TOKENS = [
    str(tokens[name])
    for tokens in (TOKENS, NEW_TOKENS)
    for name in ("access_token", "refresh_token")
]
ACCOUNT = {"company": "Müller & Söhne", "verified": True}

# --- A provider that answers what a test wants ----------------------------------------------------


class Request(NamedTuple):
    method: str
    path: str
    headers: "Message[str, str]"
    form: dict[str, str]


class ProviderHandler(BaseHTTPRequestHandler):
    """Notes a request, and sends the provider's next answer on a connection that stays open."""

    server: "Provider"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        form = dict(parse_qsl(body, keep_blank_values=True, strict_parsing=bool(body)))
        self.server.requests.append(Request(self.command, self.path, self.headers, form))
        self.server.asked.set()
        assert self.server.may_answer.wait(PATIENCE)
        status, answer = self.server.answers.pop(0)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class Provider(socketserver.ThreadingTCPServer):
    """Stands in for sipgate's token endpoint and API.

    answers: what is still to be answered, each an HTTP status and what becomes JSON
    requests: what was asked, in the order in which it came
    connections: how many there were
    may_answer: clear it to make the provider think, set it to let it go on
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ProviderHandler)
        self.answers: list[tuple[int, dict[str, Any]]] = [
            (200, TOKENS),
            (200, ACCOUNT),
            (200, NEW_TOKENS),
            (200, ACCOUNT),
        ]
        self.requests: list[Request] = []
        self.connections = 0
        self.asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.redirect_uri = f"http://localhost:{free_port()}/oauth"
        self.environment = {
            "CLIENT_ID": "the client & co",
            "CLIENT_SECRET": SECRET,
            "OAUTH_SCOPE": "account:read users:read",
            "REDIRECT_URI": self.redirect_uri,
            "AUTH_URL": f"{self.url}/auth",
            "TOKEN_URL": f"{self.url}/token",
            "TEST_API_ENDPOINT": f"{self.url}/account",
        }

    def get_request(self) -> tuple[Any, Any]:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about a script that went away."""

    def callback(self, script: Script) -> str:
        """Return where a login at the authorize URL of the script would lead to."""
        return f"{self.redirect_uri}?{urlencode({'code': CODE, 'state': script.state()})}"

    def __enter__(self) -> "Provider":
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.may_answer.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


def log_in_at(provider: Provider, start: Start, *options: str) -> Script:
    """Return the script after a whole login that went well."""
    script = start(*options, **provider.environment)
    visit(provider.callback(script))
    assert script.status() == 0, script.stderr
    return script


def fail_at(provider: Provider, start: Start) -> Script:
    """Return the script after a login that went wrong once the callback had come."""
    script = start(**provider.environment)
    visit(provider.callback(script))
    assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert "Traceback" not in script.stderr
    return script


def steps(text: str) -> list[str]:
    """Return the numbers of the steps that an output shows."""
    return re.findall(r"^(\d)\. ", text, re.MULTILINE)


# --- The whole login ------------------------------------------------------------------------------


def test_a_login_shows_the_account_twice_and_ends_well(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    assert "The login came through" in log_in(script).text
    assert script.status() == 0
    assert script.stdout.count('"company"') == 2
    assert script.stderr == ""


def test_the_six_steps_are_numbered_in_their_order(provider: Provider, start: Start) -> None:
    assert steps(log_in_at(provider, start).stdout) == ["1", "2", "3", "4", "5", "6"]


def test_the_requests_come_in_the_order_of_the_steps(provider: Provider, start: Start) -> None:
    log_in_at(provider, start)
    assert [(request.method, request.path) for request in provider.requests] == [
        ("POST", "/token"),
        ("GET", "/account"),
        ("POST", "/token"),
        ("GET", "/account"),
    ]


def test_each_step_is_shown_before_its_request_is_answered(
    provider: Provider, start: Start
) -> None:
    provider.may_answer.clear()
    script = start(**provider.environment)
    visit(provider.callback(script))
    assert provider.asked.wait(PATIENCE)
    script.until("4. ")
    assert steps(script.stdout) == ["1", "2", "3", "4"]


def test_all_requests_share_one_connection(provider: Provider, start: Start) -> None:
    log_in_at(provider, start)
    assert len(provider.requests) == 4
    assert provider.connections == 1


def test_the_sandbox_too_gets_one_connection(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    callback = answer_login_page(script.url())
    of_the_browser = sandbox.connections
    visit(callback)
    assert script.status() == 0
    assert sandbox.connections == of_the_browser + 1


def test_each_of_two_hosts_gets_one_connection(provider: Provider, start: Start) -> None:
    with Provider() as api:
        api.answers = [(200, ACCOUNT), (200, ACCOUNT)]
        provider.answers = [(200, TOKENS), (200, NEW_TOKENS)]
        provider.environment["TEST_API_ENDPOINT"] = api.environment["TEST_API_ENDPOINT"]
        log_in_at(provider, start)
        assert (provider.connections, api.connections) == (1, 1)


# --- 2. Authorize URL -----------------------------------------------------------------------------


def test_the_authorize_url_has_these_parameters_and_no_others(
    provider: Provider, start: Start
) -> None:
    url = start(**provider.environment).url()
    parameters = parse_qs(urlsplit(url).query)
    assert url.startswith(provider.environment["AUTH_URL"] + "?")
    assert len(parameters.pop("state")) == 1
    assert len(parameters.pop("code_challenge")) == 1
    assert parameters == {
        "response_type": ["code"],
        "client_id": [provider.environment["CLIENT_ID"]],
        "redirect_uri": [provider.environment["REDIRECT_URI"]],
        "scope": [provider.environment["OAUTH_SCOPE"]],
        "code_challenge_method": ["S256"],
    }


def test_the_state_has_256_bits(provider: Provider, start: Start) -> None:
    state = start(**provider.environment).state()
    assert len(base64.urlsafe_b64decode(state + "=")) == 32


@pytest.mark.parametrize("name", ["state", "code_challenge"])
def test_state_and_code_challenge_are_new_each_time(
    provider: Provider, start: Start, name: str
) -> None:
    scripts = [start("--paste", **provider.environment) for _ in range(2)]
    values = [parse_qs(urlsplit(script.url()).query)[name] for script in scripts]
    assert values[0] != values[1]


def test_the_authorize_url_stands_on_a_line_of_its_own(provider: Provider, start: Start) -> None:
    script = start(**provider.environment)
    url = script.url()
    script.until("3. ")
    assert script.stdout.splitlines().count(url) == 1


def test_the_authorize_url_can_be_seen_while_the_script_waits(
    provider: Provider, start: Start
) -> None:
    """Through a pipe, as here, Python keeps output back unless it is told not to."""
    script = start("--timeout", "86400", **provider.environment)
    assert script.url()
    assert script.process.poll() is None


@pytest.fixture
def doorbell(tmp_path: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """A browser that sends the address it is opened at to a socket: the socket, which listens,
    and the environment that makes it the person's browser."""
    program = tmp_path / "browser.py"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE)
        program.write_text(
            "import socket, sys\n"
            f"with socket.create_connection(('127.0.0.1', {server.getsockname()[1]})) as ring:\n"
            "    ring.sendall(sys.argv[1].encode())\n"
        )
        command = [Path(sys.executable).as_posix(), program.as_posix(), "%s"]
        yield server, {"BROWSER": shlex.join(command)}


def opened_at(server: socket.socket) -> str:
    """Wait until a browser is opened, and return the address it is opened at."""
    ring, _ = server.accept()
    with ring, ring.makefile(encoding="utf-8") as address:
        return address.read()


def test_the_browser_is_opened_at_the_authorize_url(
    provider: Provider,
    environment: dict[str, str],
    doorbell: tuple[socket.socket, dict[str, str]],
) -> None:
    server, browser = doorbell
    with Script(environment={**environment, **provider.environment, **browser}) as script:
        assert opened_at(server) == script.url()


# --- 3. Callback ----------------------------------------------------------------------------------


def test_the_page_comes_before_the_tokens(provider: Provider, start: Start) -> None:
    provider.may_answer.clear()
    script = start(**provider.environment)
    page = visit(provider.callback(script))
    assert "The login came through" in page.text
    assert provider.asked.wait(PATIENCE)
    provider.may_answer.set()
    assert script.status() == 0


def test_the_page_is_small_loads_nothing_and_follows_the_colours_of_the_browser(
    provider: Provider, start: Start
) -> None:
    script = start(**provider.environment)
    page = visit(provider.callback(script))
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert len(page.content) < 2000
    assert not re.search("src=|href=|http|url|@import|<script", page.text)
    assert 'name="color-scheme" content="light dark"' in page.text
    assert "terminal" in page.text


def test_deny_ends_the_login_with_what_was_refused(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    page = log_in(script, "deny")
    assert "did not come through" in page.text
    assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert "access_denied" in script.stderr
    assert "Traceback" not in script.stderr


def test_after_deny_no_code_is_exchanged(sandbox: Sandbox, start: Start) -> None:
    script = start(**sandbox.environment)
    log_in(script, "deny")
    assert script.status() == 1
    assert {path.rpartition("/")[2] for _, path in sandbox.requests} == {"auth"}


def test_the_wait_ends_after_the_time_that_timeout_gives(provider: Provider, start: Start) -> None:
    script = start("--timeout", "0.25", **provider.environment)
    assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert "0.25 seconds" in script.stderr
    assert "--timeout" in script.stderr
    assert "Traceback" not in script.stderr


def test_the_wait_says_how_long_it_is(provider: Provider, start: Start) -> None:
    assert "300 seconds" in start(**provider.environment).until("3. ")


def test_the_wait_names_paste_for_a_browser_elsewhere(provider: Provider, start: Start) -> None:
    assert start(**provider.environment).until("--paste")


def test_the_sandbox_takes_a_login_by_paste(sandbox: Sandbox, start: Start) -> None:
    script = start("--paste", **sandbox.environment)
    script.type(answer_login_page(script.url()) + "\n")
    assert script.status() == 0
    assert script.stdout.count('"company"') == 2


# --- 4. Code for tokens ---------------------------------------------------------------------------


def test_the_code_is_exchanged_with_this_form(provider: Provider, start: Start) -> None:
    form = exchange_of(log_in_at(provider, start), provider).form
    verifier = form.pop("code_verifier")
    assert re.fullmatch(r"[\w.~-]{43,128}", verifier, re.ASCII)
    assert form == {
        "grant_type": "authorization_code",
        "code": CODE,
        "redirect_uri": provider.redirect_uri,
        "client_id": provider.environment["CLIENT_ID"],
        "client_secret": SECRET,
    }


def exchange_of(script: Script, provider: Provider) -> Request:
    """Return the request for tokens, whose code verifier belongs to the authorize URL."""
    exchange = provider.requests[0]
    challenge = parse_qs(urlsplit(script.url()).query)["code_challenge"][0]
    assert sipgate_oauth.code_challenge_for(exchange.form["code_verifier"]) == challenge
    return exchange


def test_a_code_with_special_characters_arrives_intact(provider: Provider, start: Start) -> None:
    script = start(**provider.environment)
    code = "a+b c&d=e%41/ü"
    visit(f"{provider.redirect_uri}?{urlencode({'code': code, 'state': script.state()})}")
    assert script.status() == 0
    assert provider.requests[0].form["code"] == code


def test_the_client_goes_to_the_token_endpoint_in_the_form_alone(
    provider: Provider, start: Start, tmp_path: Path
) -> None:
    """Requests would add what a .netrc says about the host, and put it before the form."""
    for name in (".netrc", "_netrc"):
        (tmp_path / name).write_text("machine 127.0.0.1 login somebody password else\n")
    exchange = exchange_of(log_in_at(provider, start), provider)
    assert exchange.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert "Authorization" not in exchange.headers


# --- 5. Account -----------------------------------------------------------------------------------


def test_the_account_is_asked_for_with_the_access_token(provider: Provider, start: Start) -> None:
    log_in_at(provider, start)
    assert provider.requests[1].headers["Authorization"] == f"Bearer {TOKENS['access_token']}"


def test_the_account_is_printed_indented_with_umlauts_as_umlauts(
    provider: Provider, start: Start
) -> None:
    provider.answers[1] = (200, {"company": "Müller & Söhne", "address": {"city": "Köln"}})
    script = log_in_at(provider, start)
    assert (
        '{\n  "company": "Müller & Söhne",\n  "address": {\n    "city": "Köln"\n' in script.stdout
    )


# --- 6. Refresh -----------------------------------------------------------------------------------


def test_the_tokens_are_refreshed_with_this_form(provider: Provider, start: Start) -> None:
    log_in_at(provider, start)
    assert provider.requests[2].form == {
        "grant_type": "refresh_token",
        "refresh_token": TOKENS["refresh_token"],
        "client_id": provider.environment["CLIENT_ID"],
        "client_secret": SECRET,
    }


def test_the_new_access_token_is_shown_to_work(provider: Provider, start: Start) -> None:
    provider.answers[3] = (200, {"company": "after the refresh"})
    script = log_in_at(provider, start)
    assert provider.requests[3].headers["Authorization"] == f"Bearer {NEW_TOKENS['access_token']}"
    assert "after the refresh" in script.stdout


def test_the_output_says_that_the_old_pair_is_no_longer_valid(
    provider: Provider, start: Start
) -> None:
    line = log_in_at(provider, start).until("no longer valid")
    assert "access token and refresh token" in line


@pytest.mark.parametrize("refresh_token", [None, "", TOKENS["refresh_token"]])
def test_without_a_new_refresh_token_the_old_one_stays(
    provider: Provider, start: Start, refresh_token: str | None
) -> None:
    provider.answers[2] = (200, {**NEW_TOKENS, "refresh_token": refresh_token})
    script = log_in_at(provider, start, "--show-tokens")
    assert script.stdout.count(str(TOKENS["refresh_token"])) == 2
    assert "no longer valid" not in script.stdout
    assert "old one" in script.stdout


def test_a_refresh_answer_need_not_name_the_refresh_token(provider: Provider, start: Start) -> None:
    answer = {key: value for key, value in NEW_TOKENS.items() if key != "refresh_token"}
    provider.answers[2] = (200, answer)
    log_in_at(provider, start)
    assert provider.requests[3].headers["Authorization"] == f"Bearer {NEW_TOKENS['access_token']}"


# --- What the person sees -------------------------------------------------------------------------


def test_show_tokens_shows_the_tokens_in_full(provider: Provider, start: Start) -> None:
    script = log_in_at(provider, start, "--show-tokens")
    assert [token for token in ALL_TOKENS if token not in script.stdout] == []


def test_without_show_tokens_no_token_is_shown_in_full(provider: Provider, start: Start) -> None:
    script = log_in_at(provider, start)
    assert [token for token in ALL_TOKENS if token in script.stdout] == []


@pytest.mark.parametrize("length", [1, 3, 4, 15, 64, 2000])
def test_a_mask_shows_a_few_characters_at_most_a_quarter_and_the_length(
    provider: Provider, start: Start, length: int
) -> None:
    token = ("0123456789abcdef" * 125)[:length]
    provider.answers[0] = (200, {**TOKENS, "access_token": token, "refresh_token": token})
    script = log_in_at(provider, start)
    for name in ("Access", "Refresh"):
        line = script.until(f"{name} token:").strip()
        mask = re.fullmatch(rf"{name} token: (\w*)\.\.\. \({length} characters\)", line)
        assert mask
        assert token.startswith(mask[1])
        assert len(mask[1]) <= min(length // 4, 10)
        assert mask[1] or length < 4


def test_the_lifetime_of_each_access_token_is_shown_in_words(
    provider: Provider, start: Start
) -> None:
    lines = log_in_at(provider, start).stdout.splitlines()
    lifetimes = [line for line in lines if "valid for" in line]
    assert [line.partition(" for ")[2] for line in lifetimes] == ["5 minutes.", "2 hours."]


@pytest.mark.parametrize("option", ["--no-browser", "--show-tokens", "--paste"])
def test_secret_code_and_verifier_are_never_shown(
    provider: Provider, start: Start, option: str
) -> None:
    script = start(option, **provider.environment)
    if option == "--paste":
        script.type(provider.callback(script) + "\n")
    else:
        visit(provider.callback(script))
    assert script.status() == 0
    verifier = provider.requests[0].form["code_verifier"]
    assert [it for it in (SECRET, CODE, verifier) if it in script.stdout + script.stderr] == []


@pytest.mark.parametrize("failed", range(4))
def test_a_request_that_fails_shows_no_secret_and_no_token(
    provider: Provider, start: Start, failed: int
) -> None:
    provider.answers[failed] = (400, {"error": "invalid_request"})
    script = fail_at(provider, start)
    assert "invalid_request" in script.stderr
    hidden = [SECRET, CODE, provider.requests[0].form["code_verifier"], *ALL_TOKENS]
    assert [it for it in hidden if it in script.stdout + script.stderr] == []


@pytest.mark.parametrize("failed", range(4))
def test_nothing_more_is_asked_after_a_request_that_fails(
    provider: Provider, start: Start, failed: int
) -> None:
    provider.answers[failed] = (500, {})
    fail_at(provider, start)
    assert len(provider.requests) == failed + 1


def test_wrong_credentials_end_the_login_and_are_named(sandbox: Sandbox, start: Start) -> None:
    script = start(**{**sandbox.environment, "CLIENT_SECRET": SECRET})
    log_in(script)
    assert script.status() == 1
    assert "invalid_client" in script.stderr
    assert "CLIENT_SECRET" in script.stderr
    assert SECRET not in script.stdout + script.stderr
