# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "Authlib>=1.9,<2",
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
API, and refuses what they refuse, by the rules of Authlib:

    GET, POST .../auth   the login page; its answer is a redirect with an authorization code
    POST .../token       authorization code or refresh token in, fresh tokens out
    GET /v2/account      the account's data for an access token
"""

import argparse
import contextlib
import errno
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
from urllib.parse import parse_qsl, quote_plus, unquote, urlsplit

try:
    from authlib.common.urls import add_params_to_uri
    from authlib.integrations.flask_oauth2 import AuthorizationServer, ResourceProtector
    from authlib.oauth2 import OAuth2Error, rfc6749, rfc6750, rfc7636, rfc9207
    from flask import Flask, Response, jsonify, render_template_string, request
    from joserfc import jwt
    from joserfc.jwk import RSAKey
    from waitress import create_server, wasyncore  # type: ignore[import-untyped] # it has none
except ImportError as error:
    advice = 'Use the command under "Try it now" in README.md.'
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
# What Keycloak says both of an unknown client and of a wrong secret.
BAD_CLIENT = "Invalid client or Invalid client credentials"


# --- What is checked -----------------------------------------------------------------------------


@dataclass
class Login(rfc6749.AuthorizationCodeMixin, rfc6749.TokenMixin):
    """A login, and until when each code and token is valid that it was given."""

    redirect_uri: str
    scope: str
    code_challenge: str
    session_state: str
    code_challenge_method: str = "S256"
    valid_until: dict[tuple[str, str], float] = field(default_factory=dict)

    def give(self, kind: str, secret: str, lifetime: int) -> None:
        self.valid_until[kind, secret] = time.monotonic() + lifetime

    def has(self, kind: str, secret: str) -> bool:
        return time.monotonic() < self.valid_until.get((kind, secret), 0)

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.scope

    def check_client(self, client: rfc6749.ClientMixin) -> bool:
        return True

    def is_expired(self) -> bool:
        return False  # an access token that has expired finds no login

    is_revoked = is_expired


class LoginServer(AuthorizationServer, rfc6749.ClientMixin):
    """The authorization server, and what it knows of its one client."""

    def __init__(self, sandbox: "Sandbox") -> None:
        super().__init__()
        self.sandbox = sandbox
        self.logins: list[Login] = []
        self.register_grant(CodeGrant, [RequiredS256()])
        self.register_grant(RefreshGrant)
        self.register_extension(Issuer())

    def query_client(self, client_id: str) -> rfc6749.ClientMixin:
        if client_id != CLIENT_ID:
            what = "Client not found." if request.endpoint == "authorize" else BAD_CLIENT
            raise rfc6749.InvalidClientError(what, status_code=401)
        return self

    def check_client_secret(self, client_secret: str) -> bool:
        # In a header, a + may stand for a space (RFC 6749, section 2.3.1), which Authlib leaves.
        if client_secret not in (CLIENT_SECRET, unquote(quote_plus(CLIENT_SECRET))):
            raise rfc6749.InvalidClientError(BAD_CLIENT, None, 401, error="unauthorized_client")
        return True

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        if redirect_uri != self.sandbox.redirect_uri:
            raise rfc6749.InvalidRequestError("Invalid parameter: redirect_uri")
        return True

    def get_default_redirect_uri(self) -> str:
        return ""  # none: it has to be in the request

    def get_allowed_scope(self, scope: Any) -> str:
        return scope or ""

    def check_grant_type(self, grant_type: str) -> bool:
        return True

    def check_response_type(self, response_type: str) -> bool:
        return True

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return True

    def use_up(self, kind: str, secret: str, refusal: str) -> Login:
        """Look a code or a refresh token up, and end all that its login was given so far, so that
        its second use, of which one is a thief's, ends what came of the first (RFC 6749, section
        4.1.2; RFC 9700, section 4.14.2). Raises InvalidGrantError."""
        for login in self.logins:
            if (kind, secret) in login.valid_until:
                valid = login.has(kind, secret)
                login.valid_until = dict.fromkeys(login.valid_until, 0)
                if valid:
                    return login
        raise rfc6749.InvalidGrantError(refusal)

    def save_token(self, token: dict[str, Any], oauth: rfc6749.OAuth2Request) -> None:
        """Store the tokens, and make `token` the answer that Keycloak gives."""
        login: Any = oauth.authorization_code or oauth.refresh_token
        expires_in, refresh_expires_in = self.sandbox.expires_in, self.sandbox.refresh_expires_in
        login.give("access token", token["access_token"], expires_in)
        login.give("refresh token", token["refresh_token"], refresh_expires_in)
        self.sandbox.exchanges += oauth.authorization_code is not None
        token |= {"expires_in": expires_in, "refresh_expires_in": refresh_expires_in}
        token |= {"token_type": "bearer", "session_state": login.session_state}
        now = int(time.time())
        claims = {"iss": Issuer().get_issuer(), "aud": CLIENT_ID, "sub": "somebody"}
        times = {"iat": now, "exp": now + expires_in}
        token["id_token"] = jwt.encode({"alg": "RS256"}, claims | times, SIGNING_KEY)


class CodeGrant(rfc6749.AuthorizationCodeGrant):
    """Authorization code in, tokens out: RFC 6749, section 4.1. A user is their session's name."""

    server: LoginServer

    def create_authorization_response(self, redirect_uri: str, grant_user: str | None) -> Any:
        if grant_user:
            redirect_uri = add_params_to_uri(redirect_uri, {"session_state": grant_user})
        return super().create_authorization_response(redirect_uri, grant_user)

    def save_authorization_code(self, code: str, oauth: Any) -> None:
        form = oauth.payload.data
        login = Login(form["redirect_uri"], oauth.scope, form["code_challenge"], oauth.user)
        login.give("code", code, self.server.sandbox.code_lifetime)
        self.server.logins.append(login)

    def query_authorization_code(self, code: str, client: rfc6749.ClientMixin) -> Login:
        return self.server.use_up("code", code, "Code not valid")

    def delete_authorization_code(self, authorization_code: Login) -> None:
        """Nothing is left to do: it is used up."""

    def authenticate_user(self, authorization_code: Login) -> str:
        return authorization_code.session_state


