# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.32.4,<3", "python-dotenv>=1.0.1,<2"]
# ///
"""Log in to sipgate with OAuth 2.0, show the account, and refresh the tokens.

The user logs in to sipgate in the browser. The login server then redirects the browser to a small
web server in this program, on the loopback interface, which only this computer can reach (RFC 8252,
section 7.3). The browser brings a code, which the program exchanges for tokens: this is an
authorization code grant (RFC 6749, section 4.1). PKCE (Proof Key for Code Exchange, RFC 7636) ties
the code to this program.

The function log_in takes six steps. Each step has a section of its own, and the supporting code
comes after the last step.

1. Configuration    load_config     the client (this program, as sipgate knows it), and all URLs
2. Authorize URL    authorize_url   where the user logs in, in the browser
3. Callback         check_callback  the browser comes back with an authorization code
4. Code for tokens  exchange_code   the code is exchanged for an access and a refresh token
5. Account          get_account     the access token gives access to the API
6. Refresh          refresh_tokens  the refresh token is exchanged for a new pair of tokens
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("Error: This Python is too old.\nStart the program with Python 3.10 or newer.")

import argparse
import base64
import contextlib
import difflib
import errno
import hashlib
import html
import http.client
import importlib
import io
import json
import os
import queue
import re
import secrets
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

try:
    importlib.import_module("ssl")  # https needs it, and some Pythons are built without it
    import requests
    from dotenv import dotenv_values
except ImportError as missing:
    advice = 'Install the packages: see "Run it" in README.md. Or use: uv run sipgate_oauth.py'
    sys.exit(f"Error: {missing}.\n{advice}")


def log_in(options: argparse.Namespace) -> None:
    """Take the six steps and print what happens. Raises LoginError."""
    config, overridden = load_config(Path(os.path.expanduser(options.config)))
    say(f"1. Configuration: client {config['CLIENT_ID']}, scope {config['OAUTH_SCOPE']}")
    if overridden:
        say(f"   Overridden by environment variables: {', '.join(overridden)}")

    # The state and the code verifier are new for each login and have 256 random bits each (RFC
    # 6749, section 10.12; RFC 7636, section 7.1). A web application stores them in each browser's
    # session.
    state = secrets.token_urlsafe(32)
    code_verifier = secrets.token_urlsafe(32)
    url = authorize_url(config, state, code_challenge_for(code_verifier))

    def check(query: str) -> dict[str, str]:
        return check_callback(query, state)

    # Listen before the browser opens. Only a callback that passes the check ends the wait.
    with listen_for_callback(config["REDIRECT_URI"], check) as events:
        say("2. Authorize URL: open it in your browser and log in")
        show_request("GET", url)
        say("", url, "")
        if not options.no_browser:
            open_browser(url)

        say(f"3. Callback: waiting up to {options.timeout:g} seconds for the browser to come back")
        say("   If the browser shows an error after you have logged in, copy the URL from its")
        say("   address bar, paste it here, and press Enter.")
        callback = wait_for_callback(events, options.timeout)
    show_request("GET", config["REDIRECT_URI"], callback)
    code = code_from_callback(callback)

    # Steps 4 to 6 accept any requests.Session. This one also prints what is sent and received.
    with PrintingSession(options.show_tokens) as session:
        say("4. Code for tokens: the code is exchanged for an access token and a refresh token")
        tokens = exchange_code(session, config, code, code_verifier)

        say("5. Account: the access token gives access to the API")
        get_account(session, config, tokens["access_token"])

        # The first access token is still valid, so this refresh is only a demonstration. In your
        # own program, refresh shortly before expires_in seconds (see the response) have passed.
        # Store the new tokens at once, because the old refresh token stops working.
        say("6. Refresh: the refresh token is exchanged for a new pair of tokens. sipgate then")
        say("   invalidates the old pair.")
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
    Raises ConfigurationError (a LoginError), which names every key with a missing or wrong value.
    """
    from_file = read_config_file(path)
    config = {key: os.environ.get(key, from_file.get(key)) or "" for key in KEYS}
    overridden = [key for key in KEYS if key in from_file and config[key] != from_file[key]]
    check_config(config, from_file, path)
    return config, overridden


# --- 2. Authorize URL -----------------------------------------------------------------------------


def authorize_url(config: Config, state: str, code_challenge: str) -> str:
    """Return the URL that the user opens to log in (RFC 6749, section 4.1.1).

    Further parameters, such as prompt=consent, may follow a ? in AUTH_URL. If one of them is also
    set here, the value here is used.
    """
    parameters = {
        # Ask for a code. A token would come back in a URL, and anyone who finds it in a history or
        # a log could use it (RFC 9700, section 2.1.2). The code comes back in a URL, too, but is
        # worthless without the code verifier and the client secret.
        "response_type": "code",
        # Which program asks. The client secret must not be here: browsers and logs keep this URL.
        "client_id": config["CLIENT_ID"],
        # Where to send the browser with the code. Exactly this URI must be registered for the
        # client: the login server sends the code nowhere else.
        "redirect_uri": config["REDIRECT_URI"],
        # What the program asks to be allowed to do. The user has to agree.
        "scope": config["OAUTH_SCOPE"],
        # Comes back in the callback, and shows that the callback belongs to this login.
        "state": state,
        # A hash of the code verifier. Only a program that knows the verifier can use the code.
        "code_challenge": code_challenge,
        # How the verifier was hashed. The alternative, "plain", would put it into this URL.
        "code_challenge_method": "S256",
    }
    address, _, query = config["AUTH_URL"].partition("?")
    others = [
        pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] not in parameters
    ]
    return f"{address}?{urlencode([*others, *parameters.items()])}"


