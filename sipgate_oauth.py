# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.32.4,<3", "python-dotenv>=1.0.1,<2"]
# ///
"""Log in to sipgate with OAuth 2.0, show the account, and refresh the tokens.

The login is an authorization code grant (RFC 6749, section 4.1) with PKCE (RFC 7636); the browser
comes back to this program on the loopback interface (RFC 8252, section 7.3). The file reads in
the order in which things happen:

1. Configuration    load_config     who this client is, and where sipgate's servers are
2. Authorize URL    authorize_url   where the browser goes, for the person to log in
3. Callback         await_callback  where the browser comes back to, with a code
4. Code for tokens  exchange_code   the code becomes an access token and a refresh token
5. Account          get_account     the access token opens the API
6. Refresh          refresh_tokens  the refresh token becomes a new pair of tokens

log_in, near the end, takes these steps one after the other.
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
import queue
import re
import secrets
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeGuard
from urllib.parse import parse_qsl, quote_plus, urlencode, urlsplit

try:
    import requests
    from dotenv import dotenv_values
except ImportError as missing:
    sys.exit(f"Error: {missing}.\nInstall it with: python -m pip install -r requirements.txt")
except KeyboardInterrupt:
    sys.exit(130)

Config = dict[str, str]


class LoginError(Exception):
    """Why the login can't go on: what happened and where, advice what to do next, and the exit
    status of the program (1: something failed, 2: the configuration can't work)."""

    def __init__(self, what: str, advice: str, exit_status: int = 1) -> None:
        super().__init__(what)
        self.what, self.advice, self.exit_status = what, advice, exit_status


# --- 1. Configuration -----------------------------------------------------------------------------

# Where to listen for each host that a redirect URI may have. A browser may take localhost for
# either of two addresses.
LOOPBACK = {"localhost": ["127.0.0.1", "::1"], "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}

HTTP_LOOPBACK = r"http://(localhost|127\.0\.0\.1|\[::1\])"
HOST = r"([\w-]+(\.[\w-]+)*\.?|\[::1\])"
# The client secret and the tokens go to the endpoints: in clear text only within this machine.
ENDPOINT = rf"({HTTP_LOOPBACK}|https://{HOST})(:\d+)?([/?][^#\\\s]*)?"
URI_FORMS = {
    # Only what a browser sends back unchanged: no query, no %, no name that starts with a dot.
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
    what = "The configuration does not work"
    advice = f"Correct it in {path}, or in the environment, which wins. See config.example.env."
    try:
        with path.open(encoding="utf-8-sig") as file:
            # Without interpolation, because a secret may hold a $.
            from_file = dotenv_values(stream=file, interpolate=False)
    except FileNotFoundError:
        what = f"There is no {path}, and without it the configuration does not work"
        advice = (
            "Copy config.example.env to this name, and fill it in. "
            "Without a sipgate account, try the sandbox: python tests/sandbox.py"
        )
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LoginError(f"Can't read {path}: {reason}.", advice, exit_status=2) from error
    config = {key: os.environ.get(key, from_file.get(key)) or "" for key in KEYS}
    problems = [f"{key} {problem}" for key in KEYS if (problem := problem_with(key, config[key]))]
    if problems:
        raise LoginError(f"{what}: {'; '.join(problems)}.", advice, exit_status=2)
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
    with contextlib.suppress(ValueError):  # from a port above 65535
        matches = re.fullmatch(URI_FORMS[key], value, re.IGNORECASE)
        if matches and value.isascii() and urlsplit(value).port != 0:
            return ""
    if key == "REDIRECT_URI":
        return "should look like http://localhost:8080/oauth, with a port from 1 to 65535"
    return "should look like https://host/path (http only on localhost)"


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
    import subprocess  # not before the authorize URL is on the screen: it takes its time

    with contextlib.suppress(OSError):
        subprocess.run(
            [sys.executable, "-I", "-m", "webbrowser", url],  # -I: not ./webbrowser.py
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TERM": ""},  # without a TERM, it offers no text browser
            start_new_session=True,  # no /dev/tty, and no Ctrl+C from here (not on Windows)
        )


# --- 3. Callback ----------------------------------------------------------------------------------

FOREIGN_STATE = "State in the callback does not match the state in the original request."
NO_CALLBACK = "Not the callback of this login"
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


class CallbackRefused(Exception):
    """A request that is not the callback of this login. args: the HTTP status, and why."""


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
    parameters = {name: value for name, value in pairs if value}  # an empty one counts as left out
    if (uri.path or "/") != (path or "/"):
        raise CallbackRefused(HTTPStatus.NOT_FOUND, "This is not the path of REDIRECT_URI.")
    if len({name for name, _ in pairs}) < len(pairs):
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "A parameter is there more than once.")
    if not parameters.keys() & {"code", "error", "state"}:
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "This is no answer to a login.")
    # Without this, any web page could send a code here, and log this program in to the account of
    # somebody else (RFC 6749, section 10.12). In constant time, so that a guess learns nothing;
    # as bytes, because compare_digest takes no non-ASCII text.
    received = parameters.get("state", "").encode(errors="replace")
    if not secrets.compare_digest(received, state.encode()):
        raise CallbackRefused(HTTPStatus.FORBIDDEN, FOREIGN_STATE)
    if ("code" in parameters) == ("error" in parameters):
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "There should be a code or an error.")
    return parameters


