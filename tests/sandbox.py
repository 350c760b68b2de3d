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
"""A stand-in for sipgate on this computer: see sipgate_oauth.py at work without an account.

    python tests/sandbox.py [options of sipgate_oauth.py]
    python tests/sandbox.py --serve [REDIRECT_URI]

The first runs sipgate_oauth.py against a local server and ends with its exit status. The second
runs the server alone, for a program of your own: it prints the configuration and then, for each
request, what came of it and how to correct a mistake. The server has the addresses of sipgate's
login server (a Keycloak) and API, and refuses what they refuse, by the rules of Authlib:

    GET, POST .../auth   the login page; its answer is a redirect with an authorization code
    POST .../token       authorization code or refresh token in, fresh tokens out
    GET /v2/account      the account's data for an access token
"""

import signal
import sys

if __name__ == "__main__":
    # Ctrl+C ends the sandbox at once, even while it loads. (See run_script for later.)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import logging
import os
import re
import secrets
import shlex
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote_plus, urlsplit

try:
    from authlib.common.urls import add_params_to_uri
    from authlib.integrations.flask_oauth2 import AuthorizationServer
    from authlib.oauth2 import OAuth2Error, rfc6749, rfc6750, rfc7636
    from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
    from flask import Flask, Response, g, jsonify, render_template_string, request
    from joserfc import jwt
    from joserfc.jwk import RSAKey
    from waitress import create_server, wasyncore  # type: ignore[import-untyped] # no type hints
except ImportError as error:
    sys.exit(f'Error: {error}. Use the command under "Try it now" in README.md.')

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
FORM = "application/x-www-form-urlencoded"
SIGNING_KEY = RSAKey.generate_key(2048)
# What Keycloak says both of an unknown client and of a wrong secret.
BAD_CLIENT = "Invalid client or Invalid client credentials"


# --- What is checked -----------------------------------------------------------------------------


@dataclass
class Login(rfc6749.AuthorizationCodeMixin, rfc6749.TokenMixin):
    """A login, and until when each code and token issued for it is valid."""

    redirect_uri: str
    scope: str
    code_challenge: str
    session_state: str
    has_wrong_state: bool
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


class LoginServer(AuthorizationServer, rfc6749.ClientMixin):
    """The authorization server, and what it knows of its one client."""

    def __init__(self, sandbox: "Sandbox") -> None:
        super().__init__()
        self.sandbox = sandbox
        self.logins: list[Login] = []
        self.register_grant(CodeGrant, [RequiredS256()])
        self.register_grant(RefreshGrant)

    def query_client(self, client_id: str) -> rfc6749.ClientMixin:
        if client_id != CLIENT_ID:
            raise rfc6749.InvalidClientError("Client not found.")
        return self

    def authenticate_client(self, oauth: Any, methods: Any, endpoint: str = "token") -> Any:
        """Check id and secret, which are in the form or, each form-encoded, in an HTTP Basic header
        (RFC 6749, section 2.3.1). Authlib does not decode the + there, which stands for a space."""
        client_id, secret = request.form.get("client_id"), request.form.get("client_secret")
        header = request.authorization
        if header and header.type == "basic":
            client_id, secret = map(unquote_plus, (header.username or "", header.password or ""))
        if client_id != CLIENT_ID:
            raise rfc6749.InvalidClientError(BAD_CLIENT, status_code=401)
        if secret != CLIENT_SECRET:
            raise rfc6749.UnauthorizedClientError(BAD_CLIENT, status_code=401)
        return self

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        if redirect_uri != self.sandbox.redirect_uri:
            raise rfc6749.InvalidRequestError("Invalid parameter: redirect_uri")
        return True

    def get_default_redirect_uri(self) -> str:
        return ""  # none: it has to be in the request

    def get_allowed_scope(self, scope: Any) -> str:
        return scope or ""

    def check_grant_type(self, *args: Any, **named: Any) -> bool:
        return True

    check_response_type = check_grant_type

    def use_up(self, kind: str, secret: str, refusal: str) -> Login:
        """Look up a code or a refresh token, and invalidate everything issued for its login. So a
        second use, which may be a thief's, also ends what the first one obtained (RFC 6749, section
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
        g.state_was_not_checked = login.has_wrong_state
        token |= {"expires_in": expires_in, "refresh_expires_in": refresh_expires_in}
        token |= {"token_type": "bearer", "session_state": login.session_state}
        now = int(time.time())
        claims = {"iss": self.sandbox.issuer, "aud": CLIENT_ID, "sub": "somebody", "iat": now}
        claims["exp"] = now + expires_in
        token["id_token"] = jwt.encode({"alg": "RS256"}, claims, SIGNING_KEY)


class CodeGrant(rfc6749.AuthorizationCodeGrant):
    """Authorization code in, tokens out (RFC 6749, section 4.1). A session id names the user."""

    server: LoginServer

    def create_authorization_response(self, redirect_uri: str, grant_user: str | None) -> Any:
        if grant_user:
            redirect_uri = add_params_to_uri(redirect_uri, {"session_state": grant_user})
        if request.form.get("answer") == "wrong-state":
            parameters = {**request.values, "state": secrets.token_urlsafe()}
            self.request.payload = BasicOAuth2Payload(parameters)
        return super().create_authorization_response(redirect_uri, grant_user)

    def save_authorization_code(self, code: str, oauth: Any) -> None:
        form = oauth.payload.data
        wrong = request.form.get("answer") == "wrong-state"
        login = Login(form["redirect_uri"], oauth.scope, form["code_challenge"], oauth.user, wrong)
        login.give("code", code, self.server.sandbox.code_lifetime)
        self.server.logins.append(login)

    def query_authorization_code(self, code: str, client: rfc6749.ClientMixin) -> Login:
        return self.server.use_up("code", code, "Code not valid")

    def delete_authorization_code(self, authorization_code: Login) -> None:
        """Nothing is left to do: use_up has invalidated it."""

    def authenticate_user(self, authorization_code: Login) -> str:
        return authorization_code.session_state


class RequiredS256(rfc7636.CodeChallenge):
    """PKCE, RFC 7636. Authlib lets a confidential client omit PKCE, and allows `plain`."""

    SUPPORTED_CODE_CHALLENGE_METHOD = ["S256"]

    def validate_code_challenge(self, grant: CodeGrant, redirect_uri: str) -> None:
        if not request.values.get("code_challenge_method"):
            raise rfc6749.InvalidRequestError("Missing parameter: code_challenge_method")
        if not re.fullmatch(r"[\w.~-]{43,128}", request.values.get("code_challenge", ""), re.ASCII):
            raise rfc6749.InvalidRequestError("Invalid parameter: code_challenge")
        super().validate_code_challenge(grant, redirect_uri)

    def validate_code_verifier(self, grant: CodeGrant, result: Any) -> None:
        if "code_verifier" not in request.form:
            raise rfc6749.InvalidGrantError("PKCE code verifier not specified")
        super().validate_code_verifier(grant, result)


class RefreshGrant(rfc6749.RefreshTokenGrant):
    """Refresh token in, fresh tokens out: RFC 6749, section 6."""

    server: LoginServer
    INCLUDE_NEW_REFRESH_TOKEN = True

    def authenticate_refresh_token(self, refresh_token: str) -> Login:
        return self.server.use_up("refresh token", refresh_token, "Invalid refresh token")

    def revoke_old_credential(self, refresh_token: Any) -> None:
        """Nothing is left to do: use_up has invalidated it."""

    def authenticate_user(self, refresh_token: Any) -> str:
        return str(refresh_token.session_state)


# --- What is explained ---------------------------------------------------------------------------

CODE_CHALLENGE = "the SHA-256 of the code_verifier in base64url: 43 characters, no = at the end"
# A pattern for the words of a refusal, the parameter to correct, and what it should be.
EXPECTED = [
    ("Client not found|client_id|invalid_client", "client_id", CLIENT_ID),
    ("unauthorized_client", "client_secret", "the CLIENT_SECRET printed at the start"),
    ("redirect_uri", "redirect_uri", "{redirect_uri}"),
    ("response_type", "response_type", "code"),
    ("invalid_scope", "scope", f"one or more of {' '.join(sorted(SCOPES))}, with spaces between"),
    ("code_challenge_method", "code_challenge_method", "S256 (PKCE, RFC 7636)"),
    ("code_challenge", "code_challenge", CODE_CHALLENGE),
    ("grant_type", "grant_type", "authorization_code or refresh_token"),
    ("[Cc]ode.(verifier|challenge)", "code_verifier", "the one that gave the code_challenge"),
    ("Code not valid|'code'", "code", "a new one: each works once, and not for long"),
    ("refresh.token", "refresh_token", "the newest: each works once, a second use ends the login"),
    ("insufficient_scope", "scope", "account:read, or more, in the authorize URL"),
]


def explain(outcome: str, redirect_uri: str) -> str:
    """Return what is wrong with this request and how to correct it, or an empty text."""
    header, sent = request.authorization, request.values
    if not request.endpoint:
        return "There is nothing at this address: use those that were printed at the start"
    if g.get("state_was_not_checked"):
        return "The code came with a wrong state: the program did not check it"
    if request.endpoint == "token" and request.mimetype != FORM:
        return f"The body is {request.mimetype or 'of no type'}: it should be a form ({FORM})"
    if "unauthorized_client" in outcome and header and header.password == CLIENT_SECRET:
        return "Form-encode the id and the secret before they go into the header (RFC 6749, 2.3.1)"
    for pattern, name, expected in EXPECTED:
        if re.search(pattern, outcome):
            problem = "wrong" if sent.get(name) or (header and "client" in name) else "missing"
            return f"{name} is {problem}: it should be {expected.format(redirect_uri=redirect_uri)}"
    if request.endpoint != "authorize" or not outcome.startswith(("200", "code")):
        return ""
    # What Keycloak accepts here, and what goes wrong later.
    if len(sent["code_challenge"]) != 43:
        return f"No code_verifier will fit this code_challenge: it should be {CODE_CHALLENGE}"
    if sent.get("answer") == "wrong-state":
        return "The state in the redirect is wrong: if a token request follows, it was not checked"
    if not sent.get("state"):
        return "No state was sent: without it, a program cannot recognize a forged callback"
    return ""


# --- What is served ------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sandbox</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<style>body { font: 1.1rem system-ui; max-width: 32rem; margin: 4rem auto; padding: 0 1rem }</style>
</head><body><h1>{{ title }}</h1><p>{{ explanation }}</p>{% if grant %}
<p>A stand-in for sipgate on this computer. No account, no password.</p>
<p>The client <strong>{{ grant.request.payload.client_id }}</strong> asks for these scopes:</p>
<ul>{% for scope in grant.request.scope.split() %}<li>{{ scope }}</li>{% endfor %}</ul>
<form method="post"><button name="answer" value="allow">Allow</button>
<button name="answer" value="deny">Deny</button>
<button name="answer" value="wrong-state">Allow, but return a wrong state</button></form>
{% endif %}</body></html>"""


def create_app(server: LoginServer) -> Flask:
    """Return the app with sipgate's addresses."""
    app = Flask(__name__, static_folder=None)
    app.config.update(OAUTH2_SCOPES_SUPPORTED=SCOPES, OAUTH2_REFRESH_TOKEN_GENERATOR=True)
    server.init_app(app)

    @app.route(f"{REALM}/protocol/openid-connect/auth", methods=["GET", "POST"])
    def authorize() -> Any:
        grant = server.get_consent_grant()  # type: ignore[no-untyped-call] # untyped in the stubs of Authlib
        if request.method != "POST":  # the form posts to the same URL
            return render_template_string(PAGE, title="Sandbox login page", grant=grant)
        allowed = request.form.get("answer") in ("allow", "wrong-state")
        session = secrets.token_hex(16) if allowed else None
        return server.create_authorization_response(grant=grant, grant_user=session)

    @app.post(f"{REALM}/protocol/openid-connect/token")
    def token() -> Any:
        if request.mimetype != FORM or "grant_type" not in request.form:
            raise rfc6749.InvalidRequestError("Missing form parameter: grant_type")
        return server.create_token_response()

    @app.get("/v2/account")
    def account() -> Response:
        token = str(request.authorization and request.authorization.token)
        login = next((it for it in server.logins if it.has("access token", token)), None)
        if not login:
            raise rfc6750.InvalidTokenError
        if "account:read" not in login.scope.split():
            raise rfc6750.InsufficientScopeError
        return jsonify(ACCOUNT)

    @app.errorhandler(OAuth2Error)
    def refuse(error: OAuth2Error) -> Any:
        if request.endpoint == "authorize" and not error.redirect_uri:
            # Nobody is sent to an address that is not the client's (RFC 6749, section 4.1.2.1).
            title = error.description or str(error.error)
            explanation = explain(title, server.sandbox.redirect_uri)
            page = render_template_string(PAGE, title=title, explanation=explanation)
            return page, f"400 {title}"
        return server.handle_response(*error())

    # Authlib raises ValueError for input that is not UTF-8, or that it cannot quote.
    app.register_error_handler(ValueError, lambda error: ("Invalid request", 400))
    return app


def outcome_of(response: Response) -> str:
    """Tell what came of a request, from its answer: JSON, a redirect, or the status of a page."""
    said = response.get_json(silent=True)
    said = said or dict(parse_qsl(urlsplit(response.location or "").query))
    if "error" in said:
        return ": ".join(said[key] for key in ("error", "error_description") if key in said)
    if "code" in said:
        return "code issued"
    return "tokens issued" if "access_token" in said else response.status


def listen(first_port: int, with_callback: bool) -> socket.socket:
    """Listen on 127.0.0.1 at first_port or, if it is taken, two higher, and so on. (0 is any port.)
    with_callback: take a port only if the one below, for the callback, is free, too. No other
    sandbox uses that one, because its server would need the port that this one has."""
    for port in range(first_port, 65536, 2):
        with contextlib.suppress(OSError):
            listener = socket.create_server(("127.0.0.1", port))
            if not with_callback or is_free(port - 1):
                return listener
            listener.close()
    raise OSError(f"no port is free from {first_port} on")


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

    In: the redirect URI to register (by default, with the port below the server's), the port to
    listen at (0 is any free one; see listen), lifetimes in seconds, and whether to print a line for
    each request.
    Out: `environment`, the variables for sipgate_oauth.py; for tests `connections`, how many
    connections were used, and `exchanges`, how many codes gave tokens.
    """

    redirect_uri: str = ""
    port: int = 8081
    expires_in: int = 300
    refresh_expires_in: int = 30 * 24 * 3600
    code_lifetime: int = 60
    log: bool = False

    def __post_init__(self) -> None:
        listener = listen(self.port, with_callback=not self.redirect_uri)
        port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.issuer = self.url + REALM
        self.redirect_uri = self.redirect_uri or f"http://localhost:{port - 1}/oauth"
        self.environment = {
            "CLIENT_ID": CLIENT_ID,
            "CLIENT_SECRET": CLIENT_SECRET,
            "OAUTH_SCOPE": "account:read balance:read",
            "REDIRECT_URI": self.redirect_uri,
            "AUTH_URL": f"{self.url}{REALM}/protocol/openid-connect/auth",
            "TOKEN_URL": f"{self.url}{REALM}/protocol/openid-connect/token",
            "TEST_API_ENDPOINT": f"{self.url}/v2/account",
        }
        self.connections = self.exchanges = 0
        self._ports: set[str] = set()
        app = create_app(LoginServer(self))
        app.after_request(self._note)
        # Keep waitress's warnings about waiting requests out of sipgate_oauth.py's terminal.
        logging.getLogger("waitress").setLevel(logging.CRITICAL)
        self._sockets: dict[int, Any] = {}
        # One thread gives one answer at a time, so that nothing needs a lock.
        self._http = create_server(app, map=self._sockets, sockets=[listener], threads=1)
        self._thread = threading.Thread(target=self._http.run, daemon=True)

    def _note(self, response: Response) -> Response:
        if request.endpoint == "authorize" and response.location:  # RFC 9207, section 2
            response.location = add_params_to_uri(response.location, {"iss": self.issuer})
        self._ports.add(request.environ["REMOTE_PORT"])
        self.connections = len(self._ports)
        if self.log:
            outcome = outcome_of(response).rstrip(".")
            explanation = explain(outcome, self.redirect_uri)
            line = f"{request.method} {request.path}: {outcome}"
            line += f". {explanation}" if explanation else ""
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
    """Run sipgate_oauth.py in a process of its own, and return its exit status."""
    with Sandbox() as sandbox:
        print(f"Sandbox: a stand-in for sipgate, at {sandbox.url}. No account is needed.")
        print("For a program of your own: repeat with --serve", flush=True)
        # All values are in the environment, so the user's config.env cannot interfere.
        command = [sys.executable, str(SCRIPT), "--config", os.devnull, *arguments]
        script = subprocess.Popen(command, env=os.environ | sandbox.environment)

        def end(number: int, frame: object) -> NoReturn:
            script.kill()
            os._exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        status = script.wait()
    if status == 0xC000013A:  # Ctrl+C on Windows
        return 130
    # A process that signal N ended has the status -N here, and 128 + N in a shell.
    return status if status >= 0 else 128 - status


def serve(redirect_uri: str) -> NoReturn:
    """Run the server alone, until Ctrl+C."""
    with Sandbox(redirect_uri, log=True) as sandbox:
        print("# A stand-in for sipgate, until Ctrl+C. Its configuration:")
        for key, value in sandbox.environment.items():
            print(f"{key}={shlex.quote(value)}")
        print("# On the login page, try each of the three buttons. The requests:", flush=True)
        while True:
            time.sleep(3600)


def main() -> int:
    about = "Run sipgate_oauth.py against a stand-in for sipgate. No account is needed."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    serve_help = "run only the server, for a program of your own with this redirect URI"
    parser.add_argument("--serve", nargs="?", const="", metavar="REDIRECT_URI", help=serve_help)
    script = parser.add_argument_group("options of sipgate_oauth.py")
    script.add_argument("--no-browser", action="store_true", help="do not open the browser")
    script.add_argument(
        "--timeout", metavar="SECONDS", type=float, help="how long to wait for the login"
    )
    script.add_argument("--show-tokens", action="store_true", help="print tokens in full")
    options = parser.parse_args()
    # Without ' and \\, a shell and python-dotenv read it alike.
    if options.serve and not re.fullmatch(r"https?://[!-&(-\[\]-~]+", options.serve):
        parser.error("REDIRECT_URI should look like http://localhost:8080/oauth")
    if options.serve is not None and (options.no_browser or options.timeout or options.show_tokens):
        parser.error("--serve does not run sipgate_oauth.py: leave out its options")
    if options.serve is None:
        return run_script(sys.argv[1:])
    serve(options.serve)


if __name__ == "__main__":
    sys.exit(main())
