from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.demo.boards import make_board_sets
from lightly_ext.demo.export import export_image_folders
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.images import ImageFiles, folder_images
from lightly_ext.evaluate.probing.stability import (
    ScaledCrops,
    cosine_distance,
    run_stability,
)
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import STABILITY, STABILITY_SCALES
from tests.lightly_ext.evaluate.small import (
    SIZES,
    Given,
    make_given,
    run_options,
    write_classes,
    write_images,
    write_model,
)

PROTOCOL = STABILITY.replace(resize=32, crop=28)


class MeanColour(nn.Module):
    """Dense features are the colours of the pixels; there are no queries."""

    def forward(self, images: Tensor) -> Factorization:
        dense = images.flatten(2).mT
        grid_size = (images.shape[2], images.shape[3])
        return Factorization(
            None, dense[:, :0], dense, grid_size, lambda u, s: u @ s.mT
        )


def _given(tmp_path: Path, model: nn.Module, **options: Any) -> Given:
    origin = Origin(
        "colours", "none", "0" * 64, mean=(0, 0, 0), std=(1, 1, 1), name="colours"
    )
    values = {**SIZES, "batch_size": 4, **options}
    return make_given(tmp_path, FrozenModel(model, origin), **values)


def _crops(files: ImageFiles, seed: int = 0, **kwargs: object) -> ScaledCrops:
    options = {"scales": STABILITY_SCALES, "interpolation": "bicubic", **kwargs}
    return ScaledCrops(files, PROTOCOL, seed=seed, **options)  # type: ignore[arg-type]


class TestRunStability:
    def test_run_stability__constant_images(self, tmp_path: Path) -> None:
        for i in range(5):
            image = Image.new("RGB", (50, 40), (20 * i + 9, 7, 200 - 40 * i))
            (tmp_path / "data").mkdir(exist_ok=True)
            image.save(tmp_path / "data" / f"{i}.png")
        given = _given(tmp_path, MeanColour())
        (result,) = run_stability(*given, str(tmp_path / "data"))
        values = result.scores["cosine_distance"]
        assert list(values) == ["0.5", "0.6", "0.7", "0.8", "0.9", "1.0"]
        assert list(values.values()) == pytest.approx([0.0] * 6, abs=1e-12)
        assert result.provenance["features"] == "dense"
        assert result.protocol["features"] == "auto"

    def test_run_stability__brute_force(self, tmp_path: Path) -> None:
        data = write_images(tmp_path / "data", 5)
        given = _given(tmp_path, MeanColour(), crop=28)
        (result,) = run_stability(*given, str(data))
        crops = _crops(folder_images(data))
        distances, wholes = np.empty((5, 6)), []
        for i in range(5):
            colours = crops[i].image.double().numpy().mean(axis=(2, 3))
            unit = colours / np.linalg.norm(colours, axis=1, keepdims=True)
            distances[i] = 1 - unit[1:] @ unit[0]
            wholes.append(unit[0])
        values = list(result.scores["cosine_distance"].values())
        assert values == pytest.approx(list(distances.mean(axis=0)), abs=1e-6)
        other = [1 - wholes[i] @ wholes[j] for i, j in ((0, 2), (1, 3))]
        value = result.scores["cosine_distance_other_image"]
        assert value == pytest.approx(np.mean(other), abs=1e-6)
        assert values[0] > 1e-4 and values[-1] == pytest.approx(0, abs=1e-12)
        expected = distances.std(axis=0, ddof=1) / 5**0.5
        errors = list(result.provenance["standard_error"].values())
        assert errors == pytest.approx(list(expected), abs=1e-6)

    def test_run_stability__batch_size_changes_nothing(self, tmp_path: Path) -> None:
        data = str(write_images(tmp_path / "data", 5))
        results = []
        for batch_size, num_workers in ((1, 0), (2, 1), (64, 0)):
            options = {"batch_size": batch_size, "num_workers": num_workers}
            given = _given(tmp_path, MeanColour(), **options)
            results += run_stability(*given, data)
        values = [list(r.scores["cosine_distance"].values()) for r in results]
        assert values[0] == pytest.approx(values[1], abs=1e-12)
        assert values[0] == pytest.approx(values[2], abs=1e-12)

    def test_run_stability__several_models_from_the_command_line(
        self, tmp_path: Path
    ) -> None:
        sets = make_board_sets(0, num_train=4, num_test=1, num_train_single=1)
        export_image_folders(sets, tmp_path / "boards")
        source = write_model(tmp_path / "tiny")
        other = write_model(tmp_path / "larger", embed_dim=24)
        data = str(tmp_path / "boards" / "train")
        options = [*run_options(tmp_path), "--data", data]
        main(["stability", "--model", source, *options, "--against", other])
        folders = sorted((tmp_path / "out").glob("stability-*"))
        names = [folder.name.split("-")[2] for folder in folders]
        assert names == ["larger", "tiny"]
        stored = [json.loads((f / "result.json").read_text()) for f in folders]
        assert stored[0]["protocol"] == stored[1]["protocol"]
        assert [s["provenance"]["features"] for s in stored] == ["sparse"] * 2
        for scores in (s["scores"] for s in stored):
            distances = list(scores["cosine_distance"].values())
            assert scores["num_images"] == 4
            assert distances[0] > distances[-1] == pytest.approx(0, abs=1e-12)
        digest = folders[0].name.rpartition("-")[2]
        plot = folders[1] / f"stability-{digest}.png"  # that of this comparison
        assert plot.stat().st_size < 100_000
        assert not list(folders[0].glob("*.png"))

    @pytest.mark.slow
    def test_run_stability__features_of_other_models(self, tmp_path: Path) -> None:
        data = write_images(tmp_path / "data", 2)
        given = make_given(tmp_path, "timm:resnet10t", untrained=True, **SIZES)
        results = run_stability(*given, str(data), "cls", ["timm:resnet10t"])
        assert [r.protocol["features"] for r in results] == ["cls", "auto"]
        assert [r.provenance["features"] for r in results] == ["cls", "dense"]
        # A ResNet's pooled feature is the mean of its map.
        a, b = (list(r.scores["cosine_distance"].values()) for r in results)
        assert a == pytest.approx(b, abs=1e-6)

    def test_run_stability__errors_come_before_work(self, tmp_path: Path) -> None:
        data = str(write_images(tmp_path / "data", 2))
        given = _given(tmp_path, MeanColour())
        with pytest.raises(ValueError, match="features must be 'auto' or one of"):
            run_stability(*given, data, "spars")
        with pytest.raises(ValueError, match="no sparse features"):
            run_stability(*given, data, "sparse")
        with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
            run_stability(*given, data, against=["nowhere.pth"])
        with pytest.raises(ValueError, match="one image; another one is its"):
            run_stability(*_given(tmp_path, MeanColour(), limit=1), data)
        with pytest.raises(ValueError, match="crop 33 is more than resize 32"):
            run_stability(*_given(tmp_path, MeanColour(), crop=33), data)
        assert not (tmp_path / "out").exists()

    def test_run_stability__same_name_twice(self, tmp_path: Path) -> None:
        data = str(write_images(tmp_path / "data", 2))
        sources = [write_model(tmp_path / x / "run") for x in ("a", "b")]
        given = _given(tmp_path, MeanColour())
        with pytest.raises(ValueError, match="second 'run, sparse' in the plot"):
            run_stability(*given, data, against=sources)

    @pytest.mark.slow
    def test_run_stability__unreadable_images(self, tmp_path: Path) -> None:
        data = write_images(tmp_path / "data", 21)
        whole = run_stability(*_given(tmp_path, MeanColour()), str(data))[0]
        (data / "0020.png").write_bytes(b"not a PNG")
        result = run_stability(*_given(tmp_path, MeanColour()), str(data))[0]
        assert result.scores["num_images"] == 20
        (data / "0020.png").unlink()
        without = run_stability(*_given(tmp_path, MeanColour()), str(data))[0]
        value = result.scores["cosine_distance"]
        assert value == pytest.approx(without.scores["cosine_distance"], abs=1e-12)
        assert value != whole.scores["cosine_distance"]


