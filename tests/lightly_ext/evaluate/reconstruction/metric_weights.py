"""Random weights in the layouts of the published metric networks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import alexnet

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.reconstruction.metric_networks import MetricNetworks


class _Blank(FeatureExtractorInceptionV3):
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None  # keeps the random weights of its layers


def write_inception(path: Path) -> Path:
    """A file as torch-fidelity publishes it."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    net = _Blank("blank", ["2048"], feature_extractor_weights_path=empty)
    torch.save(net.state_dict(), path)
    return path


def write_alexnet(path: Path) -> Path:
    """A file as torchvision publishes it, but without the large classifier."""
    torch.manual_seed(0)
    state = alexnet(num_classes=1).state_dict()
    torch.save({k: v for k, v in state.items() if "features" in k}, path)
    return path


class TinyInception(nn.Module):
    """Features of uint8 images: means and products of a few pixels."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        values = images.float() / 255
        return torch.cat([values.mean(dim=(2, 3)), values[:, :, 1, 2]], dim=1)


class TinyDistance(nn.Module):
    """Mean absolute difference of images in [0, 1]."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        assert min(first.min(), second.min()) >= 0
        assert max(first.max(), second.max()) <= 1
        return (first - second).abs().flatten(1).mean(dim=1)


def tiny_networks(
    devices: Devices, inception: str | None = None, lpips_net: str | None = None
) -> MetricNetworks:
    """Stands for `load_networks`."""
    assert isinstance(devices, Devices)
    return MetricNetworks(TinyInception(), TinyDistance(), ("tiny",))
