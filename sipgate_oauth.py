# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.32.4,<3", "python-dotenv>=1.0.1,<2"]
# ///
"""Log in to sipgate with OAuth 2.0, show the account, and refresh the tokens.

The login is an authorization code grant (RFC 6749, section 4.1) with PKCE (RFC 7636); the browser
comes back to this program on the loopback interface (RFC 8252, section 7.3). The file reads in
the order in which things happen:

1. Configuration    load_config        who this client is, and where sipgate's servers are
2. Authorize URL    authorize_url      where the browser goes, for the person to log in
3. Callback         wait_for_callback  where the browser comes back to, with a code
4. Code for tokens  exchange_code      the code becomes an access token and a refresh token
5. Account          get_account        the access token opens the API
6. Refresh          refresh_tokens     the refresh token becomes a new pair of tokens
"""

import argparse
import base64
import contextlib
import errno
import hashlib
import html
import io
import json
import os
import re
import secrets
import selectors
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import parse_qsl, urlencode, urlsplit

try:
    import requests
    from dotenv import dotenv_values
except ImportError as missing:
    sys.exit(f"Error: {missing}.\nInstall it with: python -m pip install -r requirements.txt")

Config = dict[str, str]


class LoginError(Exception):
    """The login can't go on. what: what happened, and where; advice: what to do next;
    exit_status: what the program ends with, 1 if something failed, 2 for the configuration."""

    def __init__(self, what: str, advice: str, exit_status: int = 1) -> None:
        super().__init__(what)
        self.what, self.advice, self.exit_status = what, advice, exit_status


# --- 1. Configuration -----------------------------------------------------------------------------

