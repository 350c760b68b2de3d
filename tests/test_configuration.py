"""The configuration and the options: where they come from, and what is said of those that can't
work. What is wrong with them is told before anything else happens, and with exit status 2."""

import re
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from dotenv import dotenv_values
from sandbox import Sandbox
from script import ROOT, SCRIPT, Script, free_port, ipv6_works, log_in

from sipgate_oauth import LoginError, load_config

Start = Callable[..., Script]

KEYS = (
    "CLIENT_ID",
    "CLIENT_SECRET",
    "OAUTH_SCOPE",
    "REDIRECT_URI",
    "AUTH_URL",
    "TOKEN_URL",
    "TEST_API_ENDPOINT",
)
ENDPOINTS = ("AUTH_URL", "TOKEN_URL", "TEST_API_ENDPOINT")
OPTIONS = ("--config", "--no-browser", "--paste", "--timeout", "--show-tokens")
SECRET = "the-secret-of-this-test"
GOOD = {
    "CLIENT_ID": "client",
    "CLIENT_SECRET": SECRET,
    "OAUTH_SCOPE": "account:read users:read",
    "REDIRECT_URI": "http://localhost:8080/oauth",
    "AUTH_URL": "https://login.example.com/auth",
    "TOKEN_URL": "https://login.example.com/token",
    "TEST_API_ENDPOINT": "https://api.example.com/v2/account",
}


