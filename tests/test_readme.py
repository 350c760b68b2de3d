"""The documents say what there is: commands, changes, excerpts, messages, names and links."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
from keycloak import Keycloak
from odd_server import OddServer
from odd_server import log_in as log_in_at
from providers import Provider
from providers import log_in as log_in_with_forms
from sandbox import Sandbox
from script import ROOT, SCRIPT, Script, log_in
from test_sandbox import EXPLANATIONS, REDIRECT_URI, Program, make_mistake

import sipgate_oauth
from sipgate_oauth import KEYS, problem_with

Start = Callable[..., Script]
posix = pytest.mark.skipif(sys.platform == "win32", reason="this is for Linux and macOS")


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


DOCUMENTS = ["README.md", ".github/SECURITY.md", ".github/CONTRIBUTING.md"]
README, MODULE = read("README.md"), read("sipgate_oauth.py")
PROGRAMS = MODULE + read("tests/sandbox.py") + read("tests/web_application.py")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


def block(language: str, text: str) -> str:
    """Return the only block in this language that contains a text."""
    (found,) = [content for name, content in BLOCKS if name == language and text in content]
    return str(found)


def section(heading: str) -> str:
    """Return the text between a heading and the next one."""
    return PROSE.split(f"\n{heading}\n")[1].split("\n#")[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, without their heads."""
    lines = re.findall(r"(?<!\n\n)^\| (?!-)(.*) \|$", f"\n{text}", re.MULTILINE)
    return [line.split(" | ") for line in lines]


def code(text: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


# --- Commands -------------------------------------------------------------------------------------

FOR_THE_SANDBOX = block("sh", "requirements-sandbox.txt")
FOR_THE_TESTS = block("sh", "-m pytest")
# A browser that clicks Allow. (It has no colon in it, because $BROWSER is a list with colons.)
BROWSER = f"""import sys
sys.path += {[str(ROOT), str(ROOT / "tests")]}
from script import answer_login_page, visit
visit(answer_login_page(sys.argv[1]))"""
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone of git")


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as it is written, and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTHON"))}
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )


@posix
@needs_git
@pytest.mark.timeout(600)  # seconds: it downloads packages
def test_clone_and_first_command_end_with_a_login(tmp_path: Path) -> None:
    clone = block("sh", "git clone").replace(" URL ", f" {shlex.quote(str(ROOT))} ")
    cloned = shell(f"{clone.strip()} && pwd", tmp_path)
    folder = Path(cloned.stdout.splitlines()[-1])
    browser = shlex.join([sys.executable, "-c", BROWSER, "%s"])
    ended = shell(FOR_THE_SANDBOX, folder, BROWSER=browser)
    if "connection broken by" in ended.stderr:
        pytest.skip("no network: pip cannot connect to its index")
    assert ended.returncode == 0, ended.stderr
    assert "\nDone: " in ended.stdout


@posix
def test_the_copy_of_the_example_is_only_for_its_owner(tmp_path: Path) -> None:
    shutil.copy(ROOT / "config.example.env", tmp_path)
    assert shell(block("sh", "umask"), tmp_path).returncode == 0
    copy = tmp_path / "config.env"
    assert copy.read_text(encoding="utf-8") == read("config.example.env")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_the_commands_for_windows_and_ci_are_the_same() -> None:
    command = FOR_THE_SANDBOX.replace("python3", "py").replace(" &&", ";")
    assert command.replace(".venv/bin/", ".venv\\Scripts\\") == block("powershell", "py -m")
    assert FOR_THE_TESTS in read(".github/workflows/ci.yml")


def test_each_option_is_one_of_the_programs(start: Start) -> None:
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PROSE))
    helps = [start("--help", path=ROOT / path) for path in (SCRIPT, "tests/sandbox.py")]
    helps.append(start("--help", path=ROOT / "tests/web_application.py"))
    assert [script.status() for script in helps] == [0, 0, 0]
    assert options <= set(re.findall(r"--[a-z-]+", "".join(script.stdout for script in helps)))


@posix
def test_the_exit_statuses_are_those_of_the_program(server: OddServer, start: Start) -> None:
    login = start(**server.environment)
    log_in_at(login, server)
    success = login.status()
    interrupted = start(**server.environment)
    interrupted.until("3. Callback")
    interrupted.interrupt()
    statuses = [
        success,
        start("--timeout=0.1", **server.environment).status(),
        start("--no-such-option").status(),
        128 - interrupted.status(),  # as a shell has it
    ]
    told = r"(\d) after a login, (\d) if it failed, (\d) for a wrong option, and (\d+) after Ctrl"
    assert re.findall(told, " ".join(PROSE.split())) == [tuple(map(str, statuses))]


# --- Changes, and excerpts ------------------------------------------------------------------------

NEXT_REQUEST = block("python", "/v2/balance")


def test_each_excerpt_stands_in_the_program_to_the_letter() -> None:
    excerpts = [content for name, content in BLOCKS if name == "python"]
    assert [it for it in excerpts if f"\n{it}" not in PROGRAMS] == [NEXT_REQUEST]


