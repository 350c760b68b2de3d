"""An authorization server that others have written, and a login on its pages.

It is a program that prints one line of JSON as soon as it listens: for each of its clients, the
variables for sipgate_oauth.py except REDIRECT_URI, which may have any port of 127.0.0.1.
"""

import html
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

import requests
from script import PATIENCE, Script, free_port

# What the user fills in: oidc-provider accepts any name and any password.
USER = {"login": "alice", "password": "pAAAAAAA-password"}
INPUT = re.compile(r'<input[^>]* name="(.+?)"(?:[^>]* value="(.*?)")?')

Provider = Callable[[str], dict[str, str]]  # returns all variables for a client_id


@contextmanager
def running(interpreter: str, program: str, *arguments: str) -> Iterator[Provider]:
    """Run the program of a server, which is in this folder, until the end of the `with` block."""
    command = [interpreter, str(Path(__file__).with_name(program)), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8") as process:
        assert process.stdout
        try:
            ready = next((line for line in process.stdout if line.startswith("{")), None)
            assert ready, "The server has ended: see what it says on stderr."
            clients = json.loads(ready)
            redirect_uri = "http://127.0.0.1:{}/oauth"
            yield lambda name: {**clients[name], "REDIRECT_URI": redirect_uri.format(free_port())}
        finally:
            process.kill()


def log_in(script: Script) -> requests.Response:
    """Log in at the script's authorize URL, and allow access; return the callback's page."""
    with requests.Session() as browser:
        browser.trust_env = False
        page = browser.get(script.url(), timeout=PATIENCE)
        for _ in ("login form", "consent form"):
            found = INPUT.findall(page.text)
            assert found, page.text
            form = {name: USER.get(name, html.unescape(value)) for name, value in found}
            (action,) = re.findall(r' action="(.+?)"', page.text)
            page = browser.post(urljoin(page.url, action), form, timeout=PATIENCE)
    return page