@pytest.fixture(autouse=True)
def _no_configuration_of_the_person(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def moved_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let start() run a copy of the script, in a folder where no config.env is, and return it."""
    copy = tmp_path / "a folder" / SCRIPT.name
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    monkeypatch.setattr("script.SCRIPT", copy)
    return copy


def lines(values: dict[str, str]) -> str:
    return "".join(f"{key}={value}\n" for key, value in values.items())


def write(file: Path, **changes: str) -> Path:
    """Write good values, with the changes, to a file, and return the file."""
    file.write_text(lines({**GOOD, **changes}), encoding="utf-8")
    return file


def keys_in(text: str) -> list[str]:
    return [key for key in KEYS if re.search(rf"\b{key}\b", text)]


def refused(file: Path) -> list[str]:
    """Return the keys that the refusal of a configuration names."""
    with pytest.raises(LoginError) as refusal:
        load_config(file)
    assert refusal.value.exit_status == 2
    assert SECRET not in refusal.value.what + refusal.value.advice
    return keys_in(refusal.value.what)


def expect_wrong_configuration(script: Script) -> str:
    """Wait for the script to end as it does for a configuration that can't work; return stderr."""
    assert script.status() == 2
    assert script.stdout == ""
    assert script.stderr.startswith("Error: ")
    assert "Traceback" not in script.stderr
    return script.stderr


def expect_a_login(script: Script) -> None:
    log_in(script)
    assert script.status() == 0, script.stderr
    assert script.stdout.count('"company"') == 2


# --- Where the values come from -------------------------------------------------------------------


@pytest.mark.parametrize("line_break", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"], ids=["no BOM", "BOM"])
def test_a_file_is_enough(
    sandbox: Sandbox, start: Start, tmp_path: Path, encoding: str, line_break: str
) -> None:
    file = tmp_path / "file with any name"
    text = lines(sandbox.environment).replace("\n", line_break)
    file.write_bytes(text.encode(encoding))
    expect_a_login(start("--config", str(file)))


def test_the_file_is_the_one_beside_the_module(
    sandbox: Sandbox, start: Start, moved_script: Path
) -> None:
    file = moved_script.with_name("config.env")
    file.write_text(lines(sandbox.environment), encoding="utf-8")
    expect_a_login(start())


def test_config_names_another_file_than_the_one_beside_the_module(
    sandbox: Sandbox, start: Start, moved_script: Path, tmp_path: Path
) -> None:
    write(moved_script.with_name("config.env"))
    file = tmp_path / "other.env"
    file.write_text(lines(sandbox.environment), encoding="utf-8")
    expect_a_login(start("--config", str(file)))


def test_the_environment_is_enough_without_a_file(
    sandbox: Sandbox, start: Start, moved_script: Path
) -> None:
    assert not moved_script.with_name("config.env").exists()
    expect_a_login(start(**sandbox.environment))


def test_the_environment_wins(sandbox: Sandbox, start: Start, tmp_path: Path) -> None:
    file = write(tmp_path / "config.env")
    expect_a_login(start("--config", str(file), **sandbox.environment))


@pytest.mark.parametrize("key", KEYS)
def test_one_value_may_come_from_the_environment_and_the_rest_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    value = GOOD[key] + "2"
    monkeypatch.setenv(key, value)
    assert load_config(write(tmp_path / "config.env")) == {**GOOD, key: value}


def test_the_secret_of_the_sandbox_has_all_characters_that_may_get_lost(sandbox: Sandbox) -> None:
    """So each login above has shown that they arrive at the token endpoint, from either source."""
    assert set("$&+% ö") <= set(sandbox.environment["CLIENT_SECRET"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("pa$HOME", "pa$HOME"),
        ("${HOME}$$", "${HOME}$$"),
        ('"${HOME} $HOME"', "${HOME} $HOME"),
        ("a=b", "a=b"),
        ("50% & more + ü", "50% & more + ü"),
        ("'a # b'", "a # b"),
        ("'a \"quoted\" word'", 'a "quoted" word'),
        ("  blanks around  ", "blanks around"),
        ("value # comment", "value"),
    ],
)
def test_a_secret_means_what_the_file_says(tmp_path: Path, written: str, meant: str) -> None:
    file = write(tmp_path / "config.env", CLIENT_SECRET=written)
    assert load_config(file)["CLIENT_SECRET"] == meant


# --- What is missing ------------------------------------------------------------------------------


def test_a_missing_file_says_what_to_copy_and_names_the_sandbox(
    start: Start, moved_script: Path
) -> None:
    stderr = expect_wrong_configuration(start())
    assert str(moved_script.with_name("config.env")) in stderr
    assert "copy config.example.env" in stderr.lower()
    assert "tests/sandbox.py" in stderr


def test_a_missing_file_that_config_names_is_named(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "my.env"
    stderr = expect_wrong_configuration(start("--config", str(file)))
    assert str(file) in stderr
    assert "config.example.env" in stderr


def test_without_a_file_all_keys_are_named_at_once(tmp_path: Path) -> None:
    assert refused(tmp_path / "config.env") == list(KEYS)


def test_an_empty_file_lacks_all_keys(tmp_path: Path) -> None:
    (tmp_path / "config.env").touch()
    assert refused(tmp_path / "config.env") == list(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    file = tmp_path / "config.env"
    file.write_text(lines({it: value for it, value in GOOD.items() if it != key}))
    assert refused(file) == [key]


@pytest.mark.parametrize("value", ["", "''", "'  '", "YOUR_{key}", "'YOUR_{key}'"])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_empty_or_a_placeholder_is_named(
    tmp_path: Path, key: str, value: str
) -> None:
    assert refused(write(tmp_path / "config.env", **{key: value.format(key=key)})) == [key]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_without_an_equals_sign_is_named(tmp_path: Path, key: str) -> None:
    file = write(tmp_path / "config.env")
    file.write_text(file.read_text().replace(f"{key}={GOOD[key]}", key))
    assert refused(file) == [key]


def test_all_that_is_wrong_is_named_at_once(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "config.env"
    file.write_text(
        "CLIENT_ID=YOUR_CLIENT_ID\n"
        f"CLIENT_SECRET={SECRET}\n"
        "REDIRECT_URI=http://example.com/\n"
        "AUTH_URL=\n"
        "TEST_API_ENDPOINT=https://api.example.com/v2/account\n"
    )
    stderr = expect_wrong_configuration(start("--config", str(file)))
    wrong = ["CLIENT_ID", "OAUTH_SCOPE", "REDIRECT_URI", "AUTH_URL", "TOKEN_URL"]
    assert keys_in(stderr) == wrong
    assert SECRET not in stderr


def test_all_keys_are_named_however_long_the_name_of_the_file_is(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / ("long" * 50) / ("longer" * 30)
    stderr = expect_wrong_configuration(start("--config", str(folder / "config.env")))
    assert all(f"{key} is missing" in stderr for key in KEYS)


# --- What can't be read ---------------------------------------------------------------------------


def test_a_folder_is_no_configuration(start: Start, tmp_path: Path) -> None:
    assert str(tmp_path) in expect_wrong_configuration(start("--config", str(tmp_path)))


def test_a_file_is_no_folder(start: Start, tmp_path: Path) -> None:
    file = write(tmp_path / "config.env") / "config.env"
    assert str(file) in expect_wrong_configuration(start("--config", str(file)))


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows, not everybody may make links")
def test_a_file_that_nobody_can_read_is_named(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "config.env"
    file.symlink_to(file)
    assert str(file) in expect_wrong_configuration(start("--config", str(file)))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_named_and_so_is_utf_8(
    start: Start, tmp_path: Path, encoding: str
) -> None:
    file = tmp_path / "config.env"
    file.write_bytes(lines({**GOOD, "CLIENT_ID": "Müller"}).encode(encoding))
    stderr = expect_wrong_configuration(start("--config", str(file)))
    assert str(file) in stderr
    assert "UTF-8" in stderr


def test_a_file_in_utf_16_without_a_mark_lacks_all_keys(tmp_path: Path) -> None:
    """It is UTF-8 as well, with a character that can't be seen beside each that can."""
    file = tmp_path / "config.env"
    file.write_bytes(lines(GOOD).encode("utf-16-le"))
    assert refused(file) == list(KEYS)


# --- Which values work ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("character", ["\t", "\n", "\x1b", "\x7f", "\u202e", "\u200b", "\ufeff"])
def test_a_value_with_a_character_that_cannot_be_seen_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, character: str
) -> None:
    monkeypatch.setenv(key, GOOD[key][:10] + character + GOOD[key][10:])
    assert refused(write(tmp_path / "config.env")) == [key]


@pytest.mark.parametrize(
    "form",
    [
        "http://localhost:{port}/oauth",
        "http://localhost:{port}",
        "http://localhost:{port}/",
        "http://localhost:{port}/oauth/",
        "http://localhost:{port}/a/b-c/d_e.f/~g/2",
        "http://127.0.0.1:{port}/oauth",
        "http://127.0.0.1:0{port}/oauth",
        "HTTP://LocalHost:{port}/OAuth",
        "http://[::1]:{port}/oauth",
    ],
)
def test_a_redirect_uri_that_is_accepted_works_to_the_letter(start: Start, form: str) -> None:
    if "[" in form and not ipv6_works():
        pytest.skip("this computer has no ::1")
    with Sandbox(redirect_uri=form.format(port=free_port()), port=0) as sandbox:
        expect_a_login(start(**sandbox.environment))


def test_a_redirect_uri_without_a_port_means_port_80(
    sandbox: Sandbox, start: Start, tmp_path: Path
) -> None:
    """Which others need too, so that it is always taken here, or out of bounds."""
    with ExitStack() as holder:
        with suppress(OSError):
            holder.enter_context(socket.create_server(("127.0.0.1", 80)))
        script = start(**{**sandbox.environment, "REDIRECT_URI": "http://localhost/oauth"})
        assert script.status() == 1
    assert "port 80 " in script.stderr
    assert "Traceback" not in script.stderr


@pytest.mark.parametrize(
    "uri",
    [
        "localhost:8080/oauth",
        "//localhost:8080/oauth",
        "/oauth",
        "https://localhost:8080/oauth",
        "ftp://localhost:8080/oauth",
        "http:/localhost:8080/oauth",
        "http://localhost:8080:8080/oauth",
        "http://localhost:/oauth",
        "http://localhost:0/oauth",
        "http://localhost:-1/oauth",
        "http://localhost:65536/oauth",
        f"http://localhost:{'8' * 5000}/oauth",
        "http://localhost:http/oauth",
        "http://localhost:\uff18\uff10\uff18\uff10/oauth",
        "http://localhost.:8080/oauth",
        "http://localho\u017ft:8080/oauth",
        "http://localhost.example.com:8080/oauth",
        "http://example.com:8080/oauth",
        "http://0.0.0.0:8080/oauth",
        "http://127.1:8080/oauth",
        "http://127.0.0.2:8080/oauth",
        "http://127.0.0.1.example.com:8080/oauth",
        "http://[::]:8080/oauth",
        "http://[0:0:0:0:0:0:0:1]:8080/oauth",
        "http://[::1:8080/oauth",
        "http://::1:8080/oauth",
        "http://user@localhost:8080/oauth",
        "http://localhost:8080/oauth?a=b",
        "http://localhost:8080/oauth?",
        "http://localhost:8080/oauth#fragment",
        "http://localhost:8080//oauth",
        "http://localhost:8080/oauth//",
        "http://localhost:8080/./oauth",
        "http://localhost:8080/a/../oauth",
        "http://localhost:8080/o%61uth",
        "http://localhost:8080/öauth",
        "http://localhost:8080/o auth",
        "http://localhost:8080/oauth ",
        " http://localhost:8080/oauth",
        "http://localhost:8080\\oauth",
        'http://localhost:8080/"oauth"',
        "http://localhost:8080/<oauth>",
        "urn:ietf:wg:oauth:2.0:oob",
        "com.example.app:/oauth",
    ],
)
def test_a_redirect_uri_that_could_not_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("REDIRECT_URI", uri)
    assert refused(write(tmp_path / "config.env")) == ["REDIRECT_URI"]


@pytest.mark.parametrize("key", ENDPOINTS)
@pytest.mark.parametrize("form", ["{}?a=b", "{}?", "{}?a=b%20c&d=%C3%A9"])
def test_an_endpoint_that_has_a_query_works(
    sandbox: Sandbox, start: Start, key: str, form: str
) -> None:
    values = {**sandbox.environment, key: form.format(sandbox.environment[key])}
    expect_a_login(start(**values))


@pytest.mark.parametrize("key", ["TOKEN_URL", "TEST_API_ENDPOINT"])
@pytest.mark.parametrize("origin", ["http://localhost", "HTTP://LocalHost"])
def test_an_endpoint_on_this_computer_works_without_tls(
    sandbox: Sandbox, start: Start, key: str, origin: str
) -> None:
    url = sandbox.environment[key].replace("http://127.0.0.1", origin)
    expect_a_login(start(**{**sandbox.environment, key: url}))


@pytest.mark.parametrize("key", ENDPOINTS)
@pytest.mark.parametrize(
    "url",
    [
        "https://login.example.com",
        "https://login.example.com/",
        "https://login.example.com?a=b",
        "https://login.example.com:8443/a/b?c=d&e=/f?",
        "HTTPS://Login.Example.Com/Auth",
        "https://some_host-1.example/",
        "https://host/",
        "https://192.0.2.1/auth",
        "https://[::1]/auth",
        "http://[::1]:8081/auth",
    ],
)
def test_an_endpoint_of_this_form_is_accepted(tmp_path: Path, key: str, url: str) -> None:
    assert load_config(write(tmp_path / "config.env", **{key: url}))[key] == url


@pytest.mark.parametrize("key", ENDPOINTS)
@pytest.mark.parametrize(
    "url",
    [
        "login.example.com/auth",
        "//login.example.com/auth",
        "http://login.example.com/auth",
        "http://localhost.example.com/auth",
        "http://127.0.0.2/auth",
        "http://0.0.0.0/auth",
        "ftp://login.example.com/auth",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https:login.example.com/auth",
        "https:///auth",
        "https://",
        "https://?a=b",
        "https://:443/auth",
        "https://user:word@login.example.com/auth",
        "https://user@login.example.com/auth",
        "https://login.example.com/auth#fragment",
        "https://login.example.com/a b",
        "https://login.example.com /auth",
        "https://login.example.com/auth ",
        " https://login.example.com/auth",
        "https://login.example.com\\auth",
        "https://login.example.com/a\\b",
        "https://login.example.com:/auth",
        "https://login.example.com:0/auth",
        "https://login.example.com:65536/auth",
        "https://login.example.com:https/auth",
        "https://löwe.example.com/auth",
        "https://login.example.com/löwe",
        "https://login%2eexample.com/auth",
        "https://*.example.com/auth",
        "https://.example.com/auth",
        "https://login..example.com/auth",
        "https://./auth",
        "https://[::1/auth",
        "https://[2001:db8::1]/auth",
        "https://[1:2]/auth",
        "https://[::::]/auth",
        "https://[fe80::1%25eth0]/auth",
        "https://2001:db8::1/auth",
    ],
)
def test_an_endpoint_that_could_not_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, url: str
) -> None:
    monkeypatch.setenv(key, url)
    assert refused(write(tmp_path / "config.env")) == [key]


# --- The example ----------------------------------------------------------------------------------

EXAMPLE = ROOT / "config.example.env"


def test_the_example_has_the_values_of_sipgate() -> None:
    server = "https://login.sipgate.com/auth/realms/third-party/protocol/openid-connect"
    assert dotenv_values(EXAMPLE, interpolate=False) == {
        "CLIENT_ID": "YOUR_CLIENT_ID",
        "CLIENT_SECRET": "YOUR_CLIENT_SECRET",
        "OAUTH_SCOPE": "account:read",
        "REDIRECT_URI": "http://localhost:8080/oauth",
        "AUTH_URL": f"{server}/auth",
        "TOKEN_URL": f"{server}/token",
        "TEST_API_ENDPOINT": "https://api.sipgate.com/v2/account",
    }


def test_each_key_of_the_example_is_explained() -> None:
    for paragraph in EXAMPLE.read_text(encoding="utf-8").split("\n\n"):
        assert paragraph.startswith("# ")


def test_in_a_copy_of_the_example_only_the_placeholders_are_wrong(
    start: Start, moved_script: Path
) -> None:
    shutil.copy(EXAMPLE, moved_script.with_name("config.env"))
    stderr = expect_wrong_configuration(start())
    assert keys_in(stderr) == ["CLIENT_ID", "CLIENT_SECRET"]
    assert stderr.count("placeholder") == 2


def test_a_copy_of_the_example_with_id_and_secret_works(tmp_path: Path) -> None:
    file = tmp_path / "config.env"
    text = EXAMPLE.read_text(encoding="utf-8")
    file.write_text(text.replace("=YOUR_CLIENT_", "=my_"), encoding="utf-8")
    config = load_config(file)
    assert (config["CLIENT_ID"], config["CLIENT_SECRET"]) == ("my_ID", "my_SECRET")


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds", ["0", "-1", "-0.5", "nan", "inf", "-inf", "86401", "86400.001", "1e999", "abc", ""]
)
def test_a_timeout_that_could_not_work_is_wrong_usage(start: Start, seconds: str) -> None:
    script = start(f"--timeout={seconds}")
    assert script.status() == 2
    assert script.stdout == ""
    assert script.stderr.startswith("usage: ")
    assert "--timeout" in script.stderr.splitlines()[-1]
    assert "Traceback" not in script.stderr


@pytest.mark.parametrize("seconds", ["60", "59.5", "6e3", "86400"])
def test_a_timeout_of_at_most_a_day_works(sandbox: Sandbox, start: Start, seconds: str) -> None:
    expect_a_login(start("--timeout", seconds, **sandbox.environment))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config"], "--config"),
        (["--timeout"], "--timeout"),
        (["--timeout", "--paste"], "--timeout"),
        (["--no-browser=yes"], "--no-browser"),
        (["--paste=yes"], "--paste"),
        (["--show-tokens=yes"], "--show-tokens"),
        (["--no-such-option"], "--no-such-option"),
        (["config.env"], "config.env"),
    ],
)
def test_wrong_usage_names_the_option(start: Start, arguments: list[str], named: str) -> None:
    script = start(*arguments)
    assert script.status() == 2
    assert script.stdout == ""
    assert script.stderr.startswith("usage: ")
    assert named in script.stderr.splitlines()[-1]
    assert "Traceback" not in script.stderr


def helps(start: Start) -> dict[str, str]:
    """Return the help text of each option."""
    script = start("--help", COLUMNS="500")
    assert script.status() == 0
    assert script.stderr == ""
    options = re.findall(r"^  (--\S+)( [A-Z]+)?  +(\S.+)$", script.stdout, re.MULTILINE)
    return {name: text for name, _, text in options}


def test_the_help_has_each_option(start: Start) -> None:
    assert sorted(helps(start)) == sorted(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_help_of_an_option_says_its_default(start: Start, option: str) -> None:
    assert re.search(r"\(default: .+\)", helps(start)[option])


def test_the_defaults_are_the_file_beside_the_module_and_five_minutes(
    start: Start, moved_script: Path
) -> None:
    texts = helps(start)
    assert f"default: {moved_script.with_name('config.env')}" in texts["--config"]
    assert "default: 300" in texts["--timeout"]
