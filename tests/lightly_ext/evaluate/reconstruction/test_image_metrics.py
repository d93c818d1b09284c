from __future__ import annotations

import math
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from lightly_ext.evaluate.reconstruction.image_metrics import (
    FrechetDistance,
    ImageScores,
    MeanScores,
    to_uint8,
)
from lightly_ext.evaluate.reconstruction.metric_networks import MetricNetworks
from stellar_plugin.protocols import MOST_PSNR_DB
from tests import distributed
from tests.lightly_ext.evaluate.reconstruction.metric_weights import (
    TinyDistance,
    TinyInception,
)


def _images(num: int, seed: int = 0, size: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num, 3, size, size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def _networks() -> MetricNetworks:
    return MetricNetworks(TinyInception(), TinyDistance(), ("tiny",))


def _scores(images: Tensor, decoded: Tensor, batch_size: int = 4) -> dict[str, float]:
    scores = ImageScores(_networks(), [""], images.device)
    for first, second in zip(
        images.split(batch_size), decoded.split(batch_size), strict=True
    ):
        scores.update(first, [second])
    return scores.compute()


class TestFrechetDistance:
    def test_compute__closed_form_of_gaussians(self) -> None:
        torch.manual_seed(0)
        first = torch.randn(300, 64, dtype=torch.float64) @ torch.randn(64, 64).double()
        second = (
            torch.randn(200, 64, dtype=torch.float64) @ torch.randn(64, 64).double()
        )
        second += 3
        fid = FrechetDistance(64)
        for part in first.split(77):
            fid.update(part, real=True)
        for part in second.split(41):
            fid.update(part, real=False)
        mean = (first.mean(0) - second.mean(0)).square().sum()
        a, b = first.T.cov().numpy(), second.T.cov().numpy()
        root = scipy.linalg.sqrtm(a @ b).real
        expected = float(mean) + (a + b - 2 * root).trace()
        assert fid.compute().dtype == torch.float64
        assert float(fid.compute()) == pytest.approx(expected, rel=1e-9)

    def test_compute__shifted_mean(self) -> None:
        features = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
        shift = torch.linspace(-1, 2, 32)
        fid = FrechetDistance(32)
        fid.update(features.double(), real=True)
        fid.update(features.double() + shift, real=False)
        assert float(fid.compute()) == pytest.approx(float(shift.square().sum()))

    def test_compute__large_mean_loses_no_digits(self) -> None:
        # Sums of squares of float32 would leave nothing of the covariance.
        features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        fid = FrechetDistance(8)
        fid.update(features.double() + 1e4, real=True)
        fid.update(2 * features.double() + 1e4, real=False)
        variances = features.double().T.cov().trace()
        mean = features.double().mean(0).square().sum()
        # tr(C + 4 C - 2 (2 C)) = tr(C), and the means differ by one of the features
        expected = float(variances + mean)
        assert float(fid.compute()) == pytest.approx(expected, rel=1e-6)


class TestImageScores:
    def test_compute__identity_is_perfect(self) -> None:
        images = _images(12)
        scores = _scores(images, images)
        assert scores["fid"] == pytest.approx(0, abs=1e-6)
        assert scores["lpips"] == 0
        assert scores["psnr_db"] == pytest.approx(MOST_PSNR_DB)
        assert scores["ssim"] == pytest.approx(1, abs=1e-6)
        assert scores["num_images"] == 12

    @pytest.mark.parametrize("error", [3, 51])
    def test_compute__psnr_of_constant_error(self, error: int) -> None:
        images = _images(5).clamp(max=255 - error)
        scores = _scores(images, images + error)
        expected = -20 * math.log10(error / 255)
        assert scores["psnr_db"] == pytest.approx(expected, abs=1e-4)
        assert scores["lpips"] == pytest.approx(error / 255, abs=1e-6)

    def test_compute__psnr_is_averaged_over_images_in_db(self) -> None:
        images = _images(2).clamp(max=200)
        decoded = images + torch.tensor([5, 50], dtype=torch.uint8).view(2, 1, 1, 1)
        expected = -10 * (math.log10(5 / 255) + math.log10(50 / 255))
        assert _scores(images, decoded)["psnr_db"] == pytest.approx(expected, abs=1e-4)

    def test_compute__psnr_of_one_perfect_image_is_bounded(self) -> None:
        images = _images(2).clamp(max=200)
        decoded = images + torch.tensor([0, 5], dtype=torch.uint8).view(2, 1, 1, 1)
        expected = (MOST_PSNR_DB - 20 * math.log10(5 / 255)) / 2
        assert pytest.approx(58.92, abs=0.01) == MOST_PSNR_DB
        assert _scores(images, decoded)["psnr_db"] == pytest.approx(expected, abs=1e-4)

    def test_compute__ssim_by_brute_force(self) -> None:
        images, decoded = _images(3), _images(3, seed=1)
        line = (-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2)).exp()
        kernel = line[:, None] * line / line.sum() ** 2
        values = []
        for first, second in zip(images, decoded, strict=True):
            x, y = (
                (image.double() / 255).unfold(1, 11, 1).unfold(2, 11, 1)
                for image in (first, second)
            )

            def mean(window: Tensor) -> Tensor:
                return (window * kernel).sum(dim=(-1, -2))

            mx, my = mean(x), mean(y)
            vx, vy = mean(x * x) - mx**2, mean(y * y) - my**2
            cov = mean(x * y) - mx * my
            c1, c2 = 0.01**2, 0.03**2
            top = (2 * mx * my + c1) * (2 * cov + c2)
            bottom = (mx**2 + my**2 + c1) * (vx + vy + c2)
            values.append((top / bottom).mean())
        expected = float(torch.stack(values).mean())
        assert _scores(images, decoded)["ssim"] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("batch_size", [1, 3, 7])
    def test_compute__any_batch_size(self, batch_size: int) -> None:
        images, decoded = _images(7), _images(7, seed=1)
        whole = _scores(images, decoded, batch_size=7)
        parts = _scores(images, decoded, batch_size=batch_size)
        assert parts == pytest.approx(whole, rel=1e-6)

    def test_compute__decodings_apart(self) -> None:
        images, first, second = (_images(6, seed) for seed in range(3))
        both = ImageScores(_networks(), ["", "tokenizer_"], images.device)
        both.update(images, [first, second])
        scores = both.compute()
        expected = {f"tokenizer_{k}": v for k, v in _scores(images, second, 6).items()}
        expected = {**_scores(images, first, 6), **expected}
        del expected["tokenizer_num_images"]
        assert scores == pytest.approx(expected)

    def test_update__features_of_reals_are_computed_once(self) -> None:
        calls = []

        class Counting(nn.Module):
            num_features = 6

            def forward(self, images: Tensor) -> Tensor:
                assert images.dtype == torch.uint8
                calls.append(len(images))
                return TinyInception()(images)

        networks = MetricNetworks(Counting(), TinyDistance(), ())
        scores = ImageScores(networks, ["", "tokenizer_"], torch.device("cpu"))
        scores.update(_images(3), [_images(3, 1), _images(3, 2)])
        scores.update(_images(0), [_images(0), _images(0)])
        assert calls == [3, 3, 3]

    @pytest.mark.slow
    def test_compute__two_processes_as_one(self, tmp_path: Path) -> None:
        # 7 images and 2 processes: an uneven share, and none is counted twice. Then all
        # 7 in the first process.
        expected = _scores(_images(7), _images(7, seed=1))
        for uneven, first in distributed.run(_of_processes, tmp_path):
            assert uneven == pytest.approx(expected, rel=1e-6)
            assert first == pytest.approx(expected, rel=1e-6)
            assert uneven["num_images"] == 7


def _of_processes(rank: int, world_size: int) -> list[dict[str, float]]:
    images, decoded = _images(7), _images(7, seed=1)
    shares = (slice(rank, None, world_size), slice(0, 0 if rank else None))
    return [_scores(images[s], decoded[s], batch_size=2) for s in shares]


class TestMeanScores:
    def test_compute__float64(self) -> None:
        means = MeanScores()
        means.update(torch.full((1, 3), 2.0**30))
        means.update(torch.full((1, 3), 1.0))
        total, count = means.compute()
        assert total.tolist() == [(2.0**30 + 1) / 2] * 3
        assert count == 2


class TestToUint8:
    def test_to_uint8__clamps_and_rounds(self) -> None:
        values = torch.tensor([-0.3, 0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.7])
        assert to_uint8(values, "32-true").tolist() == [0, 0, 0, 1, 255, 255]

    def test_to_uint8__inverse_of_division(self) -> None:
        values = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(to_uint8(values / 255, "32-true"), values)

    def test_to_uint8__not_finite(self) -> None:
        with pytest.raises(RuntimeError, match="use --precision 32-true"):
            to_uint8(torch.tensor([0.5, float("nan")]), "16-mixed")
