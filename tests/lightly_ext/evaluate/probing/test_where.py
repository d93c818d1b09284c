from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.demo.boards import make_board_sets
from lightly_ext.demo.export import export_segmentation_set
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.pictures.gallery import GAP, LINE, PANEL_SIDE
from lightly_ext.evaluate.probing.where import parts_at_px, run_where
from stellar_plugin.encoder import Factorization
from stellar_plugin.visualize import token_palette
from tests.lightly_ext.evaluate.probing.where_loops import brute_force
from tests.lightly_ext.evaluate.small import Given, make_given, run_options, write_model

PATCH = 8
SIZE = 32
NUM_TOKENS = 4


class RedSaysWhere(nn.Module):
    """The red value of a patch, in units of 20, is the number of its token."""

    num_queries = NUM_TOKENS
    has_localization = True

    def forward(self, images: Tensor) -> Factorization:
        red = images[:, 0, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        tokens = (red * 255 / 20).round().long().clamp(0, NUM_TOKENS - 1)
        localization = F.one_hot(tokens.flatten(1), NUM_TOKENS).float()
        sparse = torch.zeros(len(images), NUM_TOKENS, 2)
        size = (tokens.shape[1], tokens.shape[2])
        return Factorization(None, sparse, localization, size, lambda dense, _: dense)


def _given(tmp_path: Path, **options: Any) -> Given:
    origin = Origin(
        "red", "STELLAR", "0" * 64, mean=(0, 0, 0), std=(1, 1, 1), name="red"
    )
    values = {"resize": SIZE, "crop": SIZE, "batch_size": 3, **options}
    return make_given(tmp_path, FrozenModel(RedSaysWhere(), origin), **values)


def _write(folder: Path, arrays: list[np.ndarray], suffix: str = ".png") -> None:
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array.astype(np.uint8)).save(folder / f"{i}{suffix}")


def _write_set(root: Path, tokens: list[np.ndarray], masks: list[np.ndarray]) -> dict:
    """Images whose patches have these tokens, and masks of full size."""
    blocks = [np.kron(t, np.ones((PATCH, PATCH))) * 20 for t in tokens]
    zeros = np.zeros((SIZE, SIZE))
    _write(root / "images", [np.stack([b, zeros, zeros], axis=2) for b in blocks])
    _write(root / "masks", masks)
    return {"data": str(root / "images"), "masks": str(root / "masks")}


