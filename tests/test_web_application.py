"""The web application as its users, their browsers and the servers meet it."""

import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

import pytest
import requests
import web_application
from flask import Flask
from flask.testing import FlaskClient
from odd_server import CLIENT_SECRET, CODE, NEW_TOKENS, TOKENS, OddServer, answer, json_answer
from script import PATIENCE, WEB_APPLICATION, Script, answer_login_page, free_port, ipv6_works, send
from web_application import REFRESH_EARLY, User, create_app, listen
from werkzeug.test import TestResponse

import sipgate_oauth
from sipgate_oauth import LoginError, check_callback

Serve = Callable[..., Script]
ACCOUNT = json_answer({"company": "Odd Ltd"})
OLD_TOKENS = json_answer(TOKENS | {"expires_in": 0})
EXPIRED = json_answer({"message": "expired"}, "401 Unauthorized")
REFUSED = json_answer({"error": "invalid_grant"}, "400 Bad Request")
THREADS = 20
needs_ipv6 = pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")


def parameters_in(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


class Browser(FlaskClient):
    """A browser with its cookies, at an application that needs no server."""

    def begin_login(self) -> dict[str, str]:
        """Follow the link to log in, and return the parameters of the authorize URL."""
        return parameters_in(self.get("/login").headers["Location"])

    def come_back(self, **parameters: str) -> TestResponse:
        """Open the callback, and return the page that the user then sees."""
        return self.get("/oauth", query_string=parameters, follow_redirects=True)

    def log_in(self, **parameters: str) -> TestResponse:
        """Log in, and come back with these parameters: a code or an error."""
        return self.come_back(state=self.begin_login()["state"], **parameters)

    def cookie(self, name: str) -> str:
        cookie = self.get_cookie(name)
        assert cookie
        return cookie.value


def app_at(redirect_uri: str, server: OddServer) -> Flask:
    return create_app(server.environment | {"REDIRECT_URI": redirect_uri})


@pytest.fixture
def app(server: OddServer) -> Flask:
    return app_at("http://localhost:8001/oauth", server)


@pytest.fixture
def browser(app: Flask) -> Browser:
    return Browser(app)


def echo_the_code(server: OddServer) -> None:
    """Let the account of each user be the code that they logged in with."""
    server.answers["/token"] = [lambda it: json_answer(TOKENS | {"access_token": it.form["code"]})]
    server.answers["/account"] = [lambda it: json_answer([it.headers["Authorization"]])]


def paths(server: OddServer) -> list[str]:
    return [request.target for request in server.requests]


# --- Login ----------------------------------------------------------------------------------------


def test_two_browsers_see_their_own_accounts(app: Flask, server: OddServer) -> None:
    echo_the_code(server)
    one, other = Browser(app), Browser(app)
    one.log_in(code="code-of-one")
    assert "Bearer code-of-other" in other.log_in(code="code-of-other").text
    assert "Bearer code-of-one" in one.get("/").text


def test_a_denied_login_offers_another_and_does_not_end_the_one_before(browser: Browser) -> None:
    page = browser.log_in(error="access_denied")
    assert page.status_code == 403
    assert "Log in</a>" in page.text
    browser.log_in(code=CODE)
    assert "Log out</button>" in browser.log_in(error="access_denied").text
    assert "You are logged in" in browser.get("/").text


def test_each_login_has_a_state_and_a_code_verifier_of_its_own(browser: Browser) -> None:
    first, second = browser.begin_login(), browser.begin_login()
    assert first["state"] != second["state"]
    assert first["code_challenge"] != second["code_challenge"]


def test_a_foreign_callback_is_refused_and_does_not_end_the_login(app: Flask) -> None:
    browser = Browser(app)
    own, foreign = browser.begin_login()["state"], Browser(app).begin_login()["state"]
    assert browser.come_back(code=CODE, state=foreign).status_code == 403
    assert "You are logged in" in browser.come_back(code=CODE, state=own).text


def test_a_callback_works_once_even_at_the_same_moment(
    browser: Browser, server: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def check_together(query: str, state: str) -> dict[str, str]:
        both.wait(PATIENCE)
        return check_callback(query, state)

    def open_callback(state: str) -> int:
        return browser.come_back(code=CODE, state=state).status_code

    monkeypatch.setattr(sipgate_oauth, "check_callback", check_together)
    state = browser.begin_login()["state"]
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(open_callback, [state, state])) == [200, 403]
    assert open_callback(state) == 403
    assert paths(server).count("/token") == 1


def test_a_login_expires(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_application, "LOGIN_LIFETIME", 0)
    assert browser.log_in(code=CODE).status_code == 403


def test_of_too_many_logins_the_oldest_is_forgotten(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_application, "MAX_LOGINS", 2)
    begun = [(it, it.begin_login()["state"]) for it in (Browser(app), Browser(app), Browser(app))]
    pages = [browser.come_back(code=CODE, state=state) for browser, state in begun]
    assert [page.status_code for page in pages] == [403, 200, 200]


@pytest.mark.parametrize("path", ["", "/", "//oauth", "/%6fauth", "/login", "/logout"])
def test_a_path_that_cannot_be_served_is_an_error(server: OddServer, path: str) -> None:
    with pytest.raises(LoginError, match=f"REDIRECT_URI http://localhost{path}\\."):
        app_at(f"http://localhost{path}", server)


# --- Errors ---------------------------------------------------------------------------------------


def test_a_fault_is_told_to_whoever_runs_it_and_does_not_end_the_login(
    browser: Browser, server: OddServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.answers["/token"] = [OLD_TOKENS, b"", json_answer(NEW_TOKENS)]
    page = browser.log_in(code=CODE)
    assert page.status_code == 502
    assert "try again later" in page.text
    assert [it for it in (server.host, "failed", "HTTPS_PROXY") if it in page.text] == []
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"Error: POST http://{server.host}/token failed")
    assert "\\n" not in line  # as the line ends of an advice would be shown
    assert "Odd Ltd" in browser.get("/").text


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("expires_in", [REFRESH_EARLY, str(REFRESH_EARLY)])
def test_a_token_is_refreshed_before_it_expires(server: OddServer, expires_in: object) -> None:
    server.answers["/token"] = [json_answer(NEW_TOKENS)]
    user = User(server.environment, TOKENS | {"expires_in": expires_in})
    assert user.account() == user.account() == {"company": "Odd Ltd"}
    assert paths(server) == ["/token", "/account", "/account"]


@pytest.mark.parametrize("odd", [{}, {"expires_in": None}, {"expires_in": "soon"}])
def test_without_expires_in_a_token_is_used_until_it_is_refused(
    server: OddServer, odd: dict[str, Any]
) -> None:
    server.answers["/account"] = [ACCOUNT, EXPIRED, ACCOUNT]
    user = User(server.environment, {"access_token": "a", "refresh_token": "r", **odd})
    assert user.account() == user.account() == {"company": "Odd Ltd"}
    assert paths(server) == ["/account", "/account", "/token", "/account"]


def test_a_login_page_that_has_expired_at_keycloak_is_no_fault(browser: Browser) -> None:
    assert browser.log_in(error="temporarily_unavailable").status_code == 403


def test_a_new_token_that_is_refused_too_is_a_fault(browser: Browser, server: OddServer) -> None:
    server.answers["/account"] = [EXPIRED]
    assert browser.log_in(code=CODE).status_code == 502
    assert paths(server) == ["/token", "/account", "/token", "/account"]


def test_a_refused_refresh_ends_the_login(browser: Browser, server: OddServer) -> None:
    server.answers["/token"] = [OLD_TOKENS, REFUSED]
    page = browser.log_in(code=CODE)
    assert page.status_code == 403
    assert "Log in</a>" in page.text
    assert "You are not logged in" in browser.get("/").text


def account_in_many_threads(user: User) -> list[Any]:
    """Ask for the account in many threads, which start at the same moment."""
    start = threading.Barrier(THREADS)

    def ask(_: int) -> Any:
        start.wait(PATIENCE)
        return user.account()

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(ask, range(THREADS)))


