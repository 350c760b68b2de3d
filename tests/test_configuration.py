"""The configuration and the options: where they come from, and what is said if they can't work."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dotenv import dotenv_values
from odd_server import OddServer
from script import ROOT, SCRIPT, Script

from sipgate_oauth import KEYS, LoginError, load_config, problem_with, problems_with

Start = Callable[..., Script]
EXAMPLE = ROOT / "config.example.env"
SECRET = "the-secret-of-this-test"
REALM = "https://login.sipgate.com/auth/realms/third-party/protocol/openid-connect"
GOOD = {
    "CLIENT_ID": "client",
    "CLIENT_SECRET": SECRET,
    "OAUTH_SCOPE": "account:read",
    "REDIRECT_URI": "http://localhost:8080/oauth",
    "AUTH_URL": f"{REALM}/auth",
    "TOKEN_URL": f"{REALM}/token",
    "TEST_API_ENDPOINT": "https://api.sipgate.com/v2/account",
}


def lines(**changes: str) -> str:
    return "".join(f"{key}={value}\n" for key, value in {**GOOD, **changes}.items())


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a configuration that can work, and none in the environment."""
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    path = tmp_path / "my.env"
    path.write_text(lines(), encoding="utf-8")
    return path


def refusal(path: Path) -> LoginError:
    """Load a configuration that cannot work, and return the error, which is without the secret."""
    with pytest.raises(LoginError) as refused:
        load_config(path)
    assert SECRET not in str(refused.value)
    return refused.value


# --- Where the values come from -------------------------------------------------------------------


def test_a_file_is_enough(file: Path) -> None:
    text = lines(CLIENT_ID="Müller", ANOTHER_KEY="is no problem")
    file.write_text(text, encoding="utf-8-sig")  # with a byte order mark
    assert load_config(file) == ({**GOOD, "CLIENT_ID": "Müller"}, [])


def test_the_environment_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in GOOD.items():
        monkeypatch.setenv(key, value)
    assert load_config(tmp_path / "missing.env") == (GOOD, [])


def test_the_environment_overrides_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIENT_ID", GOOD["CLIENT_ID"])  # the same: nothing is overridden
    monkeypatch.setenv("CLIENT_SECRET", "")
    monkeypatch.setenv("OAUTH_SCOPE", "users:read")
    changed = {"CLIENT_SECRET": "", "OAUTH_SCOPE": "users:read"}
    assert load_config(file) == ({**GOOD, **changed}, ["CLIENT_SECRET", "OAUTH_SCOPE"])


def test_step_1_names_the_keys_that_the_environment_overrides(start: Start, file: Path) -> None:
    script = start("--config", str(file), CLIENT_ID="mine", OAUTH_SCOPE="users:read")
    assert script.until("1. ").endswith("client mine, scope users:read\n")
    line = script.until("Overridden by environment variables")
    assert line.endswith(": CLIENT_ID, OAUTH_SCOPE\n")


def test_the_example_has_the_values_of_sipgate_and_lacks_only_the_client() -> None:
    placeholders = {
        "CLIENT_ID": "YOUR_CLIENT_ID",
        "CLIENT_SECRET": "YOUR_CLIENT_SECRET",
        "AUTH_URL": GOOD["AUTH_URL"].replace("third-party", "YOUR_REALM"),
        "TOKEN_URL": GOOD["TOKEN_URL"].replace("third-party", "YOUR_REALM"),
    }
    assert dotenv_values(EXAMPLE, interpolate=False) == {**GOOD, **placeholders}
    assert refusal(EXAMPLE).what == (
        "CLIENT_ID still contains YOUR_CLIENT_ID; "
        "CLIENT_SECRET still contains YOUR_CLIENT_SECRET; "
        "AUTH_URL still contains YOUR_REALM; TOKEN_URL still contains YOUR_REALM"
    )


