from __future__ import annotations

import itertools
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
from lightly_ext.evaluate.probing.equivariance import (
    Factors,
    match_factors,
    moved_back_change,
    relative_change,
    run_equivariance,
)
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import EQUIVARIANCE_SHIFTS
from tests.lightly_ext.evaluate.small import (
    Given,
    make_given,
    run_options,
    write_images,
    write_model,
)
from tests.titok_files import write_titok

PATCH = 10


class Ramp(nn.Module):
    """S never changes; L moves exactly with the image.

    Images are ramps, 2 x in red and 2 y in green. Each patch reads its two coordinates:
    L = (x, y, 1000 - x - y) / 1000. Every call gives the tokens in another order.
    """

    num_queries = 3
    has_localization = True

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Factorization:
        corners = images[:, :2, ::PATCH, ::PATCH] * 255 / 2
        x, y = corners.round().flatten(2).unbind(1)
        localization = torch.stack([x, y, 1000 - x - y], dim=2) / 1000
        sparse = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 5]])
        order = torch.arange(3).roll(self.calls)
        self.calls += 1
        size = (corners.shape[2], corners.shape[3])
        return Factorization(
            None,
            sparse[order].expand(len(images), 3, 3),
            localization,
            size,
            lambda dense, _: dense[..., order],
        )


def _ramps(folder: Path, num: int) -> Path:
    folder.mkdir()
    y, x = np.mgrid[:60, :60]
    for i in range(num):
        image = np.stack([2 * x, 2 * y, np.zeros_like(x)], axis=2).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def _given(tmp_path: Path, model: nn.Module, **options: Any) -> Given:
    origin = Origin(
        "ramp", "STELLAR", "0" * 64, mean=(0, 0, 0), std=(1, 1, 1), name="ramp"
    )
    values = {"resize": 60, "crop": 30, "batch_size": 4, **options}
    return make_given(tmp_path, FrozenModel(model, origin), **values)


def _localization(left: int, top: int) -> np.ndarray:
    y, x = np.mgrid[:30:PATCH, :30:PATCH]
    x, y = x + left, y + top
    return np.stack([x, y, 1000 - x - y], axis=2) / 1000


