from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.plan import (
    MODELS,
    Model,
    exchange_table,
    hours,
    memory_table,
    ring_seconds,
    sinkhorn_seconds,
    training_table,
)
from lightly_ext.pretrain import StellarPretraining

GUIDE = Path(__file__).parents[2] / "docs" / "multi_node.md"
BASE, LARGE = MODELS


def test_hours__by_hand() -> None:
    # 1 281 167 x 150 images / (494 x 8 images/s) = 48 627 s
    assert hours(BASE, 1_281_167, 150, 8) == pytest.approx(13.508, abs=1e-3)
    # 10^9 / (145 x 256) = 26 940 s
    assert hours(LARGE, 10**9, 1, 256) == pytest.approx(7.483, abs=1e-3)


def test_ring_seconds__by_hand() -> None:
    # 2 x 7/8 x 477 MB / 300 GB/s, and 2 x 15/16 x 477 MB / 40 GB/s
    size = 4 * BASE.parameters
    assert ring_seconds(size, 8) == pytest.approx(2.783e-3, rel=1e-3)
    assert ring_seconds(size, 16) == pytest.approx(22.365e-3, rel=1e-3)


def test_sinkhorn_seconds__by_hand() -> None:
    # 8 times 16 stages of 10 us and 2 x 255/256 x 65 536 bytes / 40 GB/s
    assert sinkhorn_seconds(256) == pytest.approx(8 * (160e-6 + 3.264e-6), rel=1e-3)


@pytest.mark.parametrize("model, size", [(BASE, "base"), (LARGE, "large")])
def test_models__parameters(model: Model, size: str) -> None:
    with torch.device("meta"):
        module = StellarPretraining({"model_name": f"stellar_vit_{size}_patch16_224"})
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == model.parameters


def test_guide__has_the_tables() -> None:
    text = re.sub(r"\s+", " ", GUIDE.read_text())
    for table in (training_table(), exchange_table(), memory_table()):
        assert re.sub(r"\s+", " ", table) in text
