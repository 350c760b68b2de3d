"""`python tests/sandbox.py [options of sipgate_oauth.py]`: a login without an account."""

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import sandbox
from script import PATIENCE, SCRIPT, Script, answer_login_page, ipv6_works, log_in

Start = Callable[..., Script]

COMMAND = Path(sandbox.__file__)
ACCOUNT = '"company": "Müller Sandkästen GmbH"'


@pytest.fixture(autouse=True)
def _command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let start() run the sandbox's command instead of the script."""
    monkeypatch.setattr("script.SCRIPT", COMMAND)


@pytest.fixture
def start(start: Start) -> Start:
    """Like start() elsewhere. The script waits for as long as a test does, and no longer: if the
    sandbox is killed, because a test failed, nobody else ends it."""
    return partial(start, "--timeout", str(PATIENCE))


@pytest.fixture
def copied_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let start() run a copy of the sandbox's command, beside a copy of the script; return the
    folder that a person's config.env would be in."""
    folder = tmp_path / "copy"
    (folder / "tests").mkdir(parents=True)
    shutil.copy(SCRIPT, folder)
    monkeypatch.setattr("script.SCRIPT", Path(shutil.copy(COMMAND, folder / "tests")))
    return folder


def redirect_uri(script: Script) -> str:
    return parse_qs(urlsplit(script.url()).query)["redirect_uri"][0]


def listens(url: str) -> bool:
    """Whether somebody listens at the host and the port of a URL."""
    address = urlsplit(url)
    with contextlib.suppress(OSError):
        socket.create_connection((address.hostname or "", address.port or 80)).close()
        return True
    return False


def expect_a_login(script: Script) -> None:
    assert "The login came through" in log_in(script).text
    assert script.status() == 0, script.stderr
    assert script.stdout.count(ACCOUNT) == 2


# --- A login --------------------------------------------------------------------------------------


def test_allow_ends_with_the_account_twice(start: Start) -> None:
    script = start()
    expect_a_login(script)
    assert script.stderr == ""


def test_deny_ends_with_a_clear_error(start: Start) -> None:
    script = start()
    log_in(script, "deny")
    assert script.status() == 1
    assert script.stderr.startswith("Error: ")
    assert "access_denied" in script.stderr
    assert "Traceback" not in script.stderr
    assert ACCOUNT not in script.stdout


def test_the_sandbox_says_first_where_it_is(start: Start) -> None:
    script = start()
    origin = "://".join(urlsplit(script.url())[:2])
    first = script.stdout.splitlines()[0]
    assert first.startswith("Sandbox")
    assert origin in first
    expect_a_login(script)


# --- Options and exit status ----------------------------------------------------------------------


def test_show_tokens_is_passed_on(start: Start) -> None:
    script = start("--show-tokens")
    expect_a_login(script)
    assert len(re.findall(r"token: \w{16,} \(", script.stdout)) == 4


def test_without_show_tokens_they_are_masked(start: Start) -> None:
    script = start()
    expect_a_login(script)
    assert len(re.findall(r"token: \w+\.\.\. \(", script.stdout)) == 4


def test_timeout_is_passed_on(start: Start) -> None:
    script = start("--timeout", "0.25")
    assert script.status() == 1
    assert "0.25 seconds" in script.stderr


def test_paste_reads_what_the_person_types(start: Start) -> None:
    script = start("--paste")
    script.type(answer_login_page(script.url()) + "\n")
    assert script.status() == 0
    assert script.stdout.count(ACCOUNT) == 2


def test_help_is_that_of_the_script(start: Start) -> None:
    script = start("--help")
    assert script.status() == 0
    assert "--show-tokens" in script.stdout


def test_a_configuration_that_cannot_be_read_ends_with_status_2(
    start: Start, tmp_path: Path
) -> None:
    script = start("--config", str(tmp_path))
    assert script.status() == 2
    assert str(tmp_path) in script.stderr


@pytest.mark.parametrize("arguments", [["--timeout", "0"], ["--no-such-option"], ["more"]])
def test_wrong_usage_ends_with_status_2(start: Start, arguments: list[str]) -> None:
    script = start(*arguments)
    assert script.status() == 2
    assert "usage: " in script.stderr
    assert "Traceback" not in script.stderr


# --- Ports ----------------------------------------------------------------------------------------