def test_a_value_means_what_the_example_says(file: Path) -> None:
    file.write_text(lines(CLIENT_ID=r"${HOME}'s \'", CLIENT_SECRET=r"'\'${HOME} # \\'"))
    config, _ = load_config(file)
    assert config["CLIENT_ID"] == "${HOME}'s \\'"
    assert config["CLIENT_SECRET"] == "'${HOME} # \\"


# --- What is wrong with a value -------------------------------------------------------------------

UNSEEN = "begins or ends with a space, or contains an invisible character"
QUOTED = "is enclosed in quotation marks: remove them"
# What is odd about the value of any key, and the problem
ANY_VALUE = {
    "nothing": ("{good}", ""),
    "only spaces": ("  ", "is missing"),
    "a placeholder": ("{good}YOUR_REALM", "still contains YOUR_REALM"),
    "a space at the start": (" {good}", UNSEEN),
    "a space at the end": ("{good} ", UNSEEN),
    "a zero-width space": ("a\u200bb", UNSEEN),
    "double quotes, as Docker keeps them": ('"{good}"', QUOTED),
    "single quotes": ("'{good}'", QUOTED),
    "English quotes of a word processor": ("“{good}”", QUOTED),
    "German quotes": ("„{good}“", QUOTED),
    "single quotes of a word processor": ("‘{good}’", QUOTED),
    "single German quotes": ("‚{good}‘", QUOTED),
    "French quotes": ("«{good}»", QUOTED),
}
GOOD_URLS = {
    "capitals": "HTTP://LocalHost",
    "IPv6, and the highest port": "http://[::1]:65535",
    "an @ in the path, and a query": "http://127.0.0.1/a@b?c=d",
    "https to another computer": "https://Host:8443/a?b=c",
}
BAD_URLS = {
    "unencrypted to another computer": "http://example.com/",
    "localhost at the end of a name": "http://x.localhost/",
    "another scheme": "ftp://localhost/",
    "no host": "https:///a",
    "a user and a password": "https://user:word@host/",
    "port 0": "http://localhost:0/",
    "a port above 65535": "https://host:65536/",
    "a fragment": "http://localhost/#a",
    "a letter that is not ASCII": "https://ü/",
    "a backslash": "http://localhost/a\\b",
    "a space": "https://host/a b",
}


@pytest.mark.parametrize("odd", ANY_VALUE)
def test_any_value_is_accepted_or_refused_with_the_reason(odd: str) -> None:
    value, problem = ANY_VALUE[odd]
    for key in KEYS:
        assert problem_with(key, value.format(good=GOOD[key])) == problem, key


@pytest.mark.parametrize("key", ["REDIRECT_URI", "AUTH_URL", "TOKEN_URL", "TEST_API_ENDPOINT"])
def test_a_url_is_accepted_or_refused_with_an_example(key: str) -> None:
    for odd, url in GOOD_URLS.items():
        assert problem_with(key, url) == "", odd
    for odd, url in BAD_URLS.items():
        assert problem_with(key, url).startswith("is not a URL like https://host/path"), odd


@pytest.mark.parametrize("key", ["CLIENT_ID", "CLIENT_SECRET", "OAUTH_SCOPE"])
def test_a_value_that_is_not_a_url_may_be_any_text(key: str) -> None:
    assert problem_with(key, "ä #\\b: '%$\"") == ""


@pytest.mark.parametrize("key", KEYS)
def test_only_the_client_secret_may_be_empty(key: str) -> None:
    assert problem_with(key, "") == ("" if key == "CLIENT_SECRET" else "is missing")
    assert problem_with(key, None) == "is missing"


@pytest.mark.parametrize("line", ["", f"CLIENT_SECRET='{SECRET}'s'\n"])
def test_a_client_secret_without_a_value_is_missing(file: Path, line: str) -> None:
    file.write_text(lines().replace(f"CLIENT_SECRET={SECRET}\n", line))
    assert refusal(file).what == "CLIENT_SECRET is missing"


