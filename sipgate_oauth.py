# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.32.4,<3", "python-dotenv>=1.0.1,<2"]
# ///
"""Log in to sipgate with OAuth 2.0, show the account, and refresh the tokens.

The login is an authorization code grant (RFC 6749, section 4.1) with PKCE (RFC 7636); the browser
comes back to this program on the loopback interface (RFC 8252, section 7.3). log_in takes six
steps; each has a section; then comes what they need of HTTP, of sockets, and of the terminal.

1. Configuration    load_config     who this client is, and where sipgate's servers are
2. Authorize URL    authorize_url   where the browser goes, for the person to log in
3. Callback         check_callback  what the browser brings back: a code
4. Code for tokens  exchange_code   the code becomes an access token and a refresh token
5. Account          get_account     the access token opens the API
6. Refresh          refresh_tokens  the refresh token becomes a new pair of tokens
"""

import signal
import sys

if sys.version_info < (3, 10):
    sys.exit("Error: this Python is too old.\nStart the program with Python 3.10 or newer.")
if __name__ == "__main__":
    # Ctrl+C ends the program at once, also while it loads, and runs no `finally` any more.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import contextlib
import errno
import hashlib
import io
import json
import os
import queue
import secrets
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

try:
    import requests
    from dotenv import dotenv_values
except ImportError as missing:
    sys.exit(f'Error: {missing}.\nSee "Run it" in README.md, or: uv run sipgate_oauth.py')


def log_in(options: argparse.Namespace) -> None:
    """Take the six steps. Raises LoginError, or OSError if stdout fails."""
    config = load_config(Path(os.path.expanduser(options.config)))
    from_environment = ", ".join(key for key in KEYS if key in os.environ)
    say(f"1. Configuration: client {config['CLIENT_ID']}, scope {config['OAUTH_SCOPE']}")
    say(f"   From the environment, which wins over the file: {from_environment or 'nothing'}")

    # 256 random bits in each (RFC 6749, section 10.10; RFC 7636, section 7.1).
    state, code_verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    url = authorize_url(config, state, code_challenge_for(code_verifier))
    # In here, check_callback checks each request that comes in, and each address that is pasted.
    with callback_server(config["REDIRECT_URI"], state) as callbacks:
        say("2. Authorize URL: open it in your browser and log in")
        show_request("GET", url)
        say("", url, "")
        if not options.no_browser:
            threading.Thread(target=open_browser, args=[url]).start()

        say(f"3. Callback: the browser comes back, within {options.timeout:g} seconds")
        say("   If the browser then shows anything other than how the login went, copy the address")
        say("   that it shows, paste it here, and press Enter.")
        code = wait_for_callback(config["REDIRECT_URI"], callbacks, options.timeout)

    with Session(options.show_tokens) as session:
        say("4. Code for tokens: the code and the code verifier become tokens")
        tokens = exchange_code(session, config, code, code_verifier)

        say("5. Account: what the access token opens")
        get_account(session, config["TEST_API_ENDPOINT"], tokens["access_token"])

        # To show it: do so before expires_in (seconds) is over, and store each new pair at once.
        say("6. Refresh: the refresh token becomes a new pair; at sipgate, this ends the old one")
        tokens = refresh_tokens(session, config, tokens)
        get_account(session, config["TEST_API_ENDPOINT"], tokens["access_token"])


# --- 1. Configuration -----------------------------------------------------------------------------

Config = dict[str, str]
Form = dict[str, str] | None  # what a request sends
Json = dict[str, Any]
CLIENT_KEYS = ("CLIENT_ID", "CLIENT_SECRET", "OAUTH_SCOPE")
KEYS = (*CLIENT_KEYS, "REDIRECT_URI", "AUTH_URL", "TOKEN_URL", "TEST_API_ENDPOINT")