class RequiredS256(rfc7636.CodeChallenge):
    """PKCE, RFC 7636. Authlib lets a confidential client go without, and allows `plain`."""

    SUPPORTED_CODE_CHALLENGE_METHOD = ["S256"]

    def validate_code_challenge(self, grant: CodeGrant, redirect_uri: str) -> None:
        if not request.values.get("code_challenge_method"):
            raise rfc6749.InvalidRequestError("Missing parameter: code_challenge_method")
        super().validate_code_challenge(grant, redirect_uri)


class RefreshGrant(rfc6749.RefreshTokenGrant):
    """Refresh token in, fresh tokens out: RFC 6749, section 6."""

    server: LoginServer
    TOKEN_ENDPOINT_AUTH_METHODS = CodeGrant.TOKEN_ENDPOINT_AUTH_METHODS
    INCLUDE_NEW_REFRESH_TOKEN = True

    def authenticate_refresh_token(self, refresh_token: str) -> Login:
        return self.server.use_up("refresh token", refresh_token, "Invalid refresh token")

    def revoke_old_credential(self, refresh_token: Any) -> None:
        """Nothing is left to do: it is used up."""

    def authenticate_user(self, refresh_token: Any) -> str:
        return str(refresh_token.session_state)


class Issuer(rfc9207.IssuerParameter):
    def get_issuer(self) -> str:
        return request.host_url.rstrip("/") + REALM


# --- What is served ------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sandbox</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<style>body { font: 1.1rem system-ui; max-width: 32rem; margin: 4rem auto; padding: 0 1rem }</style>
</head><body><h1>{{ title }}</h1>{% if grant %}
<p>A stand-in for sipgate on this computer. No account, no password.</p>
<p>The client <strong>{{ grant.request.payload.client_id }}</strong> asks for these scopes:</p>
<ul>{% for scope in grant.request.scope.split() %}<li>{{ scope }}</li>{% endfor %}</ul>
<form method="post"><button name="answer" value="allow">Allow</button>
<button name="answer" value="deny">Deny</button></form>{% endif %}</body></html>"""


def create_app(server: LoginServer) -> Flask:
    """Return the app with sipgate's addresses."""
    app = Flask(__name__, static_folder=None)
    app.config.update(OAUTH2_SCOPES_SUPPORTED=SCOPES, OAUTH2_REFRESH_TOKEN_GENERATOR=True)
    server.init_app(app)

    class TokenValidator(rfc6750.BearerTokenValidator):
        def authenticate_token(self, token: str) -> Login | None:
            return next((it for it in server.logins if it.has("access token", token)), None)

    protector = ResourceProtector()
    protector.register_token_validator(TokenValidator())

    @app.route(f"{REALM}/protocol/openid-connect/auth", methods=["GET", "POST"])
    def authorize() -> Any:
        grant = server.get_consent_grant()  # type: ignore[no-untyped-call] # untyped stub
        if request.method != "POST":  # which comes to the same address, parameters and all
            return render_template_string(PAGE, title="Sandbox login page", grant=grant)
        session = secrets.token_hex(16) if request.form.get("answer") == "allow" else None
        return server.create_authorization_response(grant=grant, grant_user=session)

    @app.post(f"{REALM}/protocol/openid-connect/token")
    def token() -> Any:
        if "grant_type" not in request.form:
            raise rfc6749.InvalidRequestError("Missing form parameter: grant_type")
        return server.create_token_response()

    @app.get("/v2/account")
    def account() -> Response:
        with protector.acquire("account:read"):
            return jsonify(ACCOUNT)

    @app.errorhandler(OAuth2Error)
    def refuse(error: OAuth2Error) -> Any:
        if request.endpoint == "authorize" and not error.redirect_uri:
            # Nobody is sent to an address that is not the client's (RFC 6749, section 4.1.2.1).
            return render_template_string(PAGE, title=error.description), f"400 {error.description}"
        response: Any = server.handle_response(*error())
        server.execute_hook("after_create_authorization_response", response)
        return response

    # Authlib fails so on what is not UTF-8, or where its error description cannot quote it.
    app.register_error_handler(ValueError, lambda error: ("Invalid request", 400))
    return app