class TestScaledCrops:
    def test_scaled_crops__follow_seed_and_name_alone(self, tmp_path: Path) -> None:
        files = folder_images(write_classes(tmp_path / "data", parts=("a",), num=3))
        crops = _crops(files)
        views = crops[4].image
        assert views.shape == (7, 3, 28, 28) and views.dtype == torch.uint8
        torch.manual_seed(5)
        state = torch.get_rng_state()
        assert torch.equal(crops[4].image, views)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(_crops(files[[4]])[0].image, views)
        assert not torch.equal(_crops(files, seed=1)[4].image[1], views[1])

    def test_scaled_crops__whole_image_is_the_last_scale(self, tmp_path: Path) -> None:
        files = folder_images(write_images(tmp_path / "data", 1, size=(45, 61)))
        views = _crops(files)[0].image
        assert torch.equal(views[0], views[-1])
        square = round(45 * 28 / 32)
        image = Image.open(tmp_path / "data" / "0000.png")
        top, left = round((45 - square) / 2), round((61 - square) / 2)
        image = image.crop((left, top, left + square, top + square))
        image = image.resize((28, 28), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (views[0].int() - expected.int()).abs().max() <= 1

    def test_scaled_crops__areas(self, tmp_path: Path) -> None:
        # x in red and y in green: the first and last colours tell what was cut.
        y, x = np.mgrid[:256, :256]
        ramp = np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)
        (tmp_path / "data").mkdir()
        for i in range(8):
            Image.fromarray(ramp).save(tmp_path / "data" / f"{i}.png")
        files = folder_images(tmp_path / "data")
        ratios = []
        for i in range(8):
            views = _crops(files, interpolation="bilinear")[i].image.float()
            width = views[:, 0, 14, 27] - views[:, 0, 14, 0]
            height = views[:, 1, 27, 14] - views[:, 1, 0, 14]
            area = (width * height / (width[0] * height[0])).tolist()
            assert area[1:] == pytest.approx(STABILITY_SCALES, abs=0.02)
            ratios.append((width / height)[1:])
        spread = torch.stack(ratios)
        assert spread.min() > 0.72 and spread.max() < 1.37
        assert spread[:, 0].max() > 1.1 and spread[:, 0].min() < 0.9


class TestCosineDistance:
    def test_cosine_distance__closed_form(self) -> None:
        a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [3.0, 4.0]])
        b = torch.tensor([[0.0, 2.0], [3.0, 3.0], [-1.0, 0.0], [4.0, 3.0]])
        expected = [1.0, 0.0, 2.0, 1 - 24 / 25]
        assert cosine_distance(a, b).tolist() == pytest.approx(expected, abs=1e-12)
        rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
        expected = 1 - F.normalize(rows.double()) @ F.normalize(rows[0].double(), dim=0)
        value = cosine_distance(rows, rows[:1].expand(9, 5))
        torch.testing.assert_close(value, expected)
