"""The README says what there is: its excerpts, names, messages and commands, against the program.

The tests cut it up by its own form: fenced blocks, headings and tables.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme
from odd_server import OddServer
from sandbox import Sandbox
from script import ROOT, Script, answer_login_page, clean_environment, free_port, log_in, visit

import sipgate_oauth

Start = Callable[..., Script]

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULE = (ROOT / "sipgate_oauth.py").read_text(encoding="utf-8")
# Fenced blocks, as (language, content), and all that is around them.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
STEPS = [
    "1. Configuration",
    "2. Authorize URL",
    "3. Callback",
    "4. Code for tokens",
    "5. Account",
    "6. Refresh",
]


def blocks(language: str, text: str = README) -> list[str]:
    return [block for name, block in BLOCKS if name == language and block in text]


def section(heading: str) -> str:
    """Return what stands between a heading and the next one of its level or above."""
    level, _, _ = heading.partition(" ")
    above = re.escape(f"\n{heading}\n") + rf"(.*?)(?=\n#{{1,{len(level)}}} |\Z)"
    (found,) = re.findall(above, README, re.DOTALL)
    return str(found)


def headings(level: str, text: str = PROSE) -> list[str]:
    return re.findall(rf"^{level} (.*)$", text, re.MULTILINE)


def rows(text: str) -> list[list[str]]:
    """Return the cells of a table, without its first two rows."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names(text: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


# --- The flow -------------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a command; at the end it is gone, and all that it has started."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        **options,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                if sys.platform == "win32":
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)


def output_of_login(command: list[str], **options: Any) -> str:
    """Run a command on the sandbox, press Allow in the browser, and return what it has printed."""
    with running(command, **options) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "response_type=code" in line:
                visit(answer_login_page(line.strip()))
        assert process.wait() == 0, lines
    return "".join(lines)