# Where to listen for each host that the redirect URI may have. For localhost, a browser may pick
# either of two addresses.
LOOPBACK = {"localhost": ["127.0.0.1", "::1"], "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}

HTTP_LOOPBACK = r"http://(localhost|127\.0\.0\.1|\[::1\])"
# The client secret and the tokens go to an endpoint: in clear text no further than this machine.
ENDPOINT = rf"({HTTP_LOOPBACK}|https://([\w.-]+|\[[\da-f:]+\]))(:\d+)?([/?][^#\\\s]*)?"
URI_FORMS = {
    # A browser comes back to a path as plain as this just as it is written.
    "REDIRECT_URI": rf"{HTTP_LOOPBACK}(:\d+)?(/[\w~-][\w.~-]*)*/?",
    "AUTH_URL": ENDPOINT,
    "TOKEN_URL": ENDPOINT,
    "TEST_API_ENDPOINT": ENDPOINT,
}
KEYS = ("CLIENT_ID", "CLIENT_SECRET", "OAUTH_SCOPE", *URI_FORMS)


def load_config(path: Path) -> Config:
    """Read the configuration: the values of a file, and over them those of the environment.

    path: a file of KEY=value lines; it may be missing if the environment has all KEYS
    Raises LoginError (exit status 2) that names every key whose value is missing or can't work.
    """
    from_file: dict[str, str | None] = {}
    advice = f"Correct it in {path}; config.example.env explains each key."
    try:
        with path.open(encoding="utf-8-sig") as file:
            # Without interpolation, because a secret may hold a $.
            from_file = dotenv_values(stream=file, interpolate=False)
    except FileNotFoundError:
        advice = (
            f"There is no {path}: copy config.example.env to config.env and fill it in. "
            "Without a sipgate account, try the sandbox: python tests/sandbox.py"
        )
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LoginError(f"Can't read {path}: {reason}.", advice, exit_status=2) from error

    config = {key: os.environ.get(key, from_file.get(key)) or "" for key in KEYS}
    problems = [f"{key} {problem}" for key in KEYS if (problem := problem_with(key, config[key]))]
    if problems:
        what = f"The configuration does not work: {'; '.join(problems)}."
        raise LoginError(what, advice, exit_status=2)
    return config


def problem_with(key: str, value: str) -> str:
    """Return what keeps the value of a key from working, or an empty string."""
    if not value.strip():
        return "is missing or empty"
    if value == f"YOUR_{key}":
        return "is still the placeholder"
    if not value.isprintable():
        return "holds characters that can't be seen"
    if key not in URI_FORMS:
        return ""
    try:
        matches = re.fullmatch(URI_FORMS[key], value, re.ASCII | re.IGNORECASE)
        works = matches and urlsplit(value).port != 0
    except ValueError:  # a port above 65535
        works = False
    if works:
        return ""
    if key == "REDIRECT_URI":
        return "should look like http://localhost:8080/oauth (http, a port from 1 to 65535, a path)"
    return "should look like https://login.sipgate.com/path (http only on localhost)"


# --- 2. Authorize URL -----------------------------------------------------------------------------


def code_challenge_for(code_verifier: str) -> str:
    """Return the S256 code challenge of a code verifier (RFC 7636, section 4.2)."""
    digest = hashlib.sha256(code_verifier.encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def authorize_url(config: Config, state: str, code_challenge: str) -> str:
    """Return the URL that the person opens to log in (RFC 6749, section 4.1.1)."""
    parameters = {
        "response_type": "code",
        "client_id": config["CLIENT_ID"],
        "redirect_uri": config["REDIRECT_URI"],
        "scope": config["OAUTH_SCOPE"],
        "state": state,
        "code_challenge": code_challenge,
        "code_challenge_method": "S256",
    }
    separator = "&" if "?" in config["AUTH_URL"] else "?"
    return config["AUTH_URL"] + separator + urlencode(parameters)


def open_browser(url: str) -> None:
    """Open the URL in the person's browser; if that fails, it is on the screen anyway.

    In a process of its own that has no terminal: no text browser takes over the screen, no log of
    a browser mixes with the output, and no slow browser holds up the wait for the callback.
    """
    command = [sys.executable, "-I", "-m", "webbrowser", url]  # -I: never ./webbrowser.py
    environment = {**os.environ, "TERM": ""}  # without TERM, it knows of no text browsers
    nothing = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        # A new session has no /dev/tty either, and no Ctrl+C. (Windows has no sessions.)
        subprocess.run(
            command,
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            env=environment,
            start_new_session=True,
        )


# --- 3. Callback ----------------------------------------------------------------------------------

FOREIGN_STATE = "State in the callback does not match the state in the original request."


class CallbackRefused(Exception):
    """A request that is not the callback of this login; status is the HTTP status to answer."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


def check_callback(target: str, path: str, state: str) -> dict[str, str]:
    """Return the parameters of a callback, with a code or an error (RFC 6749, section 4.1.2).

    target: where the browser was sent to, with or without scheme and host
    path, state: those of the redirect URI and of the authorize URL
    Raises CallbackRefused for all that is not the callback of this login.
    """
    try:
        uri = urlsplit(target)
        pairs = parse_qsl(uri.query, keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "This address can't be read.") from None
    parameters = dict(pairs)
    if (uri.path or "/") != (path or "/"):
        raise CallbackRefused(HTTPStatus.NOT_FOUND, "This is not the path of the redirect URI.")
    if len(parameters) < len(pairs):
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "A parameter is there more than once.")
    if not parameters.keys() & {"code", "error", "state"}:
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "This address holds no answer to the login.")
    # Without this, a page on the web could send a code of its own here, and log this program in
    # to somebody else's account (RFC 6749, section 10.12). The time that the comparison takes
    # does not tell how much of a guess was right; only bytes may hold non-ASCII characters.
    received = parameters.get("state", "").encode(errors="replace")
    if not secrets.compare_digest(received, state.encode()):
        raise CallbackRefused(HTTPStatus.FORBIDDEN, FOREIGN_STATE)
    if bool(parameters.get("code")) == bool(parameters.get("error")):
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "There should be a code or an error.")
    return parameters


class CallbackHandler(BaseHTTPRequestHandler):
    """Answers one request to the callback server."""

    server: "CallbackServer"
    timeout = 5  # seconds that a connection may be silent
    default_request_version = "HTTP/1.0"  # so that nonsense gets a status line too

    def do_GET(self) -> None:
        if len(self.requestline.split()) != 3:  # cut off before its end, as the code may be
            return self.send_error(HTTPStatus.BAD_REQUEST)
        try:
            parameters = check_callback(self.path, self.server.path, self.server.state)
        except CallbackRefused as refused:
            is_foreign = refused.status == HTTPStatus.FORBIDDEN
            if is_foreign and self.server.warned.acquire(blocking=False):
                warn(f"{FOREIGN_STATE}\nIt may be an old tab: use the URL above. Still waiting.")
            return self.answer(refused.status, "Not the callback of this login", str(refused))
        if not self.server.answered.acquire(blocking=False):
            return self.answer(HTTPStatus.CONFLICT, "This login has been answered before", "")
        try:
            if "error" in parameters:
                self.answer(HTTPStatus.OK, "The login did not come through", describe(parameters))
            else:
                self.answer(HTTPStatus.OK, "The login came through", "")
        finally:
            self.server.callback = parameters
            self.server.wake.send(b"!")

    def answer(self, status: HTTPStatus, title: str, text: str) -> None:
        """Send a page that loads nothing, is not kept, and tells nobody the address it is on."""
        page = (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
            '<meta name="color-scheme" content="light dark">'
            '<meta name="viewport" content="width=device-width">'
            "<style>body { font: 1.2em sans-serif; margin: 3em }</style>"
            f"<title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>"
            f"<p>{html.escape(text)}</p><p>The terminal goes on from here.</p></html>"
        ).encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send the same page where http.server refuses a request by itself."""
        status = HTTPStatus(code)
        self.answer(status, "Not the callback of this login", status.phrase)

    def finish(self) -> None:
        """Read to the end: a close before that resets the connection, and the page is lost."""
        super().finish()
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(65536):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, as the request line holds the code."""


class CallbackServer(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Listens on the loopback interface for the callback of one login.

    Each connection has a thread of its own, so that the callback does not wait behind those that
    a browser opens and leaves idle.
    """

    daemon_threads = True  # nor does the end of the program wait for them

    def __init__(self, redirect_uri: str, state: str) -> None:
        """Listen on each address of the redirect URI's host, as the browser may pick any of them.

        Raises LoginError if the port can't be had.
        """
        uri = urlsplit(redirect_uri)
        super().__init__((uri.hostname, uri.port or 80), CallbackHandler)
        self.path, self.state = uri.path, state
        self.callback: dict[str, str] = {}
        # Each is taken once and never given back: of many threads, only the first gets it.
        self.answered, self.warned = threading.Lock(), threading.Lock()
        with contextlib.ExitStack() as sockets:
            self.wake, self.woken = map(sockets.enter_context, socket.socketpair())
            self.listeners: list[socket.socket] = []
            for address in LOOPBACK[uri.hostname or ""]:
                try:
                    self.listeners.append(sockets.enter_context(listen(address, uri.port or 80)))
                except OSError as error:
                    if self.listeners and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        continue  # a machine without IPv6
                    raise LoginError(
                        f"Can't listen on port {uri.port or 80} of {address}: {error.strerror}.",
                        "Stop the program that uses the port, or choose another above 1023 in "
                        "REDIRECT_URI, and add that URI to your client at console.sipgate.com.",
                    ) from error
            self.sockets = sockets.pop_all()

    def wait(self, timeout: float) -> dict[str, str]:
        """Serve requests until the callback is among them, and return its parameters.

        timeout: seconds; LoginError is raised when they are over
        """
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for source in (self.woken, *self.listeners):
                selector.register(source, selectors.EVENT_READ, source)
            while not self.callback:
                seconds_left = deadline - time.monotonic()
                if seconds_left <= 0:
                    raise LoginError(f"No callback came in {timeout:g} seconds.", TIMEOUT_ADVICE)
                for key, _ in selector.select(seconds_left):
                    # A connection may be gone again, or there are too many.
                    with contextlib.suppress(OSError, RuntimeError):
                        if key.data is not self.woken:
                            self.process_request(*key.data.accept())
        return self.callback

    def close_request(self, request: Any) -> None:
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about connections that break: anybody may break one at any time."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        self.sockets.close()


def listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens on the address, and that is the only one to do so."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        if sys.platform == "win32":  # where a second program could take the port otherwise
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:  # where the port of a login that has just ended can't be had otherwise
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(128)  # connections that may queue up
        listener.setblocking(False)  # one may be gone again when it is accepted
    except OSError:
        listener.close()
        raise
    return listener


def ask_for_callback(redirect_uri: str, state: str) -> dict[str, str]:
    """Ask for the address that the browser was sent to until it is the callback, and return its
    parameters. Raises LoginError when the input ends."""
    while True:
        say("   Paste the address that your browser was sent to, and press Enter:")
        line = sys.stdin.readline()
        if not line:
            raise LoginError("The input ended before the callback.", "Start again and paste it.")
        try:
            return check_callback(line.strip(" \t\r\n\"'"), urlsplit(redirect_uri).path, state)
        except CallbackRefused as refused:
            warn(f"{refused}\nCopy the whole address from the address bar, after the login.")


def code_of(callback: dict[str, str]) -> str:
    """Return the authorization code. Raises LoginError if the callback brought an error."""
    if "error" in callback:
        what = f"sipgate did not log you in: {describe(callback)}."
        raise LoginError(what, ADVICE.get(callback["error"], START_AGAIN))
    return callback["code"]


# --- 4. Code for tokens ---------------------------------------------------------------------------


class Tokens(NamedTuple):
    access_token: str
    refresh_token: str | None
    expires_in: int | None  # seconds from now until the access token ends


def exchange_code(
    session: requests.Session, config: Config, code: str, code_verifier: str
) -> Tokens:
    """Exchange the authorization code for tokens (RFC 6749, section 4.1.3). Raises LoginError.

    The code alone is worth nothing to a thief: the client secret shows which client is asking,
    and the code verifier that it is the one that began this login (RFC 7636, section 4.5).
    """
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "code_verifier": code_verifier,
        "redirect_uri": config["REDIRECT_URI"],
        "client_id": config["CLIENT_ID"],
        "client_secret": config["CLIENT_SECRET"],
    }
    return read_tokens(call(session, "POST", config, "TOKEN_URL", data=form), config)


def read_tokens(answer: dict[str, Any], config: Config) -> Tokens:
    """Check the answer of the token endpoint (RFC 6749, section 5.1). Raises LoginError."""
    access_token, refresh_token = answer.get("access_token"), answer.get("refresh_token")
    token_type, expires_in = answer.get("token_type"), answer.get("expires_in")
    if not is_token(access_token) or str(token_type).lower() != "bearer":
        what = f"{urlsplit(config['TOKEN_URL']).netloc} sent no access token that can be used."
        raise LoginError(what, CHECK_KEY.format(key="TOKEN_URL"))
    if type(expires_in) is not int or not 0 < expires_in < 10**9:
        expires_in = None
    return Tokens(access_token, refresh_token if is_token(refresh_token) else None, expires_in)


def is_token(value: object) -> TypeGuard[str]:
    """Whether a value can be sent as a token: printable ASCII (RFC 6749, appendix A.12)."""
    return isinstance(value, str) and value.isascii() and value.isprintable() and value != ""


# --- 5. Account -----------------------------------------------------------------------------------


def get_account(session: requests.Session, config: Config, access_token: str) -> dict[str, Any]:
    """Return the account, which the access token opens (RFC 6750, section 2.1). Raises LoginError."""
    headers = {"Authorization": f"Bearer {access_token}"}
    return call(session, "GET", config, "TEST_API_ENDPOINT", headers=headers)


# --- 6. Refresh -----------------------------------------------------------------------------------


def refresh_tokens(session: requests.Session, config: Config, refresh_token: str) -> Tokens:
    """Exchange the refresh token for new tokens (RFC 6749, section 6). Raises LoginError.

    The old pair ends with this, so that a stolen refresh token is soon found out (RFC 9700,
    section 4.14.2).
    """
    form = {
        "grant_type": "refresh_token",
        "refresh_token": refresh_token,
        "client_id": config["CLIENT_ID"],
        "client_secret": config["CLIENT_SECRET"],
    }
    tokens = read_tokens(call(session, "POST", config, "TOKEN_URL", data=form), config)
    # A server that does not change the refresh token may leave it out.
    return tokens._replace(refresh_token=tokens.refresh_token or refresh_token)


# --- Requests to sipgate's servers ----------------------------------------------------------------

REQUEST_TIMEOUT = 10  # seconds for the connection, and for each silence in an answer


def new_session() -> requests.Session:
    """Return the session that all requests share, so that each host gets one connection."""
    session = requests.Session()
    session.headers["Accept"] = "application/json"
    # With no auth of its own, requests would put a password from ~/.netrc in the token's place.
    session.auth = lambda request: request
    return session


def call(
    session: requests.Session,
    method: str,
    config: Config,
    key: str,
    data: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Send a request to the URL of a configuration key, and return the JSON object it answers.

    Raises LoginError for every other outcome.
    """
    host = urlsplit(config[key]).netloc
    try:
        response = session.request(
            method,
            config[key],
            data=data,
            headers=headers,
            timeout=REQUEST_TIMEOUT,
            allow_redirects=False,  # the secret and the token are for this host alone
            proxies={"http": ""},  # http is for this machine: a proxy would see it in clear text
        )
    except (OSError, ValueError) as error:  # OSError is the base of all exceptions of requests
        what = f"No answer from {host} that can be used: {root_cause(error)}."
        advice = next(text for kind, text in NETWORK_ADVICE if isinstance(error, kind))
        raise LoginError(what, advice.format(key=key)) from error

    status, answer = response.status_code, None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(response.content)
        json.dumps(answer, indent=2)  # it will be shown, and Python can read deeper than write
    if status == HTTPStatus.OK and isinstance(answer, dict) and "error" not in answer:
        return answer
    reason = describe(answer)
    for name in SECRETS & (data or {}).keys():  # a server may repeat what it was sent
        reason = reason.replace((data or {})[name], "***")
    what = f"{host} answered {status} {response.reason}: {reason}."
    if key == "TEST_API_ENDPOINT" and status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise LoginError(what, ADVICE["insufficient_scope"])
    raise LoginError(what, ADVICE.get(reason.partition(":")[0], CHECK_KEY.format(key=key)))


# --- What the person sees -------------------------------------------------------------------------

START_AGAIN = "Start again. If it fails in the same way, the error's name is the one to look up."
CHECK_KEY = "Check {key} in the configuration. If it is right, try again later."
# What to do about the errors of RFC 6749 (sections 4.1.2.1 and 5.2) and RFC 6750 (section 3.1).
ADVICE = {
    "access_denied": "You, or sipgate, said no. Start again and allow the access to go on.",
    "invalid_client": "Check CLIENT_ID and CLIENT_SECRET against console.sipgate.com.",
    "unauthorized_client": "Check CLIENT_ID and CLIENT_SECRET against console.sipgate.com.",
    "invalid_grant": "The code or the refresh token was used before or has expired. Start again.",
    "invalid_scope": "Check OAUTH_SCOPE: one or more scopes of sipgate, separated by spaces.",
    "insufficient_scope": "Check that OAUTH_SCOPE has the scope for this call, such as account:read.",
}
# The first that fits counts.
NETWORK_ADVICE = (
    (requests.exceptions.ProxyError, "Check the proxy that HTTPS_PROXY names, or its NO_PROXY."),
    (
        requests.exceptions.SSLError,
        "Check {key}. If a company proxy signs the traffic, let REQUESTS_CA_BUNDLE name the file "
        "with its certificate.",
    ),
    (Exception, "Check {key} and the network connection, then try again."),
)
TIMEOUT_ADVICE = """Start again; --timeout gives you more time. If the login page showed an error:
- "Invalid parameter: redirect_uri": add REDIRECT_URI to your client at console.sipgate.com.
- "Client not found": check CLIENT_ID.
If the browser is on another machine, use --paste."""
SECRETS = {"client_secret", "code", "code_verifier", "refresh_token"}


def describe(answer: Any) -> str:
    """Return the error that an answer or a callback holds (RFC 6749, sections 4.1.2.1, 5.2)."""
    if not isinstance(answer, dict):
        return "no JSON object"
    texts = (answer.get("error"), answer.get("error_description"))
    return ": ".join(text[:200] for text in texts if isinstance(text, str)) or "no reason given"


def root_cause(error: BaseException) -> str:
    """Return the text of the exception that all others wrap, such as "Connection refused"."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error) or type(error).__name__


def show_tokens(tokens: Tokens, in_full: bool) -> None:
    """Print the tokens, masked unless in_full: whoever has them has the account."""
    for name, token in (("Access", tokens.access_token), ("Refresh", tokens.refresh_token)):
        if token:
            visible = token if in_full else token[: min(6, len(token) // 4)] + "..."
            say(f"   {name} token: {visible} ({len(token)} characters)")
    if tokens.expires_in:
        say(f"   The access token is valid for {in_words(tokens.expires_in)}.")


def in_words(seconds: int) -> str:
    """Return a time as a person says it: 5400 seconds are "1 hour 30 minutes"."""
    words = []
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            words.append(f"{count} {unit}{'s' if count > 1 else ''}")
    return " ".join(words)


def show_account(account: dict[str, Any]) -> None:
    say(json.dumps(account, indent=2, ensure_ascii=False))


def printable(text: str) -> str:
    """Return the text with JSON's escapes for all but line breaks that could steer a terminal:
    control characters, bidirectional overrides, lone surrogates."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Print to stdout, at once even into a pipe. Raises OSError if that can't be written to."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Print to stderr. If even that can't be written to, there is nobody to tell."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


# --- The whole login ------------------------------------------------------------------------------


def log_in(options: argparse.Namespace) -> None:
    """Take the six steps. Raises LoginError, or OSError if stdout can't be written to."""
    config = load_config(options.config)
    say(f"1. Configuration: client {config['CLIENT_ID']}, scope {config['OAUTH_SCOPE']}")

    # 256 bits of chance in each (RFC 6749, section 10.10; RFC 7636, section 7.1).
    state, code_verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    url = authorize_url(config, state, code_challenge_for(code_verifier))
    step_2 = f"2. Authorize URL: open it in your browser and log in\n\n{url}\n\n3. Callback:"
    if options.paste:
        say(f"{step_2} it goes to {config['REDIRECT_URI']}; no page needs to open there")
        callback = ask_for_callback(config["REDIRECT_URI"], state)
    else:
        with CallbackServer(config["REDIRECT_URI"], state) as server:
            say(f"{step_2} waiting at {config['REDIRECT_URI']} for {options.timeout:g} seconds")
            say("   Is your browser on another machine? Press Ctrl+C and start with --paste.")
            if not options.no_browser:
                threading.Thread(target=open_browser, args=[url], daemon=True).start()
            callback = server.wait(options.timeout)

    with new_session() as session:
        code = code_of(callback)
        say("4. Code for tokens: the callback has our state and a code, which is exchanged")
        tokens = exchange_code(session, config, code, code_verifier)
        show_tokens(tokens, options.show_tokens)

        say(f"5. Account: the answer of {config['TEST_API_ENDPOINT']}")
        show_account(get_account(session, config, tokens.access_token))

        say("6. Refresh: the refresh token is exchanged for new tokens")
        if not tokens.refresh_token:
            what = (
                f"{urlsplit(config['TOKEN_URL']).netloc} sent no refresh token: nothing to refresh."
            )
            raise LoginError(what, "Log in again when the access token has ended.")
        new_tokens = refresh_tokens(session, config, tokens.refresh_token)
        show_tokens(new_tokens, options.show_tokens)
        say("   The old tokens are no longer valid. The account, with the new access token:")
        show_account(get_account(session, config, new_tokens.access_token))


def seconds(text: str) -> float:
    """Return the number of seconds that an option gives."""
    if not 0 < float(text) <= 86400:
        raise argparse.ArgumentTypeError("should be a positive number of at most 86400 (a day)")
    return float(text)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Log in to sipgate with OAuth 2.0.")
    option, beside = parser.add_argument, Path(__file__).with_name("config.env")
    option("--config", metavar="FILE", type=Path, default=beside, help="(default: %(default)s)")
    option("--no-browser", action="store_true", help="don't open the browser (default: open it)")
    option(
        "--paste",
        action="store_true",
        help="for a browser on another machine: ask for the address that it was sent to (default: wait for the browser)",
    )
    option(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=300,
        help="how long to wait for the callback (default: %(default)s)",
    )
    option("--show-tokens", action="store_true", help="print the tokens in full (default: masked)")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """Log in, and return the exit status."""
    try:
        log_in(options)
    except LoginError as error:
        what = " ".join(error.what.split())  # a server may have put line breaks into it
        warn(f"Error: {what}\n{error.advice}")
        return error.exit_status
    except OSError as error:  # from stdout, as all others have become a LoginError
        # What it still has to print must not fail once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # "| head -3" has read enough
            warn(f"Error: can't print any more: {error.strerror}.\nCheck where the output goes.")
        return 1
    return 0


def main() -> int:
    """Run the login in a thread of its own, and return the exit status.

    Ctrl+C only ever interrupts the main thread, and not while that looks up the name of a host
    or, on Windows, waits for a socket. So here it waits for nothing else.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # one that is closed is None
            stream.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    options, outcome = parse_options(), [1]
    thread = threading.Thread(target=lambda: outcome.insert(0, run(options)), daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.5)  # seconds: Windows does not interrupt a wait
    except KeyboardInterrupt:
        os._exit(130)  # at once, whatever the thread is waiting for
    return outcome[0]


if __name__ == "__main__":
    sys.exit(main())
