"""Hashes that tell weights from other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def architecture_sha256(module: nn.Module) -> str:
    """SHA-256 of what a module computes apart from its weights.

    That is the class and the plain attributes of each part (sizes, epsilons, numbers of
    heads), and the shapes of all tensors.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        plain = {
            k: v
            for k, v in sorted(vars(part).items())
            if not k.startswith("_") and k != "training" and _is_plain(v)
        }
        digest.update(f"{name} {type(part).__qualname__} {plain}\n".encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
    return digest.hexdigest()


def weights_sha256(module: nn.Module, without: Sequence[str] = ()) -> str:
    """SHA-256 of names and values of a module's tensors, wherever they come from.

    Args:
        module:
            The module.
        without:
            Names that do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name not in without:
            digest.update(name.encode())
            # As bytes: numpy has no bfloat16.
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
