from __future__ import annotations

from stellar_plugin.wording import are, counted


def test_counted() -> None:
    told = [f"{counted(number, 'image')} {are(number)} here" for number in (0, 1, 2)]
    assert told == ["0 images are here", "1 image is here", "2 images are here"]
