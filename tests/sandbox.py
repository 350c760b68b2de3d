# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "Flask>=3.1,<4",
#     "joserfc>=1.7,<2",
#     "python-dotenv>=1.0.1,<2",
#     "requests>=2.32.4,<3",
#     "waitress>=3.0.2,<4",
# ]
# ///
"""A sipgate on this computer: see sipgate_oauth.py at work without an account.

    python tests/sandbox.py [options of sipgate_oauth.py]
    python tests/sandbox.py --serve [REDIRECT_URI]

The first runs sipgate_oauth.py against a local server and ends with its exit status. The second
runs the server alone, for a program of your own: it prints the configuration and then, for each
request, what came of it. The server has the addresses of sipgate's login server (a Keycloak) and
API, and refuses what they refuse:

    GET, POST .../auth   the login page; its answer is a redirect with an authorization code
    POST .../token       authorization code or refresh token in, fresh tokens out
    GET /v2/account      the account's data for an access token

Tests use it as a context manager: `with Sandbox() as sandbox: ...`.
"""

import argparse
import base64
import contextlib
import errno
import hashlib
import html
import itertools
import logging
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote_plus, urlencode

try:
    from flask import Flask, Response, g, jsonify, request
    from joserfc import jwt
    from joserfc.jwk import RSAKey
    from waitress import create_server, wasyncore  # type: ignore[import-untyped]
except ImportError as error:
    advice = "Install it with: python -m pip install -r tests/requirements-sandbox.txt"
    sys.exit(f"Error: {error}. {advice}")
except KeyboardInterrupt:
    sys.exit(130)

SCRIPT = Path(__file__).resolve().parent.parent / "sipgate_oauth.py"
REALM = "/auth/realms/third-party"
CLIENT_ID = "sandbox"
# A client that forgets to encode one of these characters finds out here.
CLIENT_SECRET = "50%25 off & $HOME + more"
SCOPES = {"account:read", "balance:read", "numbers:read", "openid", "users:read"}
ACCOUNT = {
    "company": "Müller Sandkästen GmbH",
    "mainProductType": "TEAM",
    "logoUrl": "",
    "verified": True,
}
SIGNING_KEY = RSAKey.generate_key(2048)


# --- What is checked -----------------------------------------------------------------------------


class Refusal(Exception):
    """An error of RFC 6749, section 5.2, in Keycloak's words."""

    def __init__(self, error: str, description: str = "", status: int = 400) -> None:
        answer = {"error": error, "error_description": description}
        self.answer = {key: value for key, value in answer.items() if value}
        self.status = status

    def __str__(self) -> str:
        return ": ".join(self.answer.values())


@dataclass
class Login:
    """What one login was given: first a code, then two tokens, which each refresh replaces."""

    scope: str
    code_challenge: str
    code: str
    code_expires_at: float
    session_state: str
    code_used: bool = False
    access_token: str = ""
    access_token_expires_at: float = 0
    refresh_token: str = ""
    refresh_token_expires_at: float = 0
    used_refresh_tokens: list[str] = field(default_factory=list)

    def revoke(self) -> None:
        """End the tokens: something was used twice, and one of the two users was a thief
        (RFC 6749, section 4.1.2; RFC 9700, section 4.14.2)."""
        self.access_token_expires_at = self.refresh_token_expires_at = 0


