"""The documentation says what there is: commands, output, code, names, messages and links."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
from script import ROOT, Script

import sipgate_oauth
from sipgate_oauth import KEYS, problem_with


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


DOCUMENTS = ["README.md", ".github/SECURITY.md", ".github/CONTRIBUTING.md"]
README, MODULE, SANDBOX = map(read, ["README.md", "sipgate_oauth.py", "tests/sandbox.py"])
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
STEPS = dict(re.findall(r"^(\d\. .*?)  +(\w+)  +", sipgate_oauth.__doc__ or "", re.MULTILINE))


def blocks(language: str) -> list[str]:
    return [block for name, block in BLOCKS if name == language]


def section(heading: str) -> str:
    """Return what stands between a heading and the next one."""
    return PROSE.split(f"\n{heading}\n")[1].split("\n#")[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, without their heads."""
    lines = re.findall(r"(?<!\n\n)^\| (?!---)(.*) \|$", f"\n{text}", re.MULTILINE)
    return [line.split(" | ") for line in lines]


def code(text: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall(r"`([^`\n]+)`", text)


FOR_THE_SANDBOX, FOR_THE_TESTS = [block for block in blocks("sh") if "&&" in block]
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


@pytest.mark.skipif(sys.platform == "win32", reason="The command is for Linux and macOS.")
@pytest.mark.xdist_group("port 8080")
@pytest.mark.timeout(600)  # it downloads packages
def test_the_first_command_prints_the_transcript(tmp_path: Path) -> None:
    clone = shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTHON"))}
    environment = {**kept, "BROWSER": shlex.join([sys.executable, "-c", BROWSER, "%s"])}
    command, null = ["sh", "-c", FOR_THE_SANDBOX], subprocess.DEVNULL
    output = subprocess.check_output(command, cwd=clone, env=environment, stdin=null).decode()
    printed, shown = settled(output), settled("".join(blocks("text")))
    assert printed[: len(shown)] == shown
    # The README says that the rest looks like steps 4 and 5.
    assert {*printed} == {*shown}
    assert output.count('"refresh_token"') == output.count('"company"') == 2


def test_the_commands_for_windows_and_ci_are_the_same() -> None:
    command = FOR_THE_SANDBOX.replace("python3", "py").replace(" &&", ";")
    assert blocks("powershell") == [command.replace(".venv/bin/", ".venv\\Scripts\\")]
    assert FOR_THE_TESTS in read(".github/workflows/ci.yml")


def test_the_options_are_those_of_the_program(start: Callable[..., Script]) -> None:
    script = start("--help")
    assert script.status() == 0
    option = r"(?<![\w-])--[a-z][a-z-]*"
    options = set(re.findall(option, script.stdout)) - {"--help"}
    table = {name: row for row in rows(section("## Run it")) for name in re.findall(option, row[0])}
    assert set(table) == options
    assert set(re.findall(option, README)) == options | {"--serve"}
    assert f"(default: {table['--timeout'][2]})" in script.stdout


def test_each_excerpt_stands_in_the_module_to_the_letter() -> None:
    assert [excerpt for excerpt in blocks("python") if f"\n{excerpt}" not in MODULE] == []


def test_the_six_steps_have_the_names_and_functions_of_the_module() -> None:
    paragraphs = section("## How it works").split("\n**")
    texts = {text.split(".**")[0]: text for text in paragraphs if text[0].isdigit()}
    assert list(texts) == re.findall(r": (\d\. [^:\n]*)", blocks("mermaid")[0]) == list(STEPS)
    for name, function in STEPS.items():
        assert f"`{function}`" in texts[name]


def test_the_keys_are_those_of_the_program() -> None:
    assert [code(row[0])[0] for row in rows(section("## Configuration"))] == list(KEYS)
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", PROSE))
    assert named == {*KEYS, "CLIENT_KEYS", "REQUESTS_CA_BUNDLE"}


def test_the_examples_of_other_providers_can_work() -> None:
    table = {cells[0]: cells[1:] for cells in rows(section("### Another provider"))}
    for key in KEYS[2:]:
        assert [problem_with(key, code(value)[0]) for value in table[f"`{key}`"]] == ["", ""]


def test_each_function_and_parameter_that_is_named_exists() -> None:
    for name in set(re.findall(r"`([a-z]+_[a-z_]+)`", PROSE)) - {"offline_access"}:
        assert hasattr(sipgate_oauth, name) or f'"{name}"' in MODULE + SANDBOX


def test_each_row_on_security_names_functions_and_tests_that_exist() -> None:
    for requirement, answer, tests in rows(read(".github/SECURITY.md")):
        assert re.search(r"\((6749|6750|7636|8252|9700): [\d.]+", requirement)
        for name in code(answer):
            assert callable(attrgetter(name)(sipgate_oauth))
        links = re.findall(r"\[`(\w+)`\]\(\.\./(tests/\w+\.py)\)", tests)
        assert links
        for name, file in links:
            assert f"\ndef {name}(" in read(file)


def is_said(message: str) -> bool:
    """Whether the program or the sandbox says this, or begins with it up to a part that varies."""
    error, _, text = message.partition(": ")
    if error in ("invalid_grant", "invalid_request", "invalid_scope"):
        return is_said(text)
    return message in MODULE + SANDBOX or re.split(r": |\d", message)[0] in MODULE + SANDBOX


def test_the_messages_are_those_that_people_see() -> None:
    mistakes = [
        code(row[1])[0] for row in rows(section("## The sandbox for a program of your own"))
    ]
    issues = [code(row[0])[0] for row in rows(section("## Common issues"))]
    assert [message for message in mistakes + issues if not is_said(message)] == [
        "No module named 'requests'",  # Python says this, and OpenSSL the rest
        "certificate verify failed: unable to get local issuer certificate",
        "certificate verify failed: Basic Constraints of CA cert not marked critical",
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_link_to_this_repository_leads_somewhere(document: str) -> None:
    for path, fragment in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", read(document)):
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists()
        if fragment:
            heading = fragment.replace("-", r"\W+")
            assert re.search(f"^#+ {heading}$", read(str(file)), re.MULTILINE | re.IGNORECASE)
