"""What the tests share: a sandbox, and the script that runs against it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sandbox import Sandbox
from script import Script, clean_environment, free_port


def pytest_configure() -> None:
    """A shell starts what is to run in the background with Ctrl+C ignored, and each script would
    inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A sandbox of its own for one test, on free ports."""
    with Sandbox(redirect_uri=f"http://localhost:{free_port()}/oauth", port=0) as running:
        yield running


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment for a script, without any configuration."""
    return clean_environment(tmp_path)


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., Script]]:
    """Start the script: start(*options, **variables). --no-browser is always there."""
    with ExitStack() as scripts:

        def start_script(*options: str, python: tuple[str, ...] = (), **variables: str) -> Script:
            script = Script(
                "--no-browser", *options, environment={**environment, **variables}, python=python
            )
            return scripts.enter_context(script)

        yield start_script
