# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "Authlib>=1.9,<2",
#     "Flask>=3.1,<4",
#     "python-dotenv>=1.0.1,<2",
#     "requests>=2.32.4,<3",
# ]
# ///
"""A sipgate on this computer: see sipgate_oauth.py at work without an account.

    python tests/sandbox.py [options of sipgate_oauth.py]

This runs sipgate_oauth.py against a local server and ends with its exit status. The server has
the addresses of sipgate's login server (a Keycloak) and API, and refuses what they refuse:

    GET, POST .../auth   the login page; its answer is a redirect with an authorization code
    POST .../token       authorization code or refresh token in, fresh tokens out
    GET /v2/account      the account's data for an access token

The OAuth rules are Authlib's; this file holds what they are applied to, in memory.
Tests use it as a context manager: `with Sandbox() as sandbox: ...`.
"""

import contextlib
import errno
import hmac
import html
import io
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from authlib.common.urls import add_params_to_uri
    from authlib.integrations.flask_oauth2 import AuthorizationServer, ResourceProtector
    from authlib.oauth2 import OAuth2Error, rfc6749, rfc6750, rfc7636, rfc9207
    from flask import Flask, Response, jsonify, make_response, request
    from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler
except ImportError as error:
    if __name__ != "__main__":
        raise
    advice = "Install it with: python -m pip install -r tests/requirements-sandbox.txt"
    sys.exit(f"Error: {error}. {advice}")

SCRIPT = Path(__file__).resolve().parent.parent / "sipgate_oauth.py"
REALM = "/auth/realms/third-party"
CLIENT_ID = "sandbox"
# A client that forgets to encode one of these characters finds out here.
CLIENT_SECRET = "50% schön & $HOME + more"
SCOPES = ["account:read", "balance:read", "numbers:read", "users:read"]
ACCOUNT = {
    "company": "Müller Sandkästen GmbH",
    "mainProductType": "TEAM",
    "logoUrl": "",
    "verified": True,
}
USER = "somebody"


# --- What is stored: the client, and its logins --------------------------------------------------


class Client(rfc6749.ClientMixin):
    """The one client that is registered, a confidential one."""

    def __init__(self, redirect_uri: str) -> None:
        self.redirect_uri = redirect_uri

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return redirect_uri == self.redirect_uri

    def get_default_redirect_uri(self) -> str:
        return ""

    def check_client_secret(self, client_secret: str) -> bool:
        return hmac.compare_digest(client_secret.encode(), CLIENT_SECRET.encode())

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method in ("client_secret_post", "client_secret_basic")

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type in ("authorization_code", "refresh_token")

    def get_allowed_scope(self, scope: Any) -> str:
        return scope or ""


@dataclass
class Login(rfc6749.AuthorizationCodeMixin, rfc6749.TokenMixin):
    """What one login was given: first a code, then two tokens, which each refresh replaces."""

    session_state: str
    redirect_uri: str
    scope: str
    code_challenge: str
    code_challenge_method: str
    code: str
    code_expires_at: float
    code_used: bool = False
    access_token: str | None = None
    access_token_expires_at: float = 0
    refresh_token: str | None = None
    refresh_token_expires_at: float = 0

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.scope

    def check_client(self, client: rfc6749.ClientMixin) -> bool:
        return isinstance(client, Client)

    def is_expired(self) -> bool:
        return time.monotonic() >= self.access_token_expires_at

    def is_revoked(self) -> bool:
        return self.access_token is None


# --- What is checked: Authlib's rules ------------------------------------------------------------