def test_the_next_request_works_after_step_5(
    start: Start, sandbox: Sandbox, tmp_path: Path
) -> None:
    url = sandbox.environment["TEST_API_ENDPOINT"]
    request = NEXT_REQUEST.replace("https://api.sipgate.com/v2/balance", url)
    after = re.search(r"^ +get_account\(.*\n", MODULE, re.MULTILINE)
    assert after
    changed = MODULE[: after.end()] + request + MODULE[after.end() :]
    (tmp_path / "changed.py").write_text(changed, encoding="utf-8")
    script = start(path=tmp_path / "changed.py", **sandbox.environment)
    log_in(script)
    assert script.status() == 0
    assert script.stdout.count(f"Program: GET {url}") == 3


@posix
@needs_git
def test_the_change_for_http_basic_works(
    start: Start, oidc_provider: Provider, tmp_path: Path
) -> None:
    for file in ("README.md", SCRIPT.name):
        shutil.copy(ROOT / file, tmp_path)
    applied = shell(f"git init -q && {block('sh', 'git apply')}", tmp_path)
    assert (applied.returncode, applied.stderr) == (0, "")
    script = start(path=tmp_path / SCRIPT.name, **oidc_provider("HTTP Basic"))
    log_in_with_forms(script)
    assert (script.status(), script.stderr) == (0, "")


# --- Logging out ----------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    "at", ["sandbox", pytest.param("keycloak", marks=pytest.mark.xdist_group("keycloak"))]
)
def test_the_command_logs_out(request: pytest.FixtureRequest, tmp_path: Path, at: str) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl: install it")
    server: Sandbox | Keycloak = request.getfixturevalue(at)
    config = server.environment if isinstance(server, Sandbox) else server.environment(REDIRECT_URI)
    program = Program(config)
    refresh_token = program.exchange().json()["refresh_token"]
    command = block("sh", "logout").replace("curl ", "curl --silent --show-error --noproxy '*' ")
    ended = shell(command, tmp_path, REFRESH_TOKEN=refresh_token, **config)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert program.refresh().json()["error"] == "invalid_grant"


# --- Messages, names and links --------------------------------------------------------------------

# What others say: Python, the operating system, OpenSSL, and sipgate's example
OF_OTHERS = {
    *("No module named 'requests'", "certificate verify failed", "invalid client_secret"),
    *("Address already in use", "Permission denied", "Errno 98", "Errno 48", "Errno 13"),
}


def test_each_message_is_one_of_the_program() -> None:
    messages = {span for row in rows(section("### Common issues")) for span in code(row[0])}
    assert {it for it in messages if re.sub(r"\d+$", "", it) not in MODULE} == OF_OTHERS


def test_each_name_is_one_of_the_programs() -> None:
    names = {span for span in code(PROSE) if re.fullmatch(r"[a-z]+(_[a-z]+)+|[A-Z]+_[A-Z_]+", span)}
    known = PROGRAMS + read("tests/test_web_application.py") + read("config.example.env")
    of_others = {"NEO_PBX", "authorization_endpoint", "token_endpoint"}  # of sipgate and OpenID
    assert {name for name in names if name not in known} == of_others
    assert len(names) > 10


def test_the_sandbox_explains_mistakes_as_the_table_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Sandbox(REDIRECT_URI, port=0, log=True) as sandbox:
        for steps, changes, _ in EXPLANATIONS:
            make_mistake(sandbox.environment, steps, changes)
    printed = capsys.readouterr().out
    messages = [code(row[1])[0] for row in rows(section("### Check your own login"))]
    assert len(messages) == 3
    assert [it for it in messages if it not in printed] == []


def test_the_values_for_other_providers_are_accepted() -> None:
    keys = {
        key: row[1:] for row in rows(section("### At another provider")) for key in code(row[0])
    }
    assert set(keys) == set(KEYS)
    for key in KEYS[2:]:
        for value in keys[key]:
            assert problem_with(key, *code(value)) == ""


def test_each_row_on_security_names_functions_and_tests_that_exist() -> None:
    table = rows(read(".github/SECURITY.md"))
    assert len(table) > 10
    for requirement, answer, tests in table:
        assert re.search(r"\((6749|6750|7636|8252|9700): [\d.]+", requirement)
        for name in code(answer):
            assert callable(attrgetter(name)(sipgate_oauth))
        links = re.findall(r"\[`(\w+)`\]\(\.\./(tests/\w+\.py)\)", tests)
        assert links
        for name, file in links:
            assert f"\ndef {name}(" in read(file)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_link_to_this_repository_leads_somewhere(document: str) -> None:
    for path, fragment in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", read(document)):
        if path.startswith("../../actions/"):
            path = f".github/{path.removeprefix('../../actions/').removesuffix('/badge.svg')}"
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists()
        if fragment:
            heading = fragment.replace("-", r"\W+")
            assert re.search(f"^#+ {heading}$", read(str(file)), re.MULTILINE | re.IGNORECASE)
