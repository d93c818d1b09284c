"""Weights of the reference tokenizer, made by a rule of integers instead of a file."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stellar_plugin.tokenizer import MaskGITVQGAN

SEED = 305441741
MASK = 0xFFFFFFFF
SIZES = {"channels": 32, "num_blocks": 1, "latent_dim": 32, "num_codes": 64}


def reference_tokenizer() -> MaskGITVQGAN:
    tokenizer = MaskGITVQGAN(**SIZES)
    tokenizer.load_state_dict(tokenizer_weights(tokenizer))
    return tokenizer


def tokenizer_weights(tokenizer: MaskGITVQGAN) -> dict[str, Tensor]:
    expected = tokenizer.state_dict()
    return {
        name: _tensor(name, place, expected[name].shape)
        for place, name in enumerate(sorted(expected))
    }


def _tensor(name: str, place: int, shape: torch.Size) -> Tensor:
    u = _uniform(place, shape.numel()).view(shape)
    if "norm" in name:
        u = 1 + 0.25 * u if name.endswith("weight") else 0.25 * u
    elif name == "decoder.conv_out.bias":
        u = 0.5 + 0.125 * u
    elif name == "decoder.conv_out.weight":
        u = 0.0625 * u
    elif name.endswith("bias"):
        u = 0.125 * u
    elif name != "quantize.embedding.weight":
        u = 2.0 ** math.floor(math.log2((6 / shape[1:].numel()) ** 0.5)) * u
    return u.float()


def _uniform(place: int, count: int) -> Tensor:
    """Numbers in [-1, 1), float64; products wrap, their low 32 bits are exact."""
    x = (torch.arange(count) + SEED + 1000003 * place) & MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    x = x ^ (x >> 16)
    return (x >> 8).double() / 2**23 - 1
