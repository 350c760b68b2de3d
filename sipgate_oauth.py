# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.32.4,<3", "python-dotenv>=1.0.1,<2"]
# ///
"""Log in to sipgate with OAuth 2.0, show the account, and refresh the tokens.

This program reads your sipgate account without ever seeing your password. It is a *client*, a
program that is registered with sipgate. You log in on sipgate's own page and allow the client to
read the account. sipgate's login server, the *authorization server*, then redirects your browser to
a small web server in this program, which only this computer can reach (RFC 8252, section 7.3). The
browser brings a code, which stands for your permission (an *authorization code grant*, RFC 6749,
section 4.1). The program exchanges it for tokens and shows one of them to the API.

log_in takes six steps. Each has a section of its own. The code that supports them comes last.

1. Configuration  load_config     the client, and the URLs of the servers
2. Authorize URL  authorize_url   the page where you log in, in your browser
3. Callback       check_callback  the browser comes back with an authorization code
4. Tokens         exchange_code   the code is exchanged for an access token and a refresh token
5. Account        get_account     the program calls the API with the access token
6. Refresh        refresh_tokens  the refresh token is exchanged for new tokens
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("Error: This Python is too old.\nPython 3.10 or newer is required.")

import argparse
import base64
import contextlib
import errno
import hashlib
import io
import json
import os
import queue
import re
import secrets
import signal
import socket
import socketserver
import subprocess
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any, TextIO
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

try:
    import requests
    from dotenv import dotenv_values
    from urllib3.exceptions import HTTPError
except ImportError as missing:
    advice = 'Install the packages: see "Run it" in README.md. Or use: uv run sipgate_oauth.py'
    sys.exit(f"Error: {missing}.\n{advice}")


def log_in(options: argparse.Namespace) -> None:
    """Take the six steps and print what happens. Raises LoginError."""
    config, overridden = load_config(options.config)
    say(f"1. Configuration: client {config['CLIENT_ID']}, scope {config['OAUTH_SCOPE']}")
    if overridden:
        say(f"   Overridden by environment variables: {', '.join(overridden)}")

    # Step 3 recognizes the callback of this login by its state. The code verifier proves in step 4
    # that the code is for this login. Both are new each time and too random to guess. (A web
    # application keeps them on its server, for the browser that is logging in.)
    state = secrets.token_urlsafe(32)  # 32 random bytes
    code_verifier = secrets.token_urlsafe(32)
    url = authorize_url(config, state, code_challenge_for(code_verifier))

    # Listen before the browser opens, so that the callback cannot come too early.
    with listen_for_callback(config["REDIRECT_URI"], state) as events:
        say("2. Authorize URL: log in there. If no browser opens, open the URL yourself.")
        show_request("Browser", "GET", url)
        say("", url, "")
        if not options.no_browser:
            open_browser(url)
        say(f"3. Callback: waiting up to {options.timeout:g} seconds for the browser to come back.")
        say("   If your browser is on another machine, it ends on an error page. Then copy the URL")
        say("   from its address bar, paste it here, and press Enter. For help, just press Enter.")
        # What arrives, or is pasted, counts only if check_callback accepts it.
        parameters = wait_for_callback(events, options.timeout)
    show_request("Browser", "GET", config["REDIRECT_URI"], parameters)
    code = code_from_callback(parameters)

    # Steps 4 to 6 accept any requests.Session. This one prints everything, also the account.
    with PrintingSession(options.show_tokens) as session:
        say("4. Tokens: the code is exchanged for an access token and a refresh token.")
        tokens = exchange_code(session, config, code, code_verifier)

        say("5. Account: the program calls the API with the access token.")
        get_account(session, config, tokens["access_token"])

        # The first access token is still valid, so this refresh is only a demonstration. In your
        # own program, refresh shortly before expires_in seconds (see the response) have passed, or
        # if get_account says so. Store the new tokens at once: the old ones may stop working.
        say("6. Refresh: the refresh token is exchanged for new tokens.")
        tokens = refresh_tokens(session, config, tokens)
        get_account(session, config, tokens["access_token"])
    say("Done: the login and the refresh worked, and the API accepted both access tokens.")


# --- 1. Configuration -----------------------------------------------------------------------------

Config = dict[str, str]
CLIENT_KEYS = ("CLIENT_ID", "CLIENT_SECRET", "OAUTH_SCOPE")
KEYS = (*CLIENT_KEYS, "REDIRECT_URI", "AUTH_URL", "TOKEN_URL", "TEST_API_ENDPOINT")


def load_config(path: Path) -> tuple[Config, list[str]]:
    """Read the configuration from a file and from environment variables, which override the file.

    path: a file of KEY=value lines like config.example.env; it need not exist
    Returns the values by key, and a list of the keys whose value in the file was overridden.
    Raises LoginError, which names every key with a missing or wrong value.
    """
    try:
        # Without interpolation, because a secret may contain a dollar sign.
        from_file = dotenv_values(path, interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        advice = "It must be a readable text file in UTF-8, like config.example.env."
        raise LoginError(f"Cannot read {path}: {error}", advice) from error
    config = {key: os.environ.get(key, from_file.get(key)) for key in KEYS}
    problems = problems_with(config)
    if problems and not os.path.isfile(path):
        raise LoginError(f"There is no file {path}; {'; '.join(problems)}", NO_FILE)
    if problems:
        advice = f"Correct this in {path}, or in the environment, which overrides the file."
        raise LoginError("; ".join(problems), advice)
    overridden = [key for key in KEYS if key in from_file and config[key] != from_file[key]]
    return {key: str(value) for key, value in config.items()}, overridden


# --- 2. Authorize URL -----------------------------------------------------------------------------


def authorize_url(config: Config, state: str, code_challenge: str) -> str:
    """Return the URL that the user opens to log in (RFC 6749, section 4.1.1)."""
    parameters = {
        # Ask for a code, not for a token. A token would stay in the browser's history, and whoever
        # finds it there could use it. A code alone is useless: see code_challenge.
        "response_type": "code",
        # Which client is asking. Its secret must not be here: browsers and logs keep this URL.
        "client_id": config["CLIENT_ID"],
        # Where to redirect the browser: one of the URIs that are registered for the client. The
        # server accepts no others, so that no other website can get the code.
        "redirect_uri": config["REDIRECT_URI"],
        # The permissions requested. The user sees them on the login page and has to allow them.
        "scope": config["OAUTH_SCOPE"],
        # Comes back unchanged in the callback: see check_callback.
        "state": state,
        # A hash of the code verifier. The server keeps it with the code that it issues and will
        # not exchange that code without the verifier. This is PKCE (Proof Key for Code Exchange,
        # RFC 7636). It ties the code to this login, so an intercepted code is useless.
        "code_challenge": code_challenge,
        # Says that the hash is SHA-256. With "plain", this URL would contain the verifier itself.
        "code_challenge_method": "S256",
    }
    # AUTH_URL may have parameters of its own, such as prompt=consent.
    separator = "&" if "?" in config["AUTH_URL"] else "?"
    return config["AUTH_URL"] + separator + urlencode(parameters)


def code_challenge_for(code_verifier: str) -> str:
    """Return the S256 code challenge of a code verifier (RFC 7636, section 4.2)."""
    digest = hashlib.sha256(code_verifier.encode("ascii")).digest()
    # base64 pads the end with =, which would have to be encoded in a URL. PKCE leaves it out.
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


# --- 3. Callback ----------------------------------------------------------------------------------


def check_callback(query: str, state: str) -> dict[str, str]:
    """Return the parameters of the callback: a code or an error (RFC 6749, section 4.1.2).

    query: the part of the callback's URL after the ?
    state: the state in the authorize URL, or "" if no login is under way
    Raises CallbackRefused if this is not the callback of our login.
    """
    parameters = dict(parse_qsl(query))
    if "code" not in parameters and "error" not in parameters:
        raise CallbackRefused("This is not a login response: it has neither a code nor an error.")

    # An attacker's web page can send your browser here with a code from the attacker's own login.
    # You would then work in their account without knowing it, and they could read what you leave
    # there. But no web page knows our state (RFC 6749, section 10.12). The timing of compare_digest
    # reveals nothing about the value. It accepts non-ASCII text only as bytes.
    received = parameters.get("state", "")
    if not state or not secrets.compare_digest(received.encode(), state.encode()):
        raise CallbackRefused(STATE_MISMATCH)
    return parameters


def code_from_callback(parameters: Mapping[str, str]) -> str:
    """Return the authorization code. Raises LoginError if the callback has an error instead."""
    if "error" in parameters:
        error = parameters["error"]
        advice = ADVICE.get(error, "Start again. If this keeps happening, ask the provider.")
        raise LoginError(f"The login failed: {describe(parameters)}", advice, error)
    return parameters["code"]


# --- 4. Tokens ------------------------------------------------------------------------------------

Tokens = dict[str, Any]  # the response of TOKEN_URL, the token endpoint (RFC 6749, section 5.1)


def exchange_code(
    session: requests.Session, config: Config, code: str, code_verifier: str
) -> Tokens:
    """Exchange the authorization code for tokens (RFC 6749, section 4.1.3).

    session: one per user, because it keeps the cookies of the authorization server
    Raises LoginError.
    """
    form = {
        # What is being exchanged: here a code, in step 6 a refresh token.
        "grant_type": "authorization_code",
        # Stands for what the user has allowed. It works once, and only for a short time.
        "code": code,
        # Its hash must be the code challenge that the code was issued for. So a stolen code fails
        # without the verifier, and so does a code from another login.
        "code_verifier": code_verifier,
        # Must be the one in the authorize URL. If an attacker changed that to another registered
        # URI, the server now notices.
        "redirect_uri": config["REDIRECT_URI"],
        # Which client is asking. The code works only for the client that it was issued to.
        "client_id": config["CLIENT_ID"],
        # Proves that it is this client. (RFC 6749, section 2.3.1, prefers HTTP Basic. sipgate
        # documents the form.) A program that you ship cannot keep a secret (RFC 8252, section 8.5):
        # it is a *public client*, CLIENT_SECRET is empty, and None is not sent.
        "client_secret": config["CLIENT_SECRET"] or None,
    }
    response = request_json(session, "POST", config["TOKEN_URL"], form=form)
    return tokens_from(response, config["TOKEN_URL"])


# --- 5. Account -----------------------------------------------------------------------------------


def get_account(session: requests.Session, config: Config, access_token: str) -> Any:
    """Return the account, or whatever JSON TEST_API_ENDPOINT sends. Raises LoginError.

    If the `error` of the LoginError is "invalid_token", refresh the tokens and try again once.
    """
    # Bearer: the API lets in whoever has this token. It goes into a header: URLs end up in logs.
    headers = {"Authorization": f"Bearer {access_token}"}
    return request_json(session, "GET", config["TEST_API_ENDPOINT"], headers=headers)


# --- 6. Refresh -----------------------------------------------------------------------------------


def refresh_tokens(session: requests.Session, config: Config, tokens: Tokens) -> Tokens:
    """Exchange the refresh token for new tokens, without the user (RFC 6749, section 6).

    An access token soon expires, in case it is stolen. A refresh token never goes to the API.
    tokens: the latest response of the token endpoint
    Raises LoginError. If its `error` is "invalid_grant", the user has to log in again.
    """
    refresh_token = tokens.get("refresh_token")
    if not refresh_token:
        what = f"{urlsplit(config['TOKEN_URL']).netloc} sent no refresh token"
        raise LoginError(what, NO_REFRESH_TOKEN, "invalid_grant")
    form = {
        # What is being exchanged: this time, a refresh token.
        "grant_type": "refresh_token",
        # Many servers, sipgate's among them, rotate it: it works once, and the response has a new
        # one. If a thief has a copy and both of you use it, the server refuses the second use, and
        # a careful server then revokes all tokens of this login.
        "refresh_token": refresh_token,
        # Which client is asking. A refresh token works only for the client it was issued to.
        "client_id": config["CLIENT_ID"],
        # Proves it, as in step 4. So whoever steals the refresh token needs the secret, too.
        "client_secret": config["CLIENT_SECRET"] or None,
    }
    response = request_json(session, "POST", config["TOKEN_URL"], form=form)
    new_tokens = tokens_from(response, config["TOKEN_URL"])
    # Some servers send no new refresh token. Then the old one remains valid.
    new_tokens["refresh_token"] = new_tokens.get("refresh_token") or refresh_token
    return new_tokens


# --- Errors, and what to do about them ------------------------------------------------------------


class LoginError(Exception):
    """The login cannot begin, or cannot continue.

    what: what happened, and where
    advice: what to do next
    error: the error code (RFC 6749, sections 4.1.2.1 and 5.2; RFC 6750, section 3.1), or ""
    """

    def __init__(self, what: str, advice: str, error: str = "") -> None:
        super().__init__(f"{what}. {advice}")
        self.what = what
        self.advice = advice
        self.error = error


class CallbackRefused(Exception):
    """What arrived at the redirect URI is not the callback of our login. The text says why."""


STATE_MISMATCH = "State in the callback does not match the state in the original request."
OLD_TAB = "It may come from an old browser tab or an attacker. To go on, open the URL above."
STILL_WAITING = "The terminal is still waiting for the login. Open the URL that it shows."
NO_FILE = """Copy config.example.env to config.env and fill it in. If you have the .env file of
sipgate's example, use --config .env. No sipgate account? See "Try it now" in README.md."""
CHECK_CLIENT = """Check CLIENT_ID and CLIENT_SECRET. If they are right, see "At another provider" in
README.md, or check whether the authorization code grant is enabled for the client."""
# Advice for the error codes of OAuth
ADVICE = {
    "access_denied": "To go on, start again and allow access.",
    "insufficient_scope": """OAUTH_SCOPE must contain the scope that the API requires. For sipgate's
account, that is account:read.""",
    "invalid_client": CHECK_CLIENT,
    "invalid_grant": "The code or refresh token is wrong, expired, or already used. Start again.",
    "invalid_scope": """Separate the scopes in OAUTH_SCOPE with spaces. List all that the server
requires and none that it does not know.""",
    "invalid_token": "The access token is expired, revoked, or not for this API. Start again.",
    "unauthorized_client": CHECK_CLIENT,
}
# Advice for all other errors
CHECK_URL = "Check this URL. If it is right, try again later."
USE_LOCATION = "If you trust the URL in Location (see the response), use it instead."
NOT_JSON = f"A firewall or a proxy may have responded, or this URL is for browsers. {CHECK_URL}"
NO_RESPONSE = """Try again. If this happens again, check the URL, the network, the proxy in the
settings of Windows or macOS, and the environment variables HTTPS_PROXY, ALL_PROXY (for SOCKS,
install PySocks), REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE (certificates to trust)."""
NO_REFRESH_TOKEN = """When the access token has expired, log in again. Some servers send a refresh
token if you add offline_access to OAUTH_SCOPE; others also need ?prompt=consent after AUTH_URL."""
OTHER_PORT = """Stop the program that uses this port. Or choose another port, above 1023, in
REDIRECT_URI, and register the new redirect URI for your client."""
BROWSER_ERRORS = """If the browser shows an error:
- "Client not found": check CLIENT_ID, and the realm in AUTH_URL and TOKEN_URL. At
  console.sipgate.com, you can see whether your client is in sipgate-apps or in third-party.
- "Invalid parameter: redirect_uri": register REDIRECT_URI for your client, exactly as it is.
- "405" or "Method Not Allowed": AUTH_URL and TOKEN_URL may be swapped.
- Any other error: check AUTH_URL, CLIENT_ID, OAUTH_SCOPE, and that REDIRECT_URI is registered."""