@pytest.fixture
def hold() -> Iterator[Callable[[str, int], None]]:
    """Take a port of an address until the end of the test, unless another program has it."""
    with ExitStack() as holders:

        def hold_port(address: str, port: int) -> None:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with contextlib.suppress(OSError):
                holders.enter_context(socket.create_server((address, port), family=family))

        yield hold_port


def test_the_ports_are_8081_and_8080_or_the_next_free_ones(start: Start) -> None:
    free = [port for port in range(8080, 8100) if sandbox.is_free(port)]
    expected = next(port for port in free if port > 8080)
    script = start()
    assert urlsplit(script.url()).port == expected
    assert urlsplit(redirect_uri(script)).port == next(port for port in free if port != expected)
    expect_a_login(script)


def test_where_8081_is_taken_the_login_works_at_another_port(
    start: Start, hold: Callable[[str, int], None]
) -> None:
    hold("127.0.0.1", 8081)
    script = start()
    assert (urlsplit(script.url()).port or 0) > 8081
    expect_a_login(script)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_where_8080_is_taken_the_redirect_uri_moves_and_the_login_works(
    start: Start, hold: Callable[[str, int], None], address: str
) -> None:
    if address == "::1" and not ipv6_works():
        pytest.skip("this computer has no ::1")
    hold(address, 8080)
    script = start()
    assert (urlsplit(redirect_uri(script)).port or 0) > 8080
    expect_a_login(script)


def test_two_at_once_do_not_get_in_each_other_s_way(start: Start) -> None:
    first = start()
    first.until("--paste")
    second = start()
    for script in (second, first):
        expect_a_login(script)


# --- What the person has --------------------------------------------------------------------------

MINE = {
    "CLIENT_ID": "mine",
    "CLIENT_SECRET": "mine",
    "OAUTH_SCOPE": "mine",
    "REDIRECT_URI": "http://localhost:1/mine",
    "AUTH_URL": "https://mine.example/auth",
    "TOKEN_URL": "https://mine.example/token",
    "TEST_API_ENDPOINT": "https://mine.example/account",
}


def test_the_configuration_in_the_environment_does_not_get_in_the_way(start: Start) -> None:
    expect_a_login(start(**MINE))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_config_env_does_not_get_in_the_way(
    start: Start, copied_command: Path, encoding: str
) -> None:
    text = "".join(f"{key}={value}\n" for key, value in {**MINE, "CLIENT_ID": "für mich"}.items())
    (copied_command / "config.env").write_text(text, encoding=encoding)
    expect_a_login(start())


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy_does_not_get_in_the_way(start: Start, name: str) -> None:
    expect_a_login(start(**{name: "http://127.0.0.1:1"}))


def test_a_netrc_does_not_get_in_the_way(start: Start, tmp_path: Path) -> None:
    for name in (".netrc", "_netrc"):
        (tmp_path / name).write_text("machine 127.0.0.1 login somebody password else\n")
    expect_a_login(start())


def test_a_terminal_without_utf_8_does_not_get_in_the_way(start: Start) -> None:
    script = start(PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    log_in(script)
    assert script.status() == 0
    assert script.stdout.count('"company"') == 2


# --- Ctrl+C ---------------------------------------------------------------------------------------

needs_sessions = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows can't send Ctrl+C to some processes alone"
)

# Starts Python with the arguments that follow in a session of its own, as a terminal does.
OWN_SESSION = (
    "-c",
    "import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
)


def interrupt_both(script: Script) -> None:
    """Send what Ctrl+C in a terminal sends to all that run in it."""
    if sys.platform != "win32":
        os.killpg(script.process.pid, signal.SIGINT)


@needs_sessions
@pytest.mark.parametrize("option", ["--no-browser", "--paste"])
def test_ctrl_c_ends_both_without_a_word(start: Start, option: str) -> None:
    script = start(option, python=OWN_SESSION)
    script.until("Paste" if option == "--paste" else "--paste")
    url, uri = script.url(), redirect_uri(script)
    interrupt_both(script)
    assert script.status() == 130
    assert script.stderr == ""
    assert (listens(url), listens(uri)) == (False, False)


@needs_sessions
def test_ctrl_c_at_once_leaves_no_traceback(start: Start) -> None:
    script = start(python=OWN_SESSION)
    script.until("Sandbox")
    interrupt_both(script)
    assert script.status() == 130
    assert "Traceback" not in script.stderr