@pytest.fixture(scope="module")
def sandbox_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run on the sandbox prints."""
    command = [sys.executable, str(ROOT / "tests" / "sandbox.py"), "--no-browser"]
    return output_of_login(command, env=clean_environment(tmp_path_factory.mktemp("home")))


def settled(text: str) -> str:
    """Put aside what differs between two runs: the ports, and what is made of chance."""
    text = re.sub(r"(localhost|127\.0\.0\.1)(:|%3A)\d+", r"\1\2PORT", text)
    text = re.sub(r"\b(state|code_challenge)=[\w-]{43}(?=&)", r"\1=RANDOM", text)
    return re.sub(r"(token: )\S{6}(\.\.\. )", r"\1RANDOM\2", text)


def test_the_transcript_is_what_a_run_on_the_sandbox_prints(sandbox_run: str) -> None:
    (transcript,) = blocks("text", section("## Try it now"))
    assert settled(transcript) == settled(sandbox_run)


def test_the_steps_are_called_what_the_program_prints(sandbox_run: str) -> None:
    assert re.findall(r"^\d\. [^:]*", sandbox_run, re.MULTILINE) == STEPS
    assert headings("###", section("## How it works"))[:6] == STEPS


def test_the_steps_of_the_diagram_are_called_what_the_program_prints() -> None:
    (diagram,) = blocks("mermaid")
    assert re.findall(r": (\d\. [^:\n]*)", diagram) == STEPS


def test_the_steps_are_called_what_the_module_calls_them() -> None:
    table = re.findall(r"^(\d\. .*?)  +(\w+)  +", sipgate_oauth.__doc__ or "", re.MULTILINE)
    assert [name for name, _ in table] == STEPS
    for name, function in table:
        assert f"`{function}`" in section(f"### {name}")


# --- Excerpts -------------------------------------------------------------------------------------


def find_in(text: str, excerpt: str) -> bool:
    """Whether the parts of an excerpt between "..." stand in the text, whole lines in its order."""
    parts = [re.escape(part) for part in re.split(r"^ *\.\.\.\n", excerpt, flags=re.MULTILINE)]
    return re.search("^" + "(?:.*\n)*?".join(parts), text, re.MULTILINE) is not None


@pytest.mark.parametrize("excerpt", blocks("python"))
def test_each_excerpt_stands_in_the_module_to_the_letter(excerpt: str) -> None:
    assert find_in(MODULE, excerpt)


@pytest.mark.parametrize("step", STEPS)
def test_each_step_has_an_excerpt_from_its_own_part_of_the_module(step: str) -> None:
    part = MODULE.split(f"# --- {step} -")[1].split("\n# --- ")[0]
    excerpts = blocks("python", section(f"### {step}"))
    assert excerpts
    assert any(find_in(part, excerpt) for excerpt in excerpts)


# --- Names ----------------------------------------------------------------------------------------


def test_the_options_are_those_of_the_program(start: Start) -> None:
    script = start("--help")
    assert script.status() == 0
    option = r"(?<![\w-])--[a-z][a-z-]*"
    there_are = set(re.findall(option, script.stdout))
    assert {name for row in rows(section("## Run it")) for name in re.findall(option, row[0])} == (
        there_are
    )
    assert set(re.findall(option, README)) == there_are


def test_the_time_out_has_the_default_that_its_help_says(start: Start) -> None:
    script = start("--help")
    assert script.status() == 0
    assert "(default: 300)" in script.stdout
    assert ["`--timeout SECONDS`", "300"] in [row[::2] for row in rows(section("## Run it"))]


def test_the_keys_are_those_of_the_program() -> None:
    keys = [name for row in rows(section("## Configuration")) for name in names(row[0])]
    assert keys == list(sipgate_oauth.KEYS)


def test_no_other_key_is_named() -> None:
    variables = {"HTTPS_PROXY", "REQUESTS_CA_BUNDLE"}  # these are read by requests
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", PROSE))
    assert named == {*sipgate_oauth.KEYS, *variables}


def source_of_tests(file: str) -> dict[str, str]:
    """Return the source of each test in a file."""
    source = (ROOT / file).read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    sources = {node.name: ast.get_source_segment(source, node) or "" for node in functions}
    return {name: text for name, text in sources.items() if name.startswith("test_")}


@pytest.mark.parametrize("row", rows(section("## Security")), ids=lambda row: row[0])
def test_each_row_on_security_names_functions_and_tests_that_exist(row: list[str]) -> None:
    requirement, answer, tests = row
    assert re.search(r"(8252|9700|7636|6750).*[\d.]+", requirement)
    functions = [name for name in names(answer) if re.fullmatch(r"[A-Za-z_.]+", name)]
    assert functions
    for name in functions:
        assert callable(attrgetter(name)(sipgate_oauth))
    links = re.findall(r"\[`(\w+)`\]\((tests/\w+\.py)\)", tests)
    assert links
    for name, file in links:
        assert name in source_of_tests(file)


def test_the_licenses_are_those_that_the_libraries_state() -> None:
    stated = {}
    for library in (ROOT / "requirements.txt").read_text(encoding="utf-8").split():
        name = re.split("[<>=]", library)[0]
        metadata = importlib.metadata.metadata(name)
        key = "License-Expression" if "License-Expression" in metadata else "License"
        stated[name] = metadata[key]
    named = re.findall(r"\[([\w-]+)\]\(\S+\) \(([\w.-]+)\)", section("### License"))
    assert dict(named) == stated


# --- Links ----------------------------------------------------------------------------------------

LINKS = re.findall(r"\]\(([^)\s]+)\)|<(https:[^>\s]+)>", PROSE)
TARGETS = sorted({inline or bare for inline, bare in LINKS})


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("target", [link for link in TARGETS if not link.startswith("https:")])
def test_each_link_to_this_repository_leads_somewhere(target: str) -> None:
    path, _, fragment = target.partition("#")
    assert (ROOT / path).exists()
    if not path:
        anchors = [anchor(heading) for heading in headings("##*")]
        assert anchors.count(fragment) == 1


@pytest.mark.parametrize(
    "url",
    [
        "https://oauth.net",
        "https://oauth.net/code/",
        *(f"https://www.rfc-editor.org/rfc/rfc{number}" for number in (6749, 7636, 8252, 9700)),
        "https://console.sipgate.com",
        "https://developer.sipgate.io/rest-api/oauth2-scopes/",
        "https://api.sipgate.com/v2/doc",
    ],
)
def test_the_places_to_read_on_are_linked(url: str) -> None:
    assert url in TARGETS


# --- Common issues --------------------------------------------------------------------------------

# What a person sees, which is the heading, and the test that makes them see it.
ISSUES = {
    "State in the callback does not match the state in the original request.": (
        "test_a_callback_from_an_old_tab_shows_this"
    ),
    "Can't listen on port 8080 of 127.0.0.1: Address already in use.": (
        "test_a_port_in_use_shows_this"
    ),
    "Can't listen on port 80 of 127.0.0.1: Permission denied.": (
        "test_a_privileged_port_shows_this"
    ),
    "Invalid parameter: redirect_uri": "test_keycloak_shows_this_and_the_time_out_explains_it",
    "Client not found": "test_keycloak_shows_this_and_the_time_out_explains_it",
    "Invalid client or Invalid client credentials": "test_a_wrong_secret_shows_this",
    "The login was refused: invalid_scope": "test_an_unknown_scope_shows_this",
    "invalid_grant: Code not valid.": "test_a_code_that_is_too_old_shows_this",
    "No callback came in 300 seconds.": "test_a_login_that_takes_too_long_shows_this",
    "certificate verify failed: unable to get local issuer certificate": (
        "test_a_certificate_of_an_unknown_authority_shows_this"
    ),
}


@pytest.fixture
def message(request: pytest.FixtureRequest) -> str:
    """The message that the test is there for."""
    (text,) = [text for text, test in ISSUES.items() if test == request.node.name]
    return text


def test_each_common_issue_has_a_test_that_provokes_it() -> None:
    assert headings("###", section("## Common issues")) == [f"`{text}`" for text in ISSUES]
    assert set(ISSUES.values()) <= globals().keys()


@pytest.mark.parametrize("text", ["Invalid parameter: redirect_uri", "Client not found"])
def test_keycloak_shows_this_and_the_time_out_explains_it(text: str) -> None:
    """In a test with a real browser, as it stays there."""
    tests = source_of_tests("tests/test_keycloak.py").values()
    (test,) = [test for test in tests if f'get_by_text("{text}")).to_be_visible()' in test]
    (explanation,) = re.findall(rf"'(\"{text}\": [^']+)' in script.stderr", test)
    assert explanation in sipgate_oauth.TIMEOUT_ADVICE


def test_a_callback_from_an_old_tab_shows_this(
    sandbox: Sandbox, start: Start, message: str
) -> None:
    script = start(**sandbox.environment)
    script.url()
    visit(f"{sandbox.environment['REDIRECT_URI']}?code=old&state=old")
    script.until(message, in_stderr=True)
    log_in(script)  # it is still waiting
    assert script.status() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other words for it.")
def test_a_port_in_use_shows_this(sandbox: Sandbox, start: Start, message: str) -> None:
    start(**sandbox.environment).url()  # from here on it listens
    second = start(**sandbox.environment)
    assert second.status() == 1
    port = urlsplit(sandbox.environment["REDIRECT_URI"]).port
    assert message.replace("8080", str(port)) in second.stderr


# Runs the script without the privileges of root, who may use each port.
UNPRIVILEGED = """
import ctypes, runpy, sys
version_3 = (ctypes.c_uint32 * 2)(0x20080522)
assert ctypes.CDLL(None).capset(version_3, (ctypes.c_uint32 * 6)()) == 0
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def privileged_ports() -> int:
    """Return how many ports are kept for the administrator, from 0 on."""
    file = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(file.read_text()) if file.exists() else 0