def await_callback(callbacks: queue.SimpleQueue[dict[str, str]], timeout: float) -> dict[str, str]:
    """Return the parameters of the first callback; timeout: seconds. Raises LoginError."""
    try:
        return callbacks.get(timeout=timeout)
    except queue.Empty:
        raise LoginError(f"No callback came in {timeout:g} seconds.", TIMEOUT_ADVICE) from None


def ask_for_callback(redirect_uri: str, state: str) -> dict[str, str]:
    """Ask for the address that the browser was sent to, until it is the callback of this login,
    and return its parameters. Raises LoginError when the input ends."""
    while True:
        say("   Paste the address that your browser was sent to, and press Enter:")
        line = ""
        with contextlib.suppress(OSError):  # from a terminal that is gone
            line = sys.stdin.readline() if sys.stdin else ""
        if not line:
            raise LoginError("The input ended before the callback.", "Start again, and paste it.")
        address = line.strip(" \t\r\n\"'")
        if "://" not in address:  # which some browsers do not show
            address = f"http://{address}"
        try:
            return check_callback(address, urlsplit(redirect_uri).path, state)
        except CallbackRefused as refused:
            warn(
                f"{refused.args[1]}\nOpen the URL above, log in, and copy the whole address that "
                f"your browser is sent to. It begins with {redirect_uri}?"
            )


# How it listens: a server that waits on the loopback interface for what check_callback accepts.


class Login(NamedTuple):
    """The login that is under way, as all connections to the callback server share it."""

    path: str
    state: str
    callbacks: queue.SimpleQueue[dict[str, str]]
    warned: threading.Lock  # taken by the first foreign state, and never given back


class CallbackHandler(BaseHTTPRequestHandler):
    """Answers one request to the callback server."""

    server: "CallbackServer"
    timeout = 5  # seconds that a connection may be silent

    def do_GET(self) -> None:
        login = self.server.login
        if self.requestline.split()[2:] not in (["HTTP/1.0"], ["HTTP/1.1"]):
            # Without its version, the line is cut off, and perhaps the code with it.
            return self.send_error(HTTPStatus.BAD_REQUEST)
        try:
            callback = check_callback(self.path, login.path, login.state)
        except CallbackRefused as refused:
            status, why = refused.args
            if why == FOREIGN_STATE and login.warned.acquire(blocking=False):
                warn(f"{why}\nIt may come from an old tab: use the URL above. Still waiting.")
            return self.answer(status, NO_CALLBACK, why)
        try:
            if "error" in callback:
                self.answer(
                    HTTPStatus.OK, "The login did not come through", f"{describe(callback)}."
                )
            else:
                self.answer(HTTPStatus.OK, "The login came through")
        finally:
            login.callbacks.put(callback)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with our page where http.server itself refuses a request."""
        self.answer(HTTPStatus(code), NO_CALLBACK)

    def answer(self, status: HTTPStatus, title: str, text: str = "") -> None:
        """Send a page that loads nothing, is not stored, and tells nobody its address."""
        goes_on = "goes on from here" if status == HTTPStatus.OK else "still waits for the login"
        title, text = html.escape(title), html.escape(f"{text} The terminal {goes_on}.")
        page = (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width"><meta name="color-scheme" content="light dark">'
            f"<title>{title}</title><style>body {{ font: 1.2em sans-serif; margin: 3em }}</style>"
            f"<h1>{title}</h1><p>{text}</p></html>"
        ).encode(errors="replace")
        self.request_version = "HTTP/1.0"  # so that even nonsense gets a status line
        self.send_response(status)
        for name, value in {**PAGE_HEADERS, "Content-Length": str(len(page))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def finish(self) -> None:
        """Read what is still to come: closing before that would reset the connection, and take
        the page away from the browser."""
        super().finish()
        self.connection.settimeout(1)  # seconds
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(65536):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because the request line holds the code."""


