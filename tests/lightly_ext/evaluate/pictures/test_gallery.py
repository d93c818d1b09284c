from __future__ import annotations

import numpy as np

from lightly_ext.evaluate.pictures.gallery import (
    GAP,
    LINE,
    draw_rows,
    draw_sheet,
    enlarged,
    shown_name,
)
from stellar_plugin.visualize import Uint8Array


class TestDrawSheet:
    def test_draw_sheet__places(self) -> None:
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
        sheet = draw_sheet(
            [[("a", pictures[0]), ("b", pictures[1])], [("", pictures[2])]]
        )
        assert sheet.size == (GAP + 2 * (30 + GAP), 2 * (LINE + 20 + GAP))
        pixels = np.asarray(sheet)
        for (row, column), picture in zip(
            ((0, 0), (0, 1), (1, 0)), pictures, strict=True
        ):
            top, left = LINE + row * (LINE + 20 + GAP), GAP + column * (30 + GAP)
            shown = pixels[top : top + 20, left : left + 30]
            np.testing.assert_array_equal(shown, picture)
        assert (pixels[:LINE] < 255).any()  # titles
        assert (pixels[LINE + 20 + GAP :, GAP + 30 + GAP :] == 255).all()

    def test_draw_sheet__long_and_odd_titles_are_whole(self) -> None:
        picture = np.zeros((20, 60, 3), np.uint8)
        rows = [[(f"{name}/{40 * 'm'}/0022.jpg", picture)] for name in ("\udcff", "b")]
        sheet = np.asarray(draw_sheet(rows))
        height, rest = divmod(len(sheet), 2)
        top = height - 20 - GAP
        assert not rest and not top % LINE and top > 4 * LINE
        assert (sheet[top : top + 20, GAP : GAP + 60] == 0).all()
        first, second = sheet[:top], sheet[height : height + top]
        assert (first < 255).any() and (first != second).any()

    def test_draw_sheet__legend_below(self) -> None:
        picture = np.zeros((20, 60, 3), np.uint8)
        plain = np.asarray(draw_sheet([[("a", picture)]]))
        sheet = np.asarray(draw_sheet([[("a", picture)]], "colours of tokens, words"))
        np.testing.assert_array_equal(sheet[: len(plain)], plain)
        assert (sheet[len(plain) :] < 255).any()

    def test_draw_rows__names_above_the_images(self) -> None:
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (2, 180, 180, 3), dtype=np.uint8)
        sheet = draw_rows(["a", "b"], {"images": pictures, "other": 255 - pictures}, "")
        pixels, step = np.asarray(sheet), LINE + 180 + GAP
        for i in range(2):
            left = GAP + i * (180 + GAP)
            columns = slice(left, left + 180)
            shown = pixels[LINE : LINE + 180, columns]
            np.testing.assert_array_equal(shown, pictures[i])
            shown = pixels[step + LINE : step + LINE + 180, columns]
            np.testing.assert_array_equal(shown, 255 - pictures[i])

    def test_enlarged__whole_factors(self) -> None:
        pictures: Uint8Array = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
        shown = enlarged(pictures, side=7)
        assert shown.shape == (1, 6, 6, 3)
        np.testing.assert_array_equal(shown[:, ::3, ::3], pictures)
        np.testing.assert_array_equal(enlarged(pictures, side=1), pictures)

    def test_shown_name__bytes_that_are_no_text(self) -> None:
        assert shown_name("a\udcff.png") == "a?.png"
