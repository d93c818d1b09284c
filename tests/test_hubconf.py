"""torch.hub reads hubconf.py of a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hubconf
from stellar_plugin import Stellar
from stellar_plugin.checkpoints.export import to_timm
from stellar_plugin.vit import SIZES
from tests import reference

ROOT = str(Path(__file__).parents[1])


def load(name: str, *args: Any, **kwargs: Any) -> Any:
    return torch.hub.load(ROOT, name, *args, source="local", **kwargs)


def test_list__every_size_and_trained_models() -> None:
    sizes = [f"stellar_{size.name}" for size in SIZES]
    assert sorted(hubconf.__all__) == sorted(["stellar", *sizes])
    # torch.hub shows the docstrings.
    assert all(vars(hubconf)[name].__doc__ for name in hubconf.__all__)


def test_load__pretrained_weights_of_a_file(tmp_path: Path) -> None:
    name = "stellar_vit_tiny_patch16_224"
    small = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}
    trained = Stellar(name, num_queries=16, decoder_depth=1, **small).eval()
    save_file(to_timm(trained.encoder)[0], tmp_path / "timm.safetensors")
    told = {"file": str(tmp_path / "timm.safetensors")}
    images = torch.randn(1, 3, 32, 32)
    vit = load(name, pretrained=True, pretrained_cfg_overlay=told, **small).eval()
    with torch.no_grad():
        expected = trained.encoder.forward_features(images)
        torch.testing.assert_close(vit.forward_features(images), expected)
        other = load(name, **small).eval().forward_features(images)
    assert not torch.allclose(other, expected)


def test_load__pretrained_without_weights() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        load("stellar_vit_tiny_patch16_224", pretrained=True)


def test_load__a_trained_model(tmp_path: Path) -> None:
    model = reference.stellar()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model(images), load("stellar", str(tmp_path))(images)
    torch.testing.assert_close(theirs.sparse, ours.sparse, rtol=0, atol=0)