def _random_set(num: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens of 4 x 4 patches, and masks of values 0 to 5 and 255."""
    rng = np.random.default_rng(seed)
    tokens = list(rng.integers(NUM_TOKENS, size=(num, 4, 4)))
    values = np.array([0, 0, 0, 1, 2, 3, 4, 5, 255])
    coarse = values[rng.integers(len(values), size=(num, 6, 6))]
    masks = [np.kron(c, np.ones((6, 6)))[:SIZE, :SIZE].astype(int) for c in coarse]
    return tokens, masks


class TestRunWhere:
    def test_run_where_brute_force(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(5)
        result = run_where(*_given(tmp_path), **_write_set(tmp_path, tokens, masks))
        parts = [np.kron(t, np.ones((PATCH, PATCH), dtype=int)) for t in tokens]
        expected = brute_force(parts, masks)
        y, x = np.mgrid[:SIZE, :SIZE] // 16
        grid = brute_force([2 * y + x] * 5, masks)
        expected.update({f"grid_{name}": value for name, value in grid.items()})
        assert result.chance == pytest.approx(grid)
        assert result.scores.pop("num_images") == 5  # type: ignore[attr-defined]
        assert result.scores == pytest.approx(expected, abs=1e-12)
        assert len(set(expected.values())) > 6

    def test_run_where__perfect_localization(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        tokens = [rng.permutation(np.arange(16) % 4).reshape(4, 4) for _ in range(4)]
        masks = [np.kron(t, np.ones((PATCH, PATCH))) for t in tokens]
        data = _write_set(tmp_path, tokens, masks)
        scores = run_where(*_given(tmp_path), **data).scores
        names = ("foreground_iou", "token_overlap")
        assert [scores[name] for name in names] == [1.0, 1.0]
        assert scores["foreground_iou_oracle"] == 1.0
        assert scores["token_overlap_one_to_one"] == 1.0
        assert scores["grid_token_overlap"] < 0.5

    def test_run_where__perfect_grid(self, tmp_path: Path) -> None:
        # Quarters of the image as segments, one token everywhere.
        y, x = np.mgrid[:SIZE, :SIZE] // 16
        data = _write_set(tmp_path, [np.zeros((4, 4))] * 2, [2 * y + x] * 2)
        scores = run_where(*_given(tmp_path), **data).scores
        assert scores["grid_token_overlap"] == scores["grid_foreground_iou"] == 1.0
        assert scores["token_overlap"] == pytest.approx(1 / 4)
        assert scores["token_overlap_one_to_one"] == pytest.approx(1 / 12)
        # The token is foreground: three quarters of its px are.
        assert scores["foreground_iou"] == scores["foreground_iou_oracle"] == 3 / 4

    def test_run_where__without_background(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(3)
        data = _write_set(tmp_path, tokens, masks)
        result = run_where(*_given(tmp_path), **data, background=())
        assert not [name for name in result.scores if "foreground" in name]
        shifted = [np.where(m == 255, 255, m + 1) for m in masks]
        data = _write_set(tmp_path / "shifted", tokens, shifted)
        with pytest.raises(ValueError, match=r"No px is background 0: 3 masks .* 1, 2"):
            run_where(*_given(tmp_path), **data)
        again = run_where(*_given(tmp_path), **data, background=1)
        images, masks_folder = (str(tmp_path / x) for x in ("images", "masks"))
        plain = run_where(*_given(tmp_path), images, masks_folder)
        assert again.scores == plain.scores
        assert 0 < plain.scores["foreground_iou"] < 1

    def test_run_where__images_without_segments_are_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tokens, masks = _random_set(6)
        empty = [np.zeros((SIZE, SIZE)), np.full((SIZE, SIZE), 255)]
        data = _write_set(tmp_path / "a", tokens + tokens[:2], masks + empty)
        result = run_where(*_given(tmp_path), **data)
        assert "2 images without any segment" in capsys.readouterr().out
        assert result.provenance["num_empty"] == 2
        data = _write_set(tmp_path / "b", tokens, masks)
        assert result.scores == run_where(*_given(tmp_path), **data).scores

    def test_run_where__unreadable_pairs(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(42)
        data = _write_set(tmp_path, tokens, masks)
        (tmp_path / "images" / "5.png").write_bytes(b"no PNG")
        cut = (tmp_path / "masks" / "11.png").read_bytes()[:60]
        (tmp_path / "masks" / "11.png").write_bytes(cut)
        result = run_where(*_given(tmp_path), **data)
        assert result.provenance["num_unreadable"] == 2
        assert result.scores["num_images"] == 40

    def test_run_where__resized_and_cut_alike(self, tmp_path: Path) -> None:
        # Twice as large, and a border that the crop removes.
        tokens, masks = _random_set(3)
        data = _write_set(tmp_path / "a", tokens, masks)
        scores = run_where(*_given(tmp_path), **data).scores
        rng = np.random.default_rng(1)
        for kind in ("images", "masks"):
            (tmp_path / "b" / kind).mkdir(parents=True)
            for path in (tmp_path / "a" / kind).iterdir():
                pixels = np.array(Image.open(path)).repeat(2, 0).repeat(2, 1)
                pad = [(8, 8), (20, 20), (0, 0)][: pixels.ndim]
                pixels = np.pad(pixels, pad, constant_values=rng.integers(1, 5))
                Image.fromarray(pixels).save(tmp_path / "b" / kind / path.name)
        data = {k: str(tmp_path / "b" / Path(v).name) for k, v in data.items()}
        given = _given(tmp_path, resize=40, crop=32)
        assert run_where(*given, **data).scores == pytest.approx(scores)

    def test_run_where__listed_images(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(7)
        data = _write_set(tmp_path / "a", tokens, masks)
        (tmp_path / "a" / "masks" / "6.png").unlink()
        (tmp_path / "val.txt").write_text("1\n3.png\n4\n\n")
        with pytest.raises(ValueError, match=r"1 of 7 images have no mask.*'6.png'"):
            run_where(*_given(tmp_path), **data)
        result = run_where(*_given(tmp_path), **data, split=str(tmp_path / "val.txt"))
        assert result.data == result.protocol["data"] == "images (val)"
        some = [1, 3, 4]
        few = _write_set(
            tmp_path / "b", [tokens[i] for i in some], [masks[i] for i in some]
        )
        assert result.scores == run_where(*_given(tmp_path), **few).scores

    def test_run_where__wrong_files(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(2)
        data = _write_set(tmp_path, tokens, masks)
        run = partial(run_where, *_given(tmp_path), **data)
        (tmp_path / "none.txt").write_text("\n")
        (tmp_path / "wrong.txt").write_text("0\n8\n")
        with pytest.raises(ValueError, match="lists no image"):
            run(split=str(tmp_path / "none.txt"))
        with pytest.raises(ValueError, match=r"lists 1 images .* example '8'"):
            run(split=str(tmp_path / "wrong.txt"))
        with pytest.raises(ValueError, match=r"share the values \[0\]"):
            run(ignore=(0, 255))
        with pytest.raises(ValueError, match=r"Labels are 0 or more, got \[-1\]"):
            run(ignore=-1)
        with pytest.raises(ValueError, match=r"All px are background 0, 1, .* ignored"):
            run(background=tuple(range(6)))
        with pytest.raises(ValueError, match="There is no folder"):
            run_where(*_given(tmp_path), data["data"], str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="crop 33 is more than resize 32"):
            run_where(*_given(tmp_path, crop=33), **data)
        path = tmp_path / "masks" / "1.png"
        Image.open(path).resize((30, 32)).save(path)
        with pytest.raises(
            ValueError, match=r"1.png' is 30 x 32 px, its image 32 x 32"
        ):
            run()
        Image.open(path).convert("RGB").save(path)
        with pytest.raises(ValueError, match=r"1.png' is no label image.*mode RGB"):
            run()
        assert not (tmp_path / "out").exists()

    def test_run_where__one_image(self, tmp_path: Path) -> None:
        data = _write_set(tmp_path / "one", *_random_set(1))
        with pytest.raises(ValueError, match="has one image: tokens are decided on"):
            run_where(*_given(tmp_path), **data)
        tokens, (mask, _) = _random_set(2)
        data = _write_set(tmp_path / "two", tokens, [mask, np.zeros_like(mask)])
        with pytest.raises(RuntimeError, match="Fewer than two images with a segment"):
            run_where(*_given(tmp_path), **data)

    def test_run_where__clusters_brute_force(self, tmp_path: Path) -> None:
        # The patch features are one-hot in the token: clusters are its parts.
        tokens, masks = _random_set(5)
        data = _write_set(tmp_path, tokens, masks)
        result = run_where(*_given(tmp_path), **data, clusters=NUM_TOKENS)
        parts = [np.kron(t, np.ones((PATCH, PATCH), dtype=int)) for t in tokens]
        y, x = np.mgrid[:SIZE, :SIZE] // 16
        expected = {}
        for prefix, of in (("", parts), ("grid_", [2 * y + x] * 5)):
            for name, value in brute_force(of, masks).items():
                expected[prefix + name.replace("token", "cluster")] = value
            del expected[f"{prefix}foreground_iou"]  # clusters carry no roles
        assert result.scores.pop("num_images") == 5  # type: ignore[attr-defined]
        assert result.scores == pytest.approx(expected, abs=1e-12)
        assert result.protocol["parts"] == "4 k-means clusters of patches"
        assert "split" not in result.protocol

    def test_run_where__clusters_of_colours(self, tmp_path: Path) -> None:
        # Raw pixels, in which the left three quarters have another colour.
        tokens = [np.where(np.arange(16).reshape(4, 4) % 4 < 3, 1, 9)] * 2
        masks = [np.kron(t == 1, np.ones((PATCH, PATCH))) for t in tokens]
        given = make_given(tmp_path, f"patches:{PATCH}", resize=SIZE, crop=SIZE)
        data = _write_set(tmp_path, tokens, masks)
        result = run_where(*given, **data)
        assert result.protocol["parts"] == "16 k-means clusters of patches"
        scores = {name: result.scores[name] for name in result.chance}
        assert scores == dict.fromkeys(scores, 1.0) and len(scores) == 3
        # The grid has 16 cells, 12 of which are the segment.
        assert result.chance == {
            "foreground_iou_oracle": 1.0,
            "cluster_overlap": pytest.approx(1 / 12),
            "cluster_overlap_one_to_one": pytest.approx(1 / 12),
        }
        asked = run_where(*given, **data, clusters=16)
        assert asked.digest == result.digest
        assert run_where(*given, **data, clusters=2).digest != result.digest
        with pytest.raises(ValueError, match=r"4 x 4 patches at 32 px, too few for 17"):
            run_where(*given, **data, clusters=17)
        with pytest.raises(ValueError, match="clusters must be at least 1, got 0"):
            run_where(*given, **data, clusters=0)

    def test_run_where__clusters_of_one_image_in_any_batch(
        self, tmp_path: Path
    ) -> None:
        tokens, masks = _random_set(3)
        data = _write_set(tmp_path, tokens, masks)
        options = {"clusters": 2, **data}  # fewer than kinds: the start decides
        at_once = run_where(*_given(tmp_path, batch_size=3), **options)
        alone = run_where(*_given(tmp_path, batch_size=1), **options)
        assert at_once.scores == alone.scores
        seeds = (run_where(*_given(tmp_path, seed=s), **options) for s in range(1, 5))
        assert any(other.scores != alone.scores for other in seeds)
        one = _write_set(tmp_path / "one", tokens[:1], masks[:1])
        result = run_where(*_given(tmp_path), **one, clusters=2)
        assert result.scores["num_images"] == 1

    def test_run_where__tokens_without_localization(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model", target=None)
        given = make_given(tmp_path, source, resize=SIZE, crop=SIZE)
        data = _write_set(tmp_path, *_random_set(2))
        with pytest.raises(ValueError, match=r"no localization of them: --clusters 16"):
            run_where(*given, **data)
        result = run_where(*given, **data, clusters=4)
        assert 0 < result.scores["cluster_overlap"] < 1

    def test_run_where__boards_from_the_command_line(self, tmp_path: Path) -> None:
        sets = make_board_sets(0, num_train=1, num_test=6, num_train_single=1)
        export_segmentation_set(sets, tmp_path / "boards")
        source = write_model(tmp_path / "model")
        options = [
            *("where", "--model", source, *run_options(tmp_path)),
            *("--data", str(tmp_path / "boards" / "images" / "validation")),
            *("--masks", str(tmp_path / "boards" / "annotations" / "validation")),
        ]
        with pytest.raises(ValueError, match="No px is background 0"):
            main(options)
        main([*options, "--background", "1", "--ignore", "[0]", "--untrained", "true"])
        main([*options, "--background", "[1]", "--ignore", "0"])
        folders = list((tmp_path / "out").iterdir())
        assert len(folders) == 2
        for folder in folders:
            stored = json.loads((folder / "result.json").read_text())
            scores = stored["scores"]
            assert scores["foreground_iou"] <= scores["foreground_iou_oracle"] < 1
            assert scores["token_overlap_one_to_one"] <= scores["token_overlap"] < 1
            assert scores["num_images"] == 6
            classes = "background 1; ignored 0; all others are segments"
            assert stored["protocol"]["classes"] == classes
            picture = Image.open(folder / "where.png")
            side = PANEL_SIDE // SIZE * SIZE
            assert picture.width == GAP + 6 * (side + GAP)
            assert picture.height > 3 * (LINE + side + GAP)

    def test_run_where__picture_of_a_known_localization(self, tmp_path: Path) -> None:
        # A wide image, of which the middle is seen: its rows and columns are none
        # of another, so that a turned or mirrored overlay is another picture.
        tokens = np.arange(16).reshape(4, 4) % NUM_TOKENS
        tokens[0] = [3, 0, 0, 1]
        masks = [np.zeros((SIZE, SIZE), int) for _ in range(2)]
        masks[0][:PATCH, PATCH:] = 2
        masks[1][-1, -1] = 7
        data = _write_set(tmp_path, [tokens, tokens.T], masks)
        run_where(*_given(tmp_path), **data)
        (path,) = (tmp_path / "out").glob("where-*/where.png")
        factor = PANEL_SIDE // SIZE
        side, sheet = factor * SIZE, np.asarray(Image.open(path)).astype(int)

        def panel(row: int, column: int) -> np.ndarray:
            top, left = row * (LINE + side + GAP) + LINE, GAP + column * (side + GAP)
            return sheet[top : top + side : factor, left : left + side : factor]

        for column, expected in enumerate((tokens, tokens.T)):
            blocks = np.kron(expected, np.ones((PATCH, PATCH), int))
            image = np.stack([20 * blocks, 0 * blocks, 0 * blocks], axis=2)
            np.testing.assert_array_equal(panel(0, column), image)
            colours = token_palette(NUM_TOKENS)[blocks]
            shown = (0.45 * image + 0.55 * colours).round()
            np.testing.assert_allclose(panel(2, column), shown, atol=1)
            grey = np.where(
                masks[column] == 2, 80, np.where(masks[column] == 7, 255, 0)
            )
            np.testing.assert_array_equal(
                panel(1, column), np.stack([grey] * 3, axis=2)
            )


class TestPartsAtPx:
    def test_parts_at_px__blocks(self) -> None:
        generator = torch.Generator().manual_seed(0)
        winners = torch.randint(5, (2, 6), generator=generator)
        parts = parts_at_px(winners, (2, 3), (8, 12))
        blocks = winners.view(2, 2, 3)
        expected = blocks.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        assert torch.equal(parts, expected)
