from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightly_ext.evaluate import efficiency
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.efficiency import Time, run_efficiency, table_rows, time_part
from lightly_ext.evaluate.efficiency_parts import hungarian_match, model_parts
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.loss import match_tokens
from stellar_plugin import Stellar
from stellar_plugin.encoder import Factorization
from stellar_plugin.networks.network import unlocalized
from tests.lightly_ext.evaluate.small import (
    DECODER,
    MODEL_NAME,
    VIT,
    Given,
    make_given,
    write_model,
)

PARTS = (
    "encoder",
    "decoder",
    "masked_views",
    "sinkhorn_clustering",
    "sinkhorn_matching",
    "hungarian_matching",
)


def _given(tmp_path: Path, model: str = "patches", **options: Any) -> Given:
    return make_given(tmp_path, model, **options)


class TestHungarianMatch:
    def test_hungarian_match__least_cost_of_all_permutations(self) -> None:
        generator = torch.Generator().manual_seed(0)
        predictions = torch.randn(2, 3, 4, 6, generator=generator)
        targets = torch.randn(2, 1, 4, 6, generator=generator)
        matched = hungarian_match(predictions, targets)
        assert matched.shape == (2, 3, 4)
        for image in range(2):
            for view in range(3):
                cost = (
                    (predictions[image, view, :, None] - targets[image, 0])
                    .norm(dim=-1)
                    .double()
                )
                best = min(
                    permutations(range(4)),
                    key=lambda p: sum(cost[i, j].item() for i, j in enumerate(p)),
                )
                assert matched[image, view].tolist() == list(best)

    def test_hungarian_match__one_set_without_batch(self) -> None:
        tokens = 10 * torch.eye(3)
        order = torch.tensor([2, 0, 1])
        assert hungarian_match(tokens[order], tokens).equal(order)

    def test_hungarian_match__as_sinkhorn_where_tokens_are_far_apart(self) -> None:
        generator = torch.Generator().manual_seed(0)
        targets = 10 * torch.randn(5, 1, 16, 24, generator=generator)
        order = torch.stack(
            [torch.randperm(16, generator=generator) for _ in range(5 * 8)]
        ).view(5, 8, 16)
        index = order[..., None].expand(-1, -1, -1, 24)
        predictions = targets.expand(-1, 8, -1, -1).gather(2, index)
        predictions = predictions + 0.1 * torch.randn(
            predictions.shape, generator=generator
        )
        assert hungarian_match(predictions, targets).equal(order)
        assert match_tokens(predictions, targets).indices.equal(order)

    def test_hungarian_match__never_costs_more_than_sinkhorn(self) -> None:
        generator = torch.Generator().manual_seed(0)
        targets = torch.randn(200, 4, 3, generator=generator)
        predictions = targets + 0.5 * torch.randn(200, 4, 3, generator=generator)
        cost = torch.cdist(predictions, targets)
        exact = hungarian_match(predictions, targets)
        soft = match_tokens(predictions, targets).indices
        total = [cost.gather(2, m[..., None]).sum(dim=(1, 2)) for m in (exact, soft)]
        whole = (soft.sort(dim=1).values == torch.arange(4)).all(dim=1)
        assert whole.sum() > 20  # permutations
        assert (total[0] <= total[1] + 1e-5)[whole].all()