@pytest.mark.parametrize("expires_in", [0, 300])  # expired, or refused by the API
def test_a_refresh_token_is_sent_once_for_all_threads(server: OddServer, expires_in: int) -> None:
    all_have_sent_it = threading.Barrier(THREADS)

    def account(request: Any) -> bytes:
        if TOKENS["access_token"] in request.headers["Authorization"]:
            all_have_sent_it.wait(PATIENCE)
            return EXPIRED
        return ACCOUNT

    server.answers = {"/token": [json_answer(NEW_TOKENS)], "/account": [account]}
    user = User(server.environment, TOKENS | {"expires_in": expires_in})
    assert account_in_many_threads(user) == [{"company": "Odd Ltd"}] * THREADS
    assert paths(server).count("/token") == 1


def test_a_refresh_that_hangs_delays_no_other_user(server: OddServer) -> None:
    def hold_until_the_other_has_an_account(request: object) -> bytes:
        with ThreadPoolExecutor() as threads:
            account = threads.submit(User(server.environment, TOKENS).account)
            assert account.result(PATIENCE) == {"company": "Odd Ltd"}
        return json_answer(NEW_TOKENS)

    server.answers["/token"] = [hold_until_the_other_has_an_account]
    assert User(server.environment, TOKENS | {"expires_in": 0}).account() == {"company": "Odd Ltd"}