@pytest.mark.skipif(privileged_ports() <= 80, reason="Here, anybody may listen on port 80.")
def test_a_privileged_port_shows_this(sandbox: Sandbox, start: Start, message: str) -> None:
    variables = sandbox.environment | {"REDIRECT_URI": "http://localhost/oauth"}
    script = start(python=("-c", UNPRIVILEGED), **variables)
    assert script.status() == 1
    assert message in script.stderr


def test_a_wrong_secret_shows_this(sandbox: Sandbox, start: Start, message: str) -> None:
    script = start(**sandbox.environment | {"CLIENT_SECRET": "wrong"})
    log_in(script)
    assert script.status() == 1
    assert message in script.stderr


def test_an_unknown_scope_shows_this(sandbox: Sandbox, start: Start, message: str) -> None:
    script = start(**sandbox.environment | {"OAUTH_SCOPE": "unknown:read"})
    visit(script.url())  # which leads straight back
    assert script.status() == 1
    assert message in script.stderr


def test_a_code_that_is_too_old_shows_this(start: Start, message: str) -> None:
    redirect_uri = f"http://localhost:{free_port()}/oauth"
    with Sandbox(redirect_uri, port=0, code_lifetime=0) as sandbox:
        script = start(**sandbox.environment)
        log_in(script)
        assert script.status() == 1
        assert message in script.stderr


