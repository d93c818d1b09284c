"""TiTok in loops, in float64, from its formulas and by the names of its files."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
HEAD = 64


def tokens_of(state: State, image: Tensor) -> Tensor:
    """CLS, patches row by row, latent tokens behind the encoder's last LayerNorm.

    Args:
        state:
            Tensors of a file, float64.
        image:
            (3, height, width) in [0, 1], float64.
    """
    patch = state["encoder.patch_embed.weight"].shape[3]
    kernel = state["encoder.patch_embed.weight"].flatten(1)
    rows = [state["encoder.class_embedding"][0]]
    for y in range(0, image.shape[1], patch):
        for x in range(0, image.shape[2], patch):
            pixels = image[:, y : y + patch, x : x + patch].flatten()
            rows.append(kernel @ pixels + state["encoder.patch_embed.bias"])
    return _vit(state, "encoder.", rows, list(state["latent_tokens"]))


def vector_of(state: State, latents: Tensor, number: int, legacy: bool) -> Tensor:
    """What the code of a latent token is looked for by, before lengths of 1."""
    width, count = latents.shape[1], latents.shape[0]
    flat = latents.flatten()
    channels = [
        # Legacy: channel c of token n is element c * N + n of the matrix (N, W).
        flat[c * count + number] if legacy else latents[number, c]
        for c in range(width)
    ]
    kernel = state["encoder.conv_out.weight"][:, :, 0, 0]
    return kernel @ torch.stack(channels) + state["encoder.conv_out.bias"]


def codes_of(state: State, latents: Tensor, legacy: bool = True) -> list[int]:
    """The nearest code of each latent token, by lengths of 1."""
    codes = []
    for number in range(len(latents)):
        vector = vector_of(state, latents, number, legacy)
        vector = vector / vector.square().sum().sqrt()
        distances = [
            float((row / row.square().sum().sqrt() - vector).square().sum())
            for row in state["quantize.embedding.weight"]
        ]
        codes.append(distances.index(min(distances)))
    return codes


def patches_of(state: State, codes: list[int]) -> Tensor:
    """What the decoder's head reads, a row for each patch."""
    latents = []
    for code in codes:
        row = state["quantize.embedding.weight"][code]
        row = row / row.square().sum().sqrt()
        embed = state["decoder.decoder_embed.weight"]
        latents.append(embed @ row + state["decoder.decoder_embed.bias"])
    count = len(state["decoder.positional_embedding"]) - 1
    masks = [state["decoder.mask_token"][0, 0]] * count
    rows = [state["decoder.class_embedding"][0], *masks]
    return _vit(state, "decoder.", rows, latents)[1 : 1 + count]


def soft_codes(state: State, patches: Tensor) -> Tensor:
    """Mean of the pixel codes of each patch by their probabilities, (n, 256)."""
    rows = []
    for patch in patches:
        hidden = state["decoder.ffn.0.weight"][:, :, 0, 0] @ patch
        hidden = (hidden + state["decoder.ffn.0.bias"]).tanh()
        logits = state["decoder.ffn.2.weight"][:, :, 0, 0] @ hidden
        powers = (logits + state["decoder.ffn.2.bias"]).exp()
        mean = torch.zeros(256, dtype=torch.float64)
        for code, row in enumerate(state["pixel_quantize.embedding.weight"]):
            mean += powers[code] / powers.sum() * row
        rows.append(mean)
    return torch.stack(rows)


def decoded(state: State, codes: list[int]) -> Tensor:
    """Image (3, height, width) of a legacy file."""
    soft = soft_codes(state, patches_of(state, codes))
    side = math.isqrt(len(soft))
    x = soft.T.reshape(1, 256, side, side)
    x = _convolution(state, "pixel_decoder.conv_in", x)
    for i in range(2):
        x = _residual(state, f"pixel_decoder.mid.{i}", x)
    for level in reversed(range(5)):
        for i in range(2):
            x = _residual(state, f"pixel_decoder.up.{level}.block.{i}", x)
        if level:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _convolution(state, f"pixel_decoder.up.{level}.upsample_conv", x)
    x = F.silu(_group_norm(state, "pixel_decoder.norm_out", x))
    return _convolution(state, "pixel_decoder.conv_out", x)[0].clamp(0, 1)