# --- What is wrong with a configuration -----------------------------------------------------------

# The loopback addresses of each host. localhost has two, and a browser may use either. RFC 8252,
# section 8.3, advises against localhost: use 127.0.0.1 if you can register it.
LOOPBACK = {"localhost": ["127.0.0.1", "::1"], "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}
QUOTATION_MARKS = "\"'“”„‘’‚«»"
# A realm is a separate area of an authorization server, with its own users and clients. Its name is
# in URLs (.../realms/third-party/...) and at the end of some client Ids (...:third-party).
REALM = "(?<=/realms/)[^/]+|(?<=:)(?:sipgate-apps|third-party)$"


def problems_with(config: Mapping[str, str | None]) -> list[str]:
    """Return what is wrong with the values: one text per wrong key, or one about the realms."""
    texts = {key: problem_with(key, value) for key, value in config.items()}
    problems = [f"{key} {text}" for key, text in texts.items() if text]
    named = [config[key] or "" for key in config if key != "CLIENT_SECRET"]
    realms = {realm for value in named for realm in re.findall(REALM, value)}
    if len(realms) > 1 and not problems:
        names = " and ".join(sorted(realms))
        problems.append(f"CLIENT_ID and the URLs must name the same realm, not {names}")
    return problems


def problem_with(key: str, value: str | None) -> str:
    """Return what is wrong with the value of a key, or an empty string."""
    if value == "" and key == "CLIENT_SECRET":  # as for a public client
        return ""
    if not value or not value.strip():
        return "is missing"
    placeholder = re.search("YOUR_(CLIENT_ID|CLIENT_SECRET|REALM)", value)
    if placeholder:
        return f"still contains {placeholder[0]}"
    if value != value.strip() or not value.isprintable():
        return "begins or ends with a space, or contains an invisible character"
    if value[0] in QUOTATION_MARKS and value[-1] in QUOTATION_MARKS:
        return "is enclosed in quotation marks: remove them"
    if key in CLIENT_KEYS:
        return ""
    try:
        url = urlsplit(value)
        # Secrets and tokens must not leave this computer unencrypted.
        is_safe = url.scheme == "https" or (url.scheme == "http" and url.hostname in LOOPBACK)
        is_url = is_safe and url.hostname and url.port != 0 and "@" not in url.netloc
    except ValueError:  # for example, for a port above 65535
        is_url = False
    if not is_url or not value.isascii() or set(value) & set(' #\\"<>^`{|}'):
        return "is not a URL like https://host/path (http only for localhost; no spaces, no #)"
    return ""


# --- HTTP requests --------------------------------------------------------------------------------


def request_json(
    session: requests.Session,
    method: str,
    url: str,
    form: Mapping[str, str | None] = {},
    headers: Mapping[str, str] = {},
) -> Any:
    """Send a request and return the JSON object or list in the response, or None if it is empty.

    form: is sent as application/x-www-form-urlencoded, without entries that are None
    Raises LoginError.
    """
    outside = sys.exc_info()[1]  # what our caller is handling: not the cause of a failure here
    try:
        response = session.request(
            method,
            url,
            data=form,
            # Without Accept, some servers respond with form data, not JSON.
            headers={"Accept": "application/json", **headers},
            # Without auth, requests would replace our header with a password from ~/.netrc.
            auth=lambda request: request,
            timeout=10,  # seconds to connect, and seconds of silence during the response
            allow_redirects=False,  # the secrets are meant for this URL only
            proxies={"http": ""},  # plain http stays on this computer: see problem_with
        )
    except (OSError, ValueError, HTTPError) as failure:  # of the system, requests, and urllib3
        address = url.partition("?")[0]  # the rest may contain a secret
        what = f"{method} {address} failed: {reason_of(failure, outside)}"
        raise LoginError(what, NO_RESPONSE) from None  # a traceback of it could show a secret
    try:
        content = json.loads(response.content)
    except ValueError:
        content = None
    is_success = response.status_code // 100 == 2
    if is_success and not response.content:  # usually 204 No Content
        return None
    # Some servers report an error with status 200.
    has_error = isinstance(content, dict) and content.get("error")
    if is_success and isinstance(content, (dict, list)) and not has_error:
        return content
    raise error_in(response, content)


def error_in(response: requests.Response, content: Any) -> LoginError:
    """Return the error that a response reports. content: the JSON in the response, or None"""
    details = content if isinstance(content, dict) else {}
    reason = describe(details)
    error = str(details.get("error") or "")
    if "Bearer" in response.request.headers.get("Authorization", ""):  # RFC 6750, section 3.1
        is_text = response.headers.get("Content-Type", "").startswith("text/plain")
        if response.status_code == 401:
            error = "invalid_token"
        elif response.status_code == 403 and is_text:  # as sipgate's API sends it
            reason = response.text.strip(" .\n")
        elif response.status_code == 403 and reason in ("", "Forbidden"):
            error = "insufficient_scope"
    advice = ADVICE.get(error, CHECK_URL)
    if response.is_redirect:
        reason = "redirects are not followed, so that no secret is sent to another URL"
        advice = USE_LOCATION
    elif response.content and content is None and not reason:
        reason = "the response is not JSON"
        advice = NOT_JSON
    address = str(response.url).partition("?")[0]
    what = f"{response.request.method} {address} got {response.status_code} {response.reason}"
    return LoginError(f"{what}: {reason or 'the response gives no reason'}", advice, error)


def tokens_from(response: Any, url: str) -> Tokens:
    """Return the tokens in a response of the token endpoint. Raises LoginError if there are none.

    Their `scope` may be narrower than the requested one (RFC 6749, section 5.1).
    """
    tokens: Tokens = response if isinstance(response, dict) else {}
    # A program must not use a type of token that it does not know (RFC 6749, section 7.1).
    is_bearer = str(tokens.get("token_type")).lower() == "bearer"
    if not is_bearer or not isinstance(tokens.get("access_token"), str):
        what = f"{url.partition('?')[0]} sent no access_token of token_type bearer"
        raise LoginError(what, CHECK_URL)
    return tokens


def describe(parameters: Mapping[str, Any]) -> str:
    """Return the error and its description, or an empty string if there is neither."""
    texts = [parameters.get(name) for name in ("error", "error_description", "message")]
    different = dict.fromkeys(text for text in texts if text and isinstance(text, str))
    return ": ".join(different).rstrip(".")


def reason_of(failure: BaseException, outside: BaseException | None) -> str:
    """Return why a request failed. Only messages of the operating system and of TLS are quoted:
    others may contain a secret, such as the password of a proxy."""
    cause: BaseException | None = failure
    while cause and cause is not outside:
        if isinstance(cause, OSError) and not isinstance(cause, requests.RequestException):
            return str(cause)
        cause = cause.__context__
    return type(failure).__name__


# --- Callback server ------------------------------------------------------------------------------

# What happens during the wait: the callback, as its parameters, or a text for the user
Events = queue.SimpleQueue[dict[str, str] | str]


@contextlib.contextmanager
def listen_for_callback(redirect_uri: str, state: str) -> Iterator[Events]:
    """Serve the redirect URI until the end of the `with` block, and read pasted URLs from stdin.

    state: the state in the authorize URL
    Yields the queue of events. Raises LoginError if this program cannot listen there. The thread
    that reads stdin ends with the program, so a line that is typed after the block is lost.
    """
    uri = urlsplit(redirect_uri)
    if uri.scheme != "http" or uri.hostname not in LOOPBACK:
        what = f"This program cannot listen at the REDIRECT_URI {redirect_uri}"
        advice = "Use http, not https, and a loopback host, as in http://localhost:8080/oauth."
        raise LoginError(what, advice)
    events: Events = queue.SimpleQueue()
    servers: list[CallbackServer] = []
    try:
        # All addresses of the host, and no others (RFC 8252, sections 7.3 and 8.3).
        for address in LOOPBACK[uri.hostname]:
            try:
                server = CallbackServer(address, uri, state, events)
            except OSError as error:
                if servers and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue  # this computer has no IPv6
                what = f"Cannot listen on port {uri.port or 80} of {address}: {error.strerror}"
                raise LoginError(what, OTHER_PORT) from error
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            servers.append(server)
        Thread(target=read_pasted, args=[redirect_uri, state, events], daemon=True).start()
        yield events
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def wait_for_callback(events: Events, timeout: float) -> dict[str, str]:
    """Return the parameters of the first callback. Print each text that arrives before it, once.

    timeout: seconds. Raises LoginError if there is no callback by then.
    """
    # Only this thread prints: Python may crash if another one is printing when the program ends.
    printed = set()
    deadline = time.monotonic() + timeout
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            what = f"The browser did not come back within {timeout:g} seconds"
            advice = f"Start again. For more time, use --timeout. {BROWSER_ERRORS}"
            raise LoginError(what, advice)
        with contextlib.suppress(queue.Empty):
            event = events.get(timeout=remaining)
            if isinstance(event, dict):
                return event
            if event not in printed:
                say(*event.split("\n"), file=sys.stderr)
                printed.add(event)


class CallbackServer(socketserver.ThreadingTCPServer):
    """Listens on one loopback address. Each connection gets its own thread, because browsers open
    connections that they do not use. (HTTPServer is slow: it looks up this computer's name.)"""

    daemon_threads = True  # so that no connection can keep the program from ending
    request_queue_size = 128  # connections; with fewer, a browser may wait for seconds
    # So that a second login can follow at once. On Windows, others could then take the port.
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, address: str, uri: SplitResult, state: str, events: Events) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.expected_path = uri.path or "/"
        self.state = state
        self.events = events
        super().__init__((address, uri.port or 80), CallbackHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a connection that breaks. The wait goes on."""


class CallbackHandler(BaseHTTPRequestHandler):
    """Responds to one request to the callback server, and passes on the callback."""

    server: CallbackServer

    def do_GET(self) -> None:
        target = urlsplit(self.path)  # a path, or a whole URL if the request comes from a proxy
        if (target.path or "/") != self.server.expected_path:
            self.send_page(404, "This is not the redirect URI.", STILL_WAITING)
            return
        try:
            parameters = check_callback(target.query, self.server.state)
        except CallbackRefused as refused:
            self.server.events.put(f"{refused}\n{OLD_TAB}")
            self.send_page(403, str(refused), STILL_WAITING)
            return
        try:
            self.send_page(200, "Your browser has done its part.", "Go back to the terminal.")
        finally:  # Even if the browser hangs up. Not earlier, or the program could end first.
            self.server.events.put(parameters)

    def send_page(self, status: int, title: str, text: str) -> None:
        """Send a page. Its texts must not come from the request: nothing is escaped."""
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        page = f"<!DOCTYPE html><title>Login</title><h1>{title}</h1><p>{text}</p>"
        self.wfile.write(page.encode())

    def end_headers(self) -> None:
        """Keep pages (also those of the base class) from loading anything, from being cached, and
        from revealing their URL, which contains the code."""
        self.send_header("Content-Security-Policy", "default-src 'none'")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because the request line contains the code."""


# --- Pasted URLs, and the browser -----------------------------------------------------------------


def read_pasted(redirect_uri: str, state: str, events: Events) -> None:
    """Read lines from stdin until one of them is the callback, or stdin ends."""
    with contextlib.suppress(AttributeError, OSError):  # stdin is closed, or is a notebook's
        while True:
            # A thread in input() could crash Python when the program ends.
            typed = os.read(sys.stdin.fileno(), 16384)  # bytes
            if not typed:
                return
            for line in typed.decode(errors="replace").splitlines():
                try:
                    events.put(check_pasted(line, redirect_uri, state))
                    return
                except CallbackRefused as refused:
                    events.put(str(refused))


def check_pasted(line: str, redirect_uri: str, state: str) -> dict[str, str]:
    """Return the parameters of the callback in a pasted line. Raises CallbackRefused."""
    if not line.strip():
        raise CallbackRefused(BROWSER_ERRORS)
    line = re.sub("\x1b\\[20[01]~", " ", line)  # what some terminals put around a paste
    # The characters of a URL. The rest was copied by accident.
    url = max(re.findall(r"[\w.~:/?@!$&()*+,;=%\[\]-]+", line, re.ASCII), key=len, default="")
    if url.startswith(("(", "[")):  # as in "(URL)."
        url = url.rstrip(".,:;!?)]")
    address, _, query = url.partition("?")
    with contextlib.suppress(CallbackRefused):
        return check_callback(query, state)
    expected = urlsplit(redirect_uri)
    if not address.endswith(expected.netloc + expected.path):
        text = f"This is not the URL of the callback, which begins with {redirect_uri}"
        raise CallbackRefused(f"{text}\n{BROWSER_ERRORS}")
    if state.startswith(dict(parse_qsl(query)).get("state", "")):  # also without a state
        raise CallbackRefused("This is not the whole URL. Copy all of it from the address bar.")
    raise CallbackRefused(f"{STATE_MISMATCH}\n{OLD_TAB}")


def open_browser(url: str) -> None:
    """Open the URL in the user's browser, if there is one, without waiting for it."""
    environment = {name: value for name, value in os.environ.items() if name not in KEYS}
    environment["TERM"] = ""  # so that no text browser takes over the terminal
    with contextlib.suppress(OSError):
        browser = subprocess.Popen(
            [sys.executable, "-I", "-m", "webbrowser", url],  # -I ignores a ./webbrowser.py
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,  # without the client secret
            start_new_session=True,  # so that Ctrl+C does not end the browser
        )
        browser.returncode = 0  # otherwise, Python would warn that it is still running


# --- Output ---------------------------------------------------------------------------------------

# Patterns for the names of secrets: in requests, in responses, and in responses if tokens are shown
SECRETS_SENT = "^code$|(key|token|verifier|secret|authorization)$"
SECRETS_RECEIVED = "(token|tokens|verifier|secret)$"
SECRETS_EXCEPT_TOKENS = "(verifier|secret)$"


class PrintingSession(requests.Session):
    """Prints each request as it is sent, and each response as it arrives.

    show_tokens: whether the tokens in responses stay readable
    """

    def __init__(self, show_tokens: bool) -> None:
        super().__init__()
        self.pattern = SECRETS_EXCEPT_TOKENS if show_tokens else SECRETS_RECEIVED

    def send(self, request: requests.PreparedRequest, **settings: Any) -> requests.Response:
        parameters = dict(parse_qsl(str(request.body or "")))
        if "Authorization" in request.headers:
            parameters["Authorization"] = request.headers["Authorization"]
        show_request("Program", str(request.method), str(request.url), parameters)
        response = super().send(request, **settings)
        show_response(response, self.pattern)
        return response


def show_request(sender: str, method: str, url: str, parameters: Mapping[str, str] = {}) -> None:
    """Print who sends a request, its method and URL, and its parameters, one on each line."""
    address, _, query = url.partition("?")
    say(f"   {sender}: {method} {address}")
    for name, value in masked({**dict(parse_qsl(query)), **parameters}, SECRETS_SENT).items():
        say(f"      {name}: {value}")


def show_response(response: requests.Response, pattern: str) -> None:
    """Print a response: its status, the headers that explain an error, and its JSON."""
    say(f"   Response: {response.status_code} {response.reason}")
    for name in ("Location", "WWW-Authenticate"):
        if name in response.headers:
            # The query or fragment of a Location may contain a secret.
            say(f"      {name}: {re.split('[?#]', response.headers[name])[0]}")
    try:
        # json calls the hook with each object, at every depth.
        content = json.loads(response.content, object_hook=lambda it: masked(it, pattern))
        shown = json.dumps(content, indent=2, ensure_ascii=False)
    except ValueError:
        shown = f"({len(response.content)} bytes that are not JSON)"
    say(*(f"      {line}" for line in shown.split("\n")))


def masked(values: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """Return the values. Those whose name matches the pattern are shortened."""
    shown = dict(values)
    for name, value in values.items():
        if value and re.search(pattern, name, re.IGNORECASE):
            shown[name] = "..."
            if isinstance(value, str) and not name.lower().endswith("secret"):
                shown[name] = f"{value[: min(10, len(value) // 4)]}... ({len(value)} characters)"
    return shown


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines to stdout, or to another file. Raises SystemExit if nobody reads them anymore.

    Control characters are escaped as in JSON, because some texts come from servers.
    """
    try:
        for line in lines:
            printable = [c if c.isprintable() else json.dumps(c)[1:-1] for c in line]
            print("".join(printable), file=file, flush=True)
    except OSError:  # as after `| head`
        # Python would complain when it flushes stdout at the end: give it one that works.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# --- Program --------------------------------------------------------------------------------------


def main() -> None:
    """Run the program. Raises SystemExit if the login fails."""
    # Ctrl+C ends the program at once, whatever it is waiting for. A program that stores tokens must
    # not do this, because it could end between refresh and storage.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:  # For the first process of a container, Linux ignores SIG_DFL.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    try:
        log_in(parse_arguments())
    except LoginError as error:
        say(f"Error: {error.what}.", *error.advice.split("\n"), file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, before)  # for notebooks


def parse_arguments() -> argparse.Namespace:
    """Return the options on the command line. Raises SystemExit if there is a mistake in them."""
    config = Path(__file__).with_name("config.env")
    parser = argparse.ArgumentParser(description="Log in to sipgate with OAuth 2.0.")
    parser.add_argument("--config", type=Path, default=config, help="values (default: %(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument("--timeout", type=float, default=300, help="seconds (default: %(default)s)")
    parser.add_argument("--show-tokens", action="store_true", help="print tokens in full")
    options = parser.parse_args()
    if not 0 < options.timeout <= 86400:
        parser.error("--timeout must be greater than 0 and at most 86400 seconds (a day)")
    return options


if __name__ == "__main__":
    main()