def test_cookies_of_a_server_are_not_sent_for_another_user(app: Flask, server: OddServer) -> None:
    content = b'{"access_token": "a", "token_type": "bearer"}'
    for path in ("/token", "/account"):
        server.answers[path] = [answer(content, "Set-Cookie: user=one")]
    for _ in range(2):
        Browser(app).log_in(code=CODE)
    assert [request.headers["Cookie"] for request in server.requests] == [None] * 4


# --- Logout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [answer(b"", status="204 No Content"), b""])
def test_after_the_logout_the_id_is_worthless_and_only_a_failure_is_told(
    browser: Browser, server: OddServer, capfd: pytest.CaptureFixture[str], said: bytes
) -> None:
    server.answers["/logout"] = [said]
    browser.log_in(code=CODE)
    assert "You are not logged in" in browser.post("/logout", follow_redirects=True).text
    assert browser.cookie("8001-user")  # which the browser has sent
    failure = f"Error: POST http://{server.host}/logout failed"
    assert capfd.readouterr().err.partition(": Remote")[0] == ("" if said else failure)


@pytest.mark.parametrize("secret", [{"client_secret": CLIENT_SECRET}, {}])
def test_the_logout_revokes_the_refresh_token(server: OddServer, secret: dict[str, str]) -> None:
    realm = "/realms/one/protocol/openid-connect"
    server.environment["TOKEN_URL"] = f"http://{server.host}{realm}/token"
    server.environment["CLIENT_SECRET"] = secret.get("client_secret", "")
    User(server.environment, TOKENS).log_out()
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", f"{realm}/logout")
    form = {"client_id": "client", "refresh_token": TOKENS["refresh_token"], **secret}
    assert request.form == form  # without an empty secret


def test_without_a_refresh_token_no_secret_is_sent(server: OddServer) -> None:
    User(server.environment, {"access_token": "a"}).log_out()
    assert paths(server) == []


def test_a_logout_during_a_refresh_revokes_the_new_refresh_token(server: OddServer) -> None:
    user = User(server.environment, TOKENS | {"expires_in": 0})
    logout = threading.Thread(target=user.log_out)

    def log_out_meanwhile(request: object) -> bytes:
        logout.start()
        logout.join(0.3)  # It should not end: this is how long a wrong one has to do so.
        return json_answer(NEW_TOKENS)

    server.answers["/token"] = [log_out_meanwhile]
    user.account()
    logout.join(PATIENCE)
    revoked = [it.form["refresh_token"] for it in server.requests if it.target == "/logout"]
    assert revoked == [NEW_TOKENS["refresh_token"]]
    with pytest.raises(LoginError, match="The login has ended"):
        user.account()