class CallbackServer(socketserver.ThreadingTCPServer):
    """Listens on one loopback address. Each connection has a thread of its own, so that the
    callback does not wait behind those that a browser opens and leaves idle."""

    daemon_threads = True  # the end of the program does not wait for them either
    request_queue_size = 128  # connections
    # On Windows, this would let a second program take the port; server_bind keeps it out.
    allow_reuse_address = sys.platform != "win32"

    def __init__(self, address: str, port: int, login: Login) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.login = login
        super().__init__((address, port), CallbackHandler)

    def server_bind(self) -> None:
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        super().server_bind()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about a connection that breaks, or is one too many: anybody can do that."""
        if not isinstance(sys.exc_info()[1], (OSError, RuntimeError)):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def callback_server(redirect_uri: str, state: str) -> Iterator[queue.SimpleQueue[dict[str, str]]]:
    """Serve the redirect URI on all addresses of its host, and yield where callbacks arrive.

    It begins before the browser is sent off, and ends with the callback (RFC 8252, section 8.3).
    Raises LoginError if an address can't be had: the browser might take the callback there.
    """
    uri = urlsplit(redirect_uri)
    port, login = uri.port or 80, Login(uri.path, state, queue.SimpleQueue(), threading.Lock())
    servers: list[CallbackServer] = []
    try:
        for address in LOOPBACK[uri.hostname or ""]:
            try:
                servers.append(CallbackServer(address, port, login))
            except OSError as error:
                if servers and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    break  # a machine without IPv6
                what = f"Can't listen on port {port} of {address}: {error.strerror}."
                raise LoginError(what, PORT_ADVICE) from error
            # 0.1 seconds is how long it may take to notice that it should stop.
            threading.Thread(target=servers[-1].serve_forever, args=[0.1], daemon=True).start()
        yield login.callbacks
    finally:
        for server in servers:  # the login does not wait for this
            threading.Thread(target=server.stop).start()


# --- 4. Code for tokens ---------------------------------------------------------------------------


class Client:
    """What all requests share: the configuration, a session, so that each host gets one
    connection, and the secrets that were sent, which no message may repeat."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.secrets: set[str] = set()
        self.session = requests.Session()
        # With no auth at all, requests would put a password from ~/.netrc in the token's place.
        self.session.auth = lambda request: request

    def host(self, key: str) -> str:
        return urlsplit(self.config[key]).netloc


class Tokens(NamedTuple):
    access_token: str
    refresh_token: str | None
    expires_in: int | None  # seconds that the access token lives, if the server says so


def exchange_code(client: Client, code: str, code_verifier: str) -> Tokens:
    """Exchange the authorization code for tokens (RFC 6749, section 4.1.3). Raises LoginError.

    A stolen code is worth nothing: only the program that began this login has the code verifier
    (RFC 7636, section 4.5).
    """
    return request_tokens(
        client,
        grant_type="authorization_code",
        code=code,
        code_verifier=code_verifier,
        redirect_uri=client.config["REDIRECT_URI"],
    )


