"""What the repository holds, and what the module is made of."""

import ast
import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from sandbox import Sandbox
from script import ROOT, SCRIPT, Script, log_in

import sipgate_oauth

TESTS = ROOT / "tests"
MODULE = ast.parse(SCRIPT.read_text(encoding="utf-8"))

# The words of the standard text up to "For more information", as SPDX lists it.
UNLICENSE_SHA256 = "e2c5644461045e755593c4ab9cfc34df63361a469ea7ed4b872a9d7798ebffdb"


def git(*arguments: str) -> list[str]:
    """Return the lines that a git command prints, or skip the test outside of a clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone, so there is nothing to ask git")
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


# --- The repository -------------------------------------------------------------------------------


def test_the_top_level_holds_nothing_else() -> None:
    allowed = {
        "sipgate_oauth.py",
        "config.example.env",
        "requirements.txt",
        "tests",
        "README.md",
        "LICENSE",
    }
    names = {path.partition("/")[0] for path in git("ls-files")}
    assert SCRIPT.name in names
    assert {name for name in names if not name.startswith(".")} <= allowed


def test_git_ignores_the_configuration_and_not_the_example() -> None:
    assert git("check-ignore", "--no-index", "config.env", "config.example.env") == ["config.env"]


def test_the_license_is_the_unlicense() -> None:
    text, _, last = (ROOT / "LICENSE").read_text(encoding="utf-8").partition("For more information")
    words = " ".join(text.split())
    assert words.startswith(
        "This is free and unencumbered software released into the public domain."
    )
    assert hashlib.sha256(words.encode()).hexdigest() == UNLICENSE_SHA256
    assert re.fullmatch(r", please refer to <https?://unlicense\.org/?>\s*", last)


# --- Packages -------------------------------------------------------------------------------------


def required_by(file: Path) -> list[str]:
    """Return what a requirements file lists itself, sorted."""
    stated = (line.partition("#")[0].strip() for line in file.read_text("utf-8").splitlines())
    return sorted(line for line in stated if line and not line.startswith("-r"))


def script_block(file: Path) -> dict[str, str]:
    """Return the keys and values of the block of PEP 723 that a file begins with, as TOML."""
    block = re.match(r"# /// script\n((?:#(?:| .*)\n)+?)# ///\n", file.read_text("utf-8"))
    assert block, f"{file} does not begin with a block"
    toml = re.sub(r"^# ?", "", block[1], flags=re.MULTILINE)
    return dict(re.findall(r"^([\w-]+) = ((?:.|\n )+(?:\n\])?)$", toml, re.MULTILINE))


def dependencies_of(file: Path) -> list[str]:
    """Return the dependencies in the block of PEP 723, sorted."""
    found: list[str] = ast.literal_eval(script_block(file)["dependencies"])
    return sorted(found)


def test_the_block_of_the_script_has_the_packages_of_the_requirements_file() -> None:
    assert dependencies_of(SCRIPT) == required_by(ROOT / "requirements.txt")


def test_the_block_of_the_sandbox_has_the_packages_of_the_requirements_files() -> None:
    files = (ROOT / "requirements.txt", TESTS / "requirements-sandbox.txt")
    packages = sorted(package for file in files for package in required_by(file))
    assert dependencies_of(TESTS / "sandbox.py") == packages


@pytest.mark.parametrize("file", [SCRIPT, TESTS / "sandbox.py"], ids=lambda file: file.name)
def test_each_block_asks_for_python_3_10_or_newer(file: Path) -> None:
    assert script_block(file)["requires-python"] == '">=3.10"'


def test_the_script_needs_two_packages_each_in_a_compatible_range() -> None:
    dotenv, requests = required_by(ROOT / "requirements.txt")
    assert re.fullmatch(r"python-dotenv>=\d[\d.]*,<\d+", dotenv)
    assert re.fullmatch(r"requests>=\d[\d.]*,<\d+", requests)


def test_the_requirements_of_the_tests_include_those_of_the_sandbox_and_of_the_script() -> None:
    includes = [
        (file, line)
        for file in ("requirements.txt", "requirements-sandbox.txt")
        for line in (TESTS / file).read_text("utf-8").splitlines()
        if line.startswith("-r")
    ]
    assert includes == [
        ("requirements.txt", "-r requirements-sandbox.txt"),
        ("requirements-sandbox.txt", "-r ../requirements.txt"),
    ]


def test_the_module_imports_the_standard_library_and_its_two_packages() -> None:
    imported = set()
    for node in ast.walk(MODULE):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"requests", "dotenv"}


def test_the_module_asserts_nothing() -> None:
    """Under python -O, an assert statement checks nothing."""
    assert not [node.lineno for node in ast.walk(MODULE) if isinstance(node, ast.Assert)]


# --- The table of contents ------------------------------------------------------------------------


def contents() -> list[tuple[str, str, str]]:
    """Return the number, the name and the function of each step in the module's docstring."""
    found = re.findall(r"^(\d)\. (\S+(?: \S+)*)  +(\w+)  +\S", sipgate_oauth.__doc__ or "", re.M)
    assert len(found) == 6
    return found


