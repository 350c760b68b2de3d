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
from script import ROOT, SCRIPT, Script, free_port

from sipgate_oauth import KEYS, ConfigurationError, load_config, problem_with

Start = Callable[..., Script]
EXAMPLE, SECRET = ROOT / "config.example.env", "the-secret-of-this-test"
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


def refusal(path: Path) -> tuple[str, str]:
    """Return what is wrong with a configuration, and the advice."""
    with pytest.raises(ConfigurationError) as refused:
        load_config(path)
    assert SECRET not in refused.value.what + refused.value.advice
    return refused.value.what, refused.value.advice


# --- Where the values come from -------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "line_break"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_file_is_enough(file: Path, encoding: str, line_break: str) -> None:
    text = lines(CLIENT_ID="Müller", ANOTHER_KEY="is no problem")
    file.write_bytes(text.replace("\n", line_break).encode(encoding))
    assert load_config(file) == ({**GOOD, "CLIENT_ID": "Müller"}, [])


def test_the_environment_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in GOOD.items():
        monkeypatch.setenv(key, value)
    assert load_config(tmp_path / "missing.env") == (GOOD, [])


@pytest.mark.parametrize("key", KEYS)
def test_the_environment_overrides_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(key, GOOD[key] + "2")
    assert load_config(file) == ({**GOOD, key: GOOD[key] + "2"}, [key])
    monkeypatch.setenv(key, "")
    assert refusal(file)[0] == f"{key} is missing or not filled in"


def test_the_same_value_in_the_environment_overrides_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENT_ID", GOOD["CLIENT_ID"])
    assert load_config(file) == (GOOD, [])


def test_step_1_names_the_keys_that_the_environment_overrides(start: Start, file: Path) -> None:
    script = start("--config", str(file), CLIENT_ID="mine", OAUTH_SCOPE="users:read")
    assert script.until("1. ").endswith("client mine, scope users:read\n")
    line = script.until("Overridden by environment variables")
    assert line.endswith(": CLIENT_ID, OAUTH_SCOPE\n")


def test_step_1_says_nothing_of_an_environment_that_overrides_nothing(
    start: Start, file: Path
) -> None:
    file.write_text(lines(REDIRECT_URI=f"http://127.0.0.1:{free_port()}/oauth"))
    script = start(f"--config=~/{file.name}")  # the home folder is tmp_path
    script.until("2. Authorize URL")
    assert "environment" not in script.stdout


def test_a_value_means_what_the_file_says(file: Path) -> None:
    for written, meant in {"$HOME${HOME}$$": "$HOME${HOME}$$", "'a # \"b\"'": 'a # "b"'}.items():
        file.write_text(lines(CLIENT_SECRET=written), encoding="utf-8")
        assert load_config(file)[0]["CLIENT_SECRET"] == meant


def test_the_example_has_the_values_of_sipgate_and_lacks_only_the_client() -> None:
    lacking = {
        "CLIENT_ID": "YOUR_CLIENT_ID",
        "CLIENT_SECRET": "YOUR_CLIENT_SECRET",
        "AUTH_URL": GOOD["AUTH_URL"].replace("third-party", "YOUR_REALM"),
        "TOKEN_URL": GOOD["TOKEN_URL"].replace("third-party", "YOUR_REALM"),
    }
    assert dotenv_values(EXAMPLE, interpolate=False) == {**GOOD, **lacking}
    assert refusal(EXAMPLE)[0] == f"{', '.join(lacking)} are missing or not filled in"


# --- What is wrong with a value -------------------------------------------------------------------

