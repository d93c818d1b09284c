"""FID, LPIPS, PSNR and SSIM of decoded images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from lightly_ext.evaluate.finite import not_finite
from lightly_ext.evaluate.reconstruction.metric_networks import MetricNetworks
from stellar_plugin.protocols import MOST_PSNR_DB

SSIM_WINDOW = 11  # px, of torchmetrics' Gaussian with sigma 1.5


class _Identity(nn.Identity):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance of features that are computed already, float64.

    `update` takes features with shape (batch_size, num_features).

    Attributes:
        num_features:
            Number of features.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(feature=_Identity(num_features))
        # Type of the result; torchmetrics learns it from the first batch, which a
        # process may not have.
        self.orig_dtype = torch.float64


class MeanScores(Metric):
    """Sums LPIPS, PSNR and SSIM of every image, float64, over all processes."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(3, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        """Adds scores with shape (batch_size, 3)."""
        self.total += scores.double().sum(dim=0)
        self.count += len(scores)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns the means, and the number of images."""
        return self.total / self.count, self.count


class ImageScores:
    """Scores several decodings of the same images.

    Attributes:
        networks:
            The networks, on the device of the images.
        prefixes:
            What the names of scores begin with, one for each decoding.
        device:
            Device of images and networks.

    Examples:
        >>> scores = ImageScores(networks, ["", "tokenizer_"], images.device)
        >>> scores.update(images, [decoded, images_of_the_tokenizer])
        >>> scores.compute()["tokenizer_fid"]
    """

    def __init__(
        self, networks: MetricNetworks, prefixes: Sequence[str], device: torch.device
    ) -> None:
        self.networks = networks
        self.prefixes = list(prefixes)
        width = int(networks.inception.num_features)  # type: ignore[arg-type]
        self.fids = [FrechetDistance(width).to(device) for _ in prefixes]
        self.means = [MeanScores().to(device) for _ in prefixes]

    @torch.no_grad()
    def update(self, images: Tensor, decoded: Sequence[Tensor]) -> None:
        """Adds images, each once over all processes.

        Args:
            images:
                uint8 images with shape (batch_size, 3, height, width).
            decoded:
                Their decodings, each of the same type and shape.
        """
        if not len(images):
            return
        # No TF32: scores shall not depend on the device.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = self.networks.inception(images).double()
            for i, other in enumerate(decoded):
                self.fids[i].update(features, real=True)
                fake = self.networks.inception(other).double()
                self.fids[i].update(fake, real=False)
                self.means[i].update(self._of_each(images, other))

    def compute(self) -> dict[str, float]:
        """Scores of all images of all processes; every process calls it."""
        scores: dict[str, float] = {}
        for i, prefix in enumerate(self.prefixes):
            (lpips, psnr, ssim), count = self.means[i].compute()
            scores |= {
                f"{prefix}fid": float(self.fids[i].compute()),
                f"{prefix}lpips": float(lpips),
                f"{prefix}psnr_db": float(psnr),
                f"{prefix}ssim": float(ssim),
                "num_images": int(count),
            }
        return scores

    def _of_each(self, images: Tensor, other: Tensor) -> Tensor:
        """LPIPS, PSNR and SSIM of every image, (batch_size, 3)."""
        first, second = images.float() / 255, other.float() / 255
        psnr = peak_signal_noise_ratio(
            second, first, data_range=1.0, reduction="none", dim=(1, 2, 3)
        )
        # Windows across the border count or not, by the version of torchmetrics: here
        # they do not.
        _, windows = structural_similarity_index_measure(
            second, first, data_range=1.0, reduction="none", return_full_image=True
        )
        inside = slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2))
        ssim = windows[..., inside, inside].flatten(1).mean(dim=1)
        scores = [
            self.networks.lpips(first, second),
            psnr.clamp(max=MOST_PSNR_DB),  # infinite where nothing differs
            ssim,
        ]
        return torch.stack(scores, dim=1)


def to_uint8(images: Tensor, precision: str) -> Tensor:
    """Clamps intensities to [0, 1] and rounds them to 8 bits, as files hold them.

    Args:
        images:
            Tensor of any shape.
        precision:
            What they were computed in, for the error.

    Raises:
        RuntimeError: If a value is not finite.
    """
    if not images.isfinite().all():
        raise not_finite("Values of the decoder", precision)
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
