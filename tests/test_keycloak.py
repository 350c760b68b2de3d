"""The login at a real Keycloak, in a real Chromium: also what goes wrong, as Keycloak says it."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from keycloak import PASSWORD, START_TIMEOUT, USERNAME, Keycloak
from playwright.sync_api import Browser, Page, expect, sync_playwright
from script import PATIENCE, Script, free_port
from test_browser import chromium_path

pytestmark = pytest.mark.timeout(START_TIMEOUT + 60)  # seconds

Start = Callable[..., Script]


@pytest.fixture(scope="module")
def keycloak() -> Iterator[Keycloak]:
    home = os.environ.get("KEYCLOAK_HOME")
    if not home:
        pytest.skip(
            "There is no Keycloak. Unpack one from https://www.keycloak.org/downloads (it needs "
            "Java 17), and set KEYCLOAK_HOME to its folder."
        )
    with Keycloak(Path(home)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium_path(playwright)) as running,
    ):
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of a browser that has never been anywhere."""
    with browser.new_context() as context:
        yield context.new_page()


@pytest.fixture
def variables(keycloak: Keycloak) -> dict[str, str]:
    """The configuration for a login at Keycloak, which has never seen one before."""
    keycloak.forget_consent()
    return keycloak.environment(redirect_uri=f"http://localhost:{free_port()}/oauth")


def sign_in(page: Page, url: str, password: str = PASSWORD) -> None:
    page.goto(url)
    fill_in(page, password)


def fill_in(page: Page, password: str) -> None:
    page.get_by_label("Username or email").fill(USERNAME)
    page.get_by_label("Password", exact=True).fill(password)
    page.get_by_role("button", name="Sign In").click()


def consent(page: Page, button: str = "Yes") -> None:
    expect(page.get_by_text("Read your account")).to_be_visible()
    page.get_by_role("button", name=button).click()


def ask_for_tokens(variables: dict[str, str], **form: str) -> requests.Response:
    """Ask for tokens as the script does, but beside it."""
    client = {"client_id": variables["CLIENT_ID"], "client_secret": variables["CLIENT_SECRET"]}
    with requests.Session() as session:
        session.trust_env = False
        return session.post(variables["TOKEN_URL"], {**client, **form}, timeout=PATIENCE)


def expect_title(page: Page, title: str) -> None:
    expect(page.get_by_role("heading")).to_have_text(title)


def test_a_login_ends_well_after_a_mistyped_password(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start(**variables)
    sign_in(page, script.url(), "mistyped")
    expect(page.get_by_text("Invalid username or password.")).to_be_visible()
    fill_in(page, PASSWORD)
    consent(page)
    expect_title(page, "The login came through")
    assert script.status() == 0
    assert script.stdout.count('"preferred_username": "alice"') == 2
    assert script.stderr == ""


def test_a_refused_consent_is_told_in_the_browser_and_in_the_terminal(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start(**variables)
    sign_in(page, script.url())
    consent(page, "No")
    expect_title(page, "The login did not come through")
    assert script.status() == 1
    assert "access_denied" in script.stderr
    assert "allow the access" in script.stderr


def test_a_wrong_client_secret_is_refused_with_the_advice_to_check_it(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start(**variables | {"CLIENT_SECRET": "wrong"})
    sign_in(page, script.url())
    consent(page)
    assert script.status() == 1
    assert "401 Unauthorized: unauthorized_client" in script.stderr
    assert "Check CLIENT_ID and CLIENT_SECRET" in script.stderr


def test_an_unknown_client_is_shown_in_the_browser_and_explained_by_the_time_out(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start("--timeout", "1", **variables | {"CLIENT_ID": "unknown"})
    page.goto(script.url())
    expect(page.get_by_text("Client not found")).to_be_visible()
    assert script.status() == 1
    assert '"Client not found": check CLIENT_ID' in script.stderr


def test_an_unregistered_redirect_uri_is_shown_in_the_browser_and_explained_by_the_time_out(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    unregistered = f"http://localhost:{free_port()}/unregistered"
    script = start("--timeout", "1", **variables | {"REDIRECT_URI": unregistered})
    page.goto(script.url())
    expect(page.get_by_text("Invalid parameter: redirect_uri")).to_be_visible()
    assert script.status() == 1
    assert '"Invalid parameter: redirect_uri": add REDIRECT_URI' in script.stderr


def test_an_unknown_scope_is_refused_with_the_advice_to_check_it(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start(**variables | {"OAUTH_SCOPE": "openid unknown:read"})
    page.goto(script.url())
    expect_title(page, "The login did not come through")
    assert script.status() == 1
    assert "invalid_scope: Invalid scopes: openid unknown:read" in script.stderr
    assert "Check OAUTH_SCOPE" in script.stderr


def test_without_the_scope_for_the_account_the_advice_is_to_check_the_scope(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start(**variables | {"OAUTH_SCOPE": "account:read"})  # userinfo wants openid
    sign_in(page, script.url())
    consent(page)
    assert script.status() == 1
    assert "403 Forbidden" in script.stderr
    assert "OAUTH_SCOPE" in script.stderr


def test_a_code_that_was_spent_before_calls_for_a_new_start(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start("--paste", **variables)
    redirect_uri = variables["REDIRECT_URI"]
    with page.expect_request(lambda request: request.url.startswith(redirect_uri)) as callback:
        sign_in(page, script.url())
        consent(page)
    # Keycloak takes a code for used even if the code verifier is wrong.
    (code,) = parse_qs(urlsplit(callback.value.url).query)["code"]
    thief = {"code": code, "redirect_uri": redirect_uri, "code_verifier": "wrong" * 10}
    response = ask_for_tokens(variables, grant_type="authorization_code", **thief)
    assert "PKCE verification failed" in response.text
    script.type(f"{callback.value.url}\n")
    assert script.status() == 1
    assert "400 Bad Request: invalid_grant: Code not valid" in script.stderr
    assert "Start again" in script.stderr


def test_a_refresh_token_that_was_used_before_calls_for_a_new_start(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as account:
        account.settimeout(PATIENCE)
        account_url = f"http://127.0.0.1:{account.getsockname()[1]}"
        script = start("--show-tokens", **variables | {"TEST_API_ENDPOINT": account_url})
        sign_in(page, script.url())
        consent(page)
        connection, _ = account.accept()  # the script goes on when its account call is answered
        refresh_token = script.until("Refresh token:").split()[2]
        thief = {"refresh_token": refresh_token}
        assert ask_for_tokens(variables, grant_type="refresh_token", **thief).ok
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            assert script.status() == 1
    assert "invalid_grant: Maximum allowed refresh token reuse exceeded" in script.stderr
    assert "Start again" in script.stderr


def test_the_old_refresh_token_is_not_valid_after_the_login(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start("--show-tokens", **variables)
    sign_in(page, script.url())
    consent(page)
    assert script.status() == 0
    old, _ = re.findall(r"Refresh token: (\S+)", script.stdout)
    response = ask_for_tokens(variables, grant_type="refresh_token", refresh_token=old)
    assert response.json()["error"] == "invalid_grant"


def test_a_second_tab_that_keycloak_logs_in_by_itself_does_no_harm(
    variables: dict[str, str], start: Start, page: Page
) -> None:
    script = start(**variables)
    second_tab = page.context.new_page()
    second_tab.goto(script.url())
    redirect_uri = variables["REDIRECT_URI"]
    with second_tab.expect_request(lambda request: request.url.startswith(redirect_uri)):
        sign_in(page, script.url())
        consent(page)
    expect_title(page, "The login came through")
    assert script.status() == 0
    assert script.stderr == ""