UNSEEN = "begins or ends with a space, or contains an invisible character"
QUOTED = "is enclosed in quotation marks: remove them"
HTTP = "is not a URL like {} (plain http is only for localhost)"
# What is odd about a value of any key, and the problem.
ANY_VALUE = {
    "nothing": ("{good}", ""),
    "a space at the end": ("{good} ", UNSEEN),
    "a no-break space at the start": ("\xa0{good}", UNSEEN),
    "a line break": ("{good}\n", UNSEEN),
    "an escape character": ("a\x1bb", UNSEEN),
    "a character that reverses text": ("a\u202eb", UNSEEN),
    "a zero-width space": ("{good}\u200b", UNSEEN),
    "double quotes around it, as Docker keeps them": ('"{good}"', QUOTED),
    "single quotes around it": ("'{good}'", QUOTED),
}
# What is odd about a URL: one that works,
GOOD_URLS = {
    "a port": "http://localhost:80/oauth",
    "capitals": "HTTP://LocalHost",
    "IPv6, and the highest port": "http://[::1]:65535",
    "an @ in the path, and a query": "http://127.0.0.1/a@b?c=d",
    "https": "https://host",
    "https in capitals, and a query": "HTTPS://Host:8443/a?b=c",
    "https and IPv6": "https://[2001:db8::1]/",
    "https on this computer": "https://127.0.0.1/@",
}
# one that would send secrets unencrypted,
UNENCRYPTED = {
    "another computer": "http://example.com/",
    "another loopback address": "http://127.0.0.2/",
    "all addresses": "http://0.0.0.0/",
    "localhost as a part of a name": "http://localhost.example.com/",
}
# and one that is not a URL, or not one that can be requested.
NOT_URLS = {
    "no scheme": "localhost/a",
    "an empty scheme": "//localhost/a",
    "another scheme": "ftp://localhost/",
    "no host": "http://",
    "a path only": "https:///a",
    "a port only": "https://:443/",
    "half an IPv6 address": "http://[::1/",
    "a user": "http://user@localhost/",
    "a user and a password": "https://user:word@host/",
    "port 0": "http://localhost:0/",
    "a port above 65535": "https://host:65536/",
    "a port that is not a number": "http://localhost:x/",
    "a fragment": "http://localhost/#a",
    "a letter that is not ASCII": "https://ü/",
    "a backslash": "http://localhost/a\\b",
    "a space": "https://host/a b",
}
URL_KEYS = ["REDIRECT_URI", "AUTH_URL", "TOKEN_URL", "TEST_API_ENDPOINT"]


@pytest.mark.parametrize("odd", ANY_VALUE)
def test_any_value_is_accepted_or_refused_with_the_reason(odd: str) -> None:
    value, problem = ANY_VALUE[odd]
    for key in KEYS:
        assert problem_with(key, value.format(good=GOOD[key])) == problem, key


@pytest.mark.parametrize("key", URL_KEYS)
def test_a_url_is_accepted_or_refused_with_the_reason(key: str) -> None:
    example = "http://localhost:8080/oauth" if key == "REDIRECT_URI" else "https://host/path"
    for problem, urls in {
        "": GOOD_URLS,
        HTTP.format(example): UNENCRYPTED,
        f"is not a URL like {example} (without spaces, user name, or #)": NOT_URLS,
    }.items():
        for odd, url in urls.items():
            assert problem_with(key, url) == problem, odd


def test_client_keys_may_have_any_text() -> None:
    for key in ("CLIENT_ID", "CLIENT_SECRET", "OAUTH_SCOPE"):
        assert problem_with(key, "ä #\\b: '%$") == ""


# --- What is said of it ---------------------------------------------------------------------------


def test_a_missing_file_is_told_first_and_once(tmp_path: Path) -> None:
    what, advice = refusal(tmp_path / "config.env")
    missing = f"There is no {tmp_path / 'config.env'}, and the environment lacks"
    assert what == f"{missing} {', '.join(KEYS)}"
    assert advice.startswith(f"Copy config.example.env to {tmp_path / 'config.env'} and fill it in")
    assert "try the sandbox" in advice


def test_a_missing_file_and_a_wrong_value_are_both_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTH_URL", "http://example.com/")
    what, _ = refusal(tmp_path / "config.env")
    assert what.startswith("There is no ")
    assert what.endswith(f"TEST_API_ENDPOINT; AUTH_URL {HTTP.format('https://host/path')}")


def test_a_name_that_windows_has_lengthened_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "config.env.txt").write_text(lines())
    advice = refusal(tmp_path / "config.env")[1]
    assert advice == f"Rename {tmp_path / 'config.env.txt'} to config.env."


def test_an_example_that_is_filled_in_is_noticed(tmp_path: Path) -> None:
    example = tmp_path / "config.example.env"
    example.write_text(EXAMPLE.read_text(encoding="utf-8"))
    assert refusal(tmp_path / "config.env")[1].startswith("Copy config.example.env")
    example.write_text(lines())
    assert refusal(tmp_path / "config.env")[1] == f"Rename {example} to config.env."


def test_what_is_not_a_utf_8_text_file_can_not_be_read(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / encoding).write_text(lines(CLIENT_ID="Müller"), encoding=encoding)
    for path in (tmp_path, tmp_path / "latin-1", tmp_path / "utf-16"):
        what, advice = refusal(path)
        assert what.startswith("Cannot read the configuration: ")
        assert advice.startswith(f"{path} must be a readable UTF-8 text file")


