"""The documentation says what there is: commands, output, code, names, messages and links."""

import ast
import errno
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
from odd_server import OddServer
from odd_server import log_in as log_in_at
from providers import Provider
from providers import log_in as log_in_with_forms
from sandbox import Sandbox
from script import ROOT, Script
from test_sandbox import EXPLANATIONS, REDIRECT_URI, make_mistake

import sipgate_oauth
from sipgate_oauth import KEYS, problem_with

Start = Callable[..., Script]
posix = pytest.mark.skipif(sys.platform == "win32", reason="this is for Linux and macOS")


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


DOCUMENTS = ["README.md", ".github/SECURITY.md", ".github/CONTRIBUTING.md"]
README, MODULE, SANDBOX = map(read, ["README.md", "sipgate_oauth.py", "tests/sandbox.py"])
WEB_APPLICATION = read("tests/web_application.py")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
STEPS = dict(re.findall(r"^(\d\. .*?)  +(\w+)  +", sipgate_oauth.__doc__ or "", re.MULTILINE))


def blocks(language: str) -> list[str]:
    return [block for name, block in BLOCKS if name == language]


def section(heading: str) -> str:
    """Return the text between a heading and the next one."""
    return PROSE.split(f"\n{heading}\n")[1].split("\n#")[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, without their heads."""
    lines = re.findall(r"(?<!\n\n)^\| (?!---)(.*) \|$", f"\n{text}", re.MULTILINE)
    return [line.split(" | ") for line in lines]


def code(text: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


# --- Commands -------------------------------------------------------------------------------------

FOR_THE_SANDBOX, FOR_THE_TESTS = [
    block for block in blocks("sh") if "&&" in block and "pip" in block
]
(COPY,) = [block for block in blocks("sh") if "cp " in block]
# A browser that presses Allow. (It has no colon in it, because $BROWSER is a list with colons.)
BROWSER = f"""import sys
sys.path += {[str(ROOT), str(ROOT / "tests")]}
from script import answer_login_page, visit
visit(answer_login_page(sys.argv[1]))"""


def settled(text: str) -> list[str]:
    """Return the lines, without what differs between two runs: ports, and what is random."""
    text = re.sub(r"(localhost|127\.0\.0\.1)(:|%3A)\d+", r"\1", text)
    text = re.sub(r"[\w.-]+\.\.\. \(\d+ characters\)", "MASKED", text)
    return re.sub(r"(?<![\w-])[\w-]{32,}(?![\w-])", "RANDOM", text).splitlines()


@posix
@pytest.mark.timeout(600)  # it downloads packages
def test_the_first_command_prints_what_the_steps_show(tmp_path: Path) -> None:
    clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTHON"))}
    environment = {**kept, "BROWSER": shlex.join([sys.executable, "-c", BROWSER, "%s"])}
    command, null = ["sh", "-c", FOR_THE_SANDBOX], subprocess.DEVNULL
    output = subprocess.check_output(command, cwd=clone, env=environment, stdin=null).decode()
    printed = settled(output)
    assert len(blocks("text")) == len(STEPS)
    for block in blocks("text"):
        shown = settled(block)
        first = printed.index(shown[0])
        assert printed[first : first + len(shown)] == shown
    # The README says that the rest looks like steps 4 and 5.
    assert output.count('"refresh_token"') == output.count('"company"') == 2


@posix
def test_the_copy_of_the_example_is_only_for_its_owner(tmp_path: Path) -> None:
    shutil.copy(ROOT / "config.example.env", tmp_path)
    subprocess.run(["sh", "-c", COPY], cwd=tmp_path, check=True)
    copy = tmp_path / "config.env"
    assert copy.read_text(encoding="utf-8") == read("config.example.env")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_the_commands_for_windows_and_ci_are_the_same() -> None:
    command = FOR_THE_SANDBOX.replace("python3", "py").replace(" &&", ";")
    assert blocks("powershell") == [command.replace(".venv/bin/", ".venv\\Scripts\\")]
    assert FOR_THE_TESTS in read(".github/workflows/ci.yml")


def test_the_options_are_those_of_the_program(start: Start) -> None:
    script = start("--help")
    assert script.status() == 0
    option = r"(?<![\w-])--[a-z][a-z-]*"
    options = set(re.findall(option, script.stdout)) - {"--help"}
    run_it = section("## Run it")
    table = {name: row for row in rows(run_it) for name in re.findall(option, row[0])}
    assert set(table) == options
    assert set(re.findall(option, README)) == options | {"--serve", "--port"}
    assert f"(default: {table['--timeout'][2]})" in script.stdout


@posix
def test_the_exit_statuses_are_those_of_the_program(server: OddServer, start: Start) -> None:
    login = start(**server.environment)
    log_in_at(login, server)
    success = login.status()
    interrupted = start(**server.environment)
    interrupted.until("3. Callback")
    interrupted.interrupt()
    seen = {
        "success": success,
        "you pressed Ctrl+C": 128 - interrupted.status(),  # as a shell says it
        "the login failed": start("--timeout=0.1", **server.environment).status(),
        "an option or the configuration is wrong": start("--no-such-option").status(),
    }
    table = {row[1]: int(row[0]) for row in rows(section("## Run it")) if row[0].isdigit()}
    assert table == seen


# --- Code -----------------------------------------------------------------------------------------

EXCERPTS = [block for block in blocks("python") if "quote_plus" not in block]
(HTTP_BASIC,) = [block for block in blocks("python") if "quote_plus" in block]


def test_each_excerpt_stands_in_the_program_to_the_letter() -> None:
    sources = MODULE + WEB_APPLICATION
    assert [excerpt for excerpt in EXCERPTS if f"\n{excerpt}" not in sources] == []


def without(source: str, *lines: str) -> str:
    """Remove all lines of the forms that begin so. (The authorize URL is not a form.)"""
    before, form, after = source.partition("def exchange_code(")
    for line in lines:
        after, count = re.subn(rf'^ +"{line}": .*\n', "", after, flags=re.MULTILINE)
        assert count == 2
    return before + form + after


def test_the_change_for_http_basic_works(
    start: Start, oidc_provider: Provider, tmp_path: Path
) -> None:
    source = without(MODULE, "client_id", "client_secret")
    imports = "from urllib.parse import "
    assert imports in source
    source = source.replace(imports, f"{imports}quote_plus, ")
    call = r"^ +response = request_json\(session.*\n"
    source, count = re.subn(call, lambda _: HTTP_BASIC, source, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "changed.py").write_text(source, encoding="utf-8")
    script = start(path=tmp_path / "changed.py", **oidc_provider("HTTP Basic"))
    log_in_with_forms(script)
    assert (script.status(), script.stderr) == (0, "")


def test_the_change_for_a_public_client_works(
    start: Start, oidc_provider: Provider, tmp_path: Path
) -> None:
    removed = '"CLIENT_SECRET", '
    assert f"`{removed}`" in README
    source = without(MODULE, "client_secret").replace(
        f'CLIENT_KEYS = ("CLIENT_ID", {removed}', 'CLIENT_KEYS = ("CLIENT_ID", '
    )
    (tmp_path / "changed.py").write_text(source, encoding="utf-8")
    script = start(path=tmp_path / "changed.py", **oidc_provider("public"))
    log_in_with_forms(script)
    assert (script.status(), script.stderr) == (0, "")


# --- Names and messages ---------------------------------------------------------------------------


def test_the_six_steps_have_the_names_and_functions_of_the_module() -> None:
    headings = re.findall(r"^### (\d\. .*)$", README, re.MULTILINE)
    assert headings == re.findall(r": (\d\. [^:\n]*)", blocks("mermaid")[0]) == list(STEPS)
    for name, function in STEPS.items():
        assert f"`{function}`" in section(f"### {name}")


def test_the_keys_are_those_of_the_program() -> None:
    assert [code(row[0])[0] for row in rows(section("## Configuration"))] == list(KEYS)


def test_the_examples_of_other_providers_can_work() -> None:
    table = {cells[0]: cells[1:] for cells in rows(section("### Another provider"))}
    for key in KEYS[2:]:
        assert [problem_with(key, code(value)[0]) for value in table[f"`{key}`"]] == ["", "", ""]


def pattern(node: ast.expr) -> str:
    """Return a regular expression for a text in the source, in which values may be anything."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value.removeprefix("   "))
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern, node.values))
    if isinstance(node, ast.FormattedValue) and ast.unparse(node.value).endswith(".strerror"):
        return "|".join(["(?:", *(re.escape(os.strerror(it)) for it in errno.errorcode), ")"])
    return ".+"


