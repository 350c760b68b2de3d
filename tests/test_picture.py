"""The picture in the README shows what the program and the login page say today."""

import os
from collections.abc import Callable
from xml.etree import ElementTree

from picture import PICTURE, halves, words_of
from sandbox import Sandbox
from script import Script, log_in, visit
from test_readme import settled

ADVICE = "Run tests/picture.py to make the picture again."


def test_the_picture_says_what_the_program_and_the_login_page_say(
    start: Callable[..., Script], sandbox: Sandbox
) -> None:
    script = start("--config", os.devnull, **sandbox.environment)
    page = words_of(visit(script.url()).text)
    log_in(script)
    assert script.status() == 0
    before, after = halves(script.stdout)
    shown = [str(it.text) for it in ElementTree.parse(PICTURE).iterfind(".//{*}desc")]
    assert settled("\n".join(shown)) == settled("\n".join([before, page, after])), ADVICE


def test_the_terminals_in_the_picture_show_their_descriptions() -> None:
    picture = ElementTree.parse(PICTURE)
    before, _, after = ["".join(str(it.text).split()) for it in picture.iterfind(".//{*}desc")]
    texts = [it.itertext() for it in picture.iterfind(".//{*}g[@class='matrix']")]
    assert ["".join("".join(it).split()) for it in texts] == [before, "", after], ADVICE