def request_tokens(client: Client, **grant: str) -> Tokens:
    """Ask the token endpoint for tokens (RFC 6749, section 5.1). Raises LoginError.

    The client secret shows which client is asking (RFC 6749, section 2.3.1). It is only a secret
    as long as this program stays with you: never hand it out to others (RFC 8252, section 8.5).
    """
    form = {
        **grant,
        "client_id": client.config["CLIENT_ID"],
        "client_secret": client.config["CLIENT_SECRET"],
    }
    answer = call(client, "POST", "TOKEN_URL", data=form)
    access_token, refresh_token = answer.get("access_token"), answer.get("refresh_token")
    if not is_token(access_token) or str(answer.get("token_type")).lower() != "bearer":
        what = f"{client.host('TOKEN_URL')} sent no bearer token that can be used."
        raise LoginError(what, CHECK_KEY.format(key="TOKEN_URL"))
    expires_in = answer.get("expires_in")
    if type(expires_in) is not int or not 0 < expires_in < 10**9:
        expires_in = None
    return Tokens(access_token, refresh_token if is_token(refresh_token) else None, expires_in)


def is_token(value: object) -> TypeGuard[str]:
    """Whether a value can be sent as a token: printable ASCII (RFC 6749, A.12 and A.17)."""
    return isinstance(value, str) and value != "" and value.isascii() and value.isprintable()


# --- 5. Account -----------------------------------------------------------------------------------


def get_account(client: Client, access_token: str) -> str:
    """Return the account, as JSON, which the access token opens (RFC 6750, section 2.1).

    Raises LoginError.
    """
    headers = {"Authorization": f"Bearer {access_token}", "Accept": "application/json"}
    account = call(client, "GET", "TEST_API_ENDPOINT", headers=headers)
    return json.dumps(account, indent=2, ensure_ascii=False)


# --- 6. Refresh -----------------------------------------------------------------------------------


def refresh_tokens(client: Client, refresh_token: str) -> Tokens:
    """Exchange the refresh token for new tokens (RFC 6749, section 6). Raises LoginError.

    sipgate ends the old pair with this: if a thief has it too, one of the two is soon refused, and
    the theft is found out (RFC 9700, section 4.14.2).
    """
    tokens = request_tokens(client, grant_type="refresh_token", refresh_token=refresh_token)
    # If there is no new refresh token, the old one stays.
    return tokens._replace(refresh_token=tokens.refresh_token or refresh_token)


# --- Requests to the servers ----------------------------------------------------------------------

REQUEST_TIMEOUT = 10  # seconds to connect, and seconds of silence during an answer
SECRETS = {"client_secret", "code", "code_verifier", "refresh_token", "Authorization"}


def call(client: Client, method: str, key: str, **content: dict[str, str]) -> dict[str, Any]:
    """Send a request to the URL of a configuration key, and return the JSON object it answers.

    content: the data or the headers that requests sends
    Raises LoginError if there is no answer, or any other.
    """
    sent = {name: value for part in content.values() for name, value in part.items()}
    client.secrets.update(sent[name].removeprefix("Bearer ") for name in SECRETS & sent.keys())
    arguments: dict[str, Any] = {
        **content,
        "timeout": REQUEST_TIMEOUT,
        "allow_redirects": False,  # the secret and the token are for this URL alone
        "proxies": {"http": ""},  # http stays within this machine: see ENDPOINT
    }
    host = client.host(key)
    try:
        response = client.session.request(method, client.config[key], **arguments)
    except Exception as failure:  # an odd proxy or answer raises more than RequestException
        what = f"No answer that can be used from {host}: {root_cause(failure)}"
        advice = TLS_ADVICE if isinstance(failure, requests.exceptions.SSLError) else NETWORK_ADVICE
        raise LoginError(hide(what, client.secrets), advice.format(key=key)) from failure

    try:
        answer = json.loads(response.content)
        json.dumps(answer, indent=2)  # Python can read deeper nesting than it can show
    except (ValueError, RecursionError):
        answer = None
    status = response.status_code
    if status == HTTPStatus.OK and isinstance(answer, dict) and "error" not in answer:
        return answer

    error = answer if isinstance(answer, dict) else {"error": "no JSON object"}
    what = f"{host} answered {status} {response.reason}: {describe(error)}"
    advice = ADVICE.get(str(error.get("error")), CHECK_KEY.format(key=key))
    if key == "TEST_API_ENDPOINT" and status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        advice = ADVICE["insufficient_scope"]
    raise LoginError(hide(what, client.secrets), advice)


def hide(text: str, secrets_sent: set[str]) -> str:
    """Return the beginning of an error, which a server may make as long as it likes, without
    secrets: it may repeat what was sent, as it is or as the form encodes it, or a proxy's
    password. (What is under 8 characters may be a common word.)"""
    for secret in sorted(secrets_sent, key=len, reverse=True):  # one may begin with another
        if len(secret) >= 8:
            text = text.replace(secret, "***").replace(quote_plus(secret), "***")
    return re.sub(r"//[^/\s]*@", "//***@", text)[:500]


# --- What the person sees -------------------------------------------------------------------------

# What to do about the errors of RFC 6749 (sections 4.1.2.1 and 5.2) and RFC 6750 (section 3.1).
ADVICE = {
    "access_denied": "You or sipgate said no. To go on, start again and allow the access.",
    "insufficient_scope": "Check OAUTH_SCOPE: it needs the scope for this call (account:read).",
    "invalid_client": "Check CLIENT_ID and CLIENT_SECRET against console.sipgate.com.",
    "invalid_grant": "The code or the refresh token was used before, or has expired. Start again.",
    "invalid_scope": "Check OAUTH_SCOPE: scopes that sipgate knows, separated by spaces.",
    "unauthorized_client": "Check CLIENT_ID and CLIENT_SECRET against console.sipgate.com.",
}
CHECK_KEY = "Check {key} in the configuration. If it is right, try again later."
NETWORK_ADVICE = """Check {key} and the network connection, and try again. If HTTPS_PROXY or
REQUESTS_CA_BUNDLE are set in the environment, check them too."""
TLS_ADVICE = """Check {key}. If a company's proxy signs the traffic, let REQUESTS_CA_BUNDLE name the
file with its certificate."""
PORT_ADVICE = """Stop the program that uses the port, or choose another port above 1023 in
REDIRECT_URI, and add that URI to your client at console.sipgate.com."""
TIMEOUT_ADVICE = """Start again; --timeout gives more time. If the login page showed an error:
- "Invalid parameter: redirect_uri": add REDIRECT_URI to your client at console.sipgate.com.
- "Client not found": check CLIENT_ID.
If your browser is on another machine: use --paste."""


def describe(answer: dict[str, Any]) -> str:
    """Return the error in an answer or a callback (RFC 6749, sections 4.1.2.1 and 5.2)."""
    texts = (answer.get("error"), answer.get("error_description"))
    return ": ".join(text for text in texts if isinstance(text, str)) or "no reason given"


def root_cause(error: BaseException) -> str:
    """Return the text of the exception that all others wrap, such as "Connection refused"."""
    while cause := error.__cause__ if error.__suppress_context__ else error.__context__:
        error = cause
    return str(error) or type(error).__name__


def show_tokens(tokens: Tokens, in_full: bool) -> None:
    """Print the tokens: masked unless in_full, because they open the account to anybody."""
    for name, token in (("Access", tokens.access_token), ("Refresh", tokens.refresh_token)):
        if token:
            shown = token if in_full else token[: min(6, len(token) // 4)] + "..."
            say(f"   {name} token: {shown} ({len(token)} characters)")
    if tokens.expires_in:
        say(f"   The access token is valid for {in_words(tokens.expires_in)}.")


def in_words(seconds: int) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} seconds" if seconds > 1 else "1 second"


def printable(text: str) -> str:
    """Escape, as JSON does, each character that could steer a terminal: control characters,
    bidirectional overrides, lone surrogates. Line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Print to stdout, at once even into a pipe. Raises OSError if its reader is gone or the
    disk is full."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Print to stderr; if that fails, there is nobody left to tell."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr or sys.stdout)


def discard(stream: TextIO) -> None:
    """Throw away what a stream still has to write, which would fail once more at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- The whole login ------------------------------------------------------------------------------


def log_in(options: argparse.Namespace) -> None:
    """Take the six steps. Raises LoginError, or OSError from stdout."""
    config = load_config(options.config)
    say(f"1. Configuration: client {config['CLIENT_ID']}, scope {config['OAUTH_SCOPE']}")

    # 256 bits of chance in each (RFC 6749, section 10.10; RFC 7636, section 7.1).
    state, code_verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    url = authorize_url(config, state, code_challenge_for(code_verifier))
    step_2 = f"2. Authorize URL: open it in your browser and log in\n\n{url}\n"
    step_3 = f"3. Callback: the browser comes back to {config['REDIRECT_URI']}"
    if options.paste:
        say(f"{step_2}\n{step_3}, where no page needs to open")
        callback = ask_for_callback(config["REDIRECT_URI"], state)
    else:
        with callback_server(config["REDIRECT_URI"], state) as callbacks:
            say(f"{step_2}\n{step_3}, within {options.timeout:g} seconds")
            say("   If your browser is on another machine: press Ctrl+C, and start with --paste.")
            if not options.no_browser:
                threading.Thread(target=open_browser, args=[url], daemon=True).start()
            callback = await_callback(callbacks, options.timeout)
    if "error" in callback:
        advice = ADVICE.get(callback["error"], "Start again. If it stays, ask sipgate's support.")
        raise LoginError(hide(f"The login was refused: {describe(callback)}", set()), advice)

    client = Client(config)
    with client.session:
        say("4. Code for tokens: the state is ours, the code is exchanged")
        tokens = exchange_code(client, callback["code"], code_verifier)
        show_tokens(tokens, options.show_tokens)

        say(f"5. Account: what the access token opens at {config['TEST_API_ENDPOINT']}")
        say(get_account(client, tokens.access_token))

        say("6. Refresh: the refresh token is exchanged")
        if not tokens.refresh_token:
            what = f"{client.host('TOKEN_URL')} sent no refresh token"
            raise LoginError(what, "There is nothing to refresh: log in again when it is needed.")
        new_tokens = refresh_tokens(client, tokens.refresh_token)
        show_tokens(new_tokens, options.show_tokens)
        if new_tokens.refresh_token == tokens.refresh_token:
            say("   The refresh token is the old one, which stays valid.")
        else:
            say("   At sipgate, the old access token and refresh token are no longer valid.")
        say("   The account again, with the new access token:")
        say(get_account(client, new_tokens.access_token))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Log in to sipgate with OAuth 2.0.")
    default = Path(__file__).with_name("config.env")
    add = parser.add_argument
    text = "the configuration (default: %(default)s)"
    add("--config", metavar="FILE", type=Path, default=default, help=text)
    add("--no-browser", action="store_true", help="do not open the browser (default: open it)")
    text = "ask for the address that a browser on another machine was sent to (default: listen)"
    add("--paste", action="store_true", help=text)
    text = "how long to wait for the callback (default: %(default)s)"
    add("--timeout", metavar="SECONDS", type=duration, default=300, help=text)
    add("--show-tokens", action="store_true", help="print tokens in full (default: masked)")
    return parser.parse_args()


def duration(text: str) -> float:
    """Return the seconds that an option gives."""
    if not 0 < float(text) <= 86400:
        raise argparse.ArgumentTypeError("should be a positive number of at most 86400 (a day)")
    return float(text)


def run() -> int:
    """Log in, and return the exit status."""
    try:
        try:
            log_in(parse_options())
        finally:
            if sys.stdout:  # one that is closed is None
                sys.stdout.flush()
    except SystemExit as end:  # from argparse
        return int(end.code or 0)
    except LoginError as error:
        what = " ".join(error.what.split()).rstrip(".")  # a server may send line breaks
        warn(f"Error: {what}.\n{error.advice}")
        return error.exit_status
    except OSError as error:  # from stdout: all others have become a LoginError
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # which only says that "| head" has enough
            warn(f"Error: can't print: {error.strerror}.\nCheck where the output goes.")
        return 1
    return 0


def main() -> int:
    """Run the login in a thread of its own, and return the exit status.

    Ctrl+C only ever interrupts the main thread, and not while that looks up the name of a host
    or, on Windows, waits for a socket. So the main thread only waits.
    """
    # At once, whatever the thread is waiting for, and however often it is pressed.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(run()), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)  # seconds, because Windows does not interrupt this either
    return statuses[0] if statuses else 1


if __name__ == "__main__":
    sys.exit(main())