TEXTS = [
    text
    for source in (MODULE, SANDBOX)
    for node in ast.walk(ast.parse(source))
    if isinstance(node, (ast.Constant, ast.JoinedStr))
    and len((text := pattern(node)).replace(".+", "")) > 20  # more than a few words in common
]
# What others say or understand: the program does not contain it.
OF_OTHERS = {
    *("No module named 'requests'", "externally-managed-environment"),  # Python and pip
    "certificate verify failed: unable to get local issuer certificate",  # OpenSSL
    *(
        "git clone",
        "copy config.example.env config.env",
        "sudo apt install python3-venv",
        "unset CLIENT_SECRET",
    ),  # commands
    *("ssh -L 8080:localhost:8080 server", "-L 8081:localhost:8081"),
    *("-._~", "audience", "http://127.0.0.1:8000"),  # an alphabet, a parameter, an address
    "protocol/openid-connect/logout",  # of Keycloak: see test_real_login.py
}


@posix
def test_each_name_and_message_is_one_of_the_program() -> None:
    commands = "".join(blocks("sh") + blocks("powershell")) + read("config.example.env")
    sources = MODULE + SANDBOX + WEB_APPLICATION + commands + HTTP_BASIC
    mistakes = code(section("### The sandbox for a program of your own"))
    table = section("### Another provider")
    unknown = {
        span
        for span in code(PROSE)
        if span not in sources
        and span not in mistakes
        and not (span.startswith("--") and span.split()[0] in sources)
        and not (span in table and re.match(r"https?://|read:user", span))
        and not any(re.fullmatch(text, span) for text in TEXTS)
        and not (ROOT / span.split()[-1]).exists()
    }
    assert unknown == OF_OTHERS


def test_the_sandbox_explains_mistakes_as_the_table_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Sandbox(REDIRECT_URI, port=0, log=True) as sandbox:
        for step, changes, _ in EXPLANATIONS:
            make_mistake(sandbox.environment, step, changes)
    printed = capsys.readouterr().out.replace(REDIRECT_URI, "http://localhost:8080/oauth")
    messages = [
        code(row[1])[0] for row in rows(section("### The sandbox for a program of your own"))
    ]
    assert len(messages) > 5
    elsewhere = {message for message in messages if message not in printed}
    # For these, test_sandbox.py needs more than one request, and the texts are literal.
    assert all(message in SANDBOX for message in elsewhere)
    assert len(elsewhere) == 2


def test_each_row_on_security_names_functions_and_tests_that_exist() -> None:
    for requirement, answer, tests in rows(read(".github/SECURITY.md")):
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
