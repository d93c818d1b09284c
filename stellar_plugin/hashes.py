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
