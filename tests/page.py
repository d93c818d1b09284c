"""A page as tests read it."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "link", "img", "br", "input"}
ADDRESSES = ("src", "href", "srcset")


class Page(HTMLParser):
    """What a page is made of; asserts that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.captions: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        self.addresses += [values[k] for k in ADDRESSES if k in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values)
        if tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "figcaption" in self.open:
            self.captions[-1] += f"{data} "

    def decoded(self) -> list[tuple[str, Image.Image]]:
        """Kind and picture of every image."""
        found = []
        for values in self.images:
            head, data = values["src"].split(",")
            assert head.startswith("data:image/") and head.endswith(";base64")
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            image.load()
            found.append((head[11:-7], image))
        return found
