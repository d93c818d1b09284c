from __future__ import annotations

import numpy as np

from lightly_ext.evaluate.pictures.gallery import (
    GAP,
    LINE,
    MIN_WIDTH,
    draw_rows,
    draw_shares,
    draw_sheet,
    enlarged,
    shown_name,
)
from stellar_plugin.visualize import Uint8Array, token_palette


class TestDrawSheet:
    def test_draw_sheet__places(self) -> None:
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
        sheet = draw_sheet(
            [[("a", pictures[0]), ("b", pictures[1])], [("", pictures[2])]]
        )
        assert sheet.size == (GAP + 2 * (MIN_WIDTH + GAP), 2 * (LINE + 20 + GAP))
        pixels = np.asarray(sheet)
        for (row, column), picture in zip(
            ((0, 0), (0, 1), (1, 0)), pictures, strict=True
        ):
            top, left = LINE + row * (LINE + 20 + GAP), GAP + column * (MIN_WIDTH + GAP)
            shown = pixels[top : top + 20, left : left + 30]
            np.testing.assert_array_equal(shown, picture)
        assert (pixels[:LINE] < 255).any()  # titles
        assert (pixels[LINE + 20 + GAP :, GAP + MIN_WIDTH + GAP :] == 255).all()

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

    def test_draw_sheet__a_long_title_is_broken_where_it_may_be(self) -> None:
        # The second row has one line: its picture follows 20 px below the first.
        picture = np.full((20, 60, 3), 9, np.uint8)
        name = "a_folder/with_a_long_name.png"
        sheet = np.asarray(draw_sheet([[(name, picture)], [("b", picture)]]))
        (rows,) = np.nonzero((sheet[:, GAP : GAP + 60] == 9).all(axis=(1, 2)))
        assert rows.tolist() == [
            *range(2 * LINE, 2 * LINE + 20),
            *range(3 * LINE + 20 + GAP, 3 * LINE + 40 + GAP),
        ]
        assert sheet.shape[1] == 2 * GAP + MIN_WIDTH

    def test_draw_shares__lengths_and_colours(self) -> None:
        # Of 10 patches; the third token, with 0.4 of one, is absent.
        shares = draw_shares([0.24, 0.72, 0.04], 10, (4 * LINE, 176))
        palette = token_palette(3)
        lengths = []
        for line, token in enumerate((1, 0)):
            bar = shares[line * LINE + LINE // 2]
            lengths.append(int((bar == palette[token]).all(axis=-1).sum()))
        assert lengths == [100, 34]  # a pixel and 99 px by the share
        assert (shares[2 * LINE : 3 * LINE] < 255).any()  # "absent: 1"
        assert (shares[3 * LINE :] == 255).all()
        assert not (shares == palette[2]).all(axis=-1).any()

    def test_draw_shares__what_does_not_fit_is_summed_up(self) -> None:
        masses = [1 / 64] * 64
        shares = draw_shares(masses, 64, (5 * LINE, 100))
        shown = [(shares == c).all(axis=-1).any() for c in token_palette(64)]
        assert shown == [True] * 4 + [False] * 60
        last = draw_shares(masses[:60], 64, (5 * LINE, 100))[4 * LINE :]
        assert (shares[4 * LINE :] < 255).any()  # "60 more", here "56 more"
        assert (shares[4 * LINE :] != last).any()

    def test_draw_shares__one_token(self) -> None:
        shares = draw_shares([1.0], 4, (LINE, 176))
        bar = shares[LINE // 2] == token_palette(1)[0]
        assert bar.all(axis=-1).sum() == 100

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
