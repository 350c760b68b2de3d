"""A server that responds byte for byte as a test tells it to, and a login to it."""

import http.client
import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from script import Script, free_port, visit

CLIENT_SECRET = "sAAAAAAA-client-secret"
CODE = "cBBBBBBB-code"
TOKENS: dict[str, Any] = {
    "access_token": "aCCCCCCC-access-token",
    "refresh_token": "rDDDDDDD-refresh-token",
    "token_type": "Bearer",
    "expires_in": 300,
}
NEW_TOKENS = {**TOKENS, "access_token": "aEEEEEEE-new", "refresh_token": "rFFFFFFF-new"}
SECRETS = {"access_token", "refresh_token", "client_secret", "code", "code_verifier"}
# The requests of a login: the path, and how many requests to the same path come before.
STEPS = {
    "code for tokens": ("/token", 0),
    "account": ("/account", 0),
    "refresh": ("/token", 1),
}


class Request(NamedTuple):
    method: str
    target: str
    headers: Message
    form: dict[str, str]
    connection: socket.socket


# A response: what is sent, or a function that returns it, and may use the connection before
Answer = bytes | Callable[[Request], bytes]


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close"
    return "\r\n".join((head, *headers, "", "")).encode() + body


def json_answer(content: Any, status: str = "200 OK") -> bytes:
    return answer(json.dumps(content).encode(), "Content-Type: application/json", status=status)


class Handler(socketserver.StreamRequestHandler):
    server: "OddServer"

    def handle(self) -> None:
        with suppress(OSError):  # of a connection that one of the two sides has broken off
            line = self.rfile.readline().decode()
            if not line:  # a browser's connection that is not used
                return
            method, target, _ = line.split(" ")
            headers = http.client.parse_headers(self.rfile)
            body = self.rfile.read(int(headers.get("Content-Length", 0))).decode()
            form = dict(parse_qsl(body, keep_blank_values=True))
            request = Request(method, target, headers, form, self.connection)
            self.server.requests.append(request)
            answers = self.server.answers.get(target, [b"HTTP/1.1 404 No\r\n\r\n"])
            chosen = answers.pop(0) if len(answers) > 1 else answers[0]
            self.wfile.write(chosen(request) if callable(chosen) else chosen)


class OddServer(socketserver.ThreadingTCPServer):
    """Serves until the end of the `with` block.

    tls: with a TLS context, it serves https
    host: the host name in its URLs
    answers: the responses for each path, in their order; the last one stays
    environment: the variables for sipgate_oauth.py
    requests: the requests so far
    """

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if tls:  # each connection does its handshake in its own thread
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        self.tls = tls
        self.requests: list[Request] = []
        self.answers: dict[str, list[Answer]] = {
            "/token": [json_answer(TOKENS), json_answer(NEW_TOKENS)],
            "/account": [json_answer({"company": "Odd Ltd"})] * 2,
        }
        self.host = f"{host}:{self.server_address[1]}"
        url = f"http{'s' if tls else ''}://{self.host}"
        self.environment = {
            "CLIENT_ID": "client",
            "CLIENT_SECRET": CLIENT_SECRET,
            "OAUTH_SCOPE": "account:read",
            "REDIRECT_URI": f"http://127.0.0.1:{free_port()}/oauth",
            "AUTH_URL": f"{url}/auth",
            "TOKEN_URL": f"{url}/token",
            "TEST_API_ENDPOINT": f"{url}/account",
        }

    def answer_at(self, step: str, said: Answer) -> None:
        """Respond well before one of the STEPS, and like this from then on."""
        path, before = STEPS[step]
        self.answers[path][before:] = [said]

    def __enter__(self) -> "OddServer":
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


def log_in(script: Script, server: OddServer) -> None:
    """Send the callback to the script, as the browser does after the login."""
    visit(f"{server.environment['REDIRECT_URI']}?code={CODE}&state={script.state()}")


def failed_login(script: Script, server: OddServer) -> str:
    """Log in, and return the error of the script: just one, and nothing that is secret."""
    log_in(script, server)
    script.status()
    sent = (TOKENS, NEW_TOKENS, *(request.form for request in server.requests))
    return script.error(*(values[name] for values in sent for name in SECRETS & values.keys()))
