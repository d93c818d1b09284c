"""What the files of MSN, SiameseIM, SemMAE and AIM hold, by their own names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint_files import prefixed
from tests.plain_vit import sines

State = dict[str, Tensor]
Fill = Callable[..., Tensor]
# Of the files that tests write.
WIDTH, DEPTH = 64, 2


def random(*shape: int) -> Tensor:
    """Numbers of a size at which neither norms nor attention saturate."""
    return 0.1 * torch.randn(*shape)


def empty(*shape: int) -> Tensor:
    """Zeros without memory."""
    return torch.zeros(()).expand(shape)


def linear(
    name: str, outputs: int, inputs: int, fill: Fill, bias: bool = True
) -> State:
    state = {f"{name}.weight": fill(outputs, inputs)}
    return state | ({f"{name}.bias": fill(outputs)} if bias else {})


def norm(name: str, width: int, fill: Fill) -> State:
    return {f"{name}.weight": 1 + fill(width), f"{name}.bias": fill(width)}


def block(width: int, fill: Fill, bias: bool = True, norms: str = "norm") -> State:
    return {
        **norm(f"{norms}1", width, fill),
        **linear("attn.qkv", 3 * width, width, fill, bias),
        **linear("attn.proj", width, width, fill, bias),
        **norm(f"{norms}2", width, fill),
        **linear("mlp.fc1", 4 * width, width, fill, bias),
        **linear("mlp.fc2", width, 4 * width, fill, bias),
    }


def blocks(name: str, depth: int, width: int, fill: Fill, **kwargs: Any) -> State:
    states = (block(width, fill, **kwargs) for _ in range(depth))
    return {
        f"{name}.{i}.{k}": v for i, state in enumerate(states) for k, v in state.items()
    }


def vit(
    patch_size: int,
    side: int,
    width: int = WIDTH,
    depth: int = DEPTH,
    fill: Fill = random,
) -> State:
    """A ViT without final norm; `side` is that of its grid."""
    return {
        "cls_token": fill(1, 1, width),
        "pos_embed": fill(1, 1 + side * side, width),
        "patch_embed.proj.weight": fill(width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": fill(width),
        **blocks("blocks", depth, width, fill),
    }


def msn(
    patch_size: int = 16,
    side: int = 4,
    width: int = WIDTH,
    depth: int = DEPTH,
    fill: Fill = random,
    hidden: int = 24,
) -> dict[str, Any]:
    """MSN: `hidden` is the width of the head."""
    head: State = {}
    for i, inputs in ((1, width), (2, hidden)):
        head |= linear(f"fc.fc{i}", hidden, inputs, fill)
        head |= norm(f"fc.bn{i}", hidden, fill)
        head |= {
            f"fc.bn{i}.running_mean": fill(hidden),
            f"fc.bn{i}.running_var": fill(hidden),
            f"fc.bn{i}.num_batches_tracked": torch.tensor(3),
        }
    head |= linear("fc.fc3", 8, hidden, fill)
    encoder, target = (
        vit(patch_size, side, width, depth, fill) | norm("norm", width, fill) | head
        for _ in range(2)
    )
    return {
        "epoch": 600,
        "loss": 1.0,
        "batch_size": 16,
        "world_size": 4,
        "encoder": prefixed(encoder, "module."),
        "target_encoder": prefixed(target, "module."),
        "opt": {"state": {}, "param_groups": [{"lr": 1.0}]},
        "prototypes": fill(12, 8),
    }


def siamese_im(
    patch_size: int = 16,
    side: int = 4,
    width: int = WIDTH,
    depth: int = DEPTH,
    fill: Fill = random,
    decoder_width: int = 32,
) -> dict[str, Any]:
    """SiameseIM."""
    size = {"width": width, "depth": depth, "fill": fill}
    online = vit(patch_size, side, **size)
    online["pos_embed"] = sincos_table(side, width)
    average = vit(patch_size, side, **size)
    del average["pos_embed"]
    decoder = {
        **linear("decoder_embed", decoder_width, width, fill),
        **blocks("projector_decoder_blocks", 1, decoder_width, fill),
    }
    state = {
        **online,
        **decoder,
        **prefixed(average | decoder, "mm_"),
        "mask_token": fill(1, 1, decoder_width),
        "decoder_pos_embed": fill(1, 1 + side * side, decoder_width),
        **linear("decoder_pos_mlp", decoder_width, 2 * decoder_width, fill),
        **blocks("predictor_decoder_blocks", 1, decoder_width, fill),
        **linear("decoder_pred", width, decoder_width, fill),
    }
    return {"model": state, "epoch": 1599, "optimizer": {"state": {}}, "scaler": {}}


def semmae(
    patch_size: int = 16,
    side: int = 28,
    width: int = WIDTH,
    depth: int = DEPTH,
    fill: Fill = random,
    decoder_width: int = 32,
) -> dict[str, Any]:
    """SemMAE, of the names of MAE."""
    state = {
        **vit(patch_size, side, width, depth, fill),
        **norm("norm", width, fill),
        **linear("decoder_embed", decoder_width, width, fill),
        "mask_token": fill(1, 1, decoder_width),
        "decoder_pos_embed": fill(1, 1 + side * side, decoder_width),
        **blocks("decoder_blocks", 1, decoder_width, fill),
        **norm("decoder_norm", decoder_width, fill),
        **linear("decoder_pred", 3 * patch_size**2, decoder_width, fill),
    }
    state["pos_embed"] = sincos_table(side, width)
    args = argparse.Namespace(model="mae_vit_base_patch16")
    return {"model": state, "epoch": 799, "optimizer": {"state": {}}, "args": args}


def aim(
    patch_size: int = 14, width: int = 128, depth: int = DEPTH, fill: Fill = random
) -> State:
    """AIM's trunk, without position table and class token."""
    embed = {
        "proj.weight": fill(width, 3, patch_size, patch_size),
        "proj.bias": fill(width),
        **norm("norm", width, fill),
    }
    inner = blocks("trunk.blocks", depth, width, fill, bias=False, norms="norm_")
    return (
        prefixed(embed, "preprocessor.patchifier.")
        | inner
        | norm("trunk.post_trunk_norm", width, fill)
    )


def aim_head(width: int = 128, classes: int = 10, fill: Fill = random) -> State:
    """The head of AIM's attention probe."""
    return {
        "head.cls_token": fill(1, 1, width),
        **linear("head.k", width, width, fill, bias=False),
        **linear("head.v", width, width, fill, bias=False),
        **linear("head.linear", classes, width, fill),
        "head.bn.running_mean": fill(width),
        "head.bn.running_var": fill(width),
        "head.bn.num_batches_tracked": torch.tensor(3),
    }


def aim_by_timms_names(state: State) -> State:
    """For `plain_vit`."""
    names = {
        "preprocessor.patchifier": "patch_embed",
        "trunk.post_trunk_norm": "norm",
        "trunk.": "",
        "norm_": "norm",
    }
    result = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def sincos_table(side: int, width: int) -> Tensor:
    """That of MAE, a row of zeros for the class token before it."""
    return torch.cat([torch.zeros(1, width), sines(width)(side, side)])[None]