def outcome_of(response: Response) -> str:
    """Tell what came of a request, from its answer: JSON, a redirect, or the status of a page."""
    said = response.get_json(silent=True) or dict(
        parse_qsl(urlsplit(response.location or "").query)
    )
    if "error" in said:
        return ": ".join(said[key] for key in ("error", "error_description") if key in said)
    if "code" in said:
        return "code issued"
    return "tokens issued" if "access_token" in said else response.status


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
            # With any other error, this computer does not have the address: nobody listens there.
            if error.errno in (errno.EADDRINUSE, errno.EACCES):  # EACCES: Windows keeps the port
                return False
    return True


# --- How it is run -------------------------------------------------------------------------------


@dataclass
class Sandbox:
    """The sandbox for tests, as a context manager: it serves inside of the `with` block.

    In: the redirect URI to register (by default at port 8080 or the next free one), the port to
    listen at (or the next free one; 0 is any), lifetimes in seconds, and whether to print a line
    for each request.
    Out: `environment`, the variables for sipgate_oauth.py; for tests `requests`, a list of (method,
    path), `connections`, how many they came on, and `exchanges`, how many codes gave tokens.
    """

    redirect_uri: str = ""
    port: int = 8081
    expires_in: int = 300
    refresh_expires_in: int = 30 * 24 * 3600
    code_lifetime: int = 60
    log: bool = False

    def __post_init__(self) -> None:
        listener = listen(self.port)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if not self.redirect_uri:
            callback_port = next(filter(is_free, itertools.count(8080)))
            self.redirect_uri = f"http://localhost:{callback_port}/oauth"
        self.environment = {
            "CLIENT_ID": CLIENT_ID,
            "CLIENT_SECRET": CLIENT_SECRET,
            "OAUTH_SCOPE": "account:read balance:read",
            "REDIRECT_URI": self.redirect_uri,
            "AUTH_URL": f"{self.url}{REALM}/protocol/openid-connect/auth",
            "TOKEN_URL": f"{self.url}{REALM}/protocol/openid-connect/token",
            "TEST_API_ENDPOINT": f"{self.url}/v2/account",
        }
        self.requests: list[tuple[str, str]] = []
        self.connections = self.exchanges = 0
        self._ports: set[str] = set()
        app = create_app(LoginServer(self))
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
        self.connections = len(self._ports)
        if self.log:
            line = f"{request.method} {request.path}: {outcome_of(response)}"
            # Escaped, because what a client sent could steer the terminal.
            print(line.encode("unicode_escape").decode(), flush=True)
        response.headers["Cache-Control"] = "no-store"  # RFC 6749, section 5.1
        if response.status_code == 403:  # RFC 6750, section 3
            response.headers["WWW-Authenticate"] = 'Bearer error="insufficient_scope"'
        return response

    def __enter__(self) -> "Sandbox":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.task_dispatcher.shutdown()  # which waits for the answer under way
        trigger = self._http.trigger
        with trigger.lock:  # without which the server's thread does not close it
            trigger.thunks.append(lambda: wasyncore.close_all(self._sockets))  # the idle ones, too
            trigger.pull_trigger()
        self._thread.join()


def run_script(arguments: list[str]) -> int:
    """Run sipgate_oauth.py in a process of its own. Out: its exit status."""
    with Sandbox() as sandbox:
        print(f"Sandbox: a stand-in for sipgate, at {sandbox.url}. No account is needed.")
        print("For a program of your own: repeat with --serve", flush=True)
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
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the script, too
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
