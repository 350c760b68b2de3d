"""Update .github/login.svg, the picture in the README, from a login to the sandbox.

    python tests/picture.py

The texts are what the program prints, and what Chromium shows on the login page and the callback
page. The rest of the picture, such as its arrows and colors, is edited in the file itself.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from html import escape
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright
from sandbox import SCRIPT, Sandbox

PICTURE = SCRIPT.with_name(".github") / "login.svg"
# The steps, and what the picture shows of each
SHOWN = {
    2: ["response_type", "client_id", "redirect_uri", "scope", "state", "code_challenge"],
    3: ["state"],
    4: ["code", "code_verifier", '"access_token"', '"refresh_token"'],
    5: ['"company"'],
}
RANDOM = r"([\w-]{4})([\w-]{28,}|[\w-]*\.\.\. \(\d+ characters\))"  # is shortened
COLORED = r"\b(state|code|code_challenge|code_verifier)(: |=)([\w-]{4}…)"
CHARACTER = 8.4  # pixels


def log_in() -> tuple[str, list[list[str]], list[list[str]]]:
    """Return what the program prints, and what `read` finds on the login and callback pages."""
    command = [sys.executable, str(SCRIPT), "--no-browser", "--config", os.devnull]
    with Sandbox() as sandbox, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page()
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
            login_page = read(page, "h1", "p:has(strong)", "li", "button")
            page.click("[value=allow]")
            page.wait_for_url(f"{sandbox.redirect_uri}?**")
            callback_page = read(page, "h1", "p")
            output += script.stdout.read()
        assert script.returncode == 0
        browser.close()
    return output, login_page, callback_page


def read(page: Page, *selectors: str) -> list[list[str]]:
    """Return the URL of a page, and for each selector the texts of its elements."""
    return [[page.url], *(page.locator(it).all_inner_texts() for it in selectors)]


def lines_of(output: str) -> list[str]:
    """Return the lines of the output that the picture shows."""
    lines = []
    for step, names in SHOWN.items():
        section = output[output.index(f"\n{step}. ") : output.index(f"\n{step + 1}. ")]
        lines.append(section.strip().partition(":")[0])
        for name in names:
            [line] = re.findall(f"^ +({name}: .*?),?$", section, re.MULTILINE)
            lines.append(re.sub(RANDOM, r"\1…", line))
    return [*lines, textwrap.shorten(output.splitlines()[-1], 42, placeholder=" …")]


def address(url: str, *names: str) -> str:
    """Return a URL for the address bar: without the scheme, and only with some parameters."""
    parts = urlsplit(url)
    parameters = "&".join(it for it in parts.query.split("&") if it.partition("=")[0] in names)
    path = re.sub("/.*/", "/…/", parts.path)
    return re.sub(RANDOM, r"\1…", f"{parts.netloc}{path}?…{parameters}")


def text(x: float, y: int, words: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y}" class="{style}">{escape(words, quote=False)}</text>\n'


def code(x: int, y: int, words: str, style: str) -> str:
    """Return a text in the font of terminals, with colored boxes behind some values."""
    boxes = ""
    for it in re.finditer(COLORED, words):
        left = x + it.start(3) * CHARACTER - 1
        boxes += f'<rect x="{left:g}" y="{y - 13}" width="44" height="17" rx="4" class="{it[1]}"/>'
    # Fonts differ in width: with textLength, each value is where its box is.
    svg = text(x, y, words, f'code {style}" textLength="{len(words) * CHARACTER:g}')
    return boxes + re.sub(COLORED, r"\1\2<tspan>\3</tspan>", svg)


def draw_terminal(output: str) -> str:
    svg = ""
    y = 48
    for line in lines_of(output):
        is_title = re.match(r"\d\.|Done", line)
        y += 8 if line.startswith("3.") else 0  # a gap
        svg += code(18, y, line, "light bold") if is_title else code(30, y, line, "light")
        y += 17
    return svg


def draw_browser(login_page: list[list[str]], callback_page: list[list[str]]) -> str:
    [url], [title], [request], scopes, buttons = login_page
    svg = code(441, 48, address(url, "state"), "dark") + text(440, 86, title, "dark bold")
    svg += text(440, 108, request, "dark") + text(440, 130, "• " + " • ".join(scopes), "dark")
    x = 440.5
    for name in buttons:
        style = "marked" if name == "Allow" else "button"
        width = 7 * len(name) + 16
        svg += f'<rect x="{x}" y="142.5" width="{width}" height="24" rx="4" class="{style}"/>'
        svg += text(x + width / 2, 159, name, "dark middle")
        x += width + 8
    [url], [title], [advice] = callback_page
    svg += code(441, 218, address(url, "code", "state"), "dark")
    return svg + text(440, 260, title, "dark bold") + text(440, 282, advice, "dark")


if __name__ == "__main__":
    printed, *pages = log_in()
    parts = {"terminal": draw_terminal(printed), "browser": draw_browser(*pages)}
    words = f"Terminal:\n{parts['terminal']}Browser:\n{parts['browser']}"
    parts["description"] = re.sub("<[^>]*>", "", words)
    picture = PICTURE.read_text(encoding="utf-8")
    for part, content in parts.items():
        picture = re.sub(f'(?s)(id="{part}">).*?(?=</(g|desc)>)', rf"\1\n{content}", picture)
    PICTURE.write_text(picture, encoding="utf-8")