@dataclass
class LoginServer:
    """An authorization server with one client. Its logins are in memory, its times in seconds."""

    redirect_uri: str
    expires_in: int
    refresh_expires_in: int
    code_lifetime: int
    logins: list[Login] = field(default_factory=list)
    exchanges: int = 0

    def check_request(self, asked: dict[str, str]) -> None:
        """Check what the browser brings (RFC 6749, section 4.1.1; RFC 7636, section 4.3).
        Raises Refusal."""
        for name in ("response_type", "code_challenge_method", "code_challenge"):
            if not asked.get(name):
                raise Refusal("invalid_request", f"Missing parameter: {name}")
        if asked["response_type"] != "code":
            raise Refusal("unsupported_response_type")
        if not SCOPES.issuperset(asked.get("scope", "").split()):
            raise Refusal("invalid_scope", f"Invalid scopes: {asked['scope']}")
        if asked["code_challenge_method"] != "S256":
            what = "code challenge method is not matching the configured one"
            raise Refusal("invalid_request", f"Invalid parameter: {what}")

    def issue_code(self, asked: dict[str, str]) -> Login:
        login = Login(
            scope=asked.get("scope", ""),
            code_challenge=asked["code_challenge"],
            code=secrets.token_hex(24),
            code_expires_at=time.monotonic() + self.code_lifetime,
            session_state=secrets.token_hex(16),
        )
        self.logins.append(login)
        return login

    def exchange_code(self, form: dict[str, str]) -> Login:
        """Use a code up, whatever comes of it (RFC 6749, section 4.1.3). Raises Refusal."""
        if "code" not in form:
            raise Refusal("invalid_request", "Missing parameter: code")
        login = next((it for it in self.logins if it.code == form["code"]), None)
        if not login or login.code_used or time.monotonic() >= login.code_expires_at:
            if login:
                login.revoke()
            raise Refusal("invalid_grant", "Code not valid")
        login.code_used = True
        if form.get("redirect_uri") != self.redirect_uri:
            raise Refusal("invalid_grant", "Incorrect redirect_uri")
        if "code_verifier" not in form:
            raise Refusal("invalid_grant", "PKCE code verifier not specified")
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != login.code_challenge:
            raise Refusal("invalid_grant", "PKCE verification failed: Code mismatch")
        self.exchanges += 1
        return login

    def use_refresh_token(self, form: dict[str, str]) -> Login:
        """Look a refresh token up (RFC 6749, section 6). Raises Refusal."""
        token = form.get("refresh_token")
        for login in self.logins:
            if token in login.used_refresh_tokens:
                login.revoke()
                raise Refusal("invalid_grant", "Maximum allowed refresh token reuse exceeded")
            if token == login.refresh_token:
                if time.monotonic() >= login.refresh_token_expires_at:
                    raise Refusal("invalid_grant", "Token is not active")
                login.used_refresh_tokens.append(token)
                return login
        raise Refusal("invalid_grant", "Invalid refresh token")

    def issue_tokens(self, login: Login, issuer: str) -> dict[str, str | int]:
        """Replace the tokens of a login. Returns the answer of RFC 6749, section 5.1."""
        login.access_token, login.refresh_token = secrets.token_hex(21), secrets.token_hex(24)
        login.access_token_expires_at = time.monotonic() + self.expires_in
        login.refresh_token_expires_at = time.monotonic() + self.refresh_expires_in
        now = int(time.time())
        claims = {"iss": issuer, "aud": CLIENT_ID, "sub": "somebody", "sid": login.session_state}
        lifetime = {"iat": now, "exp": now + self.expires_in}
        return {
            "access_token": login.access_token,
            "expires_in": self.expires_in,
            "refresh_expires_in": self.refresh_expires_in,
            "refresh_token": login.refresh_token,
            "token_type": "bearer",
            "id_token": jwt.encode({"alg": "RS256"}, claims | lifetime, SIGNING_KEY),
            "session_state": login.session_state,
            "scope": login.scope,
        }


def check_client(form: dict[str, str]) -> None:
    """Raises Refusal unless the form or a header shows who asks (RFC 6749, section 2.3.1)."""
    client = (form.get("client_id"), form.get("client_secret"))
    header = request.authorization
    if header and header.type == "basic":
        client = (unquote_plus(header.username or ""), unquote_plus(header.password or ""))
    if client != (CLIENT_ID, CLIENT_SECRET):
        error = "unauthorized_client" if client[0] == CLIENT_ID else "invalid_client"
        raise Refusal(error, "Invalid client or Invalid client credentials", 401)


# --- What is served ------------------------------------------------------------------------------


def page(title: str, body: str = "", status: int = 200) -> Response:
    """An HTML page in the reader's colours, light or dark."""
    g.outcome = title
    return Response(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sandbox</title>'
        '<meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        "<style>body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 32rem;"
        " margin: 4rem auto; padding: 0 1rem } button { font: inherit; padding: .4rem 1.6rem }"
        f"</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>",
        status,
    )


