"""A web application that logs its users in at sipgate, with the steps of sipgate_oauth.py.

    python tests/web_application.py                  try it with the sandbox, without an account
    python tests/web_application.py --config FILE    log in at sipgate with the values of this file

A command-line program logs one user in, once. A web application has many users at the same time,
and keeps them logged in. Comments explain the consequences. The pages:

    GET  /               the user's account, or a link to log in
    GET  /login          sends the browser to sipgate
    GET  REDIRECT_URI    the callback, where the browser returns with a code
    POST /logout         forgets the user
"""

import argparse
import json
import math
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from flask import Flask, redirect, render_template_string, request
from waitress import create_server  # type: ignore[import-untyped] # it has no type hints

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the folder of sipgate_oauth.py
import sipgate_oauth as oauth  # noqa: E402

LOGIN_LIFETIME = 600  # seconds from the link "Log in" to the callback
REFRESH_EARLY = 30  # seconds before an access token expires
# The errors after which a new login can help. All others are faults of a server or of the client.
LOG_IN_AGAIN = ("access_denied", "invalid_grant", "invalid_token")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<h1>{{ title }}</h1><pre>{{ text }}</pre>
{% if user %}<form method="post" action="/logout"><button>Log out</button></form>
{% else %}<a href="/login">Log in</a>{% endif %}"""


class Login(NamedTuple):
    """A login that has begun, and waits for its callback."""

    state: str
    code_verifier: str
    expires_at: float


class User:
    """A user who is logged in, and the tokens, which never leave the server."""

    def __init__(self, config: oauth.Config, tokens: oauth.Tokens) -> None:
        self.config = config
        self.lock = threading.Lock()  # one for each user, so that nobody waits for somebody else
        self.store(tokens)

    def store(self, tokens: oauth.Tokens) -> None:
        """Replace the tokens, and note when to refresh them."""
        expires_in = tokens.get("expires_in")
        if not isinstance(expires_in, (int, float)):
            expires_in = (
                math.inf
            )  # Some servers do not send it. Then only a 401 shows that it has expired.
        self.tokens = tokens
        self.refresh_at = time.monotonic() + expires_in - REFRESH_EARLY

    def access_token(self, refused: str = "") -> str:
        """Return an access token that has not expired. Raises LoginError.

        refused: an access token that the API has refused
        """
        # A refresh token can be used only once. If two requests need a new access token at the same
        # time, the second waits for the lock. It then reads the tokens that the first has stored.
        with self.lock:
            if self.tokens["access_token"] == refused or time.monotonic() >= self.refresh_at:
                with requests.Session() as session:
                    self.store(oauth.refresh_tokens(session, self.config, self.tokens))
            return str(self.tokens["access_token"])

    def account(self) -> Any:
        """Return the account from the API. Raises LoginError."""
        access_token = self.access_token()
        # A new requests.Session each time, because it keeps the cookies that a server sets. Those
        # of one user must not be sent with the requests of another.
        with requests.Session() as session:
            try:
                return oauth.get_account(session, self.config, access_token)
            except oauth.LoginError as error:
                if error.error != "invalid_token":
                    raise
            # The token was revoked or has expired early. Try again with a new one, but only once.
            return oauth.get_account(session, self.config, self.access_token(access_token))


def create_app(config: oauth.Config) -> Flask:
    """Return the application. The path of REDIRECT_URI must not be that of another page."""
    uri = urlsplit(config["REDIRECT_URI"])
    app = Flask(__name__, static_folder=None)
    # The keys are random ids, and only they go into cookies. Flask's own session would put all
    # values into its cookie, which the browser can read. Several processes would need a database
    # instead, also for the locks.
    logins: dict[str, Login] = {}
    users: dict[str, User] = {}

    def page(title: str, text: str, user: User | None = None) -> str:
        # Flask escapes the text, because servers and other web pages can supply parts of it.
        return render_template_string(PAGE, title=title, text=text, user=user)

    def redirect_with_cookie(url: str, name: str, value: str) -> Any:
        response = redirect(url, 303)
        response.set_cookie(
            name,
            value,
            httponly=True,  # Scripts cannot read it.
            secure=uri.scheme == "https",  # It is not sent unencrypted, except on this computer.
            # It is not sent with a form of another site (see /logout), but it is sent when sipgate
            # redirects the browser to the callback. "Strict" would block that as well.
            samesite="Lax",
        )
        return response

    @app.before_request
    def forget_old_logins() -> None:
        for login_id, login in list(logins.items()):
            if time.monotonic() >= login.expires_at:
                logins.pop(login_id, None)

    @app.get("/")
    def home() -> Any:
        user = users.get(request.cookies.get("user", ""))
        if not user:
            return page("Welcome", "You are not logged in.")
        account = json.dumps(user.account(), indent=2, ensure_ascii=False)
        return page("You are logged in", account, user)

    @app.get("/login")
    def log_in() -> Any:
        login_id = secrets.token_urlsafe(32)
        state = secrets.token_urlsafe(32)
        code_verifier = secrets.token_urlsafe(32)
        logins[login_id] = Login(state, code_verifier, time.monotonic() + LOGIN_LIFETIME)
        url = oauth.authorize_url(config, state, oauth.code_challenge_for(code_verifier))
        return redirect_with_cookie(url, "login", login_id)

    @app.get(uri.path)
    def callback() -> Any:
        # The state must be that of this browser. If it has begun no login, every state is refused.
        login_id = request.cookies.get("login", "")
        login = logins.get(login_id)
        query = request.query_string.decode("ascii", "replace")
        parameters = oauth.check_callback(query, login.state if login else "")
        # A login can be used once. It is removed after the check, so that a forged callback does
        # not end it.
        login = logins.pop(login_id, None)
        if not login:  # The same callback has arrived twice, and the other one was faster.
            raise oauth.StateMismatch(403, oauth.FOREIGN_STATE)
        code = oauth.code_from_callback(parameters)
        with requests.Session() as session:
            tokens = oauth.exchange_code(session, config, code, login.code_verifier)
        # The id is new for each login. An old one may be known to somebody who set the cookie in
        # this browser, and who would then be logged in as this user (session fixation).
        users.pop(request.cookies.get("user", ""), None)
        user_id = secrets.token_urlsafe(32)
        users[user_id] = User(config, tokens)
        # The redirect removes the code from the address bar. Its target has no host, so it also
        # works behind a proxy.
        return redirect_with_cookie("/", "user", user_id)

    @app.post("/logout")  # With GET, a link on any site could log the user out.
    def log_out() -> Any:
        users.pop(request.cookies.get("user", ""), None)
        return redirect("/", 303)

    @app.errorhandler(oauth.CallbackRefused)
    def show_refusal(refused: oauth.CallbackRefused) -> Any:
        return page("Error", refused.reason), refused.status

    @app.errorhandler(oauth.LoginError)
    def show_error(error: oauth.LoginError) -> Any:
        status = 502
        if error.error in LOG_IN_AGAIN:  # The page then asks for a new login.
            users.pop(request.cookies.get("user", ""), None)
            status = 403
        return page("Error", f"{error.what}.\n{error.advice}"), status

    @app.after_request
    def add_headers(response: Any) -> Any:
        response.headers["Cache-Control"] = "no-store"  # Nobody else may see the page later.
        response.headers["Referrer-Policy"] = "no-referrer"  # The callback's address has a code.
        # Pages load nothing, and cannot be framed (which could trick the user into a click).
        response.headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
        return response

    return app


def serve(config: oauth.Config, port: int | None) -> None:
    """Serve the application until Ctrl+C. Raises LoginError."""
    app = create_app(config)
    uri = urlsplit(config["REDIRECT_URI"])
    # With https, a proxy on this computer receives the requests, and forwards them as http.
    host = oauth.LOOPBACK.get(str(uri.hostname), ["127.0.0.1"])[0]
    port = port or uri.port or {"http": 80, "https": 443}[uri.scheme]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        advice = "Stop the program that uses this port, or choose another with --port."
        raise oauth.LoginError(f"Cannot listen on port {port}: {error}", advice) from error
    # Waitress logs no requests. Flask's own server (app.run) would log each code and state.
    server = create_server(app, sockets=[listener])
    home = urljoin(config["REDIRECT_URI"], "/")
    print(f"Open {home} in your browser (listening on port {port} of {host})", flush=True)
    server.run()  # until Ctrl+C


def main() -> None:
    parser = argparse.ArgumentParser(description="A web application with a login at sipgate.")
    parser.add_argument("--config", metavar="FILE", type=Path, help="default: use the sandbox")
    parser.add_argument("--port", type=int, help="default: the port of REDIRECT_URI")
    options = parser.parse_args()
    try:
        if options.config:
            config, _ = oauth.load_config(options.config)
            serve(config, options.port)
        else:
            from sandbox import Sandbox  # imported here, because only the sandbox needs it

            with Sandbox(redirect_uri=f"http://localhost:{options.port or 8080}/oauth") as sandbox:
                serve(sandbox.environment, options.port)
    except oauth.LoginError as error:
        sys.exit(f"Error: {error.what}.\n{error.advice}")


if __name__ == "__main__":
    main()
