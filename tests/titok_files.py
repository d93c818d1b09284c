"""Files of TiTok as they are published, with names and shapes written out here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NUM_PIXEL_CODES, PIXEL_DIM = 1024, 256


@dataclass(frozen=True)
class Sizes:
    """Sizes of a file, by default the smallest that has two heads."""

    width: int = 128
    depth: int = 2
    num_tokens: int = 5
    grid: int = 2
    patch: int = 16
    token_size: int = 6
    num_codes: int = 40
    decoder_width: int = 64
    decoder_depth: int = 1
    pixel_widths: tuple[int, ...] = (32, 32, 64, 64, 64)

    @property
    def side(self) -> int:
        return self.grid * self.patch


B_64 = Sizes(768, 12, 64, 16, 16, 12, 4096, 768, 12, (128, 128, 256, 256, 512))
L_32 = Sizes(1024, 24, 32, 16, 16, 12, 4096, 1024, 24, (128, 128, 256, 256, 512))
Shapes = dict[str, tuple[int, ...]]


def shapes(sizes: Sizes, legacy: bool = True, pixels: bool = True) -> Shapes:
    """Of a legacy file: whole, or without pixel decoder as after the first stage."""
    w, n, v, c = sizes.width, sizes.num_tokens, sizes.decoder_width, sizes.token_size
    result: Shapes = {
        "latent_tokens": (n, w),
        "encoder.patch_embed.weight": (w, 3, sizes.patch, sizes.patch),
        "encoder.patch_embed.bias": (w,),
        **_vit("encoder.", w, sizes.depth, sizes.grid, n),
        "encoder.conv_out.weight": (c, w, 1, 1),
        "encoder.conv_out.bias": (c,),
        "quantize.embedding.weight": (sizes.num_codes, c),
        "decoder.decoder_embed.weight": (v, c),
        "decoder.decoder_embed.bias": (v,),
        "decoder.mask_token": (1, 1, v),
        **_vit("decoder.", v, sizes.decoder_depth, sizes.grid, n),
    }
    if not legacy:
        channels = 3 * sizes.patch**2
        return result | {
            "decoder.ffn.0.weight": (channels, v, 1, 1),
            "decoder.ffn.0.bias": (channels,),
            "decoder.conv_out.weight": (3, 3, 3, 3),
            "decoder.conv_out.bias": (3,),
        }
    result |= {
        "decoder.ffn.0.weight": (2 * v, v, 1, 1),
        "decoder.ffn.0.bias": (2 * v,),
        "decoder.ffn.2.weight": (NUM_PIXEL_CODES, 2 * v, 1, 1),
        "decoder.ffn.2.bias": (NUM_PIXEL_CODES,),
    }
    return result | (_pixels(sizes.pixel_widths) if pixels else {})


def _vit(prefix: str, width: int, depth: int, grid: int, num_tokens: int) -> Shapes:
    result: Shapes = {
        "class_embedding": (1, width),
        "positional_embedding": (grid**2 + 1, width),
        "latent_token_positional_embedding": (num_tokens, width),
        **_affine("ln_pre", width),
        **_affine("ln_post", width),
    }
    for i in range(depth):
        block = f"transformer.{i}."
        result |= {
            **_affine(f"{block}ln_1", width),
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            **_affine(f"{block}ln_2", width),
            f"{block}mlp.c_fc.weight": (4 * width, width),
            f"{block}mlp.c_fc.bias": (4 * width,),
            f"{block}mlp.c_proj.weight": (width, 4 * width),
            f"{block}mlp.c_proj.bias": (width,),
        }
    return {f"{prefix}{name}": shape for name, shape in result.items()}


def _pixels(widths: Sequence[int]) -> Shapes:
    result: Shapes = {
        "pixel_quantize.embedding.weight": (NUM_PIXEL_CODES, PIXEL_DIM),
        "pixel_decoder.conv_in.weight": (widths[-1], PIXEL_DIM, 3, 3),
        "pixel_decoder.conv_in.bias": (widths[-1],),
    }
    blocks = {f"mid.{i}": (widths[-1], widths[-1]) for i in range(2)}
    for level, width in enumerate(widths):
        above = widths[min(level + 1, len(widths) - 1)]
        blocks[f"up.{level}.block.0"] = (above, width)
        blocks[f"up.{level}.block.1"] = (width, width)
        if level:
            name = f"pixel_decoder.up.{level}.upsample_conv"
            result |= {f"{name}.weight": (width, width, 3, 3), f"{name}.bias": (width,)}
    for block, (i, o) in blocks.items():
        name = f"pixel_decoder.{block}"
        result |= {
            **_affine(f"{name}.norm1", i),
            f"{name}.conv1.weight": (o, i, 3, 3),
            **_affine(f"{name}.norm2", o),
            f"{name}.conv2.weight": (o, o, 3, 3),
        }
        if i != o:
            result[f"{name}.nin_shortcut.weight"] = (o, o, 1, 1)
    return result | {
        **_affine("pixel_decoder.norm_out", widths[0]),
        "pixel_decoder.conv_out.weight": (3, widths[0], 3, 3),
        "pixel_decoder.conv_out.bias": (3,),
    }


def _affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def weights(all_shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Numbers at which nothing vanishes or saturates."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in all_shapes.items():
        values = torch.randn(shape, generator=generator)
        part = name.rpartition(".")[0].rpartition(".")[2]
        if "norm" in part or part.startswith("ln_"):
            values = 0.2 * values + (1 if name.endswith("weight") else 0)
        elif len(shape) > 1 and name.endswith("weight") and "embedding" not in name:
            values = values * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        elif name.endswith("bias"):
            values = 0.3 * values
        result[name] = values
    # So that images of noise have codes of their own, and pixels are within [0, 1].
    result["encoder.patch_embed.weight"] *= 4
    head = (
        "decoder.conv_out"
        if "decoder.conv_out.bias" in result
        else "pixel_decoder.conv_out"
    )
    if f"{head}.bias" in result:
        result[f"{head}.weight"] *= 0.1
        result[f"{head}.bias"] = torch.full((3,), 0.5)
    return result


def write_titok(path: Path, sizes: Sizes | None = None, seed: int = 0) -> str:
    """Writes a whole legacy file of small sizes."""
    torch.save(weights(shapes(sizes or Sizes()), seed), path)
    return str(path)