class LoginServer(AuthorizationServer):
    """The authorization server of RFC 6749. Lifetimes are in seconds."""

    def __init__(
        self, redirect_uri: str, expires_in: int, refresh_expires_in: int, code_lifetime: int
    ) -> None:
        super().__init__()
        self.client = Client(redirect_uri)
        self.expires_in = expires_in
        self.refresh_expires_in = refresh_expires_in
        self.code_lifetime = code_lifetime
        self.logins: list[Login] = []
        self.exchanges = 0
        self.register_grant(CodeGrant, [RequiredS256()])
        self.register_grant(RefreshGrant)

    def query_client(self, client_id: str) -> Client:
        if client_id != CLIENT_ID:
            raise rfc6749.InvalidClientError("Client not found.")
        return self.client

    def authenticate_client(self, *arguments: Any) -> rfc6749.ClientMixin:
        try:
            return super().authenticate_client(*arguments)
        except (rfc6749.InvalidClientError, UnicodeDecodeError) as error:
            # Authlib tells which part is wrong, and trips over a header that is not UTF-8.
            raise rfc6749.InvalidClientError(
                "Invalid client or Invalid client credentials", status_code=401
            ) from error

    def save_token(self, token: dict[str, Any], request: rfc6749.OAuth2Request) -> None:
        """Store the tokens, and add what Keycloak says of them to `token`, the answer."""
        login: Any = request.authorization_code or request.refresh_token
        token["expires_in"] = self.expires_in
        token["refresh_expires_in"] = self.refresh_expires_in
        token["session_state"] = login.session_state
        login.access_token = token["access_token"]
        login.access_token_expires_at = time.monotonic() + self.expires_in
        login.refresh_token = token["refresh_token"]
        login.refresh_token_expires_at = time.monotonic() + self.refresh_expires_in
        if request.authorization_code:
            self.exchanges += 1


class CodeGrant(rfc6749.AuthorizationCodeGrant):
    """Authorization code in, tokens out: RFC 6749, section 4.1."""

    server: LoginServer

    @staticmethod
    def validate_authorization_redirect_uri(oauth: Any, client: rfc6749.ClientMixin) -> str:
        """Raises InvalidRequestError unless it is the registered one to the letter."""
        if not client.check_redirect_uri(oauth.payload.redirect_uri):
            raise rfc6749.InvalidRequestError("Invalid parameter: redirect_uri")
        return str(oauth.payload.redirect_uri)

    def create_authorization_response(self, redirect_uri: str, grant_user: Any) -> Any:
        self.session_state = str(uuid.uuid4())
        if grant_user:
            redirect_uri = add_params_to_uri(redirect_uri, {"session_state": self.session_state})
        return super().create_authorization_response(redirect_uri, grant_user)

    def save_authorization_code(self, code: str, oauth: Any) -> None:
        self.server.logins.append(
            Login(
                session_state=self.session_state,
                redirect_uri=oauth.payload.redirect_uri,
                scope=oauth.scope,
                code_challenge=oauth.payload.data["code_challenge"],
                code_challenge_method=oauth.payload.data["code_challenge_method"],
                code=code,
                code_expires_at=time.monotonic() + self.server.code_lifetime,
            )
        )

    def query_authorization_code(self, code: str, client: rfc6749.ClientMixin) -> Login:
        """Look a code up and use it up, whatever comes of this exchange.

        Raises InvalidGrantError if it is unknown, expired or used. A second use revokes what the
        first one was given: one of the two was a thief's (RFC 6749, section 4.1.2).
        """
        for login in self.server.logins:
            if login.code == code and login.code_used:
                login.access_token = login.refresh_token = None
            elif login.code == code and time.monotonic() < login.code_expires_at:
                login.code_used = True
                return login
        raise rfc6749.InvalidGrantError("Code not valid")

    def delete_authorization_code(self, authorization_code: Login) -> None:
        """Nothing is left to do: looking the code up has used it up."""

    def authenticate_user(self, authorization_code: Login) -> str:
        return USER


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
        """Raises InvalidGrantError if the token is unknown, replaced, revoked or expired."""
        now = time.monotonic()
        for login in self.server.logins:
            if login.refresh_token == refresh_token and now < login.refresh_token_expires_at:
                return login
        raise rfc6749.InvalidGrantError("Invalid refresh token")

    def revoke_old_credential(self, refresh_token: Any) -> None:
        """Nothing is left to do: save_token has replaced both tokens."""

    def authenticate_user(self, refresh_token: Any) -> str:
        return USER