def test_a_link_does_not_log_out(browser: Browser) -> None:
    browser.log_in(code=CODE)
    browser.get("/logout")
    assert "You are logged in" in browser.get("/").text


# --- Cookies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirect_uri", "prefix", "secure"),
    [
        ("http://localhost/a/b-c_d.e~f/", "80-", set()),
        ("http://localhost:8001/oauth", "8001-", set()),  # All ports of a host share their cookies.
        ("https://web.example/oauth", "__Host-", {"Secure"}),  # which this prefix requires
    ],
)
def test_cookies_are_for_this_application_and_not_for_scripts(
    server: OddServer, redirect_uri: str, prefix: str, secure: set[str]
) -> None:
    browser = Browser(app_at(redirect_uri, server))
    begun = browser.get("/login")
    state = parameters_in(begun.headers["Location"])["state"]
    ended = browser.get(urlsplit(redirect_uri).path, query_string={"code": CODE, "state": state})
    for response, name in (begun, "login"), (ended, "user"):
        cookie, *flags = response.headers["Set-Cookie"].split("; ")
        assert cookie.startswith(f"{prefix}{name}=")
        assert set(flags) == {"HttpOnly", "Path=/", "SameSite=Lax"} | secure


def test_each_login_has_a_new_id_and_ends_the_old_one(app: Flask) -> None:
    victim, attacker = Browser(app), Browser(app)
    attacker.log_in(code=CODE)
    victim.set_cookie("8001-user", attacker.cookie("8001-user"))
    victim.log_in(code=CODE)
    assert victim.cookie("8001-user") != attacker.cookie("8001-user")
    assert "You are not logged in" in attacker.get("/").text


def test_planted_cookies_are_ignored(server: OddServer) -> None:
    """Another subdomain, or plain http, can set any name that does not begin with __Host-."""
    echo_the_code(server)
    app = app_at("https://web.example/oauth", server)
    attacker, victim = Browser(app), Browser(app)
    attacker.log_in(code="attacker")
    state = attacker.begin_login()["state"]
    # Browsers accept this name, because for them it begins with another character.
    header = {"Cookie": f"\xa0__Host-user={attacker.cookie('__Host-user')}"}
    page = Browser(app, use_cookies=False).get("/", headers=header)
    assert "You are not logged in" in page.text
    for name in ("user", "login"):
        victim.set_cookie(name, attacker.cookie(f"__Host-{name}"))
    assert "You are not logged in" in victim.get("/").text
    assert victim.come_back(code="attacker", state=state).status_code == 403
    assert "Bearer victim" in victim.log_in(code="victim").text
    assert "You are not logged in" in victim.post("/logout", follow_redirects=True).text


# --- Pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/login", "/oauth", "/unknown"])
def test_no_page_is_cached_or_framed_or_reveals_its_url(browser: Browser, path: str) -> None:
    headers = browser.get(path).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_text_of_a_server_is_escaped(browser: Browser, server: OddServer) -> None:
    server.answers["/account"] = [json_answer(["<script>"])]
    page = browser.log_in(code=CODE).text
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def test_it_does_not_debug(server: OddServer) -> None:
    assert not create_app(server.environment).debug


# --- Program --------------------------------------------------------------------------------------


def new_session() -> requests.Session:
    """A browser for an application that is a process."""
    session = requests.Session()
    session.trust_env = False  # no proxy of this machine
    return session