def login_page(scope: str) -> Response:
    """The login page. Its form posts to the page's own address, parameters and all."""
    scopes = "".join(f"<li>{html.escape(name)}</li>" for name in scope.split())
    return page(
        "Sandbox login page",
        "<p>A stand-in for sipgate on this computer. No account, no password.</p>"
        f"<p>The client <strong>{CLIENT_ID}</strong> asks for these scopes:</p><ul>{scopes}</ul>"
        '<form method="post"><button name="answer" value="allow">Allow</button> '
        '<button name="answer" value="deny">Deny</button></form>',
    )


def add_routes(app: Flask, server: LoginServer) -> None:
    """Give the app sipgate's addresses. What came of a request is left in `g.outcome`."""
    endpoints = f"{REALM}/protocol/openid-connect"

    def redirect(**answer: str) -> Response:
        """Send the browser back, with the state it came with and the server's name (RFC 9207)."""
        answer |= {"state": request.values.get("state", ""), "iss": request.host_url[:-1] + REALM}
        separator = "&" if "?" in server.redirect_uri else "?"
        uri = server.redirect_uri + separator + urlencode({k: v for k, v in answer.items() if v})
        return Response(status=302, headers={"Location": uri})

    @app.route(f"{endpoints}/auth", methods=["GET", "POST"])
    def authorize() -> Response:
        asked = request.values.to_dict()
        # Nobody is sent to an address that is not the client's (RFC 6749, section 4.1.2.1).
        if asked.get("client_id") != CLIENT_ID:
            return page("Client not found.", status=400)
        if asked.get("redirect_uri") != server.redirect_uri:
            return page("Invalid parameter: redirect_uri", status=400)
        try:
            server.check_request(asked)
            if request.method == "GET":
                return login_page(asked.get("scope", ""))
            if asked.get("answer") != "allow":
                raise Refusal("access_denied")
        except Refusal as refusal:
            g.outcome = str(refusal)
            return redirect(**refusal.answer)
        g.outcome = "code issued"
        login = server.issue_code(asked)
        return redirect(session_state=login.session_state, code=login.code)

    @app.post(f"{endpoints}/token")
    def token() -> Response:
        form = request.form.to_dict()
        if "grant_type" not in form:
            raise Refusal("invalid_request", "Missing form parameter: grant_type")
        check_client(form)
        if form["grant_type"] == "authorization_code":
            login = server.exchange_code(form)
        elif form["grant_type"] == "refresh_token":
            login = server.use_refresh_token(form)
        else:
            raise Refusal("unsupported_grant_type", "Unsupported grant_type")
        g.outcome = "tokens issued"
        return jsonify(server.issue_tokens(login, request.host_url[:-1] + REALM))

    @app.get("/v2/account")
    def account() -> Response:
        token = request.authorization and request.authorization.token
        for login in server.logins:
            if login.access_token == token and time.monotonic() < login.access_token_expires_at:
                if "account:read" not in login.scope.split():
                    raise Refusal("insufficient_scope", status=403)
                g.outcome = "account"
                return jsonify(ACCOUNT)
        raise Refusal("invalid_token", status=401)

    @app.errorhandler(Refusal)
    def refuse(refusal: Refusal) -> Response:
        g.outcome = str(refusal)
        response = jsonify(refusal.answer)
        response.status_code = refusal.status
        if request.path == "/v2/account":  # RFC 6750, section 3
            response.headers["WWW-Authenticate"] = f'Bearer error="{refusal.answer["error"]}"'
        return response


def listen(port: int) -> socket.socket:
    """Listen on 127.0.0.1 at the port or the next free one; 0 is any."""
    while True:
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
        port += 1


