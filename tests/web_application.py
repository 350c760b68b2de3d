"""A web application that shows its users their sipgate accounts, built on sipgate_oauth.py.

    python tests/web_application.py                  try it with the sandbox, without an account
    python tests/web_application.py --config FILE    use sipgate, with the values in this file

    GET  /               the user's account, or a link to log in
    GET  /login          sends the browser to sipgate
    GET  REDIRECT_URI    the callback, where the browser comes back with a code
    POST /logout         ends the login, here and, if it can, at sipgate

OAuth gives this application access to an account, but doesn't tell it who the user is. For that
("Log in with ..."), use OpenID Connect and validate the ID token.
"""

import argparse
import contextlib
import errno
import json
import math
import re
import secrets
import socket
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from flask import Flask, redirect, render_template_string, request
from waitress import create_server  # type: ignore[import-untyped] # it has no type hints

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the folder of sipgate_oauth.py
import sipgate_oauth as oauth  # noqa: E402

LOGIN_LIFETIME = 600  # seconds from clicking "Log in" to the callback
# Anybody can begin logins, and each takes memory. Whoever begins this many makes all others fail:
# in production, limit the rate.
MAX_LOGINS = 10_000
REFRESH_EARLY = 30  # seconds before an access token expires
# A request that waits for sipgate or another request's refresh occupies a thread. In production,
# a proxy must limit waiting requests and idle connections (waitress takes 100).
THREADS = 50
# The errors that a new login can fix. (Keycloak sends the last one if its login page has expired.)
LOG_IN_AGAIN = ("access_denied", "invalid_grant", "temporarily_unavailable")
# What users can do about an error. What happened goes to stderr, for whoever runs the application.
LOG_IN = """Your login has ended, was denied, was already used, took too long, or began elsewhere
(in another tab or browser, or at 127.0.0.1 instead of localhost). To continue, log in, and allow
access and cookies."""
TRY_LATER = "It is not your fault. Please try again later."
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<h1>{{ title }}</h1><pre>{{ text }}</pre>
{% if user %}<a href="/">Your account</a>
<form method="post" action="/logout"><button>Log out</button></form>
{% else %}<a href="{{ login_url }}">Log in</a>{% endif %}"""


class Login(NamedTuple):
    """A login that is waiting for its callback."""

    state: str
    code_verifier: str
    expires_at: float


class User:
    """A user who is logged in, with the tokens, which never reach the browser."""

    def __init__(self, config: oauth.Config, tokens: oauth.Tokens) -> None:
        self.config = config
        self.has_ended = False
        # One for each user, so that a slow refresh delays nobody else while threads are free.
        # Several processes would have to share it: lock the user's row in the database.
        self.lock = threading.Lock()
        self.store(tokens)

    def store(self, tokens: oauth.Tokens) -> None:
        """Replace the tokens, and note when to refresh them."""
        self.tokens = tokens
        self.refresh_at = math.inf  # If expires_in is missing, refresh when the API says so.
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            # Some servers send it as text.
            self.refresh_at = time.monotonic() + float(tokens["expires_in"]) - REFRESH_EARLY

    def access_token(self, refused: str = "") -> str:
        """Return an access token. refused: one that the API has refused. Raises LoginError."""
        # A refresh token may work only once, and a careful server takes a second use for theft. So
        # the first request refreshes. This user's other requests wait and then use the result.
        with self.lock:
            if self.has_ended:
                raise oauth.LoginError("The login has ended", "Log in again.", "invalid_grant")
            if self.tokens["access_token"] == refused or time.monotonic() >= self.refresh_at:
                try:
                    with requests.Session() as session:
                        self.store(oauth.refresh_tokens(session, self.config, self.tokens))
                except oauth.LoginError as error:
                    self.has_ended = error.error == "invalid_grant"
                    raise
            return str(self.tokens["access_token"])

    def account(self) -> Any:
        """Return the account from the API. Raises LoginError."""
        access_token = self.access_token()
        # A requests.Session keeps cookies, so users must not share one.
        with requests.Session() as session:
            try:
                return oauth.get_account(session, self.config, access_token)
            except oauth.LoginError as error:
                if error.error != "invalid_token":
                    raise
            # The token was revoked or expired early. Try a new one, but only once.
            return oauth.get_account(session, self.config, self.access_token(access_token))

    def log_out(self) -> None:
        """End the login and revoke the refresh token, so that a copy of it is worthless. (An access
        token usually works until it expires.)"""
        with self.lock:  # A refresh may be under way. If so, revoke the new refresh token.
            self.has_ended = True
        if not self.tokens.get("refresh_token"):
            return
        form = {
            "refresh_token": self.tokens["refresh_token"],
            "client_id": self.config["CLIENT_ID"],
            "client_secret": self.config["CLIENT_SECRET"] or None,
        }
        # This is Keycloak's URL, and so sipgate's. Many other servers follow RFC 7009: use their
        # revocation endpoint, and call the refresh token `token`.
        url = urljoin(self.config["TOKEN_URL"], "logout")
        try:
            with requests.Session() as session:
                oauth.request_json(session, "POST", url, form=form)
        except oauth.LoginError as error:
            # The user is logged out anyway. A real application tells them if sipgate refuses.
            report(error)


def report(error: Exception) -> None:
    """Tell whoever runs the application about an error, in one line."""
    with contextlib.suppress(SystemExit):  # if stderr is closed, or its disk is full
        oauth.say(f"Error: {error}".replace("\n", " "), file=sys.stderr)


def create_app(config: oauth.Config) -> Flask:
    """Return the application. Raises LoginError if it cannot serve REDIRECT_URI."""
    uri = urlsplit(config["REDIRECT_URI"])
    is_https = uri.scheme == "https"
    # Other characters have a special meaning in Flask's paths, or browsers encode them.
    if not re.fullmatch(r"(/[\w.~-]+)+/?", uri.path) or uri.path in ("/login", "/logout"):
        what = f"This application cannot have its callback at the REDIRECT_URI {uri.geturl()}"
        raise oauth.LoginError(what, "Use a path like /oauth, but neither /login nor /logout.")
    app = Flask(__name__, static_folder=None)

    # Cookies contain only the keys of these two, random ids. A real application keeps both in a
    # database, encrypts the tokens, and lets sessions expire.
    logins: OrderedDict[str, Login] = OrderedDict()  # the oldest first
    users: dict[str, User] = {}

    # An attacker could plant cookies, from another subdomain or over plain http, and have the user
    # work in the attacker's account. Browsers accept those that begin with __Host- only from this
    # host and over https (RFC 6265bis, section 4.1.3.2). Werkzeug before 3.1.9 undoes this, because
    # it ignores a \xa0 before the name. Plain http is for development. There, the port is in the
    # names, because all ports of a host share their cookies: other programs still receive them.
    prefix = "__Host-" if is_https else f"{uri.port or 80}-"
    login_cookie = f"{prefix}login"
    user_cookie = f"{prefix}user"

    def current_user() -> User | None:
        user = users.get(request.cookies.get(user_cookie, ""))
        return user if user and not user.has_ended else None

    def page(title: str, text: str) -> str:
        # Log in at the host of the callback: a cookie for 127.0.0.1 is not sent to localhost.
        login_url = urljoin(uri.geturl(), "/login")
        # Flask escapes the text, because servers supply parts of it.
        return render_template_string(
            PAGE, title=title, text=text, user=current_user(), login_url=login_url
        )

    def redirect_with_cookie(url: str, name: str, value: str) -> Any:
        response = redirect(url, 303)
        # Scripts cannot read it. "Lax": browsers send it after sipgate's redirect, but not with a
        # POST from another site.
        response.set_cookie(name, value, httponly=True, secure=is_https, samesite="Lax")
        return response

    @app.get("/")
    def home() -> Any:
        user = current_user()
        if not user:
            return page("Welcome", "You are not logged in.")
        account = json.dumps(user.account(), indent=2, ensure_ascii=False)
        return page("You are logged in", account)

    @app.get("/login")
    def log_in() -> Any:
        login_id = secrets.token_urlsafe(32)
        state = secrets.token_urlsafe(32)
        code_verifier = secrets.token_urlsafe(32)
        logins[login_id] = Login(state, code_verifier, time.monotonic() + LOGIN_LIFETIME)
        if len(logins) > MAX_LOGINS:
            logins.popitem(last=False)
        url = oauth.authorize_url(config, state, oauth.code_challenge_for(code_verifier))
        return redirect_with_cookie(url, login_cookie, login_id)

    @app.get(uri.path)
    def callback() -> Any:
        login_id = request.cookies.get(login_cookie, "")
        login = logins.get(login_id)
        if not login or time.monotonic() >= login.expires_at:
            raise oauth.CallbackRefused("No login is waiting for this callback.")
        parameters = oauth.check_callback(request.query_string.decode(), login.state)
        # A login works once, but a forged callback must not use it up, so it is removed only now.
        if not logins.pop(login_id, None):
            raise oauth.CallbackRefused("The same callback has just arrived.")
        code = oauth.code_from_callback(parameters)
        with requests.Session() as session:
            tokens = oauth.exchange_code(session, config, code, login.code_verifier)
        # A new id for each login: an attacker may have planted the old one (session fixation). Do
        # not end the old login at sipgate, where both may be one session.
        users.pop(request.cookies.get(user_cookie, ""), None)
        user_id = secrets.token_urlsafe(32)
        users[user_id] = User(config, tokens)
        return redirect_with_cookie("/", user_cookie, user_id)

    # With GET, a link on any site could log the user out. With POST, only a form on another
    # subdomain can (or on another port of localhost). Before you add a POST that can do more harm,
    # put a secret into your form and check it.
    @app.post("/logout")
    def log_out() -> Any:
        user = users.pop(request.cookies.get(user_cookie, ""), None)
        if user:
            user.log_out()
        return redirect("/", 303)

    @app.errorhandler(oauth.CallbackRefused)
    @app.errorhandler(oauth.LoginError)
    def show_error(error: Exception) -> Any:
        report(error)
        if isinstance(error, oauth.LoginError) and error.error not in LOG_IN_AGAIN:
            return page("That did not work", TRY_LATER), 502
        return page("That did not work", LOG_IN), 403

    @app.after_request
    def add_headers(response: Any) -> Any:
        response.headers["Cache-Control"] = "no-store"  # Keep the account out of caches.
        response.headers["Referrer-Policy"] = "no-referrer"  # The callback's URL has a code.
        # Pages load nothing, and no other site can frame them to trick users into a click.
        response.headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
        return response

    return app


def listen(port: int) -> list[socket.socket]:
    """Listen on the addresses that a browser may use for localhost. Raises LoginError."""
    listeners: list[socket.socket] = []
    for address in oauth.LOOPBACK["localhost"]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            listeners.append(socket.create_server((address, port), family=family))
        except OSError as error:
            if listeners and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # this computer has no IPv6
            what = f"Cannot listen on port {port} of {address}: {error.strerror}"
            raise oauth.LoginError(what, "Stop the program there, or use another port.") from error
    return listeners


def serve(config: oauth.Config, port: int) -> None:
    """Serve until Ctrl+C. port: the one that a proxy for https forwards to. Raises LoginError."""
    app = create_app(config)
    uri = urlsplit(config["REDIRECT_URI"])
    if uri.scheme == "http":  # There is no proxy: the browser connects to us.
        port = uri.port or 80
    # Waitress logs no requests. Flask's own server (app.run) would log each code and state. So may
    # your proxy: turn that off for REDIRECT_URI.
    server = create_server(app, sockets=listen(port), threads=THREADS)
    oauth.say(f"Open {urljoin(uri.geturl(), '/')} (listening on port {port})")
    server.run()  # until Ctrl+C


def main() -> None:
    parser = argparse.ArgumentParser(description="A web application that reads sipgate accounts.")
    parser.add_argument("--config", metavar="FILE", type=Path, help="default: use the sandbox")
    parser.add_argument("--port", type=int, default=8080, help="with the sandbox or a proxy")
    options = parser.parse_args()
    try:
        if options.config:
            config, _ = oauth.load_config(options.config)
            serve(config, options.port)
        else:
            from sandbox import Sandbox  # which a real application does not need

            with Sandbox(redirect_uri=f"http://localhost:{options.port}/oauth") as sandbox:
                serve(sandbox.environment, options.port)
    except oauth.LoginError as error:
        report(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
