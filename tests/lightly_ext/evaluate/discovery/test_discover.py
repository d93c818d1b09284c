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

from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.discovery.discover import run_discover
from lightly_ext.evaluate.discovery.picture import outlined
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.pictures.gallery import GAP, LINE, PANEL_SIDE
from lightly_ext.evaluate.probing.localization import uniform_parts
from stellar_plugin.encoder import Factorization
from tests.lightly_ext.evaluate.discovery.discovery_loops import (
    box_of,
    inner_area,
    mean_best_overlap,
    overlaps_by_half,
)
from tests.lightly_ext.evaluate.small import Given, make_given, run_options, write_model

PATCH, SIZE, NUM_TOKENS = 4, 32, 4
GRID = SIZE // PATCH
CENTRE = (5, 5, 27, 27)  # half of the area of 32 x 32 px
CLUSTERS_AND_NCUT: dict[str, Any] = {"parts": ["clusters", "ncut"]}


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


def _px(patches: np.ndarray) -> np.ndarray:
    return np.kron(patches, np.ones((PATCH, PATCH), dtype=int))


def _write(folder: Path, arrays: list[np.ndarray]) -> str:
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array.astype(np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def _write_set(root: Path, tokens: list[np.ndarray], **masks: list[np.ndarray]) -> dict:
    """Images whose patches have these tokens, and folders of masks."""
    zeros = np.zeros((SIZE, SIZE))
    images = [np.stack([20 * _px(t), zeros, zeros], axis=2) for t in tokens]
    folders = {name: _write(root / name, arrays) for name, arrays in masks.items()}
    return {"data": _write(root / "data", images), **folders}


def _random_set(num: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens of patches with something inside, and instances 0 to 3 and 255."""
    rng = np.random.default_rng(seed)
    tokens, masks = [], []
    for _ in range(num):
        of_image = rng.integers(2, size=(GRID, GRID))
        y, x = rng.integers(1, 4, size=2)
        of_image[y : y + 3, x : x + 4] = 2 + rng.integers(2, size=(3, 4))
        coarse = rng.choice([0, 0, 1, 2, 3, 255], size=(6, 6))
        tokens.append(of_image)
        masks.append(np.kron(coarse, np.ones((6, 6)))[:SIZE, :SIZE].astype(int))
    return tokens, masks


def _crowd_alone(path: Path) -> str:
    """Writes annotations of an image that has a crowd and nothing else."""
    runs = {"size": [SIZE, SIZE], "counts": [0, SIZE**2]}
    crowd = {"image_id": 1, "category_id": 1, "iscrowd": 1, "segmentation": runs}
    images = [{"id": 1, "file_name": "0.png"}]
    path.write_text(json.dumps({"images": images, "annotations": [crowd]}))
    return str(path)


def _known(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == 255, -1, mask)


class TestRunDiscover:
    def test_run_discover__brute_force(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(7)
        masks[4] = np.zeros_like(masks[4])  # no object
        classes = [np.where((m > 0) & (m < 255), m % 2 + 5, m) for m in masks]
        data = _write_set(tmp_path, tokens, masks=masks, class_masks=classes)
        result = run_discover(*_given(tmp_path), **data)
        y, x = np.mgrid[:SIZE, :SIZE] // 16
        centre = np.zeros((SIZE, SIZE), dtype=int)
        centre[CENTRE[1] : CENTRE[3], CENTRE[0] : CENTRE[2]] = 1
        kinds = {
            "tokens": [_px(t) for t in tokens],
            "clusters": [_px(t) for t in tokens],  # patch features are one-hot
            "grid": [2 * y + x] * 7,
            "centre": [centre] * 7,
        }
        for kind, parts in kinds.items():
            scores = {k: result.scores[f"{kind}_{k}"] for k in ("mbo_i", "mbo_c")}
            assert scores == pytest.approx(
                {
                    "mbo_i": mean_best_overlap(parts, [_known(m) for m in masks]),
                    "mbo_c": mean_best_overlap(parts, [_known(m) for m in classes]),
                },
                abs=1e-12,
            )
            found, oracle = [], []
            for part, mask in zip(parts, masks, strict=True):
                true = [box_of(mask == k) for k in np.unique(mask) if 0 < k < 255]
                if true:
                    inner = part == 1 if kind == "centre" else inner_area(part)
                    boxes = [box_of(part == k) for k in np.unique(part)]
                    found.append(any(overlaps_by_half(box_of(inner), t) for t in true))
                    oracle.append(
                        any(overlaps_by_half(b, t) for b in boxes for t in true)
                    )
            assert result.scores[f"{kind}_corloc"] == pytest.approx(np.mean(found))
            oracles = result.scores[f"{kind}_corloc_oracle"]
            assert oracles == pytest.approx(np.mean(oracle))
        assert result.scores["num_images"] == 6
        assert result.provenance["num_empty"] == 1
        scores = result.scores
        assert result.chance == {
            f"{kind}_{score}": scores[f"{reference}_{score}"]
            for kind, others in (("tokens", "grid"), ("clusters", "grid"), ("ncut", ""))
            for score in ("mbo_i", "fg_ari", "mbo_c", "corloc", "corloc_oracle")
            for reference in ["centre" if score == "corloc" else others or "centre"]
        }

    def test_run_discover__perfect_tokens(self, tmp_path: Path) -> None:
        # Token 0 is the background; one object of each other token.
        tokens = np.zeros((GRID, GRID), dtype=int)
        tokens[1:3, 1:3], tokens[4:7, 2:4], tokens[3:5, 5:7] = 1, 2, 3
        data = _write_set(tmp_path, [tokens, tokens.T], masks=[_px(tokens)] * 2)
        data["data"] = _write(
            tmp_path / "same",
            [np.stack([20 * _px(tokens), *np.zeros((2, SIZE, SIZE))], axis=2)] * 2,
        )
        result = run_discover(*_given(tmp_path), **data)
        scores = result.scores
        assert scores["tokens_mbo_i"] == scores["tokens_fg_ari"] == 1.0
        assert scores["tokens_corloc_oracle"] == 1.0
        # The largest object hangs together with none: it is the one that is found.
        assert scores["tokens_corloc"] == 1.0
        assert scores["grid_mbo_i"] < 0.5 and scores["centre_corloc"] == 0.0
        assert "tokens_mbo_c" not in scores
        assert (
            "instances of label images: background 0; ig" in result.protocol["classes"]
        )

    def test_run_discover__perfect_grid(self, tmp_path: Path) -> None:
        quarters = uniform_parts(4, (SIZE, SIZE)).numpy() + 1
        one_token = [np.zeros((GRID, GRID))] * 2
        data = _write_set(tmp_path, one_token, masks=[quarters] * 2)
        data["background"] = 1  # three objects are left
        scores = run_discover(*_given(tmp_path), **data).scores
        assert scores["grid_mbo_i"] == scores["grid_fg_ari"] == 1.0
        assert scores["grid_corloc_oracle"] == 1.0
        assert scores["tokens_mbo_i"] == pytest.approx(1 / 4)
        assert scores["tokens_fg_ari"] == 0.0  # all objects in one part
        # Nothing to cut: the whole image.
        assert scores["ncut_mbo_i"] == pytest.approx(1 / 4)
        assert scores["ncut_corloc"] == 0.0

    def test_run_discover__boxes_alone(self, tmp_path: Path) -> None:
        tokens = np.zeros((GRID, GRID), dtype=int)
        tokens[1:3, 1:3] = 1
        data = _write_set(tmp_path, [tokens] * 4)
        # Found exactly; by less than half; no box; by one of two.
        lines = ["0.png,4,4,11,11", "1.png,4,4,11,20", "3.png,20,20,31,31"]
        lines += ["3.png,4,4,11,12", "other.png,1,1,9,9"]
        path = tmp_path / "boxes.csv"
        path.write_text("\n".join(["file,x0,y0,x1,y1", *lines]))
        result = run_discover(*_given(tmp_path), **data, boxes=str(path))
        assert set(result.chance) == {
            f"{kind}_{score}"
            for kind in ("tokens", "clusters", "ncut")
            for score in ("corloc", "corloc_oracle")
        }
        assert result.scores["tokens_corloc"] == pytest.approx(2 / 3)
        assert result.scores["ncut_corloc"] == pytest.approx(2 / 3)
        assert result.scores["centre_corloc"] == 0.0
        assert result.scores["num_images"] == 3
        assert result.provenance["num_empty"] == 1
        assert result.protocol["classes"] == "boxes of a file"
        path.write_text("file,x0,y0,x1,y1\n0.png,4,4,11,11")
        other = run_discover(*_given(tmp_path), **data, boxes=str(path))
        assert other.digest != result.digest
        assert other.protocol == result.protocol

    def test_run_discover__coco(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(3)
        masks = [np.where(m == 255, 0, m) for m in masks]
        classes = [np.where(m > 0, m % 2 + 5, m) for m in masks]
        data = _write_set(tmp_path, tokens, masks=masks, class_masks=classes)
        of_folders = run_discover(*_given(tmp_path), **data)
        content: dict[str, Any] = {"images": [], "annotations": []}
        for i, mask in enumerate(masks):
            content["images"].append({"id": 10 + i, "file_name": f"{i}.png"})
            for k in set(np.unique(mask)) - {0}:
                # One run for each px, column by column.
                px = (mask == k).T.flatten().astype(int)
                change = np.flatnonzero(np.diff(np.r_[0, px, 1 - px[-1]]))
                counts = np.diff(np.r_[0, change]).tolist()
                content["annotations"].append(
                    {
                        "image_id": 10 + i,
                        "category_id": int(k % 2 + 5),
                        "segmentation": {"size": [SIZE, SIZE], "counts": counts},
                    }
                )
        (tmp_path / "coco.json").write_text(json.dumps(content))
        found = run_discover(
            *_given(tmp_path), data["data"], str(tmp_path / "coco.json")
        )
        assert found.scores == of_folders.scores
        assert found.protocol["classes"] == "instances of COCO"
        with pytest.raises(ValueError, match="leave --class_masks out"):
            run_discover(
                *_given(tmp_path),
                data["data"],
                str(tmp_path / "coco.json"),
                data["masks"],
            )

    @pytest.mark.slow
    def test_run_discover__other_numbers_and_kinds(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(3)
        data = _write_set(tmp_path, tokens, masks=masks)
        result = run_discover(*_given(tmp_path), **data, clusters=2)
        cells = uniform_parts(2, (SIZE, SIZE)).numpy()
        two = mean_best_overlap([cells] * 3, [_known(m) for m in masks])
        assert result.scores["grid_2_mbo_i"] == pytest.approx(two)
        assert result.chance["clusters_mbo_i"] == result.scores["grid_2_mbo_i"]
        assert result.chance["tokens_mbo_i"] == result.scores["grid_mbo_i"]
        ncut = run_discover(*_given(tmp_path), **data, parts=["ncut"])
        kinds = {name.split("_")[0] for name in ncut.scores}
        assert kinds == {"ncut", "centre", "num"}
        assert ncut.digest != result.digest
        same = run_discover(*_given(tmp_path), **data, parts=["clusters", "ncut"])
        again = run_discover(*_given(tmp_path), **data, parts=["ncut", "clusters"])
        assert same.digest == again.digest

    @pytest.mark.slow
    def test_run_discover__in_any_batch(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(5)
        data = _write_set(tmp_path, tokens, masks=masks)
        at_once = run_discover(*_given(tmp_path, batch_size=5), **data)
        alone = run_discover(*_given(tmp_path, batch_size=1), **data)
        assert at_once.scores == alone.scores
        assert at_once.digest == alone.digest

    @pytest.mark.slow
    def test_run_discover__unreadable_files(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(42)
        data = _write_set(tmp_path, tokens, masks=masks)
        (tmp_path / "data" / "5.png").write_bytes(b"no PNG")
        cut = (tmp_path / "masks" / "11.png").read_bytes()[:60]
        (tmp_path / "masks" / "11.png").write_bytes(cut)
        result = run_discover(*_given(tmp_path), **data)
        assert result.provenance["num_unreadable"] == 2
        assert result.scores["num_images"] == 40

    def test_run_discover__what_is_wrong(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(2)
        data = _write_set(tmp_path, tokens, masks=masks)
        run = partial(run_discover, *_given(tmp_path))
        with pytest.raises(ValueError, match="nothing to compare with: name masks"):
            run(data["data"])
        with pytest.raises(ValueError, match="--class_masks needs --masks"):
            run(data["data"], class_masks=data["masks"])
        with pytest.raises(ValueError, match=r"parts are tokens, .*, got 'slots'"):
            run(**data, parts=["slots"])
        with pytest.raises(ValueError, match="clusters must be at least 1, got 0"):
            run(**data, clusters=0)
        with pytest.raises(ValueError, match=r"8 x 8 patches at 32 px, too few for 65"):
            run(**data, clusters=65)
        with pytest.raises(FileNotFoundError, match=r"no file 'gone.csv' with boxes"):
            run(**data, boxes="gone.csv")
        with pytest.raises(FileNotFoundError, match=r"no file 'gone.json' with annot"):
            run(data["data"], "gone.json")
        with pytest.raises(
            ValueError, match="5 clusters are no part of what is scored"
        ):
            run(**data, clusters=5, parts=["ncut"])
        with pytest.raises(ValueError, match=r"no object of .* that is no crowd"):
            run(data["data"], _crowd_alone(tmp_path / "crowd.json"))
        assert not (tmp_path / "out").exists()

    def test_run_discover__label_images_without_background(
        self, tmp_path: Path
    ) -> None:
        tokens, masks = _random_set(2)
        masks = [np.where(m == 255, 255, m + 1) for m in masks]
        data = _write_set(tmp_path, tokens, masks=masks)
        parts: dict[str, Any] = {"parts": ["clusters"]}
        with pytest.raises(ValueError, match=r"none with --background '\[\]'"):
            run_discover(*_given(tmp_path), **data, **parts)
        options = ["discover", "--model", f"patches:{PATCH}", *run_options(tmp_path)]
        options += [f"--{name}={value}" for name, value in data.items()]
        main([*options, "--parts", "clusters", "--background", "[]"])
        (found,) = (tmp_path / "out").glob("discover-*/result.json")
        grid = [uniform_parts(16, (SIZE, SIZE)).numpy()] * 2
        assert json.loads(found.read_text())["scores"]["grid_mbo_i"] == pytest.approx(
            mean_best_overlap(grid, [_known(mask) for mask in masks])
        )

    def test_run_discover__no_object_in_any_crop(self, tmp_path: Path) -> None:
        tokens, _ = _random_set(1)
        data = _write_set(tmp_path, tokens)
        wide = Image.open(tmp_path / "data/0.png").resize((SIZE * 2, SIZE))
        wide.save(tmp_path / "data/0.png")
        (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\n0.png,0,0,9,9")
        with pytest.raises(RuntimeError, match="None has an object in its crop"):
            run_discover(*_given(tmp_path), **data, boxes=str(tmp_path / "boxes.csv"))

    def test_run_discover__models_without_localization(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(2)
        data = _write_set(tmp_path, tokens, masks=masks)
        source = write_model(tmp_path / "model", target=None)
        given = make_given(tmp_path, source, resize=SIZE, crop=SIZE)
        with pytest.raises(ValueError, match=r"no tokens with a loc.*--parts clusters"):
            run_discover(*given, **data, parts=["tokens"])
        given = make_given(tmp_path, f"patches:{PATCH}", resize=SIZE, crop=SIZE)
        result = run_discover(*given, **data)
        assert result.protocol["parts"].startswith("clusters: 16 k-means clusters of")
        assert "tokens" not in result.protocol["parts"]

    def test_run_discover__command_line_and_picture(self, tmp_path: Path) -> None:
        tokens, masks = _random_set(3)
        data = _write_set(tmp_path, tokens, masks=masks)
        options = [
            *("discover", "--model", write_model(tmp_path / "model")),
            *run_options(tmp_path),
            *("--data", data["data"], "--masks", data["masks"]),
            *("--parts", "tokens", "--parts", "ncut", "--controls", "true"),
        ]
        main(options)
        folders = sorted((tmp_path / "out").glob("discover-*"))
        results = [json.loads((f / "result.json").read_text()) for f in folders]
        (trained,) = (r for r in results if r["untrained"])
        (control,) = (r for r in results if not r["untrained"])
        assert trained["untrained"] == control["scores"]
        assert set(trained["chance"]) < set(trained["scores"])
        side = PANEL_SIDE // SIZE * SIZE
        for folder in folders:
            picture = Image.open(folder / "discover.png")
            assert picture.width == GAP + 3 * (side + GAP)
            assert picture.height > 4 * (LINE + side + GAP)


class TestOutlined:
    def test_outlined__lines_inside_of_the_box(self) -> None:
        pictures = np.zeros((2, 10, 12, 3), dtype=np.uint8)
        boxes = [torch.tensor([[2.0, 3, 7, 8], [0, 0, 2, 2]]), torch.zeros(0, 4)]
        found = outlined(pictures, boxes, (9, 8, 7))
        expected = np.zeros((10, 12), dtype=bool)
        expected[3:8, 2:7] = True
        expected[4:7, 3:6] = False
        expected[:2, :2] = True
        np.testing.assert_array_equal(found[0], expected[..., None] * [9, 8, 7])
        assert not found[1].any() and not pictures.any()
