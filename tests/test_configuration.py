"""The configuration and the options: where they come from, and what is said if they can't work."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from dotenv import dotenv_values
from odd_server import OddServer
from script import ROOT, SCRIPT, Script

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
    what, advice = refused.value.args
    assert SECRET not in what + advice
    return what, advice


@pytest.mark.parametrize(("encoding", "line_break"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_file_is_enough(file: Path, encoding: str, line_break: str) -> None:
    text = lines(CLIENT_ID="Müller", ANOTHER_KEY="is no problem")
    file.write_bytes(text.replace("\n", line_break).encode(encoding))
    assert load_config(file) == {**GOOD, "CLIENT_ID": "Müller"}


@pytest.mark.parametrize("key", KEYS)
def test_the_environment_wins(file: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(key, GOOD[key] + "2")
    assert load_config(file) == {**GOOD, key: GOOD[key] + "2"}
    monkeypatch.setenv(key, "")
    assert re.findall(r"(\w+) is missing", refusal(file)[0]) == [key]


def test_step_1_names_the_keys_from_the_environment(start: Start, file: Path) -> None:
    script = start("--config", str(file), CLIENT_ID="mine", OAUTH_SCOPE="users:read")
    assert script.until("1. ").endswith("client mine, scope users:read\n")
    assert script.until("From the environment").endswith(": CLIENT_ID, OAUTH_SCOPE\n")


def test_a_tilde_in_config_is_the_home_folder(start: Start, file: Path) -> None:
    script = start(f"--config=~/{file.name}")  # the home folder is tmp_path
    assert script.until("From the environment").endswith(": nothing\n")


def test_a_value_means_what_the_file_says(file: Path) -> None:
    for written, meant in {"$HOME${HOME}$$": "$HOME${HOME}$$", "'a # \"b\"'": 'a # "b"'}.items():
        file.write_text(lines(CLIENT_SECRET=written), encoding="utf-8")
        assert load_config(file)["CLIENT_SECRET"] == meant


def test_the_example_has_the_values_of_sipgate_and_lacks_only_the_client() -> None:
    lacking = {key: f"YOUR_{key}" for key in ("CLIENT_ID", "CLIENT_SECRET")}
    assert dotenv_values(EXAMPLE, interpolate=False) == {**GOOD, **lacking}
    assert re.findall(r"(\w+) is missing", refusal(EXAMPLE)[0]) == list(lacking)


REDIRECT_URI, ENDPOINTS = ["REDIRECT_URI"], ["AUTH_URL", "TOKEN_URL", "TEST_API_ENDPOINT"]
LOOPBACK = "http://localhost:80/oauth HTTP://LocalHost http://[::1]:65535 http://127.0.0.1/a@b?c=d"
TLS = "https://host HTTPS://Host:8443/a?b=c https://[2001:db8::1]/ https://127.0.0.1/@"
NOWHERE = """localhost/a //localhost/a ftp://localhost/ http://example.com/ http://127.0.0.2/ http://
    http://0.0.0.0/ http://localhost.example.com/ http://[::1/ http://user@localhost/ https:///a
    http://localhost:0/ http://localhost:65536/ http://localhost:x/ http://localhost/#a https://ü/
    http://localhost/a\\b https://user:word@host/ https://host:0/ https://host:65536/ https://:443/"""
UNSEEN = ["{good} ", "\xa0{good}", "{good}\n", "a\x1bb", "a\u202eb", "{good}\u200b"]
LIKE = "should look like {} (http only on localhost; a port from 1 to 65535)"
TABLE = [
    (KEYS, ["{good}"], ""),
    (KEYS, ["", " \t", "YOUR_{key}"], "is missing or not filled in"),
    (KEYS, UNSEEN, "has a blank at one end, or a character that can't be seen"),
    (REDIRECT_URI, LOOPBACK.split(), ""),
    (REDIRECT_URI, (TLS + " " + NOWHERE).split(), LIKE.format("http://localhost:8080/oauth")),
    (ENDPOINTS, (TLS + " " + LOOPBACK).split(), ""),
    (ENDPOINTS, [*NOWHERE.split(), "https://host/a b"], LIKE.format("https://host/path")),
]


def test_a_value_works_or_is_refused_with_the_reason() -> None:
    for keys, values, said in TABLE:
        for key, value in product(keys, values):
            assert problem_with(key, value.format(key=key, good=GOOD[key])) == said, (key, value)


def test_a_missing_file_names_what_to_copy_and_the_sandbox(tmp_path: Path) -> None:
    what, advice = refusal(tmp_path / "config.env")
    assert re.findall(r"(\w+) is missing", what) == list(KEYS)
    assert f"There is no {tmp_path / 'config.env'}: copy config.example.env to it" in advice
    assert "try the sandbox" in advice


def test_a_folder_and_another_encoding_can_not_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "latin-1", tmp_path / "utf-16"):
        if path != tmp_path:
            path.write_text(lines(CLIENT_ID="Müller"), encoding=path.name)
        what, advice = refusal(path)
        assert what.startswith("Can't read the configuration: ")
        assert (
            advice == f"{path} should be a UTF-8 text of KEY=value lines, like config.example.env."
        )


def test_all_that_is_wrong_is_named_at_once_with_status_2(start: Start, file: Path) -> None:
    wrong = {"CLIENT_SECRET": "", "REDIRECT_URI": "http://localhost/a b", "AUTH_URL": ""}
    file.write_text(lines(**wrong, CLIENT_SCRT=SECRET) + f"half-{SECRET}\n{SECRET}==\n")  # no keys
    script = start(f"--config={file}")
    assert (script.status(), script.stdout) == (2, "")
    named = re.findall(r"(Error|\w+_\w+)(?:: The| is| should)", script.stderr)
    assert named == ["Error", *wrong, "CLIENT_SCRT"]
    assert f" program.\nCorrect it in {file}, or in the environment, which wins." in script.stderr
    assert SECRET not in script.stderr


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
    defaults = re.findall(r"\(default: (.+)\)\n", script.stdout)
    assert defaults == [str(ROOT / "config.env"), "open it", "300", "masked"]


@pytest.mark.parametrize(("version", "said"), [((3, 9), "3.10 or newer"), ((3, 10, 0), "Run it")])
def test_an_old_python_and_missing_packages_are_one_error_each(
    environment: dict[str, str], version: tuple[int, ...], said: str
) -> None:
    run = f"import runpy, sys; sys.version_info = {version}; runpy.run_path(sys.argv[1])"
    python = [sys.executable, "-S", "-c", run, str(SCRIPT)]  # -S: without the installed packages
    ended = subprocess.run(python, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(rf"Error: .+\n.*{said}.*\n", ended.stderr)
    # What an old Python can't read, it can't run: there, only the syntax of its time is an error.
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
