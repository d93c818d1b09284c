from __future__ import annotations

import pytest
import timm
import torch

import stellar_plugin  # noqa: F401, registers the sizes

# Parameters of the plain ViT of timm without head, from its own model of that size.
SIZES = {
    "tiny_patch16_224": (192, 12, 3),
    "small_patch16_224": (384, 12, 6),
    "base_patch16_224": (768, 12, 12),
    "large_patch16_224": (1024, 24, 16),
    "huge_patch14_224": (1280, 32, 16),
}


@pytest.mark.parametrize("size", SIZES)
def test_create_model__parameters_of_timm_plus_queries(size: str) -> None:
    with torch.device("meta"):
        plain = timm.create_model(f"vit_{size}", num_classes=0)
        ours = timm.create_model(f"stellar_vit_{size}")
    width, depth, heads = SIZES[size]
    count = sum(p.numel() for p in plain.parameters())
    # 16 queries more, and no position of the CLS token
    expected = count + 16 * width - width
    assert sum(p.numel() for p in ours.parameters()) == expected
    assert (ours.embed_dim, len(ours.blocks)) == (width, depth)
    assert ours.blocks[0].attn.num_heads == heads
    assert ours.num_prefix_tokens == 17


def test_create_model__features_only() -> None:
    model = timm.create_model(
        "stellar_vit_tiny_patch16_224", features_only=True, img_size=64
    )
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 4, 4)] * 3
