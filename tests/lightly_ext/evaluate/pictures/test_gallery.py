from __future__ import annotations

import numpy as np

from lightly_ext.evaluate.pictures.gallery import (
    GAP,
    LINE,
    Row,
    Tile,
    draw_gallery,
    draw_rows,
    draw_sheet,
    enlarged,
    render_gallery,
    shown_name,
)
from stellar_plugin.visualize import Uint8Array
from tests.page import Page

COLOUR = np.array([200, 100, 0], dtype=np.uint8)


def _tile(name: str, side: int = 48) -> Tile:
    picture = np.zeros((side, side, 3), dtype=np.uint8)
    picture[:, : side // 2] = 200
    area = np.array([[True, False], [False, False]])
    return Tile(picture, area, name, "token 3, 0.912", COLOUR)


def _rows(name: str = "cats/1.png") -> list[Row]:
    tiles = [_tile(f"{i}.png") for i in range(3)]
    return [
        Row(f"{name}, token 3", "note", _tile(name), tiles),
        Row("Prototype 7", "used", None, tiles[:2]),
    ]


class TestRenderGallery:
    def test_render_gallery__is_whole(self) -> None:
        text = render_gallery("Title", "Lead.", _rows(), {"k": 5, "threshold": 0.5})
        page = Page(text)
        assert len(page.images) == 2 * (4 + 2)
        assert "http" not in text.lower()
        assert all(address.startswith("data:") for address in page.addresses)
        assert not page.tags & {"script", "link", "iframe"}
        assert page.captions[0].split() == ["cats/1.png", "token", "3,", "0.912"]
        alts = [values["alt"] for values in page.images]
        words = [f"{name}, token 3, 0.912" for name in ("cats/1.png", "0.png")]
        assert alts[:4] == [words[0], "", words[1], ""]
        assert "<td>0.5</td>" in text

    def test_render_gallery__pictures(self) -> None:
        (kind, photo), (layer_kind, layer) = Page(
            render_gallery("Title", "Lead.", _rows(), {})
        ).decoded()[:2]
        assert (kind, layer_kind) == ("jpeg", "png")
        assert photo.size == (288, 288)  # of the query: 48 px, six times
        assert np.asarray(photo)[144, [40, 250], 0].tolist() == [200, 0]
        # Over the photo: half of it, and half of the colour where the token is.
        assert layer.mode == "RGBA" and layer.size == (2, 2)
        pixels = np.asarray(layer)
        assert (pixels[..., 3] == 128).all()
        assert pixels[0, 0, :3].tolist() == COLOUR.tolist()
        assert not pixels[1, :, :3].any()

    def test_render_gallery__large_pictures_shrink(self) -> None:
        rows = [Row("a", "", None, [_tile("a.png", side=448)])]
        (_, photo), _ = Page(render_gallery("T", "L", rows, {})).decoded()
        assert photo.size == (160, 160)

    def test_render_gallery__names_are_text(self) -> None:
        name = '<img src=x onerror="alert(1)">&$title\udcff.png'
        page = Page(render_gallery(name, name, _rows(name), {name: name}))
        assert len(page.images) == 12
        assert page.images[0]["alt"] == f"{shown_name(name)}, token 3, 0.912"
        assert shown_name(name).endswith("$title?.png")


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

    def test_draw_gallery__area_in_colour(self) -> None:
        sheet = np.asarray(draw_gallery(_rows(), num_neighbours=2))
        side, top = 3 * 48, 2 * LINE
        assert sheet.shape[:2] == (2 * (top + side + GAP), GAP + 3 * (side + GAP))
        assert sheet[top + 5, GAP + 5].tolist() == [200, 150, 100]
        assert sheet[top + side - 5, GAP + 5].tolist() == [100, 100, 100]

    def test_enlarged__whole_factors(self) -> None:
        pictures: Uint8Array = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
        shown = enlarged(pictures, side=7)
        assert shown.shape == (1, 6, 6, 3)
        np.testing.assert_array_equal(shown[:, ::3, ::3], pictures)
        np.testing.assert_array_equal(enlarged(pictures, side=1), pictures)