def test_everything_wrong_is_told_at_once_with_status_2(start: Start, file: Path) -> None:
    wrong = {
        "CLIENT_SECRET": "",
        "REDIRECT_URI": "http://localhost/a b",
        "AUTH_URL": "YOUR_AUTH_URL",
    }
    file.write_text(lines(**wrong))
    script = start(f"--config={file}")
    assert (script.status(), script.stdout) == (2, "")
    assert script.stderr == (
        "Error: CLIENT_SECRET, AUTH_URL are missing or not filled in; "
        "REDIRECT_URI is not a URL like http://localhost:8080/oauth "
        "(without spaces, user name, or #).\n"
        f"Correct this in {file}, or in the environment, which overrides the file.\n"
    )


@pytest.mark.parametrize(
    "name", ["CLIENT_SECRETS", "CLIENT_SCRT", "client_secret", "CLIENT-SECRET"]
)
def test_a_misspelled_key_is_recognised(file: Path, name: str) -> None:
    file.write_text(lines(CLIENT_SECRET="") + f"{name}={SECRET}\n")
    assert f"; {name} is not a known key (did you mean CLIENT_SECRET?)" in refusal(file)[0]


@pytest.mark.parametrize(
    "line",
    [f"{SECRET}==", f"half-{SECRET}", f"CLIENT_SECRET:{SECRET}=xyz", "CLIENT_SECRET:abc=xyz"],
)
def test_a_name_that_may_be_part_of_a_secret_is_not_printed(file: Path, line: str) -> None:
    file.write_text(lines(CLIENT_SECRET="") + f"{line}\n")
    assert refusal(file)[0] == "CLIENT_SECRET is missing or not filled in"


# --- The command line -----------------------------------------------------------------------------

TIMEOUTS = [f"--timeout={seconds}" for seconds in ("nan", "inf", "0", "-1", "abc", "86400.5")]


@pytest.mark.parametrize("argument", [*TIMEOUTS, "--no-such-option", "--show-tokens=1", "a.env"])
def test_wrong_usage_names_the_option(start: Start, argument: str) -> None:
    script = start(argument)
    assert (script.status(), script.stdout) == (2, "")
    assert argument.partition("=")[0] in script.stderr.splitlines()[-1]


@pytest.mark.parametrize("seconds", ["0.5", "86400"])
def test_a_timeout_of_up_to_a_day_is_taken(server: OddServer, start: Start, seconds: str) -> None:
    assert f" {seconds} s" in start("--timeout", seconds, **server.environment).until("3. ")


def test_the_help_names_all_options_with_their_defaults(start: Start) -> None:
    script = start("--help", COLUMNS="500", NO_COLOR="1")
    assert script.status() == 0
    assert "Log in to sipgate with OAuth 2.0." in script.stdout
    options = re.findall(r"^  (--\S+(?: [A-Z]+)?)  ", script.stdout, re.MULTILINE)
    assert options == ["--config FILE", "--no-browser", "--timeout SECONDS", "--show-tokens"]
    defaults = re.findall(r"default: ([^)\n]+)", script.stdout)
    assert defaults == [str(ROOT / "config.env"), "300"]


def test_an_old_python_is_one_error(environment: dict[str, str]) -> None:
    # What an old Python cannot parse, it cannot run: there, only the syntax of its time works.
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    old = "import runpy, sys; sys.version_info = (3, 9); runpy.run_path(sys.argv[1])"
    error = "Error: This Python is too old.\nStart the program with Python 3.10 or newer.\n"
    assert run_python(environment, "-c", old, str(SCRIPT)) == (1, error)


def test_missing_packages_are_one_error(environment: dict[str, str]) -> None:
    status, error = run_python(environment, "-S", str(SCRIPT))  # without the installed packages
    assert status == 1
    assert re.fullmatch("Error: No module named 'requests'.\nInstall the packages: .+\n", error)


def test_a_python_without_tls_is_one_error(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "_ssl.py").write_text("raise ImportError(\"No module named '_ssl'\")")
    variables = {**environment, "PYTHONPATH": str(tmp_path)}
    status, error = run_python(variables, str(SCRIPT))
    assert status == 1
    assert error.startswith("Error: No module named '_ssl'.\n")


def run_python(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run Python, and return its exit status and its only output, which is on stderr."""
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr
