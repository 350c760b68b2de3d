# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "Authlib>=1.9,<2",
#     "Flask>=3.1,<4",
#     "joserfc>=1.7,<2",
#     "python-dotenv>=1.0.1,<2",
#     "requests>=2.32.4,<3",
#     "waitress>=3.0.2,<4",
#     "Werkzeug>=3.1.9,<4",
# ]
# ///
"""A stand-in for sipgate on this computer: see sipgate_oauth.py at work without an account.

    python tests/sandbox.py [options of sipgate_oauth.py]
    python tests/sandbox.py --serve [REDIRECT_URI]

The first command runs sipgate_oauth.py against a local server and exits with that program's status.
The second runs only the server, for a program of your own: it prints the configuration and then a
line for each request, which says how to correct a mistake.

The server has the paths of sipgate's login server (a Keycloak) and API and, as far as is known, the
rules: the tests compare it with a Keycloak, and its tokens look like those in sipgate's
documentation. On purpose, it requires PKCE, which sipgate's examples do not send. RFC 9700, section
2.1.1, recommends it for clients that have a secret.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends it quietly, even while it loads.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote_plus, urlsplit

try:
    from authlib.common.urls import add_params_to_uri
    from authlib.integrations.flask_oauth2 import AuthorizationServer
    from authlib.oauth2 import OAuth2Error, rfc6749, rfc6750, rfc7636
    from flask import Flask, Response, g, jsonify, render_template_string, request
    from joserfc import jwt
    from joserfc.jwk import RSAKey
    from waitress import create_server, wasyncore  # type: ignore[import-untyped] # no type hints
    from werkzeug.exceptions import MethodNotAllowed
except ImportError as error:
    sys.exit(f'Error: {error}. Use the command under "Try it now" in README.md.')

SCRIPT = Path(__file__).resolve().parent.parent / "sipgate_oauth.py"
REALM = "/auth/realms/third-party"
ENDPOINTS = f"{REALM}/protocol/openid-connect"
CLIENT_ID = "sandbox"
# A program that does not encode one of these characters finds out here.
CLIENT_SECRET = "50%25 off & $HOME + more"
ACCOUNT = {"company": "Müller Sandkästen GmbH", "mainProductType": "TEAM", "verified": True}
FORM = "application/x-www-form-urlencoded"
# In seconds
LIFETIMES = {"code": 60, "access_token": 300, "refresh_token": 30 * 24 * 3600, "id_token": 300}
KINDS = {"access_token": "Bearer", "refresh_token": "Refresh", "id_token": "ID"}
SIGNING_KEY = RSAKey.generate_key(2048)
# Keycloak has one message for an unknown client and for a wrong secret.
BAD_CLIENT = "Invalid client or Invalid client credentials"

# sipgate's published scopes, and two others that programs use: channels:read, offline_access
SCOPES_URL = "https://developer.sipgate.io/rest-api/oauth2-scopes/"
READ_AND_WRITE = """account addresses authorization:oauth:clients authorization:oauth2:clients
autorecording:greeting blacklist callrestrictions contacts contracts devices devices:callerid
devices:localprefix devices:sim devices:singlerowdisplay devices:tariffannouncement events faxlines
history labels notifications numbers payment:methods phonelines phonelines:blockanonymous
phonelines:busyonbusy phonelines:devices phonelines:forwardings phonelines:parallelforwardings
phonelines:sipgateio phonelines:voicemails phonelines:voicemails:greetings phones portings rtcm
settings settings:sipgateio sms sms:callerid users"""
READ = """balance contracts:crm faxlines:numbers groups groups:faxlines groups:numbers groups:users
groups:voicemails log:webhooks phonelines:numbers phonelines:sipgateio:log trunk voicemails"""
WRITE = """devices:sims:orders groups:devices sessions sessions:calls sessions:fax sessions:sms
users:busyonbusy users:defaultdevice users:role"""
SCOPES = {"openid", "push_device:register"} | {"channels:read", "offline_access"}
SCOPES |= {f"{resource}:read" for resource in f"{READ_AND_WRITE} {READ}".split()}
SCOPES |= {f"{resource}:write" for resource in f"{READ_AND_WRITE} {WRITE}".split()}


# --- What is checked -----------------------------------------------------------------------------


@dataclass
class Login(rfc6749.AuthorizationCodeMixin, rfc6749.TokenMixin):
    """What the user has allowed. ended: why its code and tokens no longer work, or ""."""

    sent: dict[str, str]  # the parameters of the authorize URL, and which button was clicked
    session_state: str
    ended: str = ""

    def get_redirect_uri(self) -> str:
        return self.sent["redirect_uri"]

    def get_scope(self) -> str:
        return self.sent.get("scope", "")

    def check_client(self, client: rfc6749.ClientMixin) -> bool:
        return True


@dataclass
class Issued:
    """A code or a token. used: it was exchanged or, for an access token, replaced."""

    name: str  # of the parameter in which the client received it
    login: Login
    valid_until: float  # by the monotonic clock
    used: bool = False


class LoginServer(AuthorizationServer, rfc6749.ClientMixin):
    """The authorization server, and what it knows of its one client."""

    def __init__(self, sandbox: "Sandbox") -> None:
        super().__init__()
        self.sandbox = sandbox
        self.issued: dict[str, Issued] = {}
        self.register_grant(CodeGrant, [RequiredS256()])
        self.register_grant(RefreshGrant)

    def query_client(self, client_id: str) -> rfc6749.ClientMixin:
        if client_id != CLIENT_ID:
            raise rfc6749.InvalidClientError("Client not found.")
        return self

    def authenticate_client(self, oauth: Any, methods: Any, endpoint: str = "token") -> Any:
        """Check the client's id and secret, from the form or from an HTTP Basic header, where each
        is form-encoded (RFC 6749, section 2.3.1). Authlib would not turn a + there into a space."""
        client_id, secret = request.form.get("client_id"), request.form.get("client_secret")
        header = request.authorization
        if header and header.type == "basic":
            client_id, secret = map(unquote_plus, (header.username or "", header.password or ""))
        if client_id != CLIENT_ID:
            raise rfc6749.InvalidClientError(BAD_CLIENT, status_code=401)
        if secret != CLIENT_SECRET:
            if secret and unquote_plus(CLIENT_SECRET).startswith(secret):  # & ends it in a form
                g.reason = NOT_ENCODED
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

    def issue(self, name: str, login: Login, secret: str) -> str:
        self.issued[secret] = Issued(name, login, time.monotonic() + LIFETIMES[name])
        return secret

    def find(self, name: str, secret: str) -> Issued | None:
        """Return this code or token if it is valid. If it no longer is, g.reason says why. Whoever
        uses a code or a refresh token again may be a thief, so this ends the login (RFC 6749,
        section 4.1.2; RFC 9700, section 4.14.2)."""
        found = self.issued.get(secret)
        if not found:
            return None
        if found.name != name:
            g.reason = f"{name} is wrong: this is the {found.name}"
        elif found.login.ended:
            g.reason = f"This login has ended because {found.login.ended}: log in again"
        elif found.used:
            g.reason = f"This {name} {USED[name]}"
            if name != "access_token":
                found.login.ended = f"its {name} was used twice"
                g.reason += ". The login has now ended: log in again"
        elif found.valid_until <= time.monotonic():
            remedy = "refresh the tokens" if name == "access_token" else "log in again"
            g.reason = f"This {name} has expired: {remedy}"
        else:
            return found
        return None

    def use_up(self, name: str, secret: str, refusal: str) -> Login:
        """Return the login of a code or a refresh token, and invalidate everything issued for it so
        far. Raises InvalidGrantError if the code or token is not valid."""
        found = self.find(name, secret)
        if not found:
            raise rfc6749.InvalidGrantError(refusal)
        for issued in self.issued.values():
            issued.used |= issued.login is found.login
        return found.login

    def save_token(self, token: dict[str, Any], oauth: rfc6749.OAuth2Request) -> None:
        """Issue tokens and turn `token` into a response like those in sipgate's documentation."""
        login: Any = oauth.authorization_code or oauth.refresh_token
        if oauth.authorization_code:
            self.sandbox.exchanges += 1
            g.reason = self.careless(login)
        for name in KINDS:
            token[name] = self.issue(name, login, self.sign(name, login))
        token["expires_in"] = LIFETIMES["access_token"]
        token["refresh_expires_in"] = LIFETIMES["refresh_token"]
        token |= {"token_type": "bearer", "session_state": login.session_state}
        token["not-before-policy"] = 0

    def careless(self, login: Login) -> str:
        """Return what the program did wrong before it exchanged the code, or an empty string."""
        if login.sent["answer"] == "wrong-state":
            return "The code came with a wrong state: the program did not check the state"
        earlier = [it.login for it in self.issued.values() if it.name == "access_token"]
        for name in ("state", "code_challenge"):
            value = login.sent.get(name)
            if value and any(value == it.sent.get(name) for it in earlier):
                return f"{name} was used in an earlier login: it should be new for each, and random"
        return ""

    def sign(self, name: str, login: Login) -> str:
        """Return a JWT with claims that sipgate's tokens have."""
        now = int(time.time())
        claims = {
            "jti": secrets.token_hex(16),
            "exp": now + LIFETIMES[name],
            "iat": now,
            "iss": self.sandbox.issuer,
            "aud": CLIENT_ID,
            "sub": "f:sandbox:1234567",
            "typ": KINDS[name],
            "azp": CLIENT_ID,
            "session_state": login.session_state,
            "realm_access": {"roles": login.get_scope().split()},
        }
        return jwt.encode({"alg": "RS256"}, claims, SIGNING_KEY)


class CodeGrant(rfc6749.AuthorizationCodeGrant):
    """The authorization code grant (RFC 6749, section 4.1). A session id stands for the user."""

    server: LoginServer

    def save_authorization_code(self, code: str, oauth: Any) -> None:
        login = Login(request.values.to_dict(), oauth.user)
        self.server.issue("code", login, code)

    def query_authorization_code(self, code: str, client: rfc6749.ClientMixin) -> Login:
        return self.server.use_up("code", code, "Code not valid")

    def delete_authorization_code(self, authorization_code: Login) -> None:
        """use_up has done this."""

    def authenticate_user(self, authorization_code: Login) -> str:
        return authorization_code.session_state


class RequiredS256(rfc7636.CodeChallenge):
    """PKCE (RFC 7636). Authlib lets a client that has a secret omit PKCE, and allows `plain`."""

    SUPPORTED_CODE_CHALLENGE_METHOD = ["S256"]

    def validate_code_challenge(self, grant: CodeGrant, redirect_uri: str) -> None:
        if not request.values.get("code_challenge_method"):
            raise rfc6749.InvalidRequestError("Missing parameter: code_challenge_method")
        super().validate_code_challenge(grant, redirect_uri)

    def validate_code_verifier(self, grant: Any, result: Any) -> None:
        code_challenge = grant.request.authorization_code.sent["code_challenge"]
        code_verifier = request.form.get("code_verifier")
        if code_verifier is None:
            raise rfc6749.InvalidGrantError("PKCE code verifier not specified")
        if not UNRESERVED.fullmatch(code_verifier):
            g.reason = "code_verifier is wrong: it should be 43 to 128 letters, digits, or -._~"
            raise rfc6749.InvalidGrantError("PKCE verification failed: Invalid code verifier")
        if code_challenge != rfc7636.create_s256_code_challenge(code_verifier):  # type: ignore[no-untyped-call] # untyped in the stubs of Authlib
            raise rfc6749.InvalidGrantError("PKCE verification failed: Code mismatch")


class RefreshGrant(rfc6749.RefreshTokenGrant):
    """The refresh of an access token (RFC 6749, section 6)."""

    server: LoginServer

    def authenticate_refresh_token(self, refresh_token: str) -> Login:
        return self.server.use_up("refresh_token", refresh_token, "Invalid refresh token")

    def revoke_old_credential(self, refresh_token: Any) -> None:
        """use_up has done this."""

    def authenticate_user(self, refresh_token: Any) -> str:
        return str(refresh_token.session_state)


# --- What is explained ---------------------------------------------------------------------------

UNRESERVED = re.compile(r"[A-Za-z0-9._~-]{43,128}")  # RFC 7636, sections 4.1 and 4.2
S256 = re.compile("[A-Za-z0-9_-]{43}")
CODE_CHALLENGE = "the SHA-256 of the code_verifier in base64url: 43 characters, no + or / or ="
LATEST = "the one in the latest response from the token endpoint"
USED = {
    "code": "was used before: exchange each code only once",
    "access_token": "was replaced in a refresh: use the new one",
    "refresh_token": "was used before: after each refresh, use the new one",
}
# A pattern that matches an error message, the parameter to correct, and what it should be. If one
# message can have several causes, the check that fails puts its cause into g.reason.
EXPECTED = [
    ("Client not found|client_id|invalid_client", "client_id", CLIENT_ID),
    ("unauthorized_client", "client_secret", "the CLIENT_SECRET printed at the start, unquoted"),
    ("redirect_uri", "redirect_uri", "{redirect_uri}"),
    ("response_type", "response_type", "code"),
    ("invalid_scope", "scope", f"one or more of those in {SCOPES_URL}, separated by spaces"),
    ("code_challenge_method", "code_challenge_method", "S256 (PKCE, RFC 7636)"),
    ("code_challenge", "code_challenge", CODE_CHALLENGE),
    ("grant_type", "grant_type", "authorization_code or refresh_token"),
    ("code verifier|Code mismatch", "code_verifier", "the one whose SHA-256 is code_challenge"),
    ("'code'|Code not valid", "code", "the one in the callback"),
    ("'refresh_token'|Invalid refresh token", "refresh_token", LATEST),
    ("invalid_token", "access_token", LATEST),
]
SECRET_IN_URL = "The client_secret is now in the browser's history: leave it out, and replace it"
FORM_IN_URL = "The parameters are in the URL, which ends up in logs: POST them as a form"
NOT_ENCODED = (
    "client_secret is not encoded: form-encode it (in Python with urlencode for a form, and with "
    "quote_plus for HTTP Basic)"
)
NO_BEARER = "The Authorization header is {}: it should be Bearer, a space, and the access_token"
ATTACK = (
    "This was an attack: the callback has a wrong state. A program that checks the state refuses "
    "it. sipgate_oauth.py then keeps waiting: to go on, open the login page again and click Allow"
)


def explain(outcome: str, redirect_uri: str) -> str:
    """Return what is wrong with this request and how to correct it, or an empty string."""
    if "client_secret" in request.args:
        return SECRET_IN_URL if request.endpoint == "authorize" else FORM_IN_URL
    if isinstance(request.routing_exception, MethodNotAllowed):
        allowed = request.routing_exception.valid_methods or ()
        return f"The method is wrong: it should be {'GET' if 'GET' in allowed else 'POST'}"
    if not request.endpoint:
        return "This URL does not exist: use those that were printed at the start"
    if request.method == "OPTIONS":
        return "JavaScript cannot send this: link to the login page, and let a server send the rest"
    if request.endpoint == "token" and request.mimetype != FORM:
        return f"The body is {request.mimetype or 'of no type'}: it should be a form ({FORM})"
    if g.get("reason"):
        return str(g.reason)
    for pattern, name, expected in EXPECTED:
        if re.search(pattern, outcome):
            in_header = request.authorization and re.search("client|access", name)
            problem = "wrong" if request.values.get(name) or in_header else "missing"
            return f"{name} is {problem}: it should be {expected.format(redirect_uri=redirect_uri)}"
    if request.endpoint != "authorize" or not outcome.startswith(("200", "code")):
        return ""
    # Keycloak accepts these requests, too. The mistake shows later, or never.
    if not S256.fullmatch(request.values["code_challenge"]):
        return f"code_challenge is wrong: it should be {CODE_CHALLENGE}"
    if not request.values.get("state"):
        return "No state was sent: without it, a program cannot recognize a forged callback"
    return ""


# --- What is served ------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sandbox</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<style>body { font: 1.1rem system-ui; max-width: 32rem; margin: 4rem auto; padding: 0 1rem }</style>
</head><body><h1>{{ title }}</h1><p>{{ explanation }}</p>{% if grant %}
<p>A stand-in for sipgate on this computer. You need no account and no password.</p>
<p>The client <strong>{{ grant.request.payload.client_id }}</strong> asks for these scopes:</p>
<ul>{% for scope in grant.request.scope.split() %}<li>{{ scope }}</li>{% endfor %}</ul>
<form method="post"><p><button name="answer" value="allow">Allow</button>
<button name="answer" value="deny">Deny</button></p>
<p><button name="answer" value="wrong-state">Allow, but return a wrong state</button><br>
This plays an attack. A program that checks the state refuses the callback. sipgate_oauth.py then
keeps waiting: to go on, come back to this page and click Allow.</p></form>
{% endif %}</body></html>"""


def create_app(server: LoginServer) -> Flask:
    """Return the app with sipgate's paths."""
    app = Flask(__name__, static_folder=None)
    app.config.update(OAUTH2_SCOPES_SUPPORTED=SCOPES)
    server.init_app(app)

    @app.route(f"{ENDPOINTS}/auth", methods=["GET", "POST"])
    def authorize() -> Any:
        grant = server.get_consent_grant()  # type: ignore[no-untyped-call] # untyped in the stubs of Authlib
        if request.method != "POST":  # the form posts to the same URL
            return render_template_string(PAGE, title="Sandbox login page", grant=grant)
        answer = request.form.get("answer")
        session = secrets.token_hex(16) if answer in ("allow", "wrong-state") else None
        response: Any = server.create_authorization_response(grant=grant, grant_user=session)
        if answer == "wrong-state":
            g.reason = ATTACK
            state = f"&state={secrets.token_urlsafe()}"
            response.location = re.sub("&state=[^&]*|$", state, response.location, count=1)
        return response

    @app.post(f"{ENDPOINTS}/token")
    def token() -> Any:
        if "grant_type" not in request.form:
            raise rfc6749.InvalidRequestError("Missing form parameter: grant_type")
        return server.create_token_response()

    @app.post(f"{ENDPOINTS}/logout")
    def logout() -> Any:
        server.authenticate_client(None, None)
        issued = server.issued.get(request.form.get("refresh_token", ""))
        if not issued or issued.name != "refresh_token":
            raise rfc6749.InvalidGrantError("Invalid refresh token")
        issued.login.ended = "the program logged out"
        return "", 204

    @app.get("/v2/account")
    def account() -> Response:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            g.reason = NO_BEARER.format("wrong" if scheme else "missing")
            raise rfc6750.InvalidTokenError
        issued = server.find("access_token", token)
        if not issued:
            raise rfc6750.InvalidTokenError
        if "account:read" not in issued.login.get_scope().split():
            g.reason = "The scope account:read is missing: add it to scope in the authorize URL"
            raise rfc6750.InsufficientScopeError
        return jsonify(ACCOUNT)

    @app.errorhandler(OAuth2Error)
    def refuse(error: OAuth2Error) -> Any:
        if request.endpoint == "authorize" and not error.redirect_uri:
            # Redirect nobody to a URI that is not the client's (RFC 6749, section 4.1.2.1).
            title = error.description or str(error.error)
            explanation = explain(title, server.sandbox.redirect_uri)
            page = render_template_string(PAGE, title=title, explanation=explanation)
            return page, f"400 {title}"
        return server.handle_response(*error())

    return app


def outcome_of(response: Response) -> str:
    """Summarize a response: JSON, a redirect, or a page."""
    said = response.get_json(silent=True)
    said = said or dict(parse_qsl(urlsplit(response.location or "").query))
    if "error" in said:
        return ": ".join(said[key] for key in ("error", "error_description") if key in said)
    if "code" in said:
        return "code issued"
    return "tokens issued" if "access_token" in said else response.status


def listen(first_port: int, with_callback: bool) -> socket.socket:
    """Listen on 127.0.0.1, at the first free port: first_port (0 is any), first_port + 2, ...

    with_callback: the port below must be free as well. Other sandboxes then leave it alone.
    """
    for port in range(first_port, 65536, 2):
        with contextlib.suppress(OSError):
            if not with_callback or is_free(port - 1):
                return socket.create_server(("127.0.0.1", port))
    raise OSError(f"no port is free from {first_port} on")


