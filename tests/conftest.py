"""What the tests share: servers to log in at, and the script that runs against them."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from keycloak import Keycloak
from odd_server import OddServer
from playwright.sync_api import Browser, Page, sync_playwright
from providers import Provider, running
from sandbox import Sandbox
from script import WEB_APPLICATION, Script, clean_environment, free_port


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-xdist (-p no:xdist), accept and ignore its options in .pytest.ini."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses")
        parser.addoption("--dist")


def pytest_configure() -> None:
    """A shell starts what is to run in the background with Ctrl+C ignored, and each script would
    inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A sandbox of its own for one test, on free ports: what a server should do."""
    with Sandbox(redirect_uri=f"http://localhost:{free_port()}/oauth", port=0) as running:
        yield running


@pytest.fixture
def server() -> Iterator[OddServer]:
    """A server that answers as a test tells it to: what a server should not do."""
    with OddServer() as running:
        yield running


@pytest.fixture(scope="session")
def keycloak() -> Iterator[Keycloak]:
    """A real Keycloak. Its tests are in the group "keycloak", so that it starts only once."""
    home = os.environ.get("KEYCLOAK_HOME")
    if not home:
        pytest.skip("no Keycloak: unpack https://www.keycloak.org/downloads to KEYCLOAK_HOME")
    with Keycloak(Path(home)) as running:
        yield running


@pytest.fixture(scope="session")
def oidc_provider() -> Iterator[Provider]:
    """A real oidc-provider, with three clients: "secret in the form", "HTTP Basic", "public"."""
    node, home = shutil.which("node"), os.environ.get("OIDC_PROVIDER_HOME")
    if not node or not home:
        advice = "install Node.js, and run `npm install oidc-provider` in OIDC_PROVIDER_HOME"
        pytest.skip(f"no oidc-provider: {advice}")
    with running(node, "oidc_provider.mjs", home) as provider:
        yield provider


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """A real browser: the Chromium of this machine, or else the one that Playwright downloads."""
    installed = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    with sync_playwright() as playwright:
        path = next(filter(None, installed), playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("no Chromium: get it with `playwright install chromium`")
        with playwright.chromium.launch(executable_path=path) as running:
            yield running


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """A tab of a browser that has never been anywhere."""
    with chromium.new_context() as context:
        yield context.new_page()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment for a script, without any configuration."""
    return clean_environment(tmp_path)


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., Script]]:
    """Start the script: start(*options, **variables). --no-browser is always there."""
    with ExitStack() as scripts:

        def start_script(
            *options: str,
            python: tuple[str, ...] = (),
            path: Path | None = None,
            **variables: str,
        ) -> Script:
            variables = {**environment, **variables}
            options = ("--no-browser", *options)
            script = Script(*options, environment=variables, python=python, path=path)
            return scripts.enter_context(script)

        yield start_script


@pytest.fixture
def serve(environment: dict[str, str]) -> Iterator[Callable[..., Script]]:
    """Start the web application, and wait until it can be opened: serve(*options, **variables)."""
    with ExitStack() as programs:

        def start_application(*options: str, **variables: str) -> Script:
            variables = {**environment, **variables}
            options = ("--config", os.devnull, *options)
            program = Script(*options, environment=variables, path=WEB_APPLICATION)
            programs.enter_context(program).until("Open http")
            return program

        yield start_application
