"""The picture in the README shows what the program and the pages say today."""

import os
import re
from collections.abc import Callable
from html import unescape
from xml.etree import ElementTree

from picture import PICTURE
from sandbox import Sandbox
from script import Script, answer_login_page, visit

SVG = ElementTree.parse(PICTURE)
LINES = ["".join(it.itertext()) for it in SVG.iterfind("{*}g/{*}text")]
TEXTS = [text for line in LINES for text in re.split("(?:^| )• ", line) if text]
ADVICE = "Run `python tests/picture.py` to update the picture."


def without_port(text: str) -> str:
    return re.sub(r"(localhost|127\.0\.0\.1):\d+", r"\1", text)


def pattern_for(text: str) -> str:
    """Return a pattern of the lines that the picture may shorten to this text."""
    text = re.sub(r"[\w-]{4}…", "…", without_port(text))  # a random value
    return "(http://)?" + re.escape(text).replace("…", ".*") + "(:.*|,)?"


def test_the_picture_shows_what_the_program_and_the_pages_say(
    start: Callable[..., Script], sandbox: Sandbox
) -> None:
    script = start("--config", os.devnull, **sandbox.environment)
    login_url = script.url()
    login_page = visit(login_url).text
    callback_url = answer_login_page(login_url)
    callback_page = visit(callback_url).text
    assert script.status() == 0

    elements = re.split("<[^>]*>", re.sub("</?strong>", "", login_page + callback_page))
    said = [*script.stdout.splitlines(), login_url, callback_url, *map(unescape, elements)]
    said = [without_port(line.strip()) for line in said]
    unsaid = [it for it in TEXTS if not any(re.fullmatch(pattern_for(it), line) for line in said)]
    assert TEXTS
    assert unsaid == [], ADVICE


def test_the_picture_shows_one_login() -> None:
    shown = re.findall(r"\b(state|code|code_challenge|code_verifier)(?:: |=)(.{4}…)", str(TEXTS))
    names = sorted(name for name, _ in shown)
    assert names == ["code", "code", "code_challenge", "code_verifier", *["state"] * 4]
    assert len(set(shown)) == 4  # each name has the same value everywhere


def test_the_description_of_the_picture_has_its_words() -> None:
    description = SVG.findtext("{*}desc", "").splitlines()
    assert [line for line in LINES if line not in description] == [], ADVICE
