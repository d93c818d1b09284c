"""Small files of networks of every kind, as they are published."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stellar_plugin.networks import Network
from stellar_plugin.networks.beit import BEiT
from stellar_plugin.networks.resnet import ResNet
from stellar_plugin.networks.swin import Swin
from tests.checkpoint_files import prefixed, save
from tests.published_vits import aim, msn, semmae, siamese_im


def byol(path: Path) -> Path:
    """mmselfsup's, with the average of the weights beside them."""
    state = resnet()
    target = prefixed(resnet(seed=1), "target_net.module.0.")
    neck = {"neck.fc0.weight": torch.zeros(8, 64)}
    content = {**prefixed(state, "backbone."), **target, **neck}
    return save({"meta": {}, "state_dict": content}, path)


def densecl(path: Path) -> Path:
    """The weights alone, and who wrote them."""
    return save({"state_dict": resnet(), "author": "DenseCL"}, path)


def simmim(path: Path) -> Path:
    """Swin's own names, in which a stage ends by merging patches."""
    network = Swin(img_size=64, embed_dim=16, depths=(2, 1, 1), num_heads=(1, 2, 4))
    state = {
        re.sub(
            r"layers\.(\d+)\.downsample",
            lambda m: f"layers.{int(m[1]) - 1}.downsample",
            name,
        ): tensor
        for name, tensor in filled(network).items()
    }
    head = {"decoder.0.weight": torch.zeros(768, 64, 1, 1)}
    mask = {"encoder.mask_token": torch.zeros(1, 1, 16)}
    return save({"model": {**prefixed(state, "encoder."), **mask, **head}}, path)


def beit(path: Path, seed: int = 0, **sizes: Any) -> Path:
    """With the head that predicts codes."""
    small = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
    state = filled(BEiT(**{**small, **sizes}), seed)
    head = {"lm_head.weight": torch.zeros(8192, len(state["norm.weight"]))}
    return save({"model": {**state, **head}}, path)


def data2vec(path: Path) -> Path:
    """BEiT's names, with a head that predicts features."""
    state = torch.load(beit(path), weights_only=True)["model"]
    state["lm_head.weight"] = torch.zeros(48, 48)
    return save({"model": state}, path)


def vit(content: Callable[..., Any], width: int) -> Callable[[Path], Path]:
    """Writes what `published_vits` makes, of a width that tells the heads."""

    def write(path: Path) -> Path:
        torch.manual_seed(0)
        return save(content(width=width), path)

    return write


# Of each kind what writes the file, and channels and cells of its map.
KINDS: dict[str, tuple[Callable[[Path], Path], int, int]] = {
    "byol": (byol, 64, 32),
    "densecl": (densecl, 64, 32),
    "simmim": (simmim, 64, 16),
    "beit": (beit, 48, 16),
    "data2vec": (data2vec, 48, 16),
    "msn": (vit(msn, 192), 192, 16),
    "siameseim": (vit(siamese_im, 192), 192, 16),
    "semmae": (vit(semmae, 192), 192, 16),
    "aim_600m": (vit(aim, 128), 128, 14),
}


def resnet(seed: int = 0) -> dict[str, Tensor]:
    """Bottlenecks of a fourth of the usual width, one of each stage."""
    network = ResNet(layers=(1, 1, 1, 1), channels=(2, 4, 8, 16), stem_width=8)
    return filled(network, seed)


def filled(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a network by the names of files, with random numbers."""
    torch.manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and "running_var" not in name:
            nn.init.normal_(tensor, mean=float(tensor.ndim == 1), std=0.2)
    return network.named.state_dict()
