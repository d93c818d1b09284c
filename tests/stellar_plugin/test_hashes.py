from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from stellar_plugin.hashes import file_sha256, weights_sha256


def test_file_sha256__of_several_blocks(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2**13
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_weights_sha256__names_and_values() -> None:
    module = nn.Linear(3, 2)
    expected = hashlib.sha256(b"bias" + module.bias.detach().numpy().tobytes())
    expected.update(b"weight" + module.weight.detach().numpy().tobytes())
    assert weights_sha256(module) == expected.hexdigest()
    alone = hashlib.sha256(b"weight" + module.weight.detach().numpy().tobytes())
    assert weights_sha256(module, without=["bias"]) == alone.hexdigest()


def test_weights_sha256__half_precision_and_scalars() -> None:
    norm = nn.BatchNorm1d(2).to(torch.bfloat16)  # counts in a tensor without a shape
    before = weights_sha256(norm)
    norm.num_batches_tracked += 1
    assert weights_sha256(norm) != before