def decoded_at_once(state: State, codes: list[int]) -> Tensor:
    """Image (3, height, width) of a later file: pixels of a patch, then 3 x 3."""
    patches = patches_of(state, codes)
    side = math.isqrt(len(patches))
    patch = math.isqrt(len(state["decoder.ffn.0.bias"]) // 3)
    image = torch.zeros(3, side * patch, side * patch, dtype=torch.float64)
    for number, row in enumerate(patches):
        values = state["decoder.ffn.0.weight"][:, :, 0, 0] @ row
        values = values + state["decoder.ffn.0.bias"]
        top, left = number // side * patch, number % side * patch
        for y in range(patch):
            for x in range(patch):
                for c in range(3):
                    value = values[(y * patch + x) * 3 + c]
                    image[c, top + y, left + x] = value
    return _convolution(state, "decoder.conv_out", image[None])[0].clamp(0, 1)


def _vit(
    state: State, prefix: str, rows: list[Tensor], latents: list[Tensor]
) -> Tensor:
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    positions = [*part["positional_embedding"]]
    positions += [*part["latent_token_positional_embedding"]]
    tokens = [*rows, *latents]
    x = [t + p for t, p in zip(tokens, positions, strict=True)]
    x = [_layer_norm(part, "ln_pre", t) for t in x]
    block = 0
    while f"transformer.{block}.ln_1.weight" in part:
        name = f"transformer.{block}."
        normed = [_layer_norm(part, f"{name}ln_1", t) for t in x]
        x = [t + a for t, a in zip(x, _attention(part, name, normed), strict=True)]
        x = [t + _mlp(part, name, _layer_norm(part, f"{name}ln_2", t)) for t in x]
        block += 1
    return torch.stack([_layer_norm(part, "ln_post", t) for t in x])


def _attention(part: State, name: str, tokens: list[Tensor]) -> list[Tensor]:
    width = len(tokens[0])
    weight, bias = part[f"{name}attn.in_proj_weight"], part[f"{name}attn.in_proj_bias"]
    projected = [weight @ t + bias for t in tokens]
    results = []
    for one in projected:
        heads = []
        for start in range(0, width, HEAD):
            query = one[start : start + HEAD]
            scores = [
                query @ other[width + start : width + start + HEAD] / HEAD**0.5
                for other in projected
            ]
            powers = [score.exp() for score in scores]
            total = sum(powers)
            heads.append(
                sum(
                    power / total * other[2 * width + start : 2 * width + start + HEAD]
                    for power, other in zip(powers, projected, strict=True)
                )
            )
        joined = torch.cat([torch.as_tensor(head) for head in heads])
        out = part[f"{name}attn.out_proj.weight"] @ joined
        results.append(out + part[f"{name}attn.out_proj.bias"])
    return results


def _mlp(part: State, name: str, token: Tensor) -> Tensor:
    hidden = part[f"{name}mlp.c_fc.weight"] @ token + part[f"{name}mlp.c_fc.bias"]
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return part[f"{name}mlp.c_proj.weight"] @ hidden + part[f"{name}mlp.c_proj.bias"]


def _layer_norm(part: State, name: str, token: Tensor) -> Tensor:
    centred = token - token.mean()
    scaled = centred / (centred.square().mean() + 1e-5).sqrt()
    return scaled * part[f"{name}.weight"] + part[f"{name}.bias"]


def _residual(state: State, name: str, x: Tensor) -> Tensor:
    y = _convolution(
        state, f"{name}.conv1", F.silu(_group_norm(state, f"{name}.norm1", x))
    )
    y = _convolution(
        state, f"{name}.conv2", F.silu(_group_norm(state, f"{name}.norm2", y))
    )
    if f"{name}.nin_shortcut.weight" in state:
        return y + _convolution(state, f"{name}.nin_shortcut", y)  # of the output
    return y + x


def _group_norm(state: State, name: str, x: Tensor) -> Tensor:
    groups = x.unflatten(1, (32, -1))
    centred = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = centred.square().mean(dim=(2, 3, 4), keepdim=True)
    normed = (centred / (variance + 1e-6).sqrt()).flatten(1, 2)
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return normed * weight[:, None, None] + bias[:, None, None]


def _convolution(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[3] // 2)