class TestModelParts:
    def test_model_parts__compute_what_they_say(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = Stellar(MODEL_NAME, num_queries=4, **VIT, **DECODER).eval()
        images = torch.randn(2, 3, 48, 48)
        parts = model_parts(_given(tmp_path).devices, model, images)
        assert tuple(parts) == PARTS
        result = model(images)
        torch.testing.assert_close(parts["encoder"](), result.lowrank.detach())
        decoded = model.decode(result.lowrank, result.grid_size).detach()
        torch.testing.assert_close(parts["decoder"](), decoded)
        shapes = {n: tuple(part().shape) for n, part in parts.items()}  # type: ignore[attr-defined]
        assert shapes == {
            "encoder": (2, 9, 48),
            "decoder": (2, 3, 48, 48),
            "masked_views": (2 * 8, 4, 48),
            "sinkhorn_clustering": (2 * 4, 16384),
            "sinkhorn_matching": (2, 8, 4),
            "hungarian_matching": (2, 8, 4),
        }


class Clock:
    """A clock that the timed part sets forward, instead of the machine's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        timer = partial(efficiency.Timer, timer=lambda: self.seconds)
        monkeypatch.setattr(efficiency, "Timer", timer)

    def part(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.seconds += seconds

        return run


class TestTimePart:
    def test_time_part__median_of_a_known_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times: efficiency.Times = {}
        part = Clock(monkeypatch).part(0.02)
        time_part(_given(tmp_path).devices, times, "nap", part, 4, 0.3)
        assert times["nap"][4].median == pytest.approx(20)
        assert times["nap"][4].iqr == pytest.approx(0, abs=1e-6)

    def test_time_part__spread_of_times_that_differ(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times: efficiency.Times = {}
        clock = Clock(monkeypatch)
        seconds = itertools.cycle([0.2, 0.4])
        part = lambda: clock.part(next(seconds))()  # noqa: E731
        time_part(_given(tmp_path).devices, times, "nap", part, 4, 6.0)
        assert times["nap"][4].iqr == pytest.approx(200)

    def test_time_part__stops_and_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        times = {"slow": {4: Time(600.0, 1.0)}}
        given = _given(tmp_path)
        time_part(given.devices, times, "slow", lambda: pytest.fail("ran"), 8, 1.0)
        assert list(times["slow"]) == [4]
        said = capsys.readouterr().out
        assert "slow at batch 8 is left out: it would take about 1.2 s" in said

    def test_time_part__one_run_has_no_spread(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times: efficiency.Times = {}
        part = Clock(monkeypatch).part(0.1)
        time_part(_given(tmp_path).devices, times, "nap", part, 4, 0.05)
        assert times["nap"][4] == (pytest.approx(100), None)


def test_table_rows__medians_and_multiples() -> None:
    times = {
        "encoder": {4: Time(2.0, 0.1), 8: Time(4.0, None)},
        "decoder": {4: Time(1.0, 0.25)},
    }
    assert table_rows(times) == [
        ["batch size", "4", "8"],
        ["encoder, ms", "2 (0.1)", "4 (once)"],
        ["decoder, ms", "1 (0.25)", "-"],
        ["encoder, x encoder", "1", "1"],
        ["decoder, x encoder", "0.5", "-"],
    ]


class TestRunEfficiency:
    @pytest.mark.slow
    def test_run_efficiency__command(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = write_model(tmp_path / "model")
        output = ["--output", str(tmp_path / "out"), "--accelerator", "cpu"]
        sizes = ["--crop", "48", "--batch_sizes", "[1, 2]", "--max_seconds", "0.02"]
        main(["efficiency", "--model", model, *output, *sizes])
        (path,) = (tmp_path / "out").glob("*/result.json")
        stored = json.loads(path.read_text())
        scores = stored["scores"]
        for name in PARTS:
            assert set(scores[f"{name}_ms"]) <= {"1", "2"}
            assert all(value > 0 for value in scores[f"{name}_ms"].values())
        assert scores["encoder_x_encoder"] == dict.fromkeys(scores["encoder_ms"], 1.0)
        assert stored["protocol"]["data"] == stored["data"]
        assert stored["protocol"]["crop"] == 48
        assert stored["provenance"]["num_tokens"] == 4
        assert "| decoder, ms |" in (path.parent / "efficiency.md").read_text()
        assert (path.parent / "efficiency.png").read_bytes()[:4] == b"\x89PNG"
        assert "Median (IQR)" in capsys.readouterr().out

    @pytest.mark.slow
    def test_run_efficiency__a_timm_name_needs_no_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = Stellar(MODEL_NAME, num_queries=4, **VIT, **DECODER)
        monkeypatch.setattr(efficiency, "Stellar", lambda name: small)
        given = _given(tmp_path, "timm:vit_tiny_patch16_224", untrained=True, crop=48)
        result = run_efficiency(*given, (1,), "channels_last", 0.01)
        assert "channels_last" in result.protocol["inference"]
        assert result.model.endswith("(untrained)")
        assert small.encoder.vit.patch_embed.proj.weight.is_contiguous(
            memory_format=torch.channels_last
        )

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"batch_sizes": (0, 4)}, r"batch_sizes must be 1 or more, got \[0, 4\]"),
            ({"batch_sizes": ()}, "batch_sizes must be 1 or more"),
            ({"max_seconds": 0.0}, "max_seconds must be positive, got 0"),
        ],
    )
    def test_run_efficiency__bad_options(
        self, tmp_path: Path, options: dict[str, object], match: str
    ) -> None:
        with pytest.raises(ValueError, match=match):
            run_efficiency(*_given(tmp_path), **options)  # type: ignore[arg-type]

    def test_run_efficiency__encoder_alone(self, tmp_path: Path) -> None:
        class Cells(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cut = nn.Conv2d(3, 8, 16, 16)

            def forward(self, images: Tensor) -> Factorization:
                cells = self.cut(images).flatten(2).mT
                return unlocalized(None, cells, (2, 2))

        cells = FrozenModel(Cells(), Origin("cells", "DenseCL", "0" * 64))
        for model, parameters in ((cells, 8 * (3 * 16 * 16 + 1)), ("patches:8", 0)):
            given = make_given(tmp_path, model, crop=32)
            result = run_efficiency(*given, (1,), max_seconds=0.001)
            times = ("encoder_ms", "encoder_iqr_ms", "encoder_x_encoder")
            assert tuple(result.scores) == times
            assert result.scores["encoder_ms"]["1"] > 0
            assert result.scores["encoder_x_encoder"] == {"1": 1.0}
            assert result.provenance["num_parameters"] == parameters
            assert result.protocol["rule"].endswith("encoder: image to its features")

    def test_run_efficiency__no_decoder(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model", target=None)
        with pytest.raises(ValueError, match="no decoder that could be timed"):
            run_efficiency(*_given(tmp_path, source))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_run_efficiency__gpu(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        given = _given(tmp_path, source, accelerator="cuda", crop=48)
        result = run_efficiency(*given, (1, 2))
        assert result.data == torch.cuda.get_device_name()
