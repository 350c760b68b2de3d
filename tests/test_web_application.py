"""The web application as its users, their browsers and the servers meet it."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest
import requests
import web_application
from odd_server import CLIENT_SECRET, CODE, NEW_TOKENS, TOKENS, OddServer, answer, json_answer
from sandbox import Sandbox
from script import PATIENCE, WEB_APPLICATION, Script, answer_login_page, free_port, send
from web_application import REFRESH_EARLY, User, create_app

Serve = Callable[..., Script]
EXPIRED = json_answer({"message": "expired"}, "401 Unauthorized")
THREADS = 20


class Browser(requests.Session):
    """An HTTP client that keeps the cookies of the application at this redirect URI."""

    def __init__(self, redirect_uri: str) -> None:
        super().__init__()
        self.trust_env = False  # no proxy of this machine
        self.redirect_uri = redirect_uri
        self.home = urljoin(redirect_uri, "/")

    def begin_login(self) -> str:
        """Follow the link to log in, and return the authorize URL that it leads to."""
        response = self.get(urljoin(self.home, "login"), allow_redirects=False)
        return response.headers["Location"]

    def log_in(self, button: str = "allow") -> requests.Response:
        """Log in on the sandbox's page, and return the page that the user then sees."""
        return self.get(answer_login_page(self.begin_login(), button))

    def return_with(self, **parameters: str) -> requests.Response:
        """Log in at a server that has no login page, and return with these parameters."""
        state = parse_qs(urlsplit(self.begin_login()).query)["state"][0]
        return self.get(self.redirect_uri, params={"state": state, **parameters})


@pytest.fixture
def browser(sandbox: Sandbox, serve: Serve) -> Browser:
    """A browser, for the application that logs in at the sandbox."""
    serve(**sandbox.environment)
    return Browser(sandbox.redirect_uri)


@pytest.fixture
def odd(server: OddServer, serve: Serve) -> Browser:
    """A browser, for the application that logs in at the odd server."""
    serve(**server.environment)
    return Browser(server.environment["REDIRECT_URI"])


def paths(server: OddServer) -> list[str]:
    return [request.target for request in server.requests]


# --- Login ----------------------------------------------------------------------------------------


def test_a_login_shows_the_account_at_an_address_without_the_code(browser: Browser) -> None:
    page = browser.log_in()
    assert page.url == browser.home
    assert "Müller Sandkästen GmbH" in page.text


def test_two_browsers_at_once_see_their_own_accounts(odd: Browser, server: OddServer) -> None:
    server.answers["/token"] = [lambda it: json_answer(TOKENS | {"access_token": it.form["code"]})]
    server.answers["/account"] = [lambda it: json_answer([it.headers["Authorization"]])]
    other = Browser(odd.redirect_uri)
    odd.return_with(code="code-of-one")
    assert "Bearer code-of-other" in other.return_with(code="code-of-other").text
    assert "Bearer code-of-one" in odd.get(odd.home).text


def test_a_denied_login_is_a_page_with_the_reason(browser: Browser) -> None:
    page = browser.log_in("deny")
    assert page.status_code == 403
    assert "access_denied" in page.text


def test_a_callback_of_another_browser_is_refused_and_does_not_end_the_login(
    browser: Browser,
) -> None:
    own = answer_login_page(browser.begin_login())
    foreign = answer_login_page(Browser(browser.redirect_uri).begin_login())
    assert browser.get(foreign).status_code == 403
    assert browser.get(own).status_code == 200


def test_a_callback_works_only_once(browser: Browser, sandbox: Sandbox) -> None:
    callback = answer_login_page(browser.begin_login())
    assert browser.get(callback).status_code == 200
    assert browser.get(callback).status_code == 403
    assert sandbox.exchanges == 1


def test_of_two_equal_callbacks_at_once_one_is_exchanged(odd: Browser, server: OddServer) -> None:
    state = parse_qs(urlsplit(odd.begin_login()).query)["state"][0]
    callback = f"{odd.redirect_uri}?code={CODE}&state={state}"
    cookies = odd.cookies.get_dict()

    def hold_until_the_second_is_refused(request: object) -> bytes:
        assert send("GET", callback, cookies=cookies).status_code == 403
        return json_answer(TOKENS)

    server.answers["/token"] = [hold_until_the_second_is_refused]
    assert send("GET", callback, cookies=cookies).status_code == 303
    assert paths(server) == ["/token"]


def test_a_login_expires(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_application, "LOGIN_LIFETIME", 0)
    client = create_app(sandbox.environment).test_client()
    callback = answer_login_page(client.get("/login").headers["Location"])
    assert client.get(callback).status_code == 403


