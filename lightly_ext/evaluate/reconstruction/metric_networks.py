"""The networks that FID and LPIPS look through, from their published files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import AlexNet_Weights

from lightly_ext.evaluate.devices import Devices

ALEXNET_SLICES = {  # of torchmetrics, from the layers of torchvision's AlexNet
    "slice1.0": "features.0",
    "slice2.3": "features.3",
    "slice3.6": "features.6",
    "slice4.8": "features.8",
    "slice5.10": "features.10",
}


class InceptionFeatures(nn.Module):
    """InceptionV3 of the original FID [0] in torch-fidelity's form, 2048 features.

    Resizes to 299 px as TensorFlow 1 did, which differs from the resizing in
    torchmetrics' own copy.

    - [0]: GANs trained by a two time-scale update rule, 2017,
      https://arxiv.org/abs/1706.08500

    Attributes:
        state:
            Tensors of torch-fidelity's weight file.
    """

    num_features = 2048

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        # torch-fidelity unpickles any object of a file, so it gets one of our making.
        file = io.BytesIO()
        torch.save(dict(state), file)
        file.seek(0)
        self.net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=file
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch_size, 2048) of uint8 images (batch_size, 3, h, w)."""
        return self.net(images)[0]


class PerceptualDistance(nn.Module):
    """LPIPS [0] with AlexNet and the authors' linear layers, version 0.1.

    - [0]: The unreasonable effectiveness of deep features, 2018,
      https://arxiv.org/abs/1801.03924

    Attributes:
        state:
            Tensors of torchvision's AlexNet.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        # The public class of torchmetrics downloads its backbone, and unpickles it.
        self.net = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
        backbone = {
            f"{ours}.{kind}": state[f"{theirs}.{kind}"]
            for ours, theirs in ALEXNET_SLICES.items()
            for kind in ("weight", "bias")
        }
        self.net.net.load_state_dict(backbone)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (batch_size,) of images (batch_size, 3, h, w) in [0, 1]."""
        return self.net(first, second, normalize=True).flatten()


@dataclass(frozen=True)
class WeightFile:
    """A published file with the weights of a metric's network.

    Attributes:
        what: What is in it.
        url: Where it is published.
        option: Option of the command that names a copy of it.
        network: Class that is built from its tensors.
    """

    what: str
    url: str
    option: str
    network: type[InceptionFeatures] | type[PerceptualDistance]

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[1]

    def find(self, path: str | None) -> Path:
        """Finds the file, or downloads it into the cache of torch.hub.

        Args:
            path:
                The user's copy, None looks in the cache.

        Raises:
            FileNotFoundError: If it is not there and cannot be downloaded.
        """
        cached = Path(torch.hub.get_dir()) / "checkpoints" / self.name
        found = Path(path) if path is not None else cached
        if found.is_file():
            return found
        reason = f"there is no '{found}'"
        if path is None:
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                prefix = cached.stem.rsplit("-", 1)[1]
                torch.hub.download_url_to_file(self.url, str(cached), prefix)
                return cached
            except (URLError, OSError, RuntimeError) as error:
                reason += f", and downloading it failed ({error})"
        raise FileNotFoundError(
            f"{self.what} needs the file {self.name}: {reason}. Get it from {self.url} "
            f"and put it there ('{cached}'), or name it with --{self.option} FILE."
        )

    def load(self, path: Path) -> tuple[nn.Module, str]:
        """Builds the network, weights-only, frozen.

        Args:
            path:
                The file, under whatever name.

        Returns:
            The network, and the SHA-256 of the file.

        Raises:
            ValueError: If the file holds something else.
        """
        data = path.read_bytes()
        try:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            network = self.network(state)
        except Exception as error:  # what the unpickler raises depends on the bytes
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"'{path}' does not hold the weights of {self.name} ({reason}). They "
                f"are published at {self.url}."
            ) from error
        return network.eval().requires_grad_(False), hashlib.sha256(data).hexdigest()


INCEPTION = WeightFile("FID", URL_INCEPTION_V3, "inception", InceptionFeatures)
ALEXNET = WeightFile(
    "LPIPS", AlexNet_Weights.IMAGENET1K_V1.url, "lpips_net", PerceptualDistance
)


@dataclass(frozen=True)
class MetricNetworks:
    """The networks that metrics look through.

    Attributes:
        inception: As `InceptionFeatures`, with its attribute `num_features`.
        lpips: As `PerceptualDistance`.
        identity: What tells them from others, for the card.
    """

    inception: nn.Module
    lpips: nn.Module
    identity: tuple[str, ...]


def load_networks(
    devices: Devices, inception: str | None = None, lpips_net: str | None = None
) -> MetricNetworks:
    """Loads both networks onto the device.

    Args:
        devices:
            Where it runs.
        inception:
            File with the weights for FID, None takes torch.hub's.
        lpips_net:
            File with the weights for LPIPS, None takes torch.hub's.

    Raises:
        FileNotFoundError: If a file is missing and cannot be downloaded.
        ValueError: If a file holds something else.
    """
    with devices.fabric.rank_zero_first(local=True):
        paths = [INCEPTION.find(inception), ALEXNET.find(lpips_net)]
    first, second = (
        file.load(path) for file, path in zip((INCEPTION, ALEXNET), paths, strict=True)
    )
    device = devices.device
    return MetricNetworks(
        first[0].to(device),
        second[0].to(device),
        (f"InceptionV3 sha256 {first[1]}", f"AlexNet sha256 {second[1]}"),
    )