class Issuer(rfc9207.IssuerParameter):
    """Names the server in each redirect: the parameter `iss` of RFC 9207."""

    def get_issuer(self) -> str:
        return request.host_url.rstrip("/") + REALM


# --- What is served ------------------------------------------------------------------------------


def page(body: str, status: int = 200) -> Response:
    """An HTML page in the reader's colours, light or dark."""
    return Response(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sandbox</title>'
        '<meta name="viewport" content="width=device-width">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        "<style>body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 32rem;"
        " margin: 4rem auto; padding: 0 1rem } button { font: inherit; padding: .4rem 1.6rem }"
        f"</style></head><body>{body}</body></html>",
        status,
    )


def login_page(scope: str) -> Response:
    """The login page. Its form posts to the page's own address, parameters and all."""
    scopes = "".join(f"<li>{html.escape(name)}</li>" for name in scope.split())
    return page(
        "<h1>Sandbox login</h1>"
        "<p>A stand-in for sipgate on this computer. No account, no password.</p>"
        f"<p>The client <strong>{CLIENT_ID}</strong> asks for these scopes:</p><ul>{scopes}</ul>"
        '<form method="post"><button name="answer" value="allow">Allow</button> '
        '<button name="answer" value="deny">Deny</button></form>'
    )


def add_routes(app: Flask, login: LoginServer, requests: list[tuple[str, str]]) -> None:
    """Give the app sipgate's addresses. Each request is noted in `requests`."""
    app.config["OAUTH2_SCOPES_SUPPORTED"] = SCOPES
    app.config["OAUTH2_REFRESH_TOKEN_GENERATOR"] = True
    login.init_app(app)

    class TokenValidator(rfc6750.BearerTokenValidator):
        def authenticate_token(self, token_string: str) -> Login | None:
            return next((it for it in login.logins if it.access_token == token_string), None)

    protector = ResourceProtector()
    protector.register_token_validator(TokenValidator())

    @app.before_request
    def note() -> None:
        requests.append((request.method, request.path))

    @app.route(f"{REALM}/protocol/openid-connect/auth", methods=["GET", "POST"])
    def authorize() -> Response:
        try:
            grant = login.get_consent_grant()  # type: ignore[no-untyped-call] # untyped stub
        except OAuth2Error as error:
            if not error.redirect_uri:
                # Nobody is sent to an address that is not the client's (RFC 6749, 4.1.2.1).
                return page(f"<h1>{html.escape(error.description)}</h1>", 400)
            return make_response(login.handle_response(*error()))
        if request.method != "POST":
            return login_page(grant.request.scope)
        user = USER if request.form.get("answer") == "allow" else None
        return make_response(login.create_authorization_response(grant=grant, grant_user=user))

    @app.post(f"{REALM}/protocol/openid-connect/token")
    def token() -> Response:
        return make_response(login.create_token_response())

    @app.get("/v2/account")
    def account() -> Response:
        with protector.acquire("account:read"):
            return jsonify(ACCOUNT)

    @app.after_request
    def name_issuer(response: Response) -> Response:
        Issuer().add_issuer_parameter(login, response)
        return response

    @app.errorhandler(ValueError)
    def malformed(error: ValueError) -> Response:
        """Authlib fails so where it cannot quote a parameter in its error description."""
        return page("<h1>Invalid request</h1>", 400)


class Server(ThreadedWSGIServer):
    """A thread for each connection, but one answer at a time: nothing else needs a lock."""

    def __init__(self, listener: socket.socket, app: Flask) -> None:
        self.connections: list[socket.socket] = []
        self.one_at_a_time = threading.Lock()
        # Werkzeug duplicates the listener.
        with listener:
            host, port = listener.getsockname()
            super().__init__(host, port, app, KeepAliveHandler, fd=listener.fileno())

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address