def code_challenge_for(code_verifier: str) -> str:
    """Return the S256 code challenge of a code verifier (RFC 7636, section 4.2)."""
    digest = hashlib.sha256(code_verifier.encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


# --- 3. Callback ----------------------------------------------------------------------------------


def check_callback(query: str, state: str) -> dict[str, str]:
    """Return the parameters of the callback: a code or an error (RFC 6749, section 4.1.2).

    query: the part of the callback's URL after the ?
    state: the state in the authorize URL; if it is empty, every callback is refused
    Raises CallbackRefused if this is not the callback of our login.
    """
    # An empty parameter counts as missing, and none may appear twice (RFC 6749, section 3.1).
    pairs = parse_qsl(query, keep_blank_values=True)
    parameters = {name: value for name, value in pairs if value}
    if len({name for name, _ in pairs}) < len(pairs):
        raise CallbackRefused(400, "The URL contains a parameter more than once.")
    if not parameters.keys() & {"code", "error", "state"}:
        raise CallbackRefused(400, "This is not a login response.")

    # Any web page can send the browser here with a code, for example to log you in to an
    # attacker's account. But no web page knows our state (RFC 6749, section 10.12). compare_digest
    # takes the same time for every guess. Both values are bytes, because it rejects non-ASCII text.
    received = parameters.get("state", "")
    if not state or not secrets.compare_digest(received.encode(), state.encode()):
        raise StateMismatch(403, FOREIGN_STATE)

    has_code = "code" in parameters
    has_error = "error" in parameters
    if has_code == has_error:  # both or neither
        raise CallbackRefused(400, "The URL must contain either a code or an error.")
    return parameters


def code_from_callback(callback: dict[str, str]) -> str:
    """Return the authorization code. Raises LoginError if the callback has an error instead."""
    if "error" in callback:
        error = callback["error"]
        advice = ADVICE.get(error, "Start again. If this happens again, contact the provider.")
        raise LoginError(f"The login failed: {describe(callback)}", advice, error)
    return callback["code"]


# --- 4. Code for tokens ---------------------------------------------------------------------------

Tokens = dict[str, Any]  # the response of the token endpoint (RFC 6749, section 5.1)


def exchange_code(
    session: requests.Session, config: Config, code: str, code_verifier: str
) -> Tokens:
    """Exchange the authorization code for tokens (RFC 6749, section 4.1.3).

    session: one per user, because it keeps the cookies of the login server
    Raises LoginError.
    """
    form = {
        # What the client exchanges for tokens: here, a code; in step 6, a refresh token.
        "grant_type": "authorization_code",
        # Stands for the user's permission. It works only once, and expires within a minute.
        "code": code,
        # Matches the code challenge, and so proves that this program began the login.
        "code_verifier": code_verifier,
        # Must equal the one in the authorize URL: the code was issued for this redirect URI only.
        "redirect_uri": config["REDIRECT_URI"],
        # Identifies the client. It is public, so it proves nothing.
        "client_id": config["CLIENT_ID"],
        # Proves that this is the client. A program that you give to others must not contain a
        # secret (RFC 8252, section 8.5). Register it as a public client, which has none.
        "client_secret": config["CLIENT_SECRET"],
    }
    return request_tokens(session, config, form)


# --- 5. Account -----------------------------------------------------------------------------------


def get_account(session: requests.Session, config: Config, access_token: str) -> Any:
    """Return the account, or whatever JSON TEST_API_ENDPOINT sends. Raises LoginError.

    If the `error` of the LoginError is "invalid_token", refresh the tokens and try again once.
    """
    # Bearer: the API lets in whoever has this token. So it goes into a header and not into the
    # URL, because URLs end up in logs (RFC 6750, sections 2.1 and 2.3).
    headers = {"Authorization": f"Bearer {access_token}"}
    statuses = {401: "invalid_token", 403: "insufficient_scope"}  # RFC 6750, section 3.1
    return request_json(
        session, "GET", config, "TEST_API_ENDPOINT", headers=headers, statuses=statuses
    )


# --- 6. Refresh -----------------------------------------------------------------------------------


def refresh_tokens(session: requests.Session, config: Config, tokens: Tokens) -> Tokens:
    """Exchange the refresh token for new tokens, without user interaction (RFC 6749, section 6).

    tokens: the latest response of the token endpoint
    Raises LoginError. If its `error` is "invalid_grant", the user has to log in again.
    """
    old = tokens.get("refresh_token")
    if not old or not isinstance(old, str):
        what = f"{urlsplit(config['TOKEN_URL']).netloc} sent no refresh token"
        raise LoginError(what, NO_REFRESH_TOKEN, "invalid_grant")
    form = {
        "grant_type": "refresh_token",
        # sipgate rotates refresh tokens: each works once, and the response has a new one. If a
        # thief uses the same token, whoever comes second is refused (RFC 9700, section 4.14.2).
        "refresh_token": old,
        # The refresh token was issued to this client only.
        "client_id": config["CLIENT_ID"],
        # Someone who stole the refresh token would need this as well.
        "client_secret": config["CLIENT_SECRET"],
    }
    new_tokens = request_tokens(session, config, form)
    # A login server that does not rotate sends no new refresh token. The old one remains valid.
    new_tokens["refresh_token"] = new_tokens.get("refresh_token") or old
    return new_tokens


# --- Errors, and what to do about them ------------------------------------------------------------


class LoginError(Exception):
    """The login cannot continue.

    what: what happened, and where
    advice: what to do next
    error: the error code (RFC 6749, sections 4.1.2.1 and 5.2; RFC 6750, section 3.1), or ""
    """

    def __init__(self, what: str, advice: str, error: str = "") -> None:
        super().__init__(f"{what}. {advice}")
        self.what = what
        self.advice = advice
        self.error = error


class ConfigurationError(LoginError):
    """The login cannot begin."""


class CallbackRefused(Exception):
    """A request is not the callback of our login.

    status: the HTTP status to answer with
    reason: what is wrong with the request
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class StateMismatch(CallbackRefused):
    """The callback belongs to another login, or it is forged."""


FOREIGN_STATE = "State in the callback does not match the state in the original request."
OLD_TAB = "If you used an old browser tab, open the URL above instead."
STILL_WAITING = "The terminal is still waiting for the login. Open the URL that it shows."
CANNOT_ASK = "The login server has to ask you: remove prompt=none from AUTH_URL and start again."
CHECK_CLIENT = """Check CLIENT_ID and CLIENT_SECRET. If they are right, the login server may accept
them only in a header (see "Another provider" in README.md), or the client may not be allowed to use
this kind of login (see its settings)."""
# Advice for the error codes of OAuth and OpenID Connect
ADVICE = {
    "access_denied": "Access was refused. To continue, start again and allow access.",
    "consent_required": CANNOT_ASK,
    "interaction_required": CANNOT_ASK,
    "login_required": CANNOT_ASK,
    "insufficient_scope": """Check OAUTH_SCOPE: it must contain the scope that TEST_API_ENDPOINT
requires. For the account at sipgate, this is account:read.""",
    "invalid_client": CHECK_CLIENT,
    "invalid_grant": """The code or the refresh token is wrong, has expired, or was already used.
Start again.""",
    "invalid_scope": """Check OAUTH_SCOPE: it may contain only scopes that the login server knows,
separated by spaces.""",
    "invalid_token": """The access token has expired, was revoked, or is not meant for this API.
Check TEST_API_ENDPOINT and start again.""",
    "unauthorized_client": CHECK_CLIENT,
}
# Advice for all other errors, by the key of the endpoint
CHECK = {
    "TOKEN_URL": """Check TOKEN_URL: it must not be the same as AUTH_URL. At sipgate, it contains
the realm of your client (sipgate-apps or third-party). If it is right, try again later.""",
    "TEST_API_ENDPOINT": "Check TEST_API_ENDPOINT. If it is right, try again later.",
}
NO_RESPONSE = """Try again. If this happens again, check {} and the network, and any of these
environment variables that you have set: HTTPS_PROXY, ALL_PROXY (for SOCKS, install PySocks),
REQUESTS_CA_BUNDLE (the certificates of a company's proxy), SSLKEYLOGFILE."""
NO_REFRESH_TOKEN = """There is nothing to refresh: log in again when the access token has expired.
Some login servers send a refresh token if you add offline_access to OAUTH_SCOPE. Others also need
?prompt=consent at the end of AUTH_URL."""
OTHER_PORT = """Stop the program that uses this port. Or use another port, above 1023, in
REDIRECT_URI (without a port, it is 80), and register the new URI for your client."""
BROWSER_ERRORS = """If the browser shows an error:
- "Client not found": check CLIENT_ID, and the realm in AUTH_URL and TOKEN_URL. At
  console.sipgate.com, you can see whether your client is in sipgate-apps or in third-party.
- "Invalid parameter: redirect_uri": add REDIRECT_URI to your client there.
- "405" or "Method Not Allowed": AUTH_URL and TOKEN_URL may be mixed up.
- Any other error: check CLIENT_ID, REDIRECT_URI and OAUTH_SCOPE."""


# --- The configuration file, and what is wrong with it --------------------------------------------

# The loopback addresses of each host. A browser may use either one for localhost. RFC 8252, section
# 8.3, prefers 127.0.0.1, which does not depend on name resolution. Use that if you can register it.
LOOPBACK = {"localhost": ["127.0.0.1", "::1"], "127.0.0.1": ["127.0.0.1"], "::1": ["::1"]}


def read_config_file(path: Path) -> Mapping[str, str | None]:
    """Return what the file contains: nothing if there is no file. Raises ConfigurationError."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            # Without interpolation, because a secret may contain a dollar sign.
            return dotenv_values(stream=file, interpolate=False)
    except FileNotFoundError:  # The environment may have all the values.
        return {}
    except (OSError, UnicodeError) as error:
        advice = f"{path} must be a readable UTF-8 text file, like config.example.env."
        raise ConfigurationError(f"Cannot read the configuration: {error}", advice) from error


def check_config(config: Config, from_file: Mapping[str, str | None], path: Path) -> None:
    """Raise ConfigurationError if a value is missing or wrong."""
    missing = [key for key in KEYS if not config[key].strip() or "YOUR_" in config[key]]
    if missing and not path.exists():
        problems = [f"There is no {path}, and the environment lacks {', '.join(missing)}"]
        advice = f"""Copy config.example.env to {path} and fill it in.
If you have no sipgate account, try the sandbox: see "Try it now" in README.md."""
        # Windows hides the extension .txt. Some users fill in the example itself.
        for name in (f"{path.name}.txt", "config.example.env"):
            with contextlib.suppress(OSError):
                if "YOUR_" not in path.with_name(name).read_text(errors="replace"):
                    advice = f"Rename {path.with_name(name)} to {path.name}."
    else:
        verb = "is" if len(missing) == 1 else "are"
        problems = [f"{', '.join(missing)} {verb} missing or not filled in"] if missing else []
        advice = f"Correct this in {path}, or in the environment, which overrides the file."
    for key in KEYS:
        problem = "" if key in missing else problem_with(key, config[key])
        if problem:
            problems.append(f"{key} {problem}")
    for name in from_file:
        # An unknown name is printed only if it is almost right. It may be part of a secret.
        similar = difflib.get_close_matches(name.upper(), missing, cutoff=0.9)
        if name not in KEYS and similar and re.fullmatch("[A-Za-z_-]+", name):
            problems.append(f"{name} is not a known key (did you mean {similar[0]}?)")
    if problems:
        raise ConfigurationError("; ".join(problems), advice)


def problem_with(key: str, value: str) -> str:
    """Return what is wrong with the value of a key, or an empty string."""
    if value != value.strip() or not value.isprintable():
        return "begins or ends with a space, or contains an invisible character"
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return "is enclosed in quotation marks: remove them"
    if key in CLIENT_KEYS:
        return ""
    try:
        uri = urlsplit(value)
        is_url = uri.scheme in ("http", "https") and uri.hostname and uri.port != 0
    except ValueError:  # for example, for a port above 65535
        is_url = False
    example = "http://localhost:8080/oauth" if key == "REDIRECT_URI" else "https://host/path"
    if not is_url or not value.isascii() or set(value) & set(' #\\"<>^`{|}') or "@" in uri.netloc:
        return f"is not a URL like {example} (without spaces, user name, or #)"
    # The client secret and the tokens must not leave this computer unencrypted.
    if uri.scheme == "http" and uri.hostname not in LOOPBACK:
        return f"is not a URL like {example} (plain http is only for localhost)"
    return ""


# --- HTTP requests --------------------------------------------------------------------------------


def request_tokens(session: requests.Session, config: Config, form: dict[str, str]) -> Tokens:
    """Send a form to the token endpoint and return its response.

    Its `scope` may be narrower than the requested one (RFC 6749, section 5.1): compare them.
    Raises LoginError, including when the token is not a bearer token (RFC 6749, section 7.1).
    """
    # RFC 6749, section 2.3.1, recommends sending the client ID and the secret in a header (HTTP
    # Basic). sipgate's documentation puts them into the form.
    response = request_json(session, "POST", config, "TOKEN_URL", form=form)
    tokens: Tokens = response if isinstance(response, dict) else {}
    host = urlsplit(config["TOKEN_URL"]).netloc
    for name in ("access_token", "token_type"):
        if not tokens.get(name) or not isinstance(tokens[name], str):
            raise LoginError(f"{host} sent no {name}", CHECK["TOKEN_URL"])
    if tokens["token_type"].lower() != "bearer":
        raise LoginError(f"{host} sent a token that is not a bearer token", CHECK["TOKEN_URL"])
    return tokens


def request_json(
    session: requests.Session,
    method: str,
    config: Config,
    key: str,
    form: Mapping[str, str] = {},
    headers: Mapping[str, str] = {},
    statuses: Mapping[int, str] = {},
) -> Any:
    """Send a request and return the JSON object or list in the response. Raises LoginError.

    key: the key of the endpoint in the configuration
    statuses: the OAuth error code for each HTTP status at this endpoint
    """
    host = urlsplit(config[key]).netloc
    try:
        response = session.request(
            method,
            config[key],
            data=form,
            # Without Accept, some servers respond with a form instead of JSON.
            headers={"Accept": "application/json", **headers},
            # Without auth, requests would replace our header with a password from ~/.netrc.
            auth=lambda request: request,
            timeout=10,  # seconds to connect, and seconds of silence during the response
            allow_redirects=False,  # the secrets are meant for this URL only
            proxies={"http": ""},  # plain http stays on this computer: see problem_with
        )
    except Exception as failure:  # bad proxies and responses raise more than RequestException
        what = f"The request to {host} failed: {reason_of(failure)}"
        raise LoginError(what, NO_RESPONSE.format(key)) from failure

    try:
        content = json.loads(response.content)
    except (ValueError, RecursionError):
        content = None
    details = content if isinstance(content, dict) else {}
    succeeded = response.status_code // 100 == 2
    if succeeded and isinstance(content, (dict, list)) and not details.get("error"):
        return content

    # Some servers explain an error only in a header (RFC 6750, section 3).
    header = response.headers.get("WWW-Authenticate", "")
    challenge = dict(re.findall(r'\b(\w+)="([^"]*)"', header))
    code = challenge.get("error") or statuses.get(response.status_code) or details.get("error")
    advice = ADVICE.get(str(code), CHECK[key])
    reason = describe(details) or describe(challenge) or "the response gives no reason"
    if response.is_redirect:
        reason = "redirects are not followed, so that no secret is sent to another address"
    elif content is None and response.content and not challenge:
        code = None
        reason = "the response is not JSON"
        advice = f"{CHECK[key]}\nA firewall or a proxy may have answered instead of the server."
    elif succeeded and not details:
        reason = "the response contains no JSON object or list"
    what = f"{host} responded with {status_line(response)}: {reason}"
    raise LoginError(what, advice, str(code or ""))


def status_line(response: requests.Response) -> str:
    """Return the status code and its reason phrase, even if the server left it out."""
    phrase = response.reason or http.client.responses.get(response.status_code, "")
    return f"{response.status_code} {phrase[:100]}".rstrip()


def describe(parameters: Mapping[str, Any]) -> str:
    """Return the error and its description, or an empty string if there is neither."""
    texts = [parameters.get(name) for name in ("error", "error_description", "message")]
    return ": ".join(text for text in texts if text and isinstance(text, str))[:500].rstrip(".")


def reason_of(failure: BaseException) -> str:
    """Return why a request failed. Only messages from the operating system and TLS are quoted:
    others may contain a secret, such as the password of a proxy."""
    while failure.__context__ and not isinstance(failure.__context__, LoginError):
        failure = failure.__context__
    if isinstance(failure, OSError) and not isinstance(failure, requests.RequestException):
        return str(failure)[:200]
    return type(failure).__name__


# --- Callback server ------------------------------------------------------------------------------

Callback = dict[str, str]  # what check_callback returns
Check = Callable[[str], Callback]
# What happens during the wait: our callback, one with a wrong state, or a text for the user
Events = queue.SimpleQueue[Callback | StateMismatch | str]
PAGE = "<!DOCTYPE html><title>Login</title><h1>%(message)s</h1><p>%(explain)s</p>"
HINT_AFTER = 30  # seconds without a callback


@contextlib.contextmanager
def listen_for_callback(redirect_uri: str, check: Check) -> Iterator[Events]:
    """Serve the redirect URI until the end of the `with` block, and read pasted URLs from stdin.

    check: returns the callback, given the part of a URL after the ?, or raises CallbackRefused
    Yields the queue of events. Raises ConfigurationError if this program cannot serve the redirect
    URI, and LoginError if the port is not available. The thread that reads stdin ends with the
    program, so a line that is typed after the block is lost.
    """
    uri = urlsplit(redirect_uri)
    if uri.scheme != "http" or uri.hostname not in LOOPBACK:
        what = f"This program cannot serve the REDIRECT_URI {redirect_uri}"
        advice = "Use http, not https, and a loopback host, as in http://localhost:8080/oauth."
        raise ConfigurationError(what, advice)
    events: Events = queue.SimpleQueue()
    with contextlib.ExitStack() as at_the_end:
        # All addresses of the host, and no others (RFC 8252, section 8.3).
        for address in LOOPBACK[uri.hostname]:
            try:
                server = CallbackServer(address, uri, check, events)
            except OSError as error:
                no_ipv6 = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                if no_ipv6 and ":" in address and uri.hostname == "localhost":
                    continue  # the browser has no IPv6 either
                what = f"Cannot listen on port {uri.port or 80} of {address}: {error.strerror}"
                raise LoginError(what, OTHER_PORT) from error
            at_the_end.enter_context(server)  # closes the port
            start_thread(server.serve_forever, 0.01)  # seconds between checks for shutdown
            at_the_end.callback(server.shutdown)
        start_thread(read_pasted, check, events)
        yield events


def start_thread(target: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a thread that does not keep the program from ending. Raises LoginError."""
    try:
        threading.Thread(target=target, args=arguments, daemon=True).start()
    except RuntimeError as error:
        advice = "Close other programs. In a container, allow more threads, or update Docker."
        raise LoginError("This system allows no more threads", advice) from error


def wait_for_callback(events: Events, timeout: float) -> Callback:
    """Return the first callback, and print hints and warnings until it arrives.

    timeout: seconds. Raises LoginError if there is no callback by then.
    """
    deadline = time.monotonic() + timeout
    hint_due = time.monotonic() + HINT_AFTER
    warned = False
    while True:
        now = time.monotonic()
        if now >= deadline:
            advice = f"Start again. For more time, use --timeout. {BROWSER_ERRORS}"
            raise LoginError(f"The browser did not come back within {timeout:g} seconds", advice)
        if now >= hint_due:
            warn(*BROWSER_ERRORS.split("\n"))
            hint_due = deadline
        with contextlib.suppress(queue.Empty):
            event = events.get(timeout=min(hint_due, deadline) - now)
            if isinstance(event, dict):
                return event
            if isinstance(event, str):
                warn(event)
            elif not warned:  # once, because a web page could cause this again and again
                warn(event.reason, OLD_TAB)
                warned = True


class CallbackServer(socketserver.ThreadingTCPServer):
    """Listens on one loopback address. Each connection gets its own thread, because browsers open
    connections that they do not use. (HTTPServer would look up this computer's name: that is slow.)
    """

    daemon_threads = True  # so that no connection can keep the program from ending
    request_queue_size = 128  # connections
    allow_reuse_address = sys.platform != "win32"  # on Windows, others could then take the port

    def __init__(self, address: str, uri: SplitResult, check: Check, events: Events) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.path = "/" + uri.path.lstrip("/")  # http.server changes the path in the same way
        self.check = check
        self.events = events
        super().__init__((address, uri.port or 80), CallbackHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a connection that breaks. The wait goes on."""


class CallbackHandler(BaseHTTPRequestHandler):
    """Answers one request to the callback server, and passes on the callback."""

    server: CallbackServer
    timeout = 5  # seconds of silence after which a connection is closed
    error_message_format = PAGE

    def do_GET(self) -> None:
        try:
            target = urlsplit(self.path)
        except ValueError:
            self.send_error(400)
            return
        # A request line without a version (HTTP/0.9) may have been cut off inside the code.
        if (target.path or "/") != self.server.path or self.request_version == "HTTP/0.9":
            self.send_error(404, "This is not the redirect URI.", STILL_WAITING)
            return
        try:
            callback = self.server.check(target.query)
        except CallbackRefused as refused:
            self.send_error(refused.status, refused.reason, STILL_WAITING)
            if isinstance(refused, StateMismatch):
                self.server.events.put(refused)
            return
        try:
            self.send_result(callback)
        finally:  # not earlier: the program could end before the page is sent
            self.server.events.put(callback)

    def send_result(self, callback: Callback) -> None:
        """Send the page that ends the browser's part of the login."""
        title, text = "Login accepted", "Go back to the terminal, which shows the result."
        if "error" in callback:
            title, text = "Login failed", f"{describe(callback)}. Go back to the terminal."
        page = PAGE % {"message": title, "explain": html.escape(text)}
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(page.encode())

    def end_headers(self) -> None:
        """Add headers that keep a page from loading anything, being cached, or revealing its URL,
        which contains the code."""
        self.send_header("Content-Security-Policy", "default-src 'none'")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because the request line contains the code."""


# --- Pasted addresses, and the browser ------------------------------------------------------------


def read_pasted(check: Check, events: Events) -> None:
    """Read pasted URLs from stdin until one of them is the callback."""
    for number, line in enumerate(lines_of_stdin(), start=1):
        # The query of a URL contains only these characters. The rest was copied by accident, or
        # added by a terminal.
        queries = re.findall(rb"\?([!$-&(-;=?-~]*)", line)
        query = max(queries, key=len, default=b"").rstrip(b".,:;!?)]}")
        try:
            events.put(check(query.decode("ascii")))
            return
        except StateMismatch as refused:
            events.put(f"{refused.reason} {OLD_TAB}")
        except CallbackRefused as refused:
            events.put(f"{refused.reason} Log in first, then paste the whole URL.")
        if number == 20:
            events.put("None of the 20 lines was the callback. Further input is ignored.")
            return


def lines_of_stdin() -> Iterator[bytes]:
    """Yield the lines of stdin. Yield nothing if stdin is closed or has no file descriptor."""
    try:
        stdin = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return
    unfinished = b""
    while True:
        try:
            # In one call, because a Windows console may cut a line that is read byte by byte.
            typed = os.read(stdin, 16384)  # bytes
        except OSError:  # while the program is in the background of a terminal
            time.sleep(1)
            continue
        *lines, unfinished = (unfinished + typed).split(b"\n")
        yield from lines
        if unfinished and (not typed or len(unfinished) > 65536):  # the end, or an endless line
            yield unfinished
            unfinished = b""
        if not typed:
            return


def open_browser(url: str) -> None:
    """Open the URL in the user's browser, if there is one, without waiting for it."""
    import subprocess  # here, because loading it would delay the authorize URL

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


class PrintingSession(requests.Session):
    """Prints each request as it is sent, and each response as it arrives."""

    def __init__(self, show_tokens: bool) -> None:
        super().__init__()
        self.show_tokens = show_tokens

    def send(self, request: requests.PreparedRequest, **settings: Any) -> requests.Response:
        parameters = dict(parse_qsl(str(request.body or "")))
        if "Authorization" in request.headers:
            parameters["Authorization"] = request.headers["Authorization"]
        show_request(str(request.method), str(request.url), parameters)
        response = super().send(request, **settings)
        show_response(response, self.show_tokens)
        return response


def show_request(method: str, url: str, parameters: Mapping[str, str] | None = None) -> None:
    """Print a request: its method, its address, and its parameters or headers, one per line."""
    address, _, query = url.partition("?")
    say(f"   {method} {address}")
    for name, value in [*parse_qsl(query), *(parameters or {}).items()]:
        say(f"      {name}: {masked(value, name)}")


def show_response(response: requests.Response, show_tokens: bool) -> None:
    """Print a response: its status, the headers that explain an error, and its JSON."""
    say(f"   {status_line(response)}")
    if "Location" in response.headers:
        url = re.split("[?#]", response.headers["Location"])[0]  # the rest may contain a secret
        say(f"      Location: {url[:500]}")
    if "WWW-Authenticate" in response.headers:
        say(f"      WWW-Authenticate: {response.headers['WWW-Authenticate'][:500]}")
    try:
        content = masked(json.loads(response.content), "", show_tokens)
        say(*json.dumps(content, indent=2, ensure_ascii=False).split("\n"))
    except (ValueError, RecursionError):
        size = len(response.content)
        say(f"   ({size} bytes that are not JSON)" if size else "   (empty)")


def masked(value: Any, name: str, show_tokens: bool = False) -> Any:
    """Return a value, or JSON, with secrets cut short. Names decide what counts as secret.

    show_tokens: whether tokens stay as they are
    """
    name = name.lower()
    is_token = name.endswith("token") and not show_tokens
    is_secret = is_token or name.endswith(("secret", "verifier", "authorization")) or name == "code"
    if isinstance(value, dict):
        return {k: masked(v, name if is_secret else k, show_tokens) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(item, name, show_tokens) for item in value]
    if not is_secret or not isinstance(value, str):
        return value
    if name.endswith("secret"):
        return "..."
    return f"{value[: min(10, len(value) // 4)]}... ({len(value)} characters)"


def say(*lines: str) -> None:
    """Print lines to stdout. Raises SystemExit if that fails, for example after `| head`."""
    try:
        for line in lines:
            print(printable(line), flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # EINVAL: a broken pipe on Windows
            warn(f"Error: Cannot print: {error.strerror}. Check where the output goes.")
        sys.exit(1)


def warn(*lines: str) -> None:
    """Print lines to stderr, if that is possible."""
    with contextlib.suppress(OSError):
        for line in lines if sys.stderr else ():
            print(printable(line), file=sys.stderr, flush=True)


def printable(line: str) -> str:
    """Return a line in which everything that could control a terminal is escaped as in JSON."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def discard_unprinted() -> None:
    """Let Python end quietly even if stdout or stderr has failed.

    At exit, Python flushes both. If that fails, it prints an error and changes the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- Program --------------------------------------------------------------------------------------


def main() -> int:
    """Log in with the options of the command line, and return the exit status."""
    if not hasattr(sys, "ps1"):  # in a notebook, these handlers would affect all of it
        # Ctrl+C ends the program at once, whatever it is waiting for. A program that stores tokens
        # must not do this, because it could end between a refresh and storing the tokens.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform != "win32":
            # In the background, reading from the terminal fails instead of stopping the program.
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    try:
        log_in(parse_arguments())
        return 0
    except LoginError as error:
        warn(f"Error: {error.what}.", *error.advice.split("\n"))
        return 2 if isinstance(error, ConfigurationError) else 1
    finally:
        discard_unprinted()


def parse_arguments() -> argparse.Namespace:
    """Return the options on the command line. Raises SystemExit if there is a mistake in them."""
    parser = argparse.ArgumentParser(description="Log in to sipgate with OAuth 2.0.")
    config = Path(__file__).with_name("config.env")
    parser.add_argument(
        "--config", metavar="FILE", default=config, help="configuration (default: %(default)s)"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=300,
        help="how long to wait for the login (default: %(default)s)",
    )
    parser.add_argument(
        "--show-tokens", action="store_true", help="print the tokens in responses in full"
    )
    try:
        options = parser.parse_args()
        if not 0 < options.timeout <= 86400:
            parser.error("--timeout must be greater than 0 and at most 86400 seconds (a day)")
    except (AttributeError, OSError):  # from older Pythons, if stderr is closed or full
        sys.exit(2)
    return options


if __name__ == "__main__":
    sys.exit(main())
