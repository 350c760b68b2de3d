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
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
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
    """Why the login can't go on: what happened, and where; the advice what to do next; and the
    exit status of the program, 1 if something failed, 2 if the configuration can't work."""

    def __init__(self, what: str, advice: str, exit_status: int = 1) -> None:
        super().__init__(what)
        self.what, self.advice, self.exit_status = what, advice, exit_status


# --- 1. Configuration -----------------------------------------------------------------------------

# Where to listen for each host that a redirect URI may have. A browser may take localhost for
# either of two addresses.
LOOPBACK = {"localhost": ["127.0.0.1", "::1"], "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}

HTTP_LOOPBACK = r"http://(localhost|127\.0\.0\.1|\[::1\])"
# The client secret and the tokens go to the endpoints: in clear text only within this machine.
ENDPOINT = rf"({HTTP_LOOPBACK}|https://([\w.-]+|\[[\da-f:]+\]))(:\d+)?([/?][^#\\\s]*)?"
URI_FORMS = {
    # No dots at the start of a name, no %, no query: the browser returns to it to the letter.
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
    with contextlib.suppress(ValueError):  # from a port above 65535
        matches = re.fullmatch(URI_FORMS[key], value, re.ASCII | re.IGNORECASE)
        if matches and urlsplit(value).port != 0:
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
    with contextlib.suppress(OSError):
        subprocess.run(
            [sys.executable, "-I", "-m", "webbrowser", url],  # -I: not ./webbrowser.py
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TERM": ""},  # without a TERM, it offers no text browser
            start_new_session=True,  # with no /dev/tty, and out of reach of Ctrl+C; not on Windows
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
    # somebody else (RFC 6749, section 10.12). The time of the comparison does not tell how much
    # of a guess was right; it takes bytes, because text may be non-ASCII.
    received = parameters.get("state", "").encode(errors="replace")
    if not secrets.compare_digest(received, state.encode()):
        raise CallbackRefused(HTTPStatus.FORBIDDEN, FOREIGN_STATE)
    if ("code" in parameters) == ("error" in parameters):
        raise CallbackRefused(HTTPStatus.BAD_REQUEST, "There should be a code or an error.")
    return parameters


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
    default_request_version = "HTTP/1.0"  # so that nonsense gets a status line too

    def do_GET(self) -> None:
        login = self.server.login
        if len(self.requestline.split()) != 3:  # cut off, and the code with it
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
                self.answer(HTTPStatus.OK, "The login did not come through", describe(callback))
            else:
                self.answer(HTTPStatus.OK, "The login came through")
        finally:
            login.callbacks.put(callback)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with our page where http.server itself refuses a request."""
        self.answer(HTTPStatus(code), NO_CALLBACK)

    def answer(self, status: HTTPStatus, title: str, text: str = "") -> None:
        """Send a page that loads nothing, is not stored, and tells nobody its address."""
        title, text = html.escape(title), html.escape(text)
        page = (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width"><meta name="color-scheme" content="light dark">'
            f"<title>{title}</title><style>body {{ font: 1.2em sans-serif; margin: 3em }}</style>"
            f"<h1>{title}</h1><p>{text}</p><p>The terminal goes on from here.</p></html>"
        ).encode(errors="replace")
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
    allow_reuse_address = sys.platform != "win32"  # where a second program could use the port too

    def __init__(self, address: str, port: int, login: Login) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.login = login
        super().__init__((address, port), CallbackHandler)

    def server_bind(self) -> None:
        if sys.platform == "win32":  # where it could do so even then
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        super().server_bind()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about a connection that breaks: anybody can break one."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def callback_server(redirect_uri: str, state: str) -> Iterator[queue.SimpleQueue[dict[str, str]]]:
    """Serve the redirect URI on all addresses of its host, and yield where callbacks arrive.

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
        line = sys.stdin.readline() if sys.stdin else ""
        if not line:
            raise LoginError("The input ended before the callback.", "Start again, and paste it.")
        try:
            return check_callback(line.strip(" \t\r\n\"'"), urlsplit(redirect_uri).path, state)
        except CallbackRefused as refused:
            warn(f"{refused.args[1]}\nAfter the login, copy all that the address bar shows.")


# --- 4. Code for tokens ---------------------------------------------------------------------------


class Tokens(NamedTuple):
    access_token: str
    refresh_token: str | None
    expires_in: int | None  # seconds that the access token lives


def exchange_code(
    session: requests.Session, config: Config, code: str, code_verifier: str
) -> Tokens:
    """Exchange the authorization code for tokens (RFC 6749, section 4.1.3). Raises LoginError.

    To a thief the code is worth nothing: the client secret shows which client is asking, and the
    code verifier that it is the one that began this login (RFC 7636, section 4.5).
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
    """Check what the token endpoint sent (RFC 6749, section 5.1). Raises LoginError."""
    access_token, refresh_token = answer.get("access_token"), answer.get("refresh_token")
    if not is_token(access_token) or str(answer.get("token_type")).lower() != "bearer":
        what = f"{urlsplit(config['TOKEN_URL']).netloc} sent no bearer token that can be used."
        raise LoginError(what, CHECK_KEY.format(key="TOKEN_URL"))
    expires_in = answer.get("expires_in")
    if type(expires_in) is not int or not 0 < expires_in < 10**9:
        expires_in = None
    return Tokens(access_token, refresh_token if is_token(refresh_token) else None, expires_in)


def is_token(value: object) -> TypeGuard[str]:
    """Whether a value can be sent as a token: printable ASCII (RFC 6749, appendix A.12)."""
    return isinstance(value, str) and value != "" and value.isascii() and value.isprintable()


# --- 5. Account -----------------------------------------------------------------------------------


def get_account(session: requests.Session, config: Config, access_token: str) -> str:
    """Return the account, as JSON, which the access token opens (RFC 6750, section 2.1).

    Raises LoginError.
    """
    headers = {"Authorization": f"Bearer {access_token}", "Accept": "application/json"}
    account = call(session, "GET", config, "TEST_API_ENDPOINT", headers=headers)
    return json.dumps(account, indent=2, ensure_ascii=False)


# --- 6. Refresh -----------------------------------------------------------------------------------


def refresh_tokens(session: requests.Session, config: Config, refresh_token: str) -> Tokens:
    """Exchange the refresh token for new tokens (RFC 6749, section 6). Raises LoginError.

    The old pair ends with this: if a thief has it too, one of the two is soon refused, and the
    theft is found out (RFC 9700, section 4.14.2).
    """
    form = {
        "grant_type": "refresh_token",
        "refresh_token": refresh_token,
        "client_id": config["CLIENT_ID"],
        "client_secret": config["CLIENT_SECRET"],
    }
    tokens = read_tokens(call(session, "POST", config, "TOKEN_URL", data=form), config)
    # If there is no new refresh token, the old one stays.
    return tokens._replace(refresh_token=tokens.refresh_token or refresh_token)


# --- Requests to the servers ----------------------------------------------------------------------

REQUEST_TIMEOUT = 10  # seconds to connect, and seconds of silence during an answer
SECRETS = {"client_secret", "code", "code_verifier", "refresh_token", "Authorization"}


def call(
    session: requests.Session, method: str, config: Config, key: str, **content: Any
) -> dict[str, Any]:
    """Send a request to the URL of a configuration key, and return the JSON object it answers.

    content: the data or headers that requests sends
    Raises LoginError for each other answer, and for none.
    """
    host = urlsplit(config[key]).netloc
    try:
        response = session.request(
            method,
            config[key],
            timeout=REQUEST_TIMEOUT,
            allow_redirects=False,  # the secret and the token are for this URL alone
            proxies={"http": ""},  # http stays within this machine: see ENDPOINT
            **content,
        )
    except (OSError, ValueError) as failure:  # the exceptions of requests are OSErrors
        advice = next(text for kind, text in NETWORK_ADVICE.items() if isinstance(failure, kind))
        what = f"No answer that can be used from {host}: {root_cause(failure)}."
        raise LoginError(what, advice.format(key=key)) from failure

    try:
        answer = json.loads(response.content)
        json.dumps(answer, indent=2)  # Python can read deeper nesting than it can show
    except (ValueError, RecursionError):
        answer = None
    status = response.status_code
    if status == HTTPStatus.OK and isinstance(answer, dict) and "error" not in answer:
        return answer

    error = answer if isinstance(answer, dict) else {"error": "no JSON object"}
    reason = describe(error)
    sent = {**content.get("data", {}), **content.get("headers", {})}
    for name in SECRETS & sent.keys():  # a server may repeat what it was sent
        reason = reason.replace(sent[name].removeprefix("Bearer "), "***")
    advice = ADVICE.get(str(error.get("error")), CHECK_KEY.format(key=key))
    if key == "TEST_API_ENDPOINT" and status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        advice = ADVICE["insufficient_scope"]
    raise LoginError(f"{host} answered {status} {response.reason}: {reason}.", advice)


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
NETWORK_ADVICE = {  # the first that fits
    requests.exceptions.ProxyError: "Check the proxy that HTTPS_PROXY names.",
    requests.exceptions.SSLError: "Check {key}. If a company's proxy signs the traffic, let "
    "REQUESTS_CA_BUNDLE name the file with its certificate.",
    Exception: "Check {key} and the network connection, and try again.",
}
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
    while cause := error.__cause__ or error.__context__:
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
    return f"{seconds} seconds"


def printable(text: str) -> str:
    """Return the text with JSON's escape for whatever could steer a terminal: all but line breaks
    that is a control character, a bidirectional override, a lone surrogate."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Print to stdout, at once even into a pipe. Raises OSError if it is closed or full."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Print to stderr; if that fails, there is nobody left to tell."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


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
        raise LoginError(f"The login was refused: {describe(callback)}.", advice)

    with requests.Session() as session:  # one for all requests: each host gets one connection
        session.auth = lambda request: request  # else requests looks for another in ~/.netrc
        say("4. Code for tokens: the state is ours, the code is exchanged")
        tokens = exchange_code(session, config, callback["code"], code_verifier)
        show_tokens(tokens, options.show_tokens)

        say(f"5. Account: what the access token opens at {config['TEST_API_ENDPOINT']}")
        say(get_account(session, config, tokens.access_token))

        say("6. Refresh: the refresh token is exchanged")
        if not tokens.refresh_token:
            what = f"{urlsplit(config['TOKEN_URL']).netloc} sent no refresh token."
            raise LoginError(what, "There is nothing to refresh: log in again when it is needed.")
        new_tokens = refresh_tokens(session, config, tokens.refresh_token)
        show_tokens(new_tokens, options.show_tokens)
        if new_tokens.refresh_token == tokens.refresh_token:
            say("   The refresh token is the old one, which stays valid.")
        else:
            say("   At sipgate, the old access token and refresh token are no longer valid.")
        say("   The account again, with the new access token:")
        say(get_account(session, config, new_tokens.access_token))


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


def run(options: argparse.Namespace) -> int:
    """Log in, and return the exit status."""
    try:
        log_in(options)
    except LoginError as error:
        what = " ".join(error.what.split())[:500]  # a server may have put anything into it
        warn(f"Error: {what}\n{error.advice}")
        return error.exit_status
    except OSError as error:  # of stdout: all others have become a LoginError
        # What it still has to write must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # which only says that "| head" has enough
            warn(f"Error: can't print: {error.strerror}.\nCheck where the output goes.")
        return 1
    return 0


def main() -> int:
    """Run the login in a thread of its own, and return the exit status.

    Ctrl+C only ever interrupts the main thread, and not while that looks up the name of a host
    or, on Windows, waits for a socket. So here it does nothing else.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # one that is closed is None
            stream.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    statuses: list[int] = []
    try:
        options = parse_options()
        thread = threading.Thread(target=lambda: statuses.append(run(options)), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.5)  # seconds, because Windows does not interrupt this either
    except KeyboardInterrupt:
        os._exit(130)  # at once, whatever the thread is waiting for
    return statuses[0] if statuses else 1


if __name__ == "__main__":
    sys.exit(main())