class KeepAliveHandler(WSGIRequestHandler):
    """HTTP/1.1 with keep-alive, as at sipgate; Werkzeug's own closes after each answer."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def run_wsgi(self) -> None:
        environ = self.make_environ()
        # Read to the end, or the rest would be taken for the next request.
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        environ["wsgi.input"] = io.BytesIO(body)
        with self.server.one_at_a_time:
            response = Response.from_app(self.server.app, environ, buffered=True)
        self.send_response(response.status_code)
        for name, value in response.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(response.get_data())

    def log(self, type: str, message: str, *arguments: Any) -> None:
        """Keep silent: the terminal is sipgate_oauth.py's."""


# EACCES is what Windows says of a port that it keeps for itself.
TAKEN = (errno.EADDRINUSE, errno.EACCES)


def listen(port: int) -> socket.socket:
    """Listen on 127.0.0.1 at the port or the next free one; 0 is any."""
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            port += 1


def is_free(port: int) -> bool:
    """Whether a client can listen at the port on both addresses that `localhost` stands for."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            # Any other error: this computer does not have the address, so nobody listens there.
            if error.errno in TAKEN:
                return False
    return True


# --- How it is run -------------------------------------------------------------------------------


class Sandbox:
    """The sandbox as a context manager: it serves inside of the `with` block.

    In: the redirect URI to register (by default at port 8080 or the next free one), the port to
    listen at (or the next free one; 0 is any), and lifetimes in seconds.
    Out: `environment`, the variables for sipgate_oauth.py. For tests there are `requests`, each
    request as (method, path), `connections`, the number of TCP connections accepted, and
    `exchanges`, the number of codes exchanged for tokens.
    """

    def __init__(
        self,
        redirect_uri: str = "",
        port: int = 8081,
        expires_in: int = 300,
        refresh_expires_in: int = 1800,
        code_lifetime: int = 60,
    ) -> None:
        app = Flask(__name__, static_folder=None)
        self._server = Server(listen(port), app)
        if not redirect_uri:
            callback_port = next(filter(is_free, itertools.count(8080)))
            redirect_uri = f"http://localhost:{callback_port}/oauth"
        self._login = LoginServer(redirect_uri, expires_in, refresh_expires_in, code_lifetime)
        self.requests: list[tuple[str, str]] = []
        add_routes(app, self._login, self.requests)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.environment = {
            "CLIENT_ID": CLIENT_ID,
            "CLIENT_SECRET": CLIENT_SECRET,
            "OAUTH_SCOPE": "account:read balance:read",
            "REDIRECT_URI": redirect_uri,
            "AUTH_URL": f"{self.url}{REALM}/protocol/openid-connect/auth",
            "TOKEN_URL": f"{self.url}{REALM}/protocol/openid-connect/token",
            "TEST_API_ENDPOINT": f"{self.url}/v2/account",
        }

    @property
    def connections(self) -> int:
        return len(self._server.connections)

    @property
    def exchanges(self) -> int:
        return self._login.exchanges

    def __enter__(self) -> "Sandbox":
        # The argument is how often the server looks whether it is to stop, in seconds.
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=[0.05], daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        # An idle connection would be served on, by a sandbox that is over.
        for connection in self._server.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def run_script(arguments: list[str], environment: dict[str, str]) -> int:
    """Run sipgate_oauth.py in a process of its own. Out: its exit status."""
    command = [sys.executable, str(SCRIPT), *arguments]
    script = subprocess.Popen(command, env=os.environ | environment)
    try:
        status = script.wait()
    finally:
        # A terminal sends Ctrl+C to both: the script has a moment (in seconds) to end by itself,
        # or until the next Ctrl+C.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            script.wait(timeout=1.5)
        script.kill()
        script.wait()
    # A process that signal N ended has the status -N here, and 128 + N in a shell.
    return status if status >= 0 else 128 - status


def main() -> int:
    try:
        with Sandbox() as sandbox:
            print(
                f"Sandbox: a stand-in for sipgate, at {sandbox.url}. No account is needed.",
                flush=True,
            )
            # The environment has it all: no config.env of the person's gets in the way.
            return run_script(["--config", os.devnull, *sys.argv[1:]], sandbox.environment)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
