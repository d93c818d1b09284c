from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lightly_ext.evaluate.pictures.page import render_visualize
from lightly_ext.evaluate.pictures.seen import Seen
from stellar_plugin.visualize import overlay, overlay_localization, token_palette
from tests.page import Page

NAME = "<a> \udcff.png"


def _seen(localization: torch.Tensor) -> Seen:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    dense = torch.arange(12.0).view(1, 4, 3)
    return Seen([NAME], picture, dense, (2, 2), localization, None, picture)


def _page(seen: Seen, threshold: float | None = None) -> Page:
    photos = [np.full((16, 16, 3), 100, np.uint8)]
    text = render_visualize("what", seen, photos, "legend", "strength", threshold)
    assert not re.search(r"https?://|<script|<link|@import", text)
    return Page(text)


class TestRenderVisualize:
    def test_render_visualize__layers_are_what_sheets_show(self) -> None:
        localization = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]])
        seen = _seen(localization)
        page = _page(seen)
        texts = [image["alt"].removeprefix("<a> ?.png: ") for image in page.images]
        assert texts == [
            "the photo",
            "tokens, by their lead",
            "strongest token",
            "patch features, PCA",
            "reconstruction",
            "token 0, 55.0%, maximum 0.90",
            "token 1, 45.0%, maximum 0.80",
        ]
        pictures = [np.asarray(image) for _, image in page.decoded()]
        grey = np.full((1, 2, 2, 3), 100, np.uint8)
        lead = overlay_localization(grey, localization, (2, 2))[0]
        colours, alpha = pictures[1][..., :3], pictures[1][..., 3:] / 255
        shown = overlay(grey[0], colours, alpha.astype(np.float32))
        np.testing.assert_allclose(shown.astype(int), lead, atol=1)
        # Half the photo; half the colour at the maximum, less elsewhere.
        token = pictures[-1]
        assert (token[..., 3] == 128).all()
        expected = np.array([1, 4, 8, 5])[:, None] / 8 * token_palette(2)[1]
        np.testing.assert_allclose(token[..., :3].reshape(4, 3), expected, atol=1)
        np.testing.assert_array_equal(pictures[4], seen.pictures[0])
        assert "0: 55.0%" in page.text and "1: 45.0%" in page.text

    @pytest.mark.parametrize("threshold", [None, 0.5])
    def test_render_visualize__many_tokens_and_absent_ones(
        self, threshold: float | None
    ) -> None:
        localization = torch.full((1, 4, 64), 1e-4)
        localization[..., 7] = 1 - 63e-4
        page = _page(_seen(localization), threshold)
        assert "the largest of 64 tokens" in page.text
        texts = [image["alt"].removeprefix("<a> ?.png: ") for image in page.images]
        assert len(set(texts)) == len(texts) == 5 + 64
        assert "token 7, 99.4%, maximum 0.99" in texts
        assert "token 6, absent, 0.01%" in texts
        pictures = dict(zip(texts, page.decoded(), strict=True))
        absent = np.asarray(pictures["token 6, absent, 0.01%"][1])
        assert (absent[..., :3] == 0).all() and (absent[..., 3] == 128).all()

    def test_render_visualize__one_token(self) -> None:
        page = _page(_seen(torch.ones(1, 4, 1)))
        assert "token 0, 100.0%, maximum 1.00" in page.images[-1]["alt"]

    def test_render_visualize__clusters(self) -> None:
        seen = Seen(
            *([NAME], _seen(torch.ones(1, 4, 1)).pictures, torch.rand(1, 4, 3)),
            *((2, 2), None, torch.tensor([[1, 0, 0, 2]]), None),
        )
        page = _page(seen)
        assert [image["alt"].split(": ")[1] for image in page.images] == [
            "the photo",
            "clusters of patches",
            "patch features, PCA",
        ]
        colours = np.asarray(page.decoded()[1][1])[..., :3].reshape(4, 3)
        np.testing.assert_array_equal(colours, token_palette(3)[[1, 0, 0, 2]])
