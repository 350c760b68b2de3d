"""The login in a real Chromium, which goes to places and shows things that an HTTP client does not.

Chromium is the one on the PATH, or the one that `playwright install chromium` downloads.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Page,
    Playwright,
    expect,
    sync_playwright,
)
from sandbox import Sandbox
from script import PATIENCE, Script, free_port

expect.set_options(timeout=PATIENCE * 1000)

# So that Chromium runs as root too, and does nothing of its own accord. Where Playwright starts it,
# it sees to that itself.
QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)

Start = Callable[..., Script]


def chromium_path(playwright: Playwright) -> str:
    """Return the path of Chromium, or skip the test that can't go without it."""
    installed = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    path = next(installed, playwright.chromium.executable_path)
    if not Path(path).exists():
        pytest.skip("There is no Chromium. Get it with: playwright install chromium")
    return path


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    with playwright.chromium.launch(executable_path=chromium_path(playwright)) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of a browser that has never been anywhere."""
    with browser.new_context() as context:
        yield context.new_page()


def answer(page: Page, url: str, button: str = "Allow") -> None:
    page.goto(url)
    page.get_by_role("button", name=button).click()


def expect_title(page: Page, title: str) -> None:
    expect(page.get_by_role("heading")).to_have_text(title)


def test_allow_leads_to_the_account(sandbox: Sandbox, start: Start, page: Page) -> None:
    script = start(**sandbox.environment)
    answer(page, script.url(), "Allow")
    expect_title(page, "The login came through")
    assert script.status() == 0
    assert script.stdout.count('"company"') == 2


def test_deny_ends_the_login_in_the_browser_and_in_the_terminal(
    sandbox: Sandbox, start: Start, page: Page
) -> None:
    script = start(**sandbox.environment)
    answer(page, script.url(), "Deny")
    expect_title(page, "The login did not come through")
    expect(page.get_by_text("access_denied")).to_be_visible()
    assert script.status() == 1
    assert "access_denied" in script.stderr


def test_the_login_page_names_the_client_and_the_scopes(
    sandbox: Sandbox, start: Start, page: Page
) -> None:
    page.goto(start(**sandbox.environment).url())
    expect(page.get_by_text("The client sandbox asks")).to_be_visible()
    assert page.get_by_role("listitem").all_inner_texts() == ["account:read", "balance:read"]


@pytest.mark.parametrize(
    ("color_scheme", "text_color"), [("light", "rgb(0, 0, 0)"), ("dark", "rgb(255, 255, 255)")]
)
def test_the_page_of_the_script_is_as_light_or_dark_as_the_browser(
    sandbox: Sandbox,
    start: Start,
    page: Page,
    color_scheme: Literal["light", "dark"],
    text_color: str,
) -> None:
    page.emulate_media(color_scheme=color_scheme)
    answer(page, start(**sandbox.environment).url())
    expect_title(page, "The login came through")
    expect(page.get_by_role("heading")).to_have_css("color", text_color)


def test_the_page_of_the_script_sends_the_person_back_to_the_terminal(
    sandbox: Sandbox, start: Start, page: Page
) -> None:
    answer(page, start(**sandbox.environment).url())
    expect(page).to_have_title("The login came through")
    expect(page.get_by_text("The terminal goes on from here.")).to_be_visible()


def test_the_browser_finds_no_fault_with_the_page_of_the_script(
    sandbox: Sandbox, start: Start, page: Page
) -> None:
    faults: dict[str, str] = {}

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            faults[message.location["url"]] = message.text

    page.on("console", note)
    answer(page, start(**sandbox.environment).url())
    expect_title(page, "The login came through")
    page.wait_for_load_state()
    assert faults.keys() <= {f"{sandbox.url}/favicon.ico"}, faults  # the sandbox has no icon


def test_the_browser_is_sent_nowhere_else(sandbox: Sandbox, start: Start, page: Page) -> None:
    visited: set[str] = set()
    page.on("request", lambda request: visited.add(urlsplit(request.url).netloc))
    answer(page, start(**sandbox.environment).url())
    expect_title(page, "The login came through")
    page.wait_for_load_state()
    redirect_uri = sandbox.environment["REDIRECT_URI"]
    assert visited == {urlsplit(sandbox.url).netloc, urlsplit(redirect_uri).netloc}


def test_a_reloaded_tab_does_not_spend_the_code_again(
    sandbox: Sandbox, start: Start, page: Page
) -> None:
    script = start(**sandbox.environment)
    answer(page, script.url())
    expect_title(page, "The login came through")
    with suppress(Error):  # nobody may be there any more to answer
        page.reload()
    assert script.status() == 0
    assert (sandbox.exchanges, script.stderr) == (1, "")


def test_going_back_to_allow_once_more_changes_nothing(
    sandbox: Sandbox, start: Start, page: Page
) -> None:
    script = start(**sandbox.environment)
    answer(page, script.url())
    expect_title(page, "The login came through")
    assert script.status() == 0
    page.go_back()
    with page.expect_event("requestfailed") as failed:
        page.get_by_role("button", name="Allow").click()
    assert failed.value.url.startswith(sandbox.environment["REDIRECT_URI"])
    assert (sandbox.exchanges, script.stderr) == (1, "")


def test_two_tabs_make_one_login(sandbox: Sandbox, start: Start, page: Page) -> None:
    script = start(**sandbox.environment)
    redirect_uri = sandbox.environment["REDIRECT_URI"]
    tabs = [page, page.context.new_page()]
    for tab in tabs:
        tab.goto(script.url())
    for tab in tabs:
        with tab.expect_request(lambda request: request.url.startswith(redirect_uri)):
            tab.get_by_role("button", name="Allow").click()
    assert script.status() == 0
    assert (sandbox.exchanges, script.stderr) == (1, "")


@pytest.mark.skipif(sys.platform == "win32", reason="Its stand-in for a browser is a shell script.")
def test_the_script_opens_the_browser_so_that_one_click_is_left(
    sandbox: Sandbox, environment: dict[str, str], playwright: Playwright, tmp_path: Path
) -> None:
    port, command, process_id = free_port(), tmp_path / "browser", tmp_path / "pid"
    command.write_text(
        f'#!/bin/sh\necho $$ >"{process_id}"\n'
        f'exec "{chromium_path(playwright)}" {QUIET} --remote-debugging-port={port} '
        f'--user-data-dir="{tmp_path}/profile" "$@"\n'
    )
    command.chmod(0o700)
    variables = {**environment, **sandbox.environment, "BROWSER": str(command)}
    with Script(environment=variables) as script:
        try:
            page = first_tab(playwright, port)
            page.get_by_role("button", name="Allow").click()
            expect_title(page, "The login came through")
            assert script.status() == 0
        finally:
            if process_id.exists():
                os.kill(int(process_id.read_text()), signal.SIGTERM)


def first_tab(playwright: Playwright, port: int) -> Page:
    """Wait for the browser whose debugging port this is, and return its first tab."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            browser = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")
        except Error:
            assert time.monotonic() < deadline, "The browser did not start."
            time.sleep(0.1)
        else:
            (context,) = browser.contexts
            return context.pages[0] if context.pages else context.wait_for_event("page")