def load_config(path: Path) -> Config:
    """Read the configuration: the values of a file, and over them those of the environment.

    path: a file of KEY=value lines; it may be missing. Raises ConfigurationError that names every
    key whose value is missing or can't work.
    """
    advice = f"Correct it in {path}, or in the environment, which wins. See config.example.env."
    try:
        with path.open(encoding="utf-8-sig") as file:
            # Without interpolation, because a secret may hold a $.
            from_file = dotenv_values(stream=file, interpolate=False)
    except FileNotFoundError:
        from_file = {}
        advice = f"""There is no {path}: copy config.example.env to it, and fill it in.
Without a sipgate account, try the sandbox: see "Try it now" in README.md."""
    except (OSError, UnicodeError) as error:
        advice = f"{path} should be a UTF-8 text of KEY=value lines, like config.example.env."
        raise ConfigurationError(f"Can't read the configuration: {error}", advice) from error

    config = {key: os.environ.get(key, from_file.get(key)) or "" for key in KEYS}
    found = [(key, problem_with(key, config[key])) for key in KEYS]
    problems = [f"{key} {problem}" for key, problem in found if problem]
    if problems:
        # What is missing may be misspelt. (What has only a = may be the end of a secret: hide it.)
        unknown = [k for k, v in from_file.items() if k not in KEYS and (v or "").strip("=")]
        problems += [f"{key} is no key of this program" for key in unknown]
        raise ConfigurationError(f"The configuration can't work: {'; '.join(problems)}", advice)
    return config


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
    return config["AUTH_URL"] + ("&" if "?" in config["AUTH_URL"] else "?") + urlencode(parameters)


# --- 3. Callback ----------------------------------------------------------------------------------

Callbacks = queue.SimpleQueue[dict[str, str]]  # of what check_callback returned


def check_callback(query: str, state: str) -> dict[str, str]:
    """Return the parameters of a callback, with a code or an error (RFC 6749, section 4.1.2).

    query: what stands after the ? of the address; state: that of the authorize URL
    Raises CallbackRefused for all that is not the callback of this login.
    """
    # An empty parameter counts as left out, and none may be repeated (RFC 6749, section 3.1).
    pairs = parse_qsl(query, keep_blank_values=True)
    parameters = {name: value for name, value in pairs if value}
    if len({name for name, _ in pairs}) < len(pairs):
        raise CallbackRefused(400, "A parameter is there more than once.")
    if not parameters.keys() & {"code", "error", "state"}:
        raise CallbackRefused(400, "This is no answer to a login.")
    # Any web page can send a code or an error here, but only our browser brings our state (RFC
    # 6749, section 10.12). Compared in constant time, so that a guess learns nothing; as bytes,
    # because compare_digest takes no non-ASCII text.
    received = parameters.get("state", "")
    if not state or not secrets.compare_digest(received.encode(), state.encode()):
        raise CallbackRefused(403, FOREIGN_STATE)
    if ("code" in parameters) == ("error" in parameters):
        raise CallbackRefused(400, "There should be a code or an error.")
    return parameters


def wait_for_callback(redirect_uri: str, callbacks: Callbacks, timeout: float) -> str:
    """Return the authorization code of the first callback that check_callback has accepted.
    timeout: seconds. Raises LoginError if it brings an error, or if none comes in time."""
    try:
        callback = callbacks.get(timeout=timeout)
    except queue.Empty:
        advice = f"Start again; --timeout gives more time. {BROWSER_ERRORS}"
        raise LoginError(f"No callback came in {timeout:g} seconds", advice) from None
    show_request("GET", redirect_uri, callback)
    if "error" in callback:
        advice = ADVICE.get(callback["error"], "Start again. If it stays, ask sipgate's support.")
        raise LoginError(f"The login was refused: {describe(callback)}", advice)
    return callback["code"]


# --- 4. Code for tokens ---------------------------------------------------------------------------


def exchange_code(session: "Session", config: Config, code: str, code_verifier: str) -> Json:
    """Exchange the authorization code for tokens (RFC 6749, section 4.1.3). Raises LoginError.

    A thief of the code lacks the code verifier (RFC 7636, section 4.6). The client secret shows
    which client is asking (RFC 6749, section 2.3.1). Never ship one: what others get can't keep a
    secret (RFC 8252, section 8.5).
    """
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "code_verifier": code_verifier,
        "redirect_uri": config["REDIRECT_URI"],
        "client_id": config["CLIENT_ID"],
        "client_secret": config["CLIENT_SECRET"],
    }
    return check_tokens(config, call(session, "POST", config["TOKEN_URL"], form=form))


def check_tokens(config: Config, answer: Json) -> Json:
    """Return the answer of the token endpoint. Raises LoginError if it has no access token, or one
    of a type that this program does not know how to use (RFC 6749, section 7.1)."""
    token, token_type = answer.get("access_token"), str(answer.get("token_type"))
    if not token or not isinstance(token, str) or token_type.lower() != "bearer":
        what = f"{urlsplit(config['TOKEN_URL']).netloc} sent no bearer token"
        raise LoginError(what, CHECK_KEY.format("TOKEN_URL"))
    return answer


# --- 5. Account -----------------------------------------------------------------------------------


def get_account(session: "Session", url: str, access_token: str) -> Json:
    """Show and return the account (RFC 6750, section 2.1). Raises LoginError."""
    return call(session, "GET", url, headers={"Authorization": f"Bearer {access_token}"})


# --- 6. Refresh -----------------------------------------------------------------------------------


def refresh_tokens(session: "Session", config: Config, tokens: Json) -> Json:
    """Exchange the refresh token for new tokens (RFC 6749, section 6). Raises LoginError.

    sipgate ends the old pair with this: whoever uses a refresh token second is refused, which tells
    that somebody else has it, too (RFC 9700, section 4.14.2).
    """
    if not tokens.get("refresh_token") or not isinstance(tokens["refresh_token"], str):
        what = f"{urlsplit(config['TOKEN_URL']).netloc} sent no refresh token"
        raise LoginError(what, "There is nothing to refresh: log in again when it is needed.")
    form = {
        "grant_type": "refresh_token",
        "refresh_token": tokens["refresh_token"],
        "client_id": config["CLIENT_ID"],
        "client_secret": config["CLIENT_SECRET"],
    }
    new_tokens = check_tokens(config, call(session, "POST", config["TOKEN_URL"], form=form))
    # Other servers may send no new refresh token: then the old one stays.
    new_tokens["refresh_token"] = new_tokens.get("refresh_token") or tokens["refresh_token"]
    return new_tokens


# --- What errors there are, and what to do about them ---------------------------------------------


class LoginError(Exception):
    """Why the login can't go on. args: what happened and where; what to do next."""


class ConfigurationError(LoginError):
    """Why it can't begin."""


class CallbackRefused(Exception):
    """A request that is not the callback of this login. args: the HTTP status, and why."""


FOREIGN_STATE = "State in the callback does not match the state in the original request."
# For the errors of RFC 6749 (sections 4.1.2.1 and 5.2) and RFC 6750 (section 3.1).
ADVICE = {
    "access_denied": "You or sipgate said no. To go on, start again and allow the access.",
    "insufficient_scope": "Check OAUTH_SCOPE: it needs the scope for this call (account:read).",
    "invalid_client": "Check CLIENT_ID and CLIENT_SECRET (step 1 tells where they come from).",
    "invalid_grant": "The code or the refresh token was used before, or has expired. Start again.",
    "invalid_scope": "Check OAUTH_SCOPE: scopes that sipgate knows, separated by spaces.",
    "unauthorized_client": "Check CLIENT_ID and CLIENT_SECRET (step 1 tells where they come from).",
}
CHECK_KEY = "Check {} in the configuration. If it is right, try again later."
CHECK_NETWORK = """Check {} and the network. If they are set in the environment, check HTTPS_PROXY,
ALL_PROXY (SOCKS needs PySocks) and REQUESTS_CA_BUNDLE (a company's certificate)."""
OTHER_PORT = """Choose another port above 1023 in REDIRECT_URI (without a port, it means 80), and
add that URI to your client at console.sipgate.com."""
BROWSER_ERRORS = """If the login page shows an error:
- "Invalid parameter: redirect_uri": add REDIRECT_URI to your client at console.sipgate.com.
- "Client not found": check CLIENT_ID, and in AUTH_URL and TOKEN_URL the realm, third-party or
  sipgate-apps: the console shows in which of them the client is."""


def problem_with(key: str, value: str) -> str:
    """Return what keeps the value of a key from working, or an empty string."""
    if not value.strip() or value == f"YOUR_{key}":
        return "is missing or not filled in"
    if value != value.strip() or not value.isprintable():
        return "has a blank at one end, or a character that can't be seen"
    if key in CLIENT_KEYS:
        return ""
    with contextlib.suppress(ValueError):  # from a port above 65535
        uri = urlsplit(value)
        plain = value.isascii() and not set(value) & set(' #\\"<>^`{|}') and "@" not in uri.netloc
        loopback = uri.scheme == "http" and uri.hostname in LOOPBACK
        # The client secret and the tokens go to these: in clear text only within this machine.
        endpoint = uri.scheme == "https" and uri.hostname and key != "REDIRECT_URI"
        if plain and uri.port != 0 and (loopback or endpoint):
            return ""
    example = "http://localhost:8080/oauth" if key == "REDIRECT_URI" else "https://host/path"
    return f"should look like {example} (http only on localhost; a port from 1 to 65535)"


# --- HTTP requests --------------------------------------------------------------------------------


class Session(requests.Session):
    """What all requests share: one connection to each host, and whether tokens are shown whole."""

    def __init__(self, show_tokens: bool) -> None:
        super().__init__()
        self.show_tokens = show_tokens
        self.headers["Accept"] = "application/json"  # some servers answer with a form otherwise
        # With no auth at all, requests would put a password from ~/.netrc in the token's place.
        self.auth = lambda request: request


def call(session: Session, method: str, url: str, form: Form = None, headers: Form = None) -> Json:
    """Send a request, show it and its answer, and return the JSON object. Raises LoginError."""
    show_request(method, url, form or headers)
    host, key = urlsplit(url).netloc, "TOKEN_URL" if form else "TEST_API_ENDPOINT"
    try:
        response = session.request(
            method,
            url,
            data=form,
            headers=headers,
            timeout=10,  # seconds to connect, and seconds of silence during an answer
            allow_redirects=False,  # the secret and the token are for this URL alone
            proxies={"http": ""},  # http stays within this machine: see problem_with
        )
    except Exception as failure:  # an odd proxy or answer raises more than RequestException
        what = f"No answer that can be used from {host}: {reason_of(failure)}"
        raise LoginError(what, CHECK_NETWORK.format(key)) from failure

    answer, status = show_answer(response, session.show_tokens), response.status_code
    if status // 100 == 2 and answer and not answer.get("error"):
        return answer
    error = "insufficient_scope" if headers and status in (401, 403) else answer.get("error")
    what = f"{host} answered {status} {response.reason}: {describe(answer)}"
    raise LoginError(what, ADVICE.get(str(error), CHECK_KEY.format(key)))


def reason_of(failure: BaseException) -> str:
    """Return what the system or TLS says, or else a name: other texts may quote a secret, such as
    the password of a proxy."""
    while failure.__context__:
        failure = failure.__context__
    if isinstance(failure, OSError) and not isinstance(failure, requests.RequestException):
        return str(failure)[:200]
    return type(failure).__name__


# --- Callback server ------------------------------------------------------------------------------

# Where to listen for each host of a redirect URI: a browser may look for localhost at either.
LOOPBACK = {"localhost": ["127.0.0.1", "::1"], "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}


class CallbackHandler(BaseHTTPRequestHandler):
    """Answers one request to the callback server."""

    server: "CallbackServer"
    timeout = 5  # seconds that a connection may be silent
    error_message_format = "<!DOCTYPE html><title>Login</title><h1>%(message)s</h1>%(explain)s"

    def do_GET(self) -> None:
        try:
            uri = urlsplit(self.path)  # with scheme and host, if a proxy sends it
            # Without its version, the line is cut off, and perhaps the code with it.
            if (uri.path or "/") != self.server.path or self.request_version == "HTTP/0.9":
                raise CallbackRefused(404, "This is not the redirect URI.")
            callback = check_callback(uri.query, self.server.state)
        except ValueError:  # from urlsplit
            self.send_error(400)
        except CallbackRefused as refused:
            status, why = refused.args
            self.send_error(status, why, "The terminal still waits for the login.")
            if why == FOREIGN_STATE and not self.server.warned:
                self.server.warned = True
                say(FOREIGN_STATE, "If it is an old tab, use the URL above.", file=sys.stderr)
        else:
            title = f"The login {'did not come' if 'error' in callback else 'came'} through"
            text = describe(callback) if "error" in callback else "The terminal goes on from here."
            try:
                self.send_error(200, title, text)  # http.server's function for a short page
            finally:  # not before: the program may end with it, and the page would be lost
                self.server.callbacks.put(callback)

    def end_headers(self) -> None:
        """Let no page load anything, be stored, or tell its address, which has the code in it."""
        self.send_header("Content-Security-Policy", "default-src 'none'")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because the request line holds the code."""


class CallbackServer(socketserver.ThreadingTCPServer):
    """Listens on one loopback address, with a thread for each connection: a browser leaves some
    idle. (An HTTPServer first looks up the name of this machine, which can take seconds.)"""

    daemon_threads = True  # no end waits for them: a program could keep its connection for ever
    request_queue_size = 128  # connections
    allow_reuse_address = sys.platform != "win32"  # there it would let others take the port, too

    def __init__(self, address: str, uri: SplitResult, state: str, callbacks: Callbacks) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.path, self.state, self.callbacks = "/" + uri.path.lstrip("/"), state, callbacks
        self.warned = False  # of a foreign state
        super().__init__((address, uri.port or 80), CallbackHandler)

    def serve(self) -> None:
        with self:  # which closes the port at the end
            self.serve_forever(0.05)  # seconds until it notices that it should stop

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about a connection that breaks: anybody can do that, and the wait goes on."""


@contextlib.contextmanager
def callback_server(redirect_uri: str, state: str) -> Iterator[Callbacks]:
    """Serve the redirect URI on each address of its host, until the callback has come (RFC 8252,
    section 8.3); yield where it arrives. Raises LoginError if an address can't be had: a browser
    might look for the callback there."""
    uri, callbacks, done = urlsplit(redirect_uri), Callbacks(), threading.Event()
    servers: list[CallbackServer] = []
    hint = threading.Timer(30, say, BROWSER_ERRORS.split("\n"), {"file": sys.stderr})  # seconds
    try:
        for address in LOOPBACK[uri.hostname or ""]:
            try:
                server = CallbackServer(address, uri, state, callbacks)
            except OSError as error:
                if servers and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    break  # a machine without IPv6
                what = f"Can't listen on port {uri.port or 80} of {address}: {error.strerror}"
                stop = "" if isinstance(error, PermissionError) else " Or stop what uses this port."
                raise LoginError(what, OTHER_PORT + stop) from error
            threading.Thread(target=server.serve).start()
            servers.append(server)
        threading.Thread(target=read_pasted, args=[state, callbacks, done], daemon=True).start()
        hint.start()
        yield callbacks
    finally:
        done.set()
        hint.cancel()
        for server in servers:  # the login does not wait for this
            threading.Thread(target=server.shutdown).start()


# --- Terminal, browser and program ----------------------------------------------------------------


def read_pasted(state: str, callbacks: Callbacks, done: threading.Event) -> None:
    """Read pasted addresses from stdin, until one is the callback of this login, or it is done."""
    while not done.is_set():
        # It fails without a stdin, and in the background of a terminal, until it is back.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            for line in io.FileIO(sys.stdin.fileno(), closefd=False):  # takes no more than a line
                # People copy quotes, too, and browsers leave out the scheme, or add a #.
                address, _, _ = line.decode(errors="replace").strip(" \t\r\n\"'<>").partition("#")
                try:
                    callbacks.put(check_callback(address.partition("?")[2], state))
                    return
                except CallbackRefused as refused:
                    say(refused.args[1], "Paste what the browser shows last.", file=sys.stderr)
        done.wait(1)  # second


def open_browser(url: str) -> None:
    """Open the URL in the person's browser, in a process without a terminal: no text browser takes
    over the screen, no log of a browser mixes with the output. It may take seconds, or fail."""
    import subprocess  # not before the authorize URL is on the screen: it takes its time

    null = subprocess.DEVNULL
    command = [sys.executable, "-I", "-m", "webbrowser", url]  # -I: not ./webbrowser.py
    # The client secret is not for browsers, and without a TERM it offers none for the terminal.
    environment = {k: v for k, v in os.environ.items() if k not in KEYS} | {"TERM": ""}
    with contextlib.suppress(OSError):
        # In a session of its own, it has no /dev/tty, and no Ctrl+C from here (not on Windows).
        subprocess.run(
            command, stdin=null, stdout=null, stderr=null, env=environment, start_new_session=True
        )


def show_request(method: str, url: str, parameters: Form = None) -> None:
    """Print a request: the method, the address, and its parameters or headers, one a line."""
    address, _, query = url.partition("?")
    say(f"   {method} {address}")
    for name, value in [*parse_qsl(query), *(parameters or {}).items()]:
        say(f"      {name}: {masked(value, name)}")


def show_answer(response: requests.Response, show_tokens: bool) -> Json:
    """Print an answer, and return its JSON object, which is empty if it has none."""
    say(f"   {response.status_code} {response.reason}")
    try:
        answer = json.loads(response.content)
        text = json.dumps(masked(answer, "", show_tokens), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        answer, text = None, f"   ({len(response.content)} bytes that are no JSON)"
    say(*text.split("\n"))
    return answer if isinstance(answer, dict) else {}


def masked(value: Any, name: str, show_tokens: bool = False) -> Any:
    """Return a value, or JSON, without what its name says is secret; show_tokens keeps tokens."""
    name = name.lower()
    token = name.endswith("token") and not show_tokens
    secret = token or name.endswith(("secret", "verifier", "authorization")) or name == "code"
    if isinstance(value, dict):
        return {k: masked(v, name if secret else k, show_tokens) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(item, name, show_tokens) for item in value]
    if not secret or not isinstance(value, str):
        return value
    if name.endswith("secret"):
        return "..."
    return f"{value[: min(10, len(value) // 4)]}... ({len(value)} characters)"


def describe(answer: dict[str, Any]) -> str:
    """Return the error in an answer or a callback (RFC 6749, sections 4.1.2.1 and 5.2)."""
    texts = [answer.get("error"), answer.get("error_description")]
    return ": ".join(t for t in texts if t and isinstance(t, str))[:500].rstrip(".") or "see above"


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines to stdout, at once even into a pipe. What could steer a terminal is escaped as in
    JSON: control characters, bidirectional overrides, lone surrogates. Raises OSError."""
    for line in lines:
        shown = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        print(shown + "\n", end="", file=file, flush=True)  # in one piece: threads print, too


def main() -> int:
    """Log in as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(description="Log in to sipgate with OAuth 2.0.")
    add, config = parser.add_argument, Path(__file__).with_name("config.env")
    add("--config", metavar="FILE", default=config, help="the configuration (default: %(default)s)")
    add("--no-browser", action="store_true", help="do not open the browser (default: open it)")
    add("--timeout", metavar="SECONDS", type=float, default=300, help="wait (default: %(default)s)")
    add("--show-tokens", action="store_true", help="print tokens in full (default: masked)")
    options = parser.parse_args()
    if not 0 < options.timeout <= 86400:
        parser.error("--timeout should be a positive number of at most 86400 (a day)")

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    if sys.platform != "win32":
        # In the background of a terminal, reading from it fails, and does not stop the program.
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    try:
        log_in(options)
    except LoginError as error:
        say(f"Error: {error.args[0]}.", *error.args[1].split("\n"), file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except OSError as error:  # from stdout: all others have become a LoginError
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # "| head" has enough; so on Windows
            say(f"Error: can't print: {error.strerror}. Check the output.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Not sys.exit: it waits for threads that print, and prints once more what could not be printed.
    os._exit(main())