def is_free(port: int) -> bool:
    """Return whether a program can listen at the port on both addresses of `localhost`."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            # Any other error means that this computer lacks the address, so it cannot be taken.
            if error.errno in (errno.EADDRINUSE, errno.EACCES):  # Windows reserves it
                return False
    return True


# --- How it is run -------------------------------------------------------------------------------


@dataclass
class Sandbox:
    """A context manager: the server runs inside the `with` block.

    redirect_uri: of the client; by default, it has the port below the server's
    port: where to listen; 0 is any free port (see listen)
    log: print a line for each request; otherwise only for the third button

    `environment` has the variables for sipgate_oauth.py. For tests, `exchanges` is the number of
    codes that were exchanged, and `ports` has the ports that requests came from.
    """

    redirect_uri: str = ""
    port: int = 8081
    log: bool = False

    def __post_init__(self) -> None:
        listener = listen(self.port, with_callback=not self.redirect_uri)
        port = listener.getsockname()[1]
        if port != self.port != 0:
            print("# The usual ports are taken: adapt SSH tunnels and saved configurations.")
        self.url = f"http://127.0.0.1:{port}"
        self.issuer = self.url + REALM
        self.redirect_uri = self.redirect_uri or f"http://localhost:{port - 1}/oauth"
        self.environment = {
            "CLIENT_ID": CLIENT_ID,
            "CLIENT_SECRET": CLIENT_SECRET,
            "OAUTH_SCOPE": "account:read balance:read",
            "REDIRECT_URI": self.redirect_uri,
            "AUTH_URL": f"{self.url}{ENDPOINTS}/auth",
            "TOKEN_URL": f"{self.url}{ENDPOINTS}/token",
            "TEST_API_ENDPOINT": f"{self.url}/v2/account",
        }
        self.exchanges = 0
        self.ports: set[str] = set()
        app = create_app(LoginServer(self))
        app.after_request(self._note)
        # Keep waitress's warnings about waiting requests out of sipgate_oauth.py's terminal.
        logging.getLogger("waitress").setLevel(logging.CRITICAL)
        self._sockets: dict[int, Any] = {}
        # A single thread handles one request at a time, so nothing needs a lock.
        self._http = create_server(app, map=self._sockets, sockets=[listener], threads=1)
        self._thread = threading.Thread(target=self._http.run, daemon=True)

    def _note(self, response: Response) -> Response:
        if request.endpoint == "authorize" and response.location:  # RFC 9207, section 2
            response.location = add_params_to_uri(response.location, {"iss": self.issuer})
        self.ports.add(request.environ["REMOTE_PORT"])
        if self.log:
            outcome = outcome_of(response).rstrip(".")
            explanation = explain(outcome, self.redirect_uri)
            line = f"{request.method} {request.path}: {outcome}"
            line += f". {explanation}" if explanation else ""
            # Escaped, because what a client sent could control the terminal.
            print(line.encode("unicode_escape").decode(), flush=True)
        elif g.get("reason") == ATTACK:
            print(f"Sandbox: {ATTACK}", flush=True)
        return response

    def __enter__(self) -> "Sandbox":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.task_dispatcher.shutdown()  # which waits for the request in progress
        trigger = self._http.trigger
        # The server's own thread must close the sockets, including idle ones.
        with trigger.lock:
            trigger.thunks.append(lambda: wasyncore.close_all(self._sockets))
            trigger.pull_trigger()
        self._thread.join()


def run_script(arguments: list[str]) -> int:
    """Run sipgate_oauth.py as a process and return its exit status."""
    with Sandbox() as sandbox:
        print(f"Sandbox: a stand-in for sipgate, at {sandbox.url}. You need no account.")
        print("To test a program of your own, run this again with --serve.", flush=True)
        # All values are in the environment, so the user's config.env cannot interfere.
        command = [sys.executable, str(SCRIPT), "--config", os.devnull, *arguments]
        script = subprocess.Popen(command, env=os.environ | sandbox.environment)

        def end(number: int, frame: object) -> NoReturn:
            script.kill()
            os._exit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        return script.wait()


def serve(redirect_uri: str) -> NoReturn:
    """Run only the server, until Ctrl+C."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    with Sandbox(redirect_uri, log=True) as sandbox:
        print("# A stand-in for sipgate, until you press Ctrl+C. The configuration for a program:")
        for key, value in sandbox.environment.items():
            print(f"{key}={shlex.quote(value)}")
        print(f"# Logout endpoint: {sandbox.url}{ENDPOINTS}/logout")
        print("# To save the seven lines above, copy them into a file, config.env. In PowerShell:")
        print("#     Get-Clipboard | Set-Content config.env")
        print("# (> would also save the requests and, in Windows PowerShell, write UTF-16.)")
        print("# Requests appear below. On the login page, try all three buttons.", flush=True)
        while True:  # A signal that comes just before a sleep is handled only after it.
            time.sleep(1)


def main() -> int:
    about = "Run sipgate_oauth.py against a stand-in for sipgate. You need no account."
    epilog = "All other options are passed to sipgate_oauth.py. Its --help describes them."
    parser = argparse.ArgumentParser(description=about, epilog=epilog, allow_abbrev=False)
    serve_help = "run only the server, for a program of your own with this redirect URI"
    parser.add_argument("--serve", nargs="?", const="", metavar="REDIRECT_URI", help=serve_help)
    options, others = parser.parse_known_args()
    # Without ' and \, the value means the same to a shell and to python-dotenv.
    if options.serve and not re.fullmatch(r"https?://[!-&(-\[\]-~]+", options.serve):
        parser.error("REDIRECT_URI must look like http://localhost:8080/oauth")
    if options.serve is None:
        return run_script(others)
    if others:
        parser.error(f"--serve takes no other options: leave out {' '.join(others)}")
    serve(options.serve)


if __name__ == "__main__":
    sys.exit(main())
