"""The page as a user walks it: in a real browser, with mouse and keys, from files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightly_ext.evaluate.atlas.atlas import run_atlas
from tests.browser import Browser, browser, find_browser
from tests.lightly_ext.evaluate.small import SIZES, make_given

EXECUTABLE = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        EXECUTABLE is None,
        reason="no Chromium on this machine: install it, or name one in CHROMIUM",
    ),
]
EVIL = "<img src=x onerror=alert(1)>'\"&é猫.png"
NUM = 130  # on two sheets
HERE = "location.hash"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas of images with a red left half and a right half of two shades of blue.

    Even images are in the folder "even", and their blue is lighter.
    """
    folder = tmp_path_factory.mktemp("atlas")
    for i in range(NUM):
        image = np.zeros((32, 32, 3), np.uint8)
        image[:, :16] = [200, 20, 20]
        image[:, 16:] = [0, 40, 230] if i % 2 else [0, 230, 230]
        path = folder / "images" / ("odd" if i % 2 else "even")
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / (EVIL if i == 0 else f"{i:04d}.png"))
    given = make_given(folder, "patches:8", **SIZES)
    return run_atlas(*given, str(folder / "images"), concepts=3, clusters=2)


@pytest.fixture
def opened(page: Path, tmp_path: Path) -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with browser(EXECUTABLE, tmp_path) as window:
        yield window
        assert window.complaints == []
        folder = page.parent.as_uri()
        asked = [url for url in window.requests if url != "about:blank"]
        assert asked and all(url.startswith(f"{folder}/") for url in asked)


def _address(page: Path, hash_: str = "") -> str:
    return page.as_uri() + hash_


def _count(selector: str) -> str:
    return f"document.querySelectorAll({selector!r}).length"


def _text(selector: str) -> str:
    return f"document.querySelector({selector!r}).textContent"


class TestMouse:
    def test_from_concept_to_similar_images_and_back(
        self, page: Path, opened: Browser
    ) -> None:
        opened.open(_address(page), 1280, 900)
        opened.until(f"{_count('ul.concepts > li')} === 3")
        # Red covers half of all images, the blues a quarter each.
        assert "50\u00a0%" in opened.value(_text("ul.concepts li"))
        opened.click("ul.concepts a")
        opened.until(f"{HERE} === '#concept=0'")
        assert opened.value(_text("h2")) == "Concept 0"
        assert opened.value("document.title").startswith("Concept 0 · What patches:8")
        facts = opened.value(_text(".facts"))
        assert f"130 parts in {NUM} of {NUM} images" in facts
        assert "even50\u00a0%1.0 × its share" in facts
        regions = "document.querySelectorAll('#view ul.grid')[0].children.length"
        assert opened.value(regions) == 12
        shown = "getComputedStyle(document.querySelector('#view ul.grid .tile'))"
        opened.until(f"{shown}.backgroundImage.includes('region-0000.jpg')")

        opened.click("#view ul.grid a")
        opened.until(f"{HERE}.startsWith('#image=')")
        opened.until(f"{_count('ul.parts li.chosen')} === 1")
        opened.until(f"{_count('section ul.grid li')} === 24")

        # The right half is of another part, which is lit, and whose images follow.
        opened.click(".picture", x=0.9, y=0.5)
        opened.until(f"{_text('section h3')}.startsWith('Most similar to part')")
        opened.until(
            "document.querySelector('section .caption b').textContent === '1.00'"
        )
        assert opened.value(_count(".picture canvas")) == 1
        alike = opened.value(
            "[...document.querySelectorAll('section .caption')].map(e => e.textContent)"
        )
        folder = opened.value(_text("h2")).split("/")[0]
        assert len(alike) == 24 and all(f" {folder}/" in text for text in alike)
        light = (
            "(row => [row[3], row[15]])(document.querySelector('.picture canvas')"
            ".getContext('2d').getImageData(0, 1, 4, 1).data)"
        )
        assert opened.value(light) == [204, 0]  # dark on the left

        opened.back()
        opened.until(f"{HERE} === '#concept=0'")
        opened.back()
        opened.until(f"{_count('ul.concepts > li')} === 3")
        assert opened.value("document.activeElement.hash") == "#concept=0"

    def test_images_come_when_they_are_seen(self, page: Path, opened: Browser) -> None:
        opened.open(_address(page, "#images"), 390, 844)
        opened.until(f"{_count('ul.grid > li')} === 60")
        assert not any("sheet-0001" in url for url in opened.requests)
        for _ in range(4):
            opened.value("scrollTo(0, document.querySelector('main').offsetHeight)")
            opened.value("new Promise(done => setTimeout(done, 50))")
        opened.until(f"{_count('ul.grid > li')} === {NUM}")
        opened.until(
            "getComputedStyle([...document.querySelectorAll('.tile')].pop())"
            ".backgroundImage.includes('sheet-0001.jpg')"
        )
        name = opened.value(
            "[...document.querySelectorAll('.caption')].map(e => e.textContent)"
        )
        assert f"even/{EVIL}" in name
        assert opened.value(_count("#view img")) == 0

    @pytest.mark.parametrize("dark", [False, True])
    @pytest.mark.parametrize("width", [1280, 390])
    @pytest.mark.parametrize("hash_", ["", "#concept=1", "#image=1&token=0"])
    def test_nothing_is_cut_off(
        self, page: Path, opened: Browser, hash_: str, width: int, dark: bool
    ) -> None:
        opened.open(_address(page, hash_), width, 844, dark)
        opened.until(f"{_count('#view ul.grid li')} > 2")
        assert opened.value("document.documentElement.scrollWidth") <= width
        back = "getComputedStyle(document.body).backgroundColor"
        colours = {True: "rgb(20, 22, 26)", False: "rgb(250, 250, 248)"}
        assert opened.value(back) == colours[dark]