def log_in_with(session: requests.Session, home: str) -> dict[str, str]:
    """Log in, and return the parameters of the callback."""
    begun = session.get(f"{home}login", allow_redirects=False)
    callback = {"code": CODE, "state": parameters_in(begun.headers["Location"])["state"]}
    session.get(f"{home}oauth", params=callback)
    return callback


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_one_command_runs_it_on_the_sandbox_until_ctrl_c(environment: dict[str, str]) -> None:
    port, session = free_port(), new_session()
    options = ("--port", str(port))
    with Script(*options, environment=environment, path=WEB_APPLICATION) as application:
        home = f"http://localhost:{port}/"
        application.until(f"Open {home} ")
        begun = session.get(f"{home}login", allow_redirects=False)
        page = session.get(answer_login_page(begun.headers["Location"]))
        assert "Müller Sandkästen GmbH" in page.text
        assert page.url == home  # without the code
        application.interrupt()
        assert application.status() == 0
        assert application.stderr == ""


def test_no_secret_is_printed(server: OddServer, serve: Serve) -> None:
    application = serve(**server.environment, PYTHONUNBUFFERED="1")
    home, session = urljoin(server.environment["REDIRECT_URI"], "/"), new_session()
    callback = log_in_with(session, home)
    assert session.get(f"{home}oauth", params=callback).status_code == 403
    cookies = session.cookies.get_dict()
    session.post(f"{home}logout")
    application.process.kill()
    application.status()
    assert application.stderr.count("Error: ") == 2  # the second callback, and the logout
    own = [*callback.values(), server.requests[0].form["code_verifier"], *cookies.values()]
    secrets = [*own, TOKENS["access_token"], TOKENS["refresh_token"], CLIENT_SECRET]
    assert len(secrets) == 8
    assert [it for it in secrets if it in application.stdout + application.stderr] == []


def test_many_requests_that_hang_stop_nobody(server: OddServer, serve: Serve) -> None:
    serve(**server.environment)
    home = urljoin(server.environment["REDIRECT_URI"], "/")
    hanging = 8  # twice as many as waitress has threads by default
    all_hang = threading.Barrier(hanging + 1)
    go_on = threading.Event()

    def hang(request: object) -> bytes:
        all_hang.wait(PATIENCE)
        go_on.wait(PATIENCE)
        return REFUSED

    server.answers["/token"] = [hang]
    with ThreadPoolExecutor(hanging) as threads:
        logins = [threads.submit(log_in_with, new_session(), home) for _ in range(hanging)]
        all_hang.wait(PATIENCE)
        assert not any(login.done() for login in logins)  # none has been given up for another
        assert "Welcome" in new_session().get(home, timeout=PATIENCE).text
        go_on.set()


@needs_ipv6
def test_for_a_proxy_it_listens_on_all_loopback_addresses_and_no_others(
    server: OddServer, serve: Serve
) -> None:
    port = free_port()
    server.environment["REDIRECT_URI"] = "https://web.example/oauth"
    serve("--port", str(port), **server.environment)
    for address in ("127.0.0.1", "[::1]"):
        page = send("GET", f"http://{address}:{port}/")
        assert '<a href="https://web.example/login">' in page.text
    with pytest.raises(OSError, match="refused|timed out|unreachable|assign"):
        socket.create_connection(("127.0.0.2", port), timeout=5)


@needs_ipv6
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_an_error_before_the_url(
    server: OddServer, environment: dict[str, str], address: str
) -> None:
    family = socket.AF_INET6 if address == "::1" else socket.AF_INET
    port = urlsplit(server.environment["REDIRECT_URI"]).port or 0
    environment |= server.environment
    with (
        socket.create_server((address, port), family=family),
        Script(
            "--config", os.devnull, environment=environment, path=WEB_APPLICATION
        ) as application,
    ):
        assert application.status() == 1
    assert application.stderr.startswith(f"Error: Cannot listen on port {port} of {address}: ")
    assert application.stdout == ""


def test_a_machine_without_ipv6_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    without = "2001:db8::1"  # for documentation: no computer has this address
    monkeypatch.setitem(sipgate_oauth.LOOPBACK, "localhost", ["127.0.0.1", without])
    (listener,) = listen(free_port())
    listener.close()