def is_free(port: int) -> bool:
    """Whether a client can listen at the port on both addresses that `localhost` stands for."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            # EACCES is what Windows says of a port that it keeps for itself. With any other error,
            # this computer does not have the address, so nobody listens there.
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
    return True


# --- How it is run -------------------------------------------------------------------------------


class Sandbox:
    """The sandbox as a context manager: it serves inside of the `with` block.

    In: the redirect URI to register (by default at port 8080 or the next free one), the port to
    listen at (or the next free one; 0 is any), lifetimes in seconds, and whether to print a line
    for each request.
    Out: `environment`, the variables for sipgate_oauth.py. For tests there are `requests`, each
    request as (method, path), `connections`, the number of TCP connections that they came on, and
    `exchanges`, the number of codes exchanged for tokens.
    """

    def __init__(
        self,
        redirect_uri: str = "",
        port: int = 8081,
        expires_in: int = 300,
        refresh_expires_in: int = 30 * 24 * 3600,
        code_lifetime: int = 60,
        log: bool = False,
    ) -> None:
        listener = listen(port)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if not redirect_uri:
            callback_port = next(filter(is_free, itertools.count(8080)))
            redirect_uri = f"http://localhost:{callback_port}/oauth"
        self.environment = {
            "CLIENT_ID": CLIENT_ID,
            "CLIENT_SECRET": CLIENT_SECRET,
            "OAUTH_SCOPE": "account:read balance:read",
            "REDIRECT_URI": redirect_uri,
            "AUTH_URL": f"{self.url}{REALM}/protocol/openid-connect/auth",
            "TOKEN_URL": f"{self.url}{REALM}/protocol/openid-connect/token",
            "TEST_API_ENDPOINT": f"{self.url}/v2/account",
        }
        self.requests: list[tuple[str, str]] = []
        self.connections, self.exchanges = 0, 0
        self._ports: set[str] = set()
        self._log = log
        self._server = LoginServer(redirect_uri, expires_in, refresh_expires_in, code_lifetime)
        app = Flask(__name__, static_folder=None)
        add_routes(app, self._server)
        app.after_request(self._note)
        # The terminal is sipgate_oauth.py's, and the server would warn that a request waits.
        logging.getLogger("waitress").setLevel(logging.CRITICAL)
        self._sockets: dict[int, Any] = {}
        # One thread gives one answer at a time, so that nothing needs a lock.
        self._http = create_server(app, map=self._sockets, sockets=[listener], threads=1)
        self._thread = threading.Thread(target=self._http.run, daemon=True)

    def _note(self, response: Response) -> Response:
        self.requests.append((request.method, request.path))
        self._ports.add(request.environ["REMOTE_PORT"])
        self.connections, self.exchanges = len(self._ports), self._server.exchanges
        if self._log:
            line = f"{request.method} {request.path}: {g.get('outcome', response.status)}"
            # Escaped, because what a client sent could steer the terminal.
            print(line.encode("unicode_escape").decode(), flush=True)
        response.headers["Cache-Control"] = "no-store"  # RFC 6749, section 5.1
        return response

    def __enter__(self) -> "Sandbox":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # In its own thread, and with the idle connections, which would be served on.
        self._http.trigger.pull_trigger(lambda: wasyncore.close_all(self._sockets))
        self._thread.join()
        self._http.task_dispatcher.shutdown()


def run_script(arguments: list[str]) -> int:
    """Run sipgate_oauth.py in a process of its own. Out: its exit status."""
    with Sandbox() as sandbox:
        print(f"Sandbox: a stand-in for sipgate, at {sandbox.url}. No account is needed.")
        print("For a program of your own: python tests/sandbox.py --serve", flush=True)
        # The environment has it all: no config.env of the person's gets in the way.
        command = [sys.executable, str(SCRIPT), "--config", os.devnull, *arguments]
        status = subprocess.call(command, env=os.environ | sandbox.environment)
    if status == 0xC000013A:  # Ctrl+C on Windows
        return 130
    # A process that signal N ended has the status -N here, and 128 + N in a shell.
    return status if status >= 0 else 128 - status


def serve(redirect_uri: str) -> NoReturn:
    """Run the server alone, until Ctrl+C."""
    # Without ' and \\, a shell and python-dotenv read it alike.
    if redirect_uri and not re.fullmatch(r"https?://[!-&(-\[\]-~]+", redirect_uri):
        sys.exit("Error: REDIRECT_URI should look like http://localhost:8080/oauth.")
    with Sandbox(redirect_uri, log=True) as sandbox:
        print("# A stand-in for sipgate, until Ctrl+C. Its configuration:")
        for key, value in sandbox.environment.items():
            print(f"{key}={shlex.quote(value)}")
        print("# The requests:", flush=True)
        while True:
            time.sleep(3600)


def main() -> int:
    # As an exception, which also ends the script.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--serve", nargs="?", const="", metavar="REDIRECT_URI")
    try:
        if parser.parse_known_args()[0].serve is None:
            return run_script(sys.argv[1:])
        serve(parser.parse_args().serve)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