def test_a_wrong_secret_is_a_page_with_the_reason(sandbox: Sandbox, serve: Serve) -> None:
    serve(**sandbox.environment | {"CLIENT_SECRET": "wrong"})
    page = Browser(sandbox.redirect_uri).log_in()
    assert page.status_code == 502
    assert "unauthorized_client" in page.text


def test_no_response_is_a_page_with_the_reason(odd: Browser, server: OddServer) -> None:
    server.answers["/token"] = [b""]
    page = odd.return_with(code=CODE)
    assert page.status_code == 502
    assert f"The request to {server.host}" in page.text


# --- Tokens ---------------------------------------------------------------------------------------


def test_a_token_is_refreshed_before_it_expires(odd: Browser, server: OddServer) -> None:
    expires_soon = json_answer(TOKENS | {"expires_in": REFRESH_EARLY})
    server.answers["/token"] = [expires_soon, json_answer(NEW_TOKENS)]
    assert odd.return_with(code=CODE).status_code == 200
    assert paths(server) == ["/token", "/token", "/account"]


def test_without_a_refresh_token_the_user_is_asked_to_log_in_again(
    odd: Browser, server: OddServer
) -> None:
    tokens = {"access_token": "a", "token_type": "bearer", "expires_in": 0}
    server.answers["/token"] = [json_answer(tokens)]
    assert odd.return_with(code=CODE).status_code == 403


def test_a_refused_token_is_refreshed_and_tried_again(odd: Browser, server: OddServer) -> None:
    server.answers["/account"] = [EXPIRED, json_answer({"company": "Odd Ltd"})]
    assert "Odd Ltd" in odd.return_with(code=CODE).text
    assert paths(server) == ["/token", "/account", "/token", "/account"]


def test_a_token_that_is_refused_again_ends_the_login(odd: Browser, server: OddServer) -> None:
    server.answers["/account"] = [EXPIRED]
    assert odd.return_with(code=CODE).status_code == 403
    assert paths(server) == ["/token", "/account", "/token", "/account"]
    assert "You are not logged in" in odd.get(odd.home).text


def test_a_refused_refresh_ends_the_login(odd: Browser, server: OddServer) -> None:
    refusal = json_answer({"error": "invalid_grant"}, "400 Bad Request")
    server.answers["/token"] = [json_answer(TOKENS | {"expires_in": 0}), refusal]
    page = odd.return_with(code=CODE)
    assert page.status_code == 403
    assert "invalid_grant" in page.text
    assert "You are not logged in" in odd.get(odd.home).text


def test_a_fault_of_the_api_does_not_end_the_login(odd: Browser, server: OddServer) -> None:
    server.answers["/account"] = [b"", json_answer({"company": "Odd Ltd"})]
    assert odd.return_with(code=CODE).status_code == 502
    assert "Odd Ltd" in odd.get(odd.home).text


def accounts_at_once(user: User) -> list[Any]:
    """Ask for the account in many threads, which start at the same moment."""
    start = threading.Barrier(THREADS)

    def ask(_: int) -> Any:
        start.wait(PATIENCE)
        return user.account()

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(ask, range(THREADS)))


def test_an_expired_token_is_refreshed_once_for_all_threads(server: OddServer) -> None:
    server.answers["/token"] = [json_answer(NEW_TOKENS)]
    user = User(server.environment, TOKENS | {"expires_in": 0})
    assert accounts_at_once(user) == [{"company": "Odd Ltd"}] * THREADS
    assert paths(server).count("/token") == 1


def test_a_refused_token_is_refreshed_once_for_all_threads(server: OddServer) -> None:
    all_have_sent_it = threading.Barrier(THREADS)

    def account(request: Any) -> bytes:
        if TOKENS["access_token"] in request.headers["Authorization"]:
            all_have_sent_it.wait(PATIENCE)
            return EXPIRED
        return json_answer({"company": "Odd Ltd"})

    server.answers = {"/token": [json_answer(NEW_TOKENS)], "/account": [account]}
    user = User(server.environment, TOKENS)
    assert accounts_at_once(user) == [{"company": "Odd Ltd"}] * THREADS
    assert paths(server).count("/token") == 1


def test_a_refresh_that_hangs_delays_no_other_user(odd: Browser, server: OddServer) -> None:
    other = Browser(odd.redirect_uri)
    other.return_with(code=CODE)

    def hold_until_the_other_has_an_answer(request: object) -> bytes:
        assert "Odd Ltd" in other.get(other.home).text
        return json_answer(NEW_TOKENS)

    server.answers["/token"] = [
        json_answer(TOKENS | {"expires_in": 0}),
        hold_until_the_other_has_an_answer,
    ]
    assert "Odd Ltd" in odd.return_with(code=CODE).text