def banners() -> list[tuple[str, str]]:
    """Return the number and the name of each numbered section of the module."""
    return re.findall(r"^# --- (\d)\. (.+?) -+$", SCRIPT.read_text("utf-8"), re.MULTILINE)


def test_the_sections_are_the_steps_of_the_docstring() -> None:
    assert banners() == [(number, name) for number, name, _ in contents()]


def test_the_printed_steps_are_the_steps_of_the_docstring(
    sandbox: Sandbox, start: Callable[..., Script]
) -> None:
    script = start(**sandbox.environment)
    log_in(script)
    assert script.status() == 0
    printed = re.findall(r"^(\d)\. (.+?):", script.stdout, re.MULTILINE)
    assert printed == [(number, name) for number, name, _ in contents()]


def test_the_function_of_each_step_stands_in_its_section() -> None:
    sections = re.split(r"^# --- (?:\d\. )?", SCRIPT.read_text("utf-8"), flags=re.MULTILINE)
    for _, name, function in contents():
        [section] = [text for text in sections if text.startswith(f"{name} -")]
        assert f"\ndef {function}(" in section


# --- Challenge and URL ----------------------------------------------------------------------------


def test_the_challenge_is_the_one_of_rfc_7636_appendix_b() -> None:
    octets = bytes(
        [116, 24, 223, 180, 151, 153, 224, 37, 79, 250, 96, 125, 216, 173, 187, 186]
        + [22, 212, 37, 77, 105, 214, 191, 240, 91, 88, 5, 88, 83, 132, 141, 121]
    )
    verifier = base64.urlsafe_b64encode(octets).rstrip(b"=").decode()
    assert verifier == "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    challenge = sipgate_oauth.code_challenge_for(verifier)
    assert challenge == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def authorize_url(**changes: str) -> str:
    config = {
        "CLIENT_ID": "client",
        "CLIENT_SECRET": "the-secret-of-this-test",
        "OAUTH_SCOPE": "account:read",
        "REDIRECT_URI": "http://localhost:8080/oauth",
        "AUTH_URL": "https://login.example.com/auth",
    }
    return sipgate_oauth.authorize_url({**config, **changes}, "a-state", "a-challenge")


def test_the_authorize_url_asks_for_a_code_with_state_and_pkce() -> None:
    assert parse_qs(urlsplit(authorize_url()).query, strict_parsing=True) == {
        "response_type": ["code"],
        "client_id": ["client"],
        "redirect_uri": ["http://localhost:8080/oauth"],
        "scope": ["account:read"],
        "state": ["a-state"],
        "code_challenge": ["a-challenge"],
        "code_challenge_method": ["S256"],
    }


@pytest.mark.parametrize("query", ["?a=b", "?a=b&a=c", "?a=b%20c+d&e", "?", "?a=/b?c"])
def test_the_query_of_auth_url_stays_as_it_is(query: str) -> None:
    auth_url = f"https://login.example.com/auth{query}"
    url = authorize_url(AUTH_URL=auth_url)
    assert url.startswith(auth_url)
    added = parse_qs(url.removeprefix(auth_url), keep_blank_values=True)
    parameters = parse_qs(urlsplit(url).query, keep_blank_values=True)
    own = parse_qs(query[1:], keep_blank_values=True)
    assert parameters == {**own, **added}
    assert added["client_id"] == ["client"]


@pytest.mark.parametrize("scope", ["account:read", "account:read users:read", "a b c"])
def test_one_or_several_scopes_are_sent_separated_by_spaces(scope: str) -> None:
    parameters = parse_qs(urlsplit(authorize_url(OAUTH_SCOPE=scope)).query)
    assert parameters["scope"] == [scope]


def test_no_character_of_a_client_id_gets_lost_in_the_url() -> None:
    client_id = "50% schön & more + #1 = ?/"
    parameters = parse_qs(urlsplit(authorize_url(CLIENT_ID=client_id)).query)
    assert parameters["client_id"] == [client_id]


def test_the_client_secret_is_not_in_the_url() -> None:
    assert "secret" not in authorize_url()
