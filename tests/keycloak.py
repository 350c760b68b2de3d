"""A real Keycloak on this computer; sipgate's login server is one too.

    with Keycloak(Path(os.environ["KEYCLOAK_HOME"])) as keycloak: ...

$KEYCLOAK_HOME is the folder that a download from https://www.keycloak.org/downloads was unpacked
to; it needs Java 17 or later. The realm is in keycloak-realm.json: one client, one user, one scope.
"""

import contextlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import requests
from script import free_port

REALM_FILE = Path(__file__).with_name("keycloak-realm.json")
REALM: dict[str, Any] = json.loads(REALM_FILE.read_text(encoding="utf-8"))
(CLIENT,) = REALM["clients"]
(USER,) = REALM["users"]
USERNAME, PASSWORD = USER["username"], USER["credentials"][0]["value"]
START_TIMEOUT = 240  # seconds; 15 is usual, and 40 for the first time, when it builds itself


class Keycloak:
    """Keycloak as a context manager: it serves inside of the `with` block.

    In: home, the folder of the distribution. All that is written there is the build that Keycloak
    makes at its first start and keeps; the database and the rest end with the block.
    Out: `environment()` with the variables for sipgate_oauth.py.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/auth"
        self.realm_url = f"{self.url}/realms/{REALM['realm']}"
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy is between us

    def environment(self, redirect_uri: str, scope: str = "openid account:read") -> dict[str, str]:
        """Return the variables for the script. The account is userinfo, which openid opens."""
        endpoints = f"{self.realm_url}/protocol/openid-connect"
        return {
            "CLIENT_ID": CLIENT["clientId"],
            "CLIENT_SECRET": CLIENT["secret"],
            "OAUTH_SCOPE": scope,
            "REDIRECT_URI": redirect_uri,
            "AUTH_URL": f"{endpoints}/auth?prompt=consent",  # also if it was given before
            "TOKEN_URL": f"{endpoints}/token",
            "TEST_API_ENDPOINT": f"{endpoints}/userinfo",
        }

    def __enter__(self) -> "Keycloak":
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._http)
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
            process = self._start(folder, log := folder / "log")
            undo.callback(stop, process)
            self._wait_until_ready(process, log)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def _start(self, folder: Path, log: Path) -> "subprocess.Popen[bytes]":
        """Start Keycloak with its home in the folder, so that it keeps its data there."""
        (folder / "lib").symlink_to(self.home / "lib")  # where it finds its build again
        imports = folder / "data" / "import"
        imports.mkdir(parents=True)
        shutil.copy(REALM_FILE, imports / f"{REALM['realm']}-realm.json")  # has to be named so
        options = ["--import-realm", "--db=dev-mem", "--http-relative-path=/auth"]
        options += ["--http-host=127.0.0.1", f"--http-port={self.port}", f"-Dkc.home.dir={folder}"]
        with log.open("wb") as output:
            return subprocess.Popen(
                [self.home / "bin" / "kc.sh", "start-dev", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the shell script and its Java end together
            )

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        """Ask for the realm until it is there. Raises RuntimeError with the end of the log."""
        deadline = time.monotonic() + START_TIMEOUT
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(requests.RequestException):
                if self._http.get(self.realm_url, timeout=10).ok:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"Keycloak did not start:\n{log.read_text(errors='replace')[-2000:]}")


def log_in(url: str) -> str:
    """Log in at an authorize URL, and allow the access; return where the browser is sent to."""
    forms = [{"username": USERNAME, "password": PASSWORD}, {"accept": "Yes"}]
    where, form = url, dict[str, str]()
    with requests.Session() as browser:
        browser.trust_env = False
        while not where.startswith("http://localhost"):
            send = browser.post if form else browser.get
            page = send(where, data=form, allow_redirects=False, timeout=10)
            for cookie in browser.cookies:
                cookie.secure = False  # as browsers have it: within this machine, all is secure
            where = page.headers.get("Location", "")
            form = {} if where else forms.pop(0)
            where = urljoin(
                url, where or html.unescape(re.findall(r' action="(.+?)"', page.text)[0])
            )
    return where


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End Keycloak and all that it has started; there is nothing that it would have to save."""
    with contextlib.suppress(ProcessLookupError):  # it may not even have started
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
