"""Sizes that the parts of the GPU benchmark run at."""

from __future__ import annotations

from benchmarks.step import BASE, Sizes

LARGE = Sizes("stellar_vit_large_patch16_224", width=1024, depth=24, heads=16)
TINY = Sizes(
    "stellar_vit_tiny_patch16_224",
    width=48,
    depth=2,
    heads=3,
    queries=4,
    views=2,
    image=64,
    local_image=32,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
    hidden=64,
    embedding=32,
    prototypes=128,
)


def base(tiny: bool) -> tuple[Sizes, tuple[int, ...]]:
    """STELLAR-B and the batch sizes to try until one fits."""
    return (TINY, (4,)) if tiny else (BASE, (128, 64))


def large(tiny: bool) -> tuple[Sizes, tuple[int, ...]]:
    """STELLAR-L and the batch sizes to try until one fits."""
    return (TINY, (4,)) if tiny else (LARGE, (128, 64))