def test_a_login_that_takes_too_long_shows_this(
    sandbox: Sandbox, start: Start, message: str
) -> None:
    script = start("--timeout", "0.1", **sandbox.environment)
    assert script.status() == 1
    assert message.replace("300", "0.1") in script.stderr


def test_a_certificate_of_an_unknown_authority_shows_this(start: Start, message: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with OddServer(context) as server:
        script = start(**server.environment)
        visit(f"{server.environment['REDIRECT_URI']}?code=code&state={script.state()}")
        assert script.status() == 1
        assert message in script.stderr


# --- The commands ---------------------------------------------------------------------------------

FOR_THE_SANDBOX, FOR_THE_TESTS = [block.strip() for block in blocks("sh") if "&&" in block]
A_TEST = "test_a_login_shows_the_account_twice_and_ends_well"

runs_sh = pytest.mark.skipif(sys.platform == "win32", reason="They are for Linux and macOS.")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a clone would have, together with what is not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("This is no clone, so there is nothing to ask git.")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def environment_of_a_person() -> dict[str, str]:
    """The environment, with what pip needs in it, without what belongs to the running tests."""
    ours = ("COV", "PYTEST", "PYTHON")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    return {**kept, "BROWSER": "true"}  # a browser that does nothing


@runs_sh
@pytest.mark.timeout(600)  # it downloads packages
def test_the_command_for_the_sandbox_leads_to_a_login(clone: Path) -> None:
    environment = environment_of_a_person()
    output = output_of_login(["sh", "-c", FOR_THE_SANDBOX], cwd=clone, env=environment)
    assert output.count('"company"') == 2


@runs_sh
@pytest.mark.timeout(600)
def test_the_command_for_the_tests_runs_them(clone: Path) -> None:
    """One of them, that is: with all, it would run itself."""
    environment = {**environment_of_a_person(), "PYTEST_ADDOPTS": f"-k {A_TEST}"}
    with running(["sh", "-c", FOR_THE_TESTS], cwd=clone, env=environment) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    assert re.search(r"\b1 passed, \d+ deselected", output)


def test_the_commands_for_windows_are_the_same_in_powershell() -> None:
    replaced = {"python3": "py", " &&": ";", ".venv/bin/": ".venv\\Scripts\\"}
    commands = []
    for command in (FOR_THE_SANDBOX, FOR_THE_TESTS):
        for here, there in replaced.items():
            command = command.replace(here, there)
        commands.append(f"{command}\n")
    assert blocks("powershell") == commands
