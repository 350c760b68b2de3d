"""The login at a real Keycloak, which is also what sipgate uses, in a real Chromium."""

from collections.abc import Callable
from urllib.parse import urljoin

import pytest
from keycloak import PASSWORD, START_TIMEOUT, USERNAME, Keycloak
from odd_server import OddServer, answer
from playwright.sync_api import Page, expect
from script import PATIENCE, Script, free_port, visit

from sipgate_oauth import STATE_MISMATCH, STILL_WAITING

pytestmark = [pytest.mark.xdist_group("keycloak"), pytest.mark.timeout(START_TIMEOUT + 60)]

Begin = Callable[..., Script]
DONE = "Your browser has done its part."

expect.set_options(timeout=PATIENCE * 1000)  # milliseconds


@pytest.fixture
def redirect_uri() -> str:
    return f"http://localhost:{free_port()}/oauth"


@pytest.fixture
def begin(keycloak: Keycloak, redirect_uri: str, start: Callable[..., Script]) -> Begin:
    """Start the script for a login at Keycloak: begin(**variables)."""
    return lambda **variables: start(**keycloak.environment(redirect_uri) | variables)


def sign_in(page: Page) -> None:
    page.get_by_label("Username or email").fill(USERNAME)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_role("button", name="Sign In").click()


def consent(page: Page, button: str = "Yes") -> None:
    expect(page.get_by_text("Read your account")).to_be_visible()
    page.get_by_role("button", name=button).click()


def log_in(page: Page, script: Script) -> None:
    page.goto(script.url())
    sign_in(page)
    consent(page)


def expect_title(page: Page, title: str) -> None:
    expect(page.get_by_role("heading")).to_have_text(title)


# --- What Keycloak says ---------------------------------------------------------------------------


def test_a_login_shows_the_account_of_the_user(begin: Begin, page: Page) -> None:
    script = begin()
    log_in(page, script)
    expect_title(page, DONE)
    assert (script.status(), script.stderr) == (0, "")
    assert script.stdout.count('"preferred_username": "alice"') == 2


def test_a_refused_consent_is_told_in_the_terminal(begin: Begin, page: Page) -> None:
    script = begin()
    page.goto(script.url())
    sign_in(page)
    consent(page, "No")
    expect_title(page, DONE)
    error = script.error()
    assert "The login failed: access_denied" in error
    assert "start again and allow access" in error


def test_a_wrong_client_secret_is_told_after_the_login(begin: Begin, page: Page) -> None:
    script = begin(CLIENT_SECRET="wrong")
    log_in(page, script)
    expect_title(page, DONE)
    error = script.error()
    assert "401 Unauthorized: unauthorized_client" in error
    assert "Check CLIENT_ID and CLIENT_SECRET" in error


@pytest.mark.parametrize(
    ("path", "client", "error"),
    [
        ("/unknown", "command-line-example", "Invalid parameter: redirect_uri"),
        ("/oauth", "unknown", "Client not found"),
    ],
)
def test_an_error_that_stays_in_the_browser_does_not_end_the_wait(
    begin: Begin, page: Page, redirect_uri: str, path: str, client: str, error: str
) -> None:
    uri = urljoin(redirect_uri, path)
    page.goto(begin(REDIRECT_URI=uri, CLIENT_ID=client).url())
    expect(page.get_by_text(error)).to_be_visible()
    assert STILL_WAITING in visit(uri).text


# --- What Chromium does ---------------------------------------------------------------------------


def test_the_page_can_load_nothing_and_does_not_reveal_its_url(
    begin: Begin, page: Page, server: OddServer
) -> None:
    log_in(page, begin())
    expect_title(page, DONE)
    load = "src => new Promise(then => Object.assign(new Image(), {onerror: then, src}))"
    page.evaluate(load, f"http://{server.host}/image")
    server.answers["/next"] = [answer(b"<h1>Next</h1>", "Content-Type: text/html")]
    page.evaluate("url => { location = url }", f"http://{server.host}/next")
    expect_title(page, "Next")
    seen = {it.target: it.headers["Referer"] for it in server.requests}
    assert "/image" not in seen
    assert seen["/next"] is None


def test_an_old_tab_is_refused_and_a_new_one_logs_in(begin: Begin, page: Page) -> None:
    before = begin()
    page.goto(before.url())
    before.process.kill()
    before.status()
    script = begin()
    script.url()
    sign_in(page)
    consent(page)
    expect_title(page, STATE_MISMATCH)
    expect(page.get_by_text(STILL_WAITING)).to_be_visible()
    page.goto(script.url())  # Keycloak knows the user by now
    consent(page)
    expect_title(page, DONE)
    assert script.status() == 0
    assert "an old browser tab" in script.stderr


# --- The web application --------------------------------------------------------------------------


def test_a_user_of_the_web_application_logs_in_and_out(
    page: Page, redirect_uri: str, serve: Callable[..., Script], keycloak: Keycloak
) -> None:
    serve(**keycloak.environment(redirect_uri))
    home = urljoin(redirect_uri, "/")
    page.goto(home)
    page.get_by_role("link", name="Log in").click()
    sign_in(page)
    consent(page)
    expect_title(page, "You are logged in")
    assert page.url == home
    expect(page.get_by_text('"preferred_username": "alice"')).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect_title(page, "Welcome")