class TestKeys:
    def test_without_a_mouse(self, page: Path, opened: Browser) -> None:
        opened.open(_address(page), 1280, 900)
        opened.until(f"{_count('ul.concepts > li')} === 3")
        active = "document.activeElement"
        opened.press("ArrowDown")
        opened.until(f"{active}.hash === '#concept=0'")
        opened.until(f"getComputedStyle({active}).outlineStyle === 'solid'")
        opened.press("ArrowRight")
        opened.until(f"{active}.hash === '#concept=1'")
        opened.press("Enter")
        opened.until(f"{_text('h2')} === 'Concept 1'")
        opened.until(f"{active}.tagName === 'H2'")
        opened.press("ArrowLeft")
        opened.until(f"{_text('h2')} === 'Concept 0'")
        opened.until(f"{active}.tagName === 'H2'")
        opened.press("Tab")
        opened.press("Enter")
        opened.until(f"{HERE}.startsWith('#image=')")
        opened.until(f"{_count('ul.parts li')} === 2")
        opened.until(f"{active}.tagName === 'H2'")
        opened.press("ArrowDown")
        for _ in range(2):  # past the link to the concept of the first part
            opened.press("ArrowRight")
        second = opened.value(f"{active}.closest('li').dataset.part")
        opened.press("Enter")
        opened.until(f"{HERE}.endsWith('&token={second}')")
        opened.until(f"{_text('section h3')}.includes('part {second} ')")
        opened.until(f"{_count('section ul.grid li')} === 24")
        opened.press("Escape")
        opened.until(f"{HERE} === '#images'")
        opened.press("Escape")
        opened.until(f"{_count('ul.concepts > li')} === 3")

    def test_find(self, page: Path, opened: Browser) -> None:
        opened.open(_address(page), 1280, 900)
        opened.until(f"{_count('ul.concepts > li')} === 3")
        opened.press("/")
        opened.call("Input.insertText", text="ODD/000")
        opened.until(f"{_text('.note')} === '0 concepts and 5 images'")
        assert opened.value(HERE) == "#find=ODD%2F000"
        opened.press("Escape")
        opened.until(f"{_count('ul.concepts > li')} === 3")

    def test_addresses_that_lead_nowhere(self, page: Path, opened: Browser) -> None:
        for hash_ in ("#concept=3", "#image=-1", f"#image={NUM}", "#x"):
            opened.open(_address(page, hash_), 1280, 900)
            opened.until(f"{_text('h2')} === 'There is nothing here'")
