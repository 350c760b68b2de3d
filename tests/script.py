"""Run sipgate_oauth.py as a person does: as a process, with a browser that is an HTTP client."""

import contextlib
import itertools
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, urlsplit

import requests

from sipgate_oauth import KEYS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "sipgate_oauth.py"
WEB_APPLICATION = ROOT / "tests" / "web_application.py"
PATIENCE = 30  # seconds after which a test gives up waiting for an event

# What the machine must not decide: the configuration, where requests go, and what a browser is.
FOREIGN = (*KEYS, "PROXY", "BROWSER", "DISPLAY", "CA_BUNDLE", "PYTHON", "NETRC")
# Below those of outgoing connections, which could take one meanwhile; others for each process.
PORTS = (20_000 + (7919 * os.getpid() + number) % 12_000 for number in itertools.count())


def free_port() -> int:
    """Return a port that is free on 127.0.0.1 and, where there is IPv6, on ::1."""
    addresses = {"127.0.0.1": socket.AF_INET, **({"::1": socket.AF_INET6} if ipv6_works() else {})}
    while True:
        port = next(PORTS)
        with contextlib.suppress(OSError):
            for address, family in addresses.items():
                socket.create_server((address, port), family=family).close()
            return port


def ipv6_works() -> bool:
    """Whether this machine has the loopback address ::1."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def clean_environment(home: Path) -> dict[str, str]:
    """Return this process's environment without what would make a test depend on the machine."""
    kept = {k: v for k, v in os.environ.items() if not any(part in k.upper() for part in FOREIGN)}
    return {**kept, "HOME": str(home), "USERPROFILE": str(home), "PYTHONUTF8": "1"}


class Script:
    """One run of the script. Use it as a context manager: at the end, the process is gone.

    environment: all of the environment that the process gets
    python: options of the Python interpreter
    path: what to run in place of sipgate_oauth.py, for example a changed copy of it
    session: start it in a session of its own, as a terminal does, and at the end, also kill the
        processes that it has started
    """

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str],
        python: tuple[str, ...] = (),
        path: Path | None = None,
        session: bool = False,
    ) -> None:
        self._session = session
        self.process = subprocess.Popen(
            [sys.executable, *python, str(path or SCRIPT), *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
            start_new_session=session,  # of no effect on Windows
        )
        assert self.process.stdout
        assert self.process.stderr
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._out: list[str] = []
        self._err: list[str] = []
        self._readers = [
            self._read(self.process.stdout, self._out),
            self._read(self.process.stderr, self._err),
        ]

    def _read(self, stream: IO[str], lines: list[str]) -> threading.Thread:
        def read() -> None:
            for line in stream:
                lines.append(line)
                self._news.put(None)
            self._news.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        return reader

    @property
    def stdout(self) -> str:
        """What the script has printed so far."""
        return "".join(self._out)

    @property
    def stderr(self) -> str:
        """What the script has printed to stderr so far."""
        return "".join(self._err)

    def until(self, text: str) -> str:
        """Wait until a line of the output or of stderr holds the text, and return that line."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = not any(reader.is_alive() for reader in self._readers)
            for line in self._out + self._err:
                if text in line:
                    return line
            assert not ended, f"ended without {text!r}:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"no {text!r}:\n{self.stdout}\n{self.stderr}"
            with contextlib.suppress(queue.Empty):
                self._news.get(timeout=1)

    def url(self) -> str:
        """Wait for the authorize URL, which stands on a line of its own, and return it."""
        line = self.until("response_type=code").strip()
        assert line.startswith("http")
        return line

    def state(self) -> str:
        """Wait for the authorize URL, and return the state in it."""
        return parse_qs(urlsplit(self.url()).query)["state"][0]

    def type(self, text: str) -> None:
        """Write to the script's stdin."""
        assert self.process.stdin
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def interrupt(self) -> None:
        """Send what Ctrl+C sends. (Only POSIX can send it to one process alone.)"""
        self.process.send_signal(signal.SIGINT)

    def status(self) -> int:
        """Wait for the end of the script, and return its exit status."""
        status = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return status

    def error(self, *secrets: str) -> str:
        """Wait for the failure of the script, and return its error: just one, without secrets."""
        assert self.status() == 1
        assert self.stderr.startswith("Error: ")
        assert re.findall("^Error: |Traceback", self.stderr, re.MULTILINE) == ["Error: "]
        assert [it for it in secrets if it in self.stdout + self.stderr] == []
        return self.stderr

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._session and sys.platform == "win32":
            command = ["taskkill", "/F", "/T", "/PID", str(self.process.pid)]
            subprocess.run(command, capture_output=True)
        elif self._session:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.status()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):  # a script that is gone reads no more
                stream.close() if stream else None


def send(method: str, url: str, **content: Any) -> requests.Response:
    """Send a request as a browser does, but follow no redirect."""
    with requests.Session() as browser:
        browser.trust_env = False
        return browser.request(method, url, allow_redirects=False, timeout=PATIENCE, **content)


def visit(url: str) -> requests.Response:
    """Open a URL, and return the page."""
    return send("GET", url)


def answer_login_page(url: str, answer: str = "allow") -> str:
    """Click a button on the sandbox's login page ("allow", "deny" or "wrong-state"), and return the
    URL that it leads to."""
    assert visit(url).status_code == 200
    return send("POST", url, data={"answer": answer}).headers["Location"]


def log_in(script: Script, answer: str = "allow") -> requests.Response:
    """Log in on the sandbox's page, and return the page that the callback shows."""
    return visit(answer_login_page(script.url(), answer))