def test_cookies_of_a_server_are_not_sent_for_another_user(odd: Browser, server: OddServer) -> None:
    content = b'{"access_token": "a", "token_type": "bearer"}'
    server.answers["/token"] = [answer(content, "Set-Cookie: user=one")]
    odd.return_with(code=CODE)
    Browser(odd.redirect_uri).return_with(code=CODE)
    assert [request.headers["Cookie"] for request in server.requests] == [None] * 4


# --- Sessions, cookies and pages ------------------------------------------------------------------


def test_after_the_logout_the_id_is_worthless(browser: Browser) -> None:
    browser.log_in()
    cookies = browser.cookies.get_dict()
    page = browser.post(urljoin(browser.home, "logout"))
    assert "You are not logged in" in page.text
    assert "You are not logged in" in send("GET", browser.home, cookies=cookies).text


def test_a_link_does_not_log_out(browser: Browser) -> None:
    browser.log_in()
    assert browser.get(urljoin(browser.home, "logout")).status_code == 405
    assert "You are logged in" in browser.get(browser.home).text


def test_each_login_has_a_new_id_and_ends_the_old_one(browser: Browser) -> None:
    browser.log_in()
    old = browser.cookies["user"]
    browser.log_in()
    assert browser.cookies["user"] != old
    assert "You are not logged in" in send("GET", browser.home, cookies={"user": old}).text


def test_cookies_are_for_this_site_and_not_for_scripts(browser: Browser) -> None:
    begun = send("GET", urljoin(browser.home, "login"))
    callback = answer_login_page(begun.headers["Location"])
    ended = send("GET", callback, cookies=begun.cookies.get_dict())
    for response in (begun, ended):
        _, *flags = response.headers["Set-Cookie"].split("; ")
        assert set(flags) == {"HttpOnly", "Path=/", "SameSite=Lax"}


def test_an_https_redirect_uri_works_behind_a_proxy(serve: Serve) -> None:
    local = f"http://127.0.0.1:{free_port()}"
    with Sandbox("https://web.example/oauth", port=0) as sandbox:
        serve("--port", local.rpartition(":")[2], **sandbox.environment)
        begun = send("GET", f"{local}/login")
        callback = answer_login_page(begun.headers["Location"])
        forwarded = callback.replace("https://web.example", local)
        ended = send("GET", forwarded, cookies=begun.cookies.get_dict())
        assert ended.headers["Location"] == "/"
        assert "Secure" in begun.headers["Set-Cookie"].split("; ")
        assert "Secure" in ended.headers["Set-Cookie"].split("; ")
        home = send("GET", local, cookies=ended.cookies.get_dict())
        assert "You are logged in" in home.text


@pytest.mark.parametrize("path", ["/", "/login", "/oauth", "/unknown"])
def test_no_page_is_cached_or_reveals_its_address(browser: Browser, path: str) -> None:
    headers = send("GET", urljoin(browser.home, path)).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_text_of_a_server_is_escaped(odd: Browser) -> None:
    page = odd.return_with(error="<script>")
    assert page.status_code == 502
    assert "&lt;script&gt;" in page.text
    assert "<script>" not in page.text


# --- Program --------------------------------------------------------------------------------------


def test_no_secret_is_printed(server: OddServer, serve: Serve) -> None:
    application = serve(**server.environment)
    browser = Browser(server.environment["REDIRECT_URI"])
    browser.return_with(error="access_denied")
    callback = browser.return_with(code=CODE).history[0].url
    assert browser.get(callback).status_code == 403
    application.process.kill()
    application.status()
    state = parse_qs(urlsplit(callback).query)["state"][0]
    code_verifier = server.requests[0].form["code_verifier"]
    tokens = [TOKENS["access_token"], TOKENS["refresh_token"]]
    secrets = [CODE, state, code_verifier, *tokens, CLIENT_SECRET, *browser.cookies.values()]
    assert [it for it in secrets if it in application.stdout + application.stderr] == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_one_command_runs_it_on_the_sandbox_until_ctrl_c(environment: dict[str, str]) -> None:
    port = free_port()
    options = ("--port", str(port))
    with Script(*options, environment=environment, path=WEB_APPLICATION) as application:
        application.until(f"Open http://localhost:{port}/")
        assert "You are logged in" in Browser(f"http://localhost:{port}/oauth").log_in().text
        application.interrupt()
        assert application.status() == 0
        assert application.stderr == ""


def test_a_port_in_use_is_an_error(browser: Browser, environment: dict[str, str]) -> None:
    options = ("--port", str(urlsplit(browser.home).port))
    with Script(*options, environment=environment, path=WEB_APPLICATION) as application:
        assert application.status() == 1
        assert application.stderr.startswith("Error: Cannot listen on port ")