# What is changed, and what is wrong with the realms
REALMS = [
    ({"CLIENT_ID": "1-2-apps:third-party"}, ""),
    ({"CLIENT_ID": "1-2:sipgate-apps"}, "CLIENT_ID and the URLs must name the same realm, not "),
    ({"AUTH_URL": "https://a/realms/apps/auth"}, "not apps and third-party"),
    ({"AUTH_URL": "https://a/realms/YOUR_REALM/auth"}, "AUTH_URL still contains YOUR_REALM"),
    ({"CLIENT_ID": "a:sipgate-apps-2"}, ""),
    ({"CLIENT_ID": "sipgate-apps"}, ""),
    ({"CLIENT_SECRET": "a:sipgate-apps"}, ""),
    ({"AUTH_URL": "https://a/auth", "TOKEN_URL": "https://b/c", "CLIENT_ID": "d:e"}, ""),
]


@pytest.mark.parametrize(("changes", "told"), REALMS)
def test_different_realms_are_one_problem(changes: dict[str, str], told: str) -> None:
    problems = problems_with({**GOOD, **changes})
    assert len(problems) == bool(told)
    assert told in "".join(problems)


# --- What is said of it ---------------------------------------------------------------------------


def test_a_missing_file_is_told_with_its_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTH_URL", "http://example.com/")
    path = tmp_path / "config.env"
    error = refusal(path)
    assert error.what.startswith(f"There is no file {path}; CLIENT_ID is missing; ")
    assert "AUTH_URL is not a URL" in error.what
    for remedy in ("Copy config.example.env to config.env", "--config .env", '"Try it now"'):
        assert remedy in error.advice


def test_a_file_that_is_not_utf_8_cannot_be_read(file: Path) -> None:
    file.write_text(lines(), encoding="utf-16")
    error = refusal(file)
    assert error.what.startswith(f"Cannot read {file}: ")
    assert "UTF-8" in error.advice


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path).what.startswith(f"There is no file {tmp_path}; ")


def test_everything_wrong_is_told_at_once(start: Start, file: Path) -> None:
    wrong = {"CLIENT_ID": "", "OAUTH_SCOPE": "'“a”'", "AUTH_URL": "YOUR_REALM", "TOKEN_URL": "x"}
    file.write_text(lines(**wrong), encoding="utf-8")
    script = start(f"--config={file}")
    assert (script.status(), script.stdout) == (1, "")
    assert script.stderr == (
        f"Error: CLIENT_ID is missing; OAUTH_SCOPE {QUOTED}; AUTH_URL still contains YOUR_REALM; "
        "TOKEN_URL is not a URL like https://host/path "
        "(http only for localhost; no spaces, no #).\n"
        f"Correct this in {file}, or in the environment, which overrides the file.\n"
    )


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0", "86400.5"])
def test_a_timeout_that_is_out_of_range_is_refused(start: Start, seconds: str) -> None:
    script = start("--timeout", seconds)
    assert (script.status(), script.stdout) == (2, "")
    assert "--timeout must be greater than 0" in script.stderr.splitlines()[-1]


def test_a_timeout_of_a_day_is_taken(server: OddServer, start: Start) -> None:
    assert " 86400 s" in start("--timeout=86400", **server.environment).until("3. ")


def test_the_help_names_the_default_configuration(start: Start) -> None:
    script = start("--help", COLUMNS="500", NO_COLOR="1")
    assert f"(default: {ROOT / 'config.env'})" in script.until("--config CONFIG ")


def test_an_old_python_is_one_error(environment: dict[str, str]) -> None:
    # What an old Python cannot parse, it cannot run: there, only the syntax of its time works.
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    old = "import runpy, sys; sys.version_info = (3, 9); runpy.run_path(sys.argv[1])"
    error = "Error: This Python is too old.\nPython 3.10 or newer is required.\n"
    assert run_python(environment, "-c", old, str(SCRIPT)) == (1, error)


def test_missing_packages_are_one_error(environment: dict[str, str]) -> None:
    status, error = run_python(environment, "-S", str(SCRIPT))  # without the installed packages
    assert status == 1
    assert re.fullmatch("Error: No module named 'requests'.\nInstall the packages: .+\n", error)


def run_python(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run Python, and return its exit status and its only output, which is on stderr."""
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr
