"""A browser for the tests: it makes noise wherever it can, and stays open as long as a test wants.

    python noisy_browser.py PORT URL

It tells the test at PORT its URL, and the names of its environment variables, each on a line. Then
it sends back what it receives, until the test closes the connection.
"""

import contextlib
import os
import socket
import sys

port, url = sys.argv[1:]
print("noise on stdout", flush=True)
print("noise on stderr", file=sys.stderr, flush=True)
with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
    terminal.write("noise in the terminal")
sys.stdin.read()
with socket.create_connection(("127.0.0.1", int(port))) as test:
    test.sendall(f"{url}\n{' '.join(os.environ)}\n".encode())
    while byte := test.recv(1):
        test.sendall(byte)
