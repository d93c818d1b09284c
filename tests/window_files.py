"""Weight files with relative position biases, by their published names and shapes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
Grid = tuple[int, int]


def beit_shapes(
    width: int, depth: int, heads: int, grid: int, patch: int, outputs: int
) -> dict[str, tuple[int, ...]]:
    """Of pre-training, in unilm and in data2vec_vision; `outputs` of the head."""
    tokens, hidden = grid**2 + 1, 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "mask_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "rel_pos_bias.relative_position_bias_table": ((2 * grid - 1) ** 2 + 3, heads),
        "rel_pos_bias.relative_position_index": (tokens, tokens),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "lm_head.weight": (outputs, width),
        "lm_head.bias": (outputs,),
    }
    for block in range(depth):
        of_block = {
            **dict.fromkeys(("gamma_1", "gamma_2"), (width,)),
            **_norms(width, "norm1", "norm2"),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (hidden, width),
            "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (width, hidden),
            "mlp.fc2.bias": (width,),
        }
        shapes |= {f"blocks.{block}.{name}": of_block[name] for name in of_block}
    return shapes


def swin_shapes(
    width: int, depths: Sequence[int], heads: Sequence[int], window: int
) -> dict[str, tuple[int, ...]]:
    """Of SimMIM's pre-training, for images of 32 windows in four stages."""
    area, stages = window**2, len(depths)
    last, pixels = width * 2 ** (stages - 1), 3 * (4 * 2 ** (stages - 1)) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.mask_token": (1, 1, width),
        "encoder.patch_embed.proj.weight": (width, 3, 4, 4),
        "encoder.patch_embed.proj.bias": (width,),
        **_norms(width, "encoder.patch_embed.norm"),
        **_norms(last, "encoder.norm"),
        "decoder.0.weight": (pixels, last, 1, 1),
        "decoder.0.bias": (pixels,),
    }
    for stage, (depth, num_heads) in enumerate(zip(depths, heads, strict=True)):
        start, d = f"encoder.layers.{stage}", width * 2**stage
        if stage < stages - 1:
            shapes |= _norms(4 * d, f"{start}.downsample.norm")
            shapes[f"{start}.downsample.reduction.weight"] = (2 * d, 4 * d)
        for block in range(depth):
            of_block = {
                **_norms(d, "norm1", "norm2"),
                "attn.relative_position_bias_table": ((2 * window - 1) ** 2, num_heads),
                "attn.relative_position_index": (area, area),
                "attn.qkv.weight": (3 * d, d),
                "attn.qkv.bias": (3 * d,),
                "attn.proj.weight": (d, d),
                "attn.proj.bias": (d,),
                "mlp.fc1.weight": (4 * d, d),
                "mlp.fc1.bias": (4 * d,),
                "mlp.fc2.weight": (d, 4 * d),
                "mlp.fc2.bias": (d,),
            }
            if block % 2 and stage < stages - 1:
                windows = 4 ** (stages - 1 - stage)
                of_block["attn_mask"] = (windows, area, area)
            names = (f"{start}.blocks.{block}.{name}" for name in of_block)
            shapes |= dict(zip(names, of_block.values(), strict=True))
    return shapes


def filled(shapes: dict[str, tuple[int, ...]], device: str = "cpu") -> State:
    """Random numbers everywhere, and the indices that files have as buffers."""
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if not name.endswith("relative_position_index"):
            state[name] = 0.3 * torch.randn(shape, device=device)
        elif device == "meta":
            state[name] = torch.empty(shape, dtype=torch.long, device=device)
        else:
            side = round(shape[0] ** 0.5)
            with_cls = side**2 < shape[0]
            state[name] = rows_of_pairs((side, side), with_cls)
    return state


def rows_of_pairs(grid: Grid, with_cls: bool) -> Tensor:
    """The row of the table for each pair of tokens, by one pair after the other."""
    height, width = grid
    places = list(itertools.product(range(height), range(width)))
    distances = (2 * height - 1) * (2 * width - 1)
    rows = torch.zeros(len(places), len(places), dtype=torch.long)
    for i, (y, x) in enumerate(places):
        for j, (other_y, other_x) in enumerate(places):
            down, across = y - other_y + height - 1, x - other_x + width - 1
            rows[i, j] = down * (2 * width - 1) + across
    if not with_cls:
        return rows
    result = torch.full((len(places) + 1,) * 2, distances + 2)  # CLS to CLS
    result[0, 1:] = distances  # CLS to patches
    result[1:, 0] = distances + 1  # patches to CLS
    result[1:, 1:] = rows
    return result


def resampled_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """BEiT's: distances grow geometrically, so that the largest ones meet."""
    cls = table[(2 * old[0] - 1) * (2 * old[1] - 1) :]
    values = table[: len(table) - len(cls)].double()
    values = values.unflatten(0, (2 * old[0] - 1, 2 * old[1] - 1))
    down, across = (_interpolation(o, n) for o, n in zip(old, new, strict=True))
    resampled = torch.einsum("ay,bx,yxh->abh", down, across, values)
    return torch.cat([resampled.flatten(0, 1).float(), cls])


def _interpolation(old: int, new: int) -> Tensor:
    """Weights (2 new - 1, 2 old - 1) of a linear interpolation along one axis."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if sum(ratio**i for i in range(old - 1)) > new - 1:
            high = ratio
        else:
            low = ratio
    steps = [sum(ratio**i for i in range(n)) for n in range(old)]
    places = [-step for step in reversed(steps[1:])] + steps
    weights = torch.zeros(2 * new - 1, len(places), dtype=torch.double)
    for row, place in enumerate(range(1 - new, new)):
        clamped = min(max(place, places[0]), places[-1])
        right = next(i for i, p in enumerate(places) if p >= clamped)
        left = max(right - 1, 0)
        gap = places[right] - places[left]
        share = (clamped - places[left]) / gap if gap else 1.0
        weights[row, left] += 1 - share
        weights[row, right] += share
    return weights


def _norms(width: int, *names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}
