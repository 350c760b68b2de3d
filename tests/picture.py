"""Make .github/login.svg, the picture in the README, from a login at the sandbox.

    python tests/picture.py

It shows the terminal before the login, the login page in Chromium, and the terminal after the
login. Each window also has its words as a description, for screen readers and test_picture.py.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from base64 import b64encode
from html import escape, unescape

from playwright.sync_api import ViewportSize, sync_playwright
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text
from sandbox import SCRIPT, Sandbox

PICTURE = SCRIPT.with_name(".github") / "login.svg"
LEFT, RIGHT = 51, 58  # columns of text in the windows on each side
# In rich's units: a character, what a window adds to its text, and where its text begins.
ROW, COLUMN, FRAME_HEIGHT, FRAME_WIDTH, TEXT_TOP, TEXT_LEFT = 24.4, 12, 50, 18, 41, 9
GAP = 72  # between windows: with it, the frame of one is as high as 5 rows
PAGE_SIZE: ViewportSize = {
    "width": 420,
    "height": 100,
}  # pixels; a screenshot of the full page may be higher

DARK = TerminalTheme((22, 27, 34), (201, 209, 217), [(0, 0, 0)] * 8)
LIGHT = TerminalTheme((255, 255, 255), (36, 41, 47), [(0, 0, 0)] * 8)
WINDOW = """{chrome}<path class="line" d="M1 39H{terminal_width}h18"/><style>{styles}</style>
<g class="matrix" transform="translate({terminal_x} {terminal_y})">{matrix}</g>"""
# The fonts are the reader's, because a picture in a README cannot load any.
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {:g}" width="900" role="img">
<title>A login with sipgate_oauth.py</title>
<style>
text {{ font: 20px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }}
[class$=title] {{ font: 18px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }}
rect, .line {{ stroke: #8b949e }}
.arrow {{ fill: none; stroke: #388bfd; stroke-width: 4; marker-end: url(#head) }}
</style>
<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="5" orient="auto">
<path d="M0 0 10 5 0 10z" fill="#388bfd"/></marker>
{}
</svg>
"""


def halves(output: str) -> tuple[str, str]:
    """Split what the program prints into what it prints before the callback, and the rest."""
    callback = output.index("   GET ", output.index("\n3. "))
    return output[:callback], output[callback:]


def words_of(page: str) -> str:
    """Return the words of the login page."""
    return " ".join(unescape(re.sub(r".*<body>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def log_in() -> tuple[str, str, str, bytes]:
    """Return what the program prints, in halves, and the login page: its words and a PNG of it."""
    command = [sys.executable, str(SCRIPT), "--no-browser", "--config", os.devnull]
    with Sandbox() as sandbox, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport=PAGE_SIZE, device_scale_factor=2)
        environment = {**os.environ, **sandbox.environment, "PYTHONUTF8": "1"}
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdout=pipe, encoding="utf-8") as script:
            assert script.stdout
            output = ""
            for line in script.stdout:
                output += line
                if line.startswith("http"):
                    break
            page.goto(line.strip())
            words, screenshot = words_of(page.content()), page.screenshot(full_page=True)
            page.click("[value=allow]")
            before, after = halves(output + script.stdout.read())
        assert script.returncode == 0
        browser.close()
    return before, after, words, screenshot


def rows_of(output: str, columns: int) -> list[Text]:
    """Return the lines, wrapped, with a margin around them. Those that begin a step are bold."""
    rows = [Text()]
    for line in output.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(line, columns, subsequent_indent=indent, break_on_hyphens=False)
        style = "bold" if re.match(r"\d\. |Done", line) else ""
        rows += [Text(f" {row}", style) for row in wrapped or [""]]
    return [*rows, Text()]


def window(x: float, y: float, title: str, words: str, rows: list[Text], columns: int) -> str:
    """Return a window with rows of text in it, and with its words as a description."""
    console = Console(record=True, file=io.StringIO(), width=columns + 2)  # with the margin
    console.print(*rows, sep="\n")
    theme, name = (LIGHT if title == "Browser" else DARK), title.lower().replace(" ", "-")
    svg = console.export_svg(
        title=title, theme=theme, code_format=WINDOW, font_aspect_ratio=0.6, unique_id=name
    )
    svg = re.sub(' clip-path="[^"]*"', "", svg)  # which is for the one font that rich would load
    return f'<g transform="translate({x:g} {y:g})"><desc>{escape(words)}</desc>{svg}</g>'


def picture(before: str, after: str, words: str, screenshot: bytes) -> str:
    """Return the picture: the terminal and the browser on the left, and the rest on the right."""
    first, last = rows_of(before, LEFT), rows_of(after, RIGHT)
    empty = [Text()] * (len(last) - len(first) - 5)  # so that both sides are equally high
    width, height = (LEFT + 2) * COLUMN, len(empty) * ROW
    right = width + FRAME_WIDTH + GAP
    top = len(first) * ROW + FRAME_HEIGHT + GAP
    content = [
        window(0, 0, "Terminal before the login", before, first, LEFT),
        window(0, top, "Browser", words, empty, LEFT),
        window(right, 0, "Terminal after the login", after, last, RIGHT),
        f'<image x="{TEXT_LEFT}" y="{top + TEXT_TOP:g}" width="{width}" height="{height:g}" '
        'preserveAspectRatio="xMidYMin" '
        f'href="data:image/png;base64,{b64encode(screenshot).decode()}"/>',
        f'<path class="arrow" d="M{width / 2:g} {top - GAP + 8:g}V{top - 6:g}"/>',
        f'<path class="arrow" d="M{right - GAP + 8} {top + height / 2:g}h28V60H{right - 6}"/>',
    ]
    size = right + (RIGHT + 2) * COLUMN + FRAME_WIDTH, len(last) * ROW + FRAME_HEIGHT
    return SVG.format(*size, "\n".join(content))


if __name__ == "__main__":
    PICTURE.write_text(picture(*log_in()), encoding="utf-8")
