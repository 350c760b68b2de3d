"""The script in networks that few developers have: each test makes its own, with Linux's means."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandbox import Sandbox
from script import PATIENCE, Script

NAME_SERVER = "224.0.0.53"


def in_a_network_of_its_own(*commands: str) -> list[str]:
    """Return the start of a command line, which runs the rest of it as root of a new network, and
    of new mounts, after some shell commands there."""
    if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "ip", "setpriv"))):
        pytest.skip("needs Linux, util-linux and iproute2")
    unshare = ["unshare", "--map-root-user", "--net", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a network namespace")
    steps = ["ip link set lo up", *commands, 'exec "$@"']
    return [*unshare, "sh", "-ec", "; ".join(steps), "sh"]


def in_place_of_the_script(command: list[str]) -> tuple[str, ...]:
    """Return options of Python that run a command, with Python and the script at its end."""
    then = f"os.execvp({command[0]!r}, [*{command!r}, sys.executable, *sys.argv[1:]])"
    return ("-c", f"import os, sys; {then}")


def test_a_machine_without_ipv6_is_fine() -> None:
    """The tests of a login with localhost, but without ::1."""
    without_ipv6 = in_a_network_of_its_own("ip -6 address delete ::1/128 dev lo")
    tests = Path(__file__).with_name("test_callback.py")
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "either_address"]
    result = subprocess.run(
        [*without_ipv6, *pytest_, str(tests)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert "1 passed, 1 skipped" in result.stdout, result.stdout + result.stderr


def test_a_port_that_may_not_be_bound_is_an_error_that_names_it(
    sandbox: Sandbox, environment: dict[str, str]
) -> None:
    command = [*in_a_network_of_its_own(), "setpriv", "--bounding-set", "-net_bind_service"]
    python = in_place_of_the_script(command)
    configuration = {**sandbox.environment, "REDIRECT_URI": "http://localhost/oauth"}
    with Script(environment={**environment, **configuration}, python=python) as script:
        assert script.status() == 1
        assert "response_type" not in script.stdout
        assert "port 80 " in script.stderr
        assert "REDIRECT_URI" in script.stderr
        assert "1023" in script.stderr
        assert "Traceback" not in script.stderr


def test_ctrl_c_ends_the_look_up_of_a_host_name(
    environment: dict[str, str], sandbox: Sandbox, tmp_path: Path
) -> None:
    """The name server is a multicast group without members: nobody answers, nobody refuses."""
    (tmp_path / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: dns\n")
    command = in_a_network_of_its_own(
        f"ip route add {NAME_SERVER} dev lo",
        f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf",
        f"mount --bind {tmp_path}/nsswitch.conf /etc/nsswitch.conf",
    )
    python = in_place_of_the_script(command)
    configuration = {**sandbox.environment, "TOKEN_URL": "https://login.example/token"}
    with Script("--paste", environment={**environment, **configuration}, python=python) as script:
        uri = sandbox.environment["REDIRECT_URI"]
        script.type(f"{uri}?code=a-code&state={script.state()}\n")
        wait_for_the_question(script.process.pid)
        began = time.monotonic()
        script.interrupt()
        assert script.status() == 130
        assert time.monotonic() - began < 1
        assert script.stderr == ""


def wait_for_the_question(process: int) -> None:
    """Wait until a process has a UDP socket to port 53 of the name server."""
    address = int.from_bytes(socket.inet_aton(NAME_SERVER), sys.byteorder)
    deadline = time.monotonic() + PATIENCE
    while f"{address:08X}:{53:04X}" not in Path(f"/proc/{process}/net/udp").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