class TestRunEquivariance:
    def test_run_equivariance__closed_form(self, tmp_path: Path) -> None:
        given = _given(tmp_path, Ramp())
        result = run_equivariance(*given, str(_ramps(tmp_path / "ramps", 5)))
        before = _localization(0, 0)
        for px in (0, *EQUIVARIANCE_SHIFTS):
            for name, shift in (("horizontal", (px, 0)), ("vertical", (0, px))):
                difference = _localization(*shift) - before
                expected = np.linalg.norm(difference) / np.linalg.norm(before)
                value = result.scores[f"change_of_l_{name}"][str(px)]
                assert value == pytest.approx(expected, rel=1e-6, abs=0)
                assert result.scores[f"change_of_s_{name}"][str(px)] == 0.0
            both = (difference**2).sum()  # the ramp is the same in both directions
            expected = (both / (before**2).sum()) ** 0.5
            assert result.scores["change_of_l"][str(px)] == pytest.approx(expected)
        assert result.scores["change_of_l"]["0"] == 0.0

    def test_run_equivariance__controls(self, tmp_path: Path) -> None:
        given = _given(tmp_path, Ramp())
        result = run_equivariance(*given, str(_ramps(tmp_path / "ramps", 5)))
        # All images are the same, and L moves by one patch when the image does.
        assert result.scores["change_of_l_other_image"] == 0.0
        assert result.scores["change_of_s_other_image"] == 0.0
        moved = result.scores["change_of_l_moved_back"]
        assert list(moved) == [str(PATCH)] and moved[str(PATCH)] == 0.0
        # The order of the tokens rolls by one with each call, so of the two calls of a
        # shift none or one has that of the reference, and the match says so.
        matches = list(result.scores["identity_matches"].values())
        assert matches == [0.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.0]
        assert result.provenance["standard_error"]["change_of_l"]["5"] == 0.0
        assert result.protocol["crop"] == 30

    @pytest.mark.slow
    def test_run_equivariance__other_image(self, tmp_path: Path) -> None:
        # Three pairs by hand, half the list away from each other.
        source = write_model(tmp_path / "model")
        data = write_images(tmp_path / "images", 6, size=(70, 64))
        values = []
        for batch_size in (3, 64):
            options = {"batch_size": batch_size, "resize": 62, "crop": 32}
            given = make_given(tmp_path / str(batch_size), source, **options)
            values.append(run_equivariance(*given, str(data)))
        a, b = (value.scores for value in values)
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4)
        crops = []
        for i in range(6):
            image = Image.open(data / f"{i:04d}.png")
            image = image.resize((62, 68), Image.Resampling.BICUBIC)
            image = image.crop((0, 3, 32, 35))
            crops.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        sparse = given.model(torch.stack(crops)).sparse.double()
        localization = given.model(torch.stack(crops)).localization.double()
        order = [3, 4, 5, 0, 1, 2]
        s = (sparse[order] - sparse).flatten(1).norm(dim=1)
        s = s / sparse.flatten(1).norm(dim=1)
        # Tokens of random weights differ so much that the match is the identity.
        other = Factors(sparse[order].float(), localization[order].float())
        factors = Factors(sparse.float(), localization.float())
        assert (match_factors(factors, other)[1] == torch.arange(4)).all()
        value = a["change_of_s_other_image"]
        assert value == pytest.approx(float(s.mean()), rel=0.02)  # resized by PIL

    @pytest.mark.slow
    def test_run_equivariance__boards_from_the_command_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sets = make_board_sets(0, num_train=6, num_test=1, num_train_single=4)
        export_image_folders(sets, tmp_path / "boards")
        data = str(tmp_path / "boards")
        source = write_model(tmp_path / "model")
        options = [*run_options(tmp_path), "--resize", "62", "--data", data]
        with pytest.raises(ValueError, match="one image; another one is its"):
            main(["equivariance", "--model", source, *options, "--limit", "1"])
        options[-1] = str(tmp_path / "boards" / "single")
        main(["equivariance", "--model", source, *options])
        folder = next((tmp_path / "out").glob("equivariance-*"))
        scores = json.loads((folder / "result.json").read_text())["scores"]
        assert list(scores["change_of_s"]) == ["0", "5", "10", "15", "20", "25", "30"]
        assert scores["change_of_s"]["0"] == scores["change_of_l"]["0"] == 0.0
        assert scores["identity_matches"]["0"] == 1.0
        assert list(scores["change_of_l_moved_back"]) == ["16"]
        changes = scores["change_of_s"]
        assert 0 < changes["5"] < changes["30"]
        assert (folder / "equivariance.png").stat().st_size < 100_000
        assert "||S'[match] - S||_F" in capsys.readouterr().out

    @pytest.mark.slow
    def test_run_equivariance__bf16(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        data = str(write_images(tmp_path / "images", 4, size=(64, 64)))
        scores = []
        for precision in ("32-true", "bf16-mixed"):
            options = {"precision": precision, "resize": 62, "crop": 32}
            given = make_given(tmp_path / precision, source, **options)
            scores.append(run_equivariance(*given, data).scores)
        full, half = scores
        assert half["change_of_s"]["0"] == half["change_of_l"]["0"] == 0.0
        for px in ("15", "30"):
            value = full["change_of_s"][px]
            assert half["change_of_s"][px] == pytest.approx(value, rel=0.1)
            assert half["change_of_s"][px] != value

    def test_run_equivariance__unreadable_images(self, tmp_path: Path) -> None:
        data = _ramps(tmp_path / "ramps", 24)
        (data / "7.png").write_bytes(b"not a PNG")
        result = run_equivariance(*_given(tmp_path, Ramp()), str(data))
        assert result.provenance["num_unreadable"] == 1
        assert result.scores["num_images"] == 23
        assert result.scores["change_of_l_other_image"] == 0.0
        (data / "8.png").write_bytes(b"not a PNG")
        with pytest.raises(RuntimeError, match=r"2 of 24 images are unreadable"):
            run_equivariance(*_given(tmp_path, Ramp()), str(data))

    def test_run_equivariance__too_small_images(self, tmp_path: Path) -> None:
        data = _ramps(tmp_path / "ramps", 2)
        given = _given(tmp_path, Ramp(), resize=59)
        with pytest.raises(ValueError, match=r"needs images of 60 px, resize is 59"):
            run_equivariance(*given, str(data))

    def test_run_equivariance__one_image(self, tmp_path: Path) -> None:
        data = _ramps(tmp_path / "ramps", 1)
        with pytest.raises(ValueError, match="one image; another one"):
            run_equivariance(*_given(tmp_path, Ramp()), str(data))

    def test_run_equivariance__no_stellar(self, tmp_path: Path) -> None:
        given = make_given(tmp_path, "timm:resnet10t", untrained=True)
        with pytest.raises(ValueError, match=r"resnet10t.* has no latent queries"):
            run_equivariance(*given, str(_ramps(tmp_path / "ramps", 2)))


class TestMatchFactors:
    def test_match_factors__undoes_a_permutation(self) -> None:
        torch.manual_seed(0)
        reference = Factors(5 * torch.randn(4, 6, 8), torch.rand(4, 9, 6))
        orders = torch.stack([torch.randperm(6) for _ in range(4)])
        other = Factors(
            torch.stack([s[o] for s, o in zip(reference.sparse, orders, strict=True)]),
            torch.stack(
                [x[:, o] for x, o in zip(reference.localization, orders, strict=True)]
            ),
        )
        matched, match = match_factors(reference, other)
        assert torch.equal(match, orders.argsort(dim=1))
        for a, b in zip(reference, matched, strict=True):
            assert torch.equal(a, b)
            assert relative_change(a, b).tolist() == [0.0] * 4


class TestRelativeChange:
    def test_relative_change__against_numpy(self) -> None:
        torch.manual_seed(0)
        a, b = torch.randn(2, 3, 5, 7)
        expected = [
            np.linalg.norm(y - x) / np.linalg.norm(x)
            for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
        ]
        assert relative_change(a, b).tolist() == pytest.approx(expected, rel=1e-12)


class TestMovedBackChange:
    @pytest.mark.parametrize("direction", ["horizontal", "vertical"])
    def test_moved_back_change__by_one_patch(self, direction: str) -> None:
        torch.manual_seed(0)
        scene = torch.rand(2, 5, 6, 3)
        horizontal = direction == "horizontal"
        after = scene[:, :4, 1:] if horizontal else scene[:, 1:, :5]
        before, after = scene[:, :4, :5].flatten(1, 2), after.flatten(1, 2)
        change = moved_back_change(before, after, (4, 5), direction)
        assert change.tolist() == [0.0, 0.0]
        wrong = "vertical" if horizontal else "horizontal"
        assert (moved_back_change(before, after, (4, 5), wrong) > 0.1).all()


class TestTokensWithoutPlaces:
    def test_run_equivariance__titok_has_changes_of_s_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = write_titok(tmp_path / "tokenizer_titok_b64.bin")
        data = write_images(tmp_path / "images", 4, size=(62, 62))
        given = make_given(tmp_path, source, resize=62, crop=32)
        result = run_equivariance(*given, str(data))
        names = ("change_of_s", "change_of_s_horizontal", "change_of_s_vertical")
        assert set(result.scores) == {
            *names,
            *("change_of_s_other_image", "identity_matches", "num_images"),
        }
        assert "only changes of S are measured" in capsys.readouterr().out
        files = sorted(data.iterdir())
        windows = torch.stack(
            [torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files]
        )
        # By hand: the best of all 120 orders of five tokens.
        orders = torch.tensor(list(itertools.permutations(range(5))))
        for px in (0, 5, 30):
            for name, (left, top) in zip(names[1:], ((px, 0), (0, px)), strict=True):
                before = given.model(windows[..., :32, :32]).sparse.double()
                moved = windows[..., top : top + 32, left : left + 32]
                after = given.model(moved).sparse.double()
                cosines = F.cosine_similarity(before[:, :, None], after[:, None], dim=3)
                sums = cosines[:, torch.arange(5), orders].sum(dim=2)
                best = orders[sums.argmax(dim=1)]
                matched = after.gather(1, best[..., None].expand_as(after))
                change = (matched - before).flatten(1).norm(dim=1)
                change = change / before.flatten(1).norm(dim=1)
                found = result.scores[name][str(px)]
                assert found == pytest.approx(float(change.mean()), rel=1e-4, abs=1e-9)
        folder = given.results.folder(result)
        assert (folder / "equivariance.png").is_file()
