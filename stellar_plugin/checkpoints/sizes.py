"""The arguments of `Stellar` and `StellarEncoder`, read from tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.layouts import STELLAR
from stellar_plugin.checkpoints.names import State, part
from stellar_plugin.checkpoints.positions import Grid, folded
from stellar_plugin.tokenizer import tokenizer_sizes
from stellar_plugin.vit import HEADS_OF_WIDTH, size_of_width

DECODER_HEAD_WIDTH = 64
QKV_BIASES = ("qkv.bias", "q_bias", "q_proj.bias")  # of timm's ViT and its Eva
PROJ_BIASES = ("attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias")
_BLOCK = re.compile(r"blocks\.(?:\d+\.)?(\d+)\.")  # DINOv2 trains them in chunks
# Arguments of `Stellar` that no tensor shows.
NUMERICS = ("norm_eps", "pos_antialias", "mean", "std")
# Arguments of `Stellar` that are not its encoder's.
NOT_OF_ENCODER = (
    "schema_version",
    "target",
    "num_codes",
    "tokenizer",
    "mean",
    "std",
)


def model_config(
    checkpoint: Checkpoint,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> dict[str, Any]:
    """Arguments of `Stellar` for a checkpoint.

    Args:
        checkpoint:
            A model of this package or of the official layout.
        num_heads:
            Attention heads of the encoder, where neither a config nor its width tells.
        decoder_num_heads:
            The same for the decoder.

    Raises:
        ValueError: If the checkpoint is no STELLAR model, or the number of heads is not
            known.
    """
    if checkpoint.layout == STELLAR:
        return checkpoint.config
    checkpoint.require_vit()
    if not checkpoint.num_queries:
        raise ValueError(
            f"'{checkpoint.path}' ({checkpoint.read_as}) holds a ViT without latent "
            "queries, no STELLAR model; create a model and start from it by "
            "stellar_plugin.checkpoints.load_encoder_weights(model.encoder, source)."
        )
    config = encoder_config(checkpoint, num_heads)
    return {**config, **_decoder_config(checkpoint, decoder_num_heads)}


def encoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `StellarEncoder` for the encoder of a model.

    Args:
        config:
            Arguments of `Stellar`, as it keeps and saves them.
    """
    return {
        "localization": config.get("target", "pixels") is not None,
        **{
            name: value
            for name, value in config.items()
            if name not in NOT_OF_ENCODER and not name.startswith("decoder_")
        },
    }


def encoder_config(
    checkpoint: Checkpoint,
    num_heads: int | None = None,
    img_size: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Arguments of `StellarEncoder` for a checkpoint.

    Args:
        checkpoint:
            Of any layout; the config of our own is complete.
        num_heads:
            Attention heads, where neither a config nor the width tells.
        img_size:
            Size of the images that the encoder shall be built for. None is that of the
            position table.

    Raises:
        ValueError: If it is no ViT, the number of heads or the grid of the position
            table is not known, or patches are not square.
    """
    checkpoint.require_vit()
    if checkpoint.layout == STELLAR:
        config = encoder_arguments(checkpoint.config)
        return config if img_size is None else {**config, "img_size": img_size}
    vit = part(checkpoint.state, "encoder.vit.")
    width, patch_size = _patches(vit, checkpoint)
    registers = vit["reg_token"].shape[1] if "reg_token" in vit else 0
    registers -= checkpoint.num_queries or 0
    known = {**checkpoint.assumed, **checkpoint.config}
    named = known.get("model_name")
    config = {
        "model_name": named or f"stellar_{size_of_width(width).name}",
        "num_queries": checkpoint.num_queries or 0,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": depth(vit),
        "num_heads": heads(checkpoint, num_heads),
        "pos_antialias": known.get("pos_antialias", False),
    }
    if img_size is not None or "pos_embed" in vit or not checkpoint.rotary:
        config["img_size"] = (
            img_size or known.get("img_size") or _img_size(checkpoint, patch_size)
        )
    if not named:  # else the model has it already, of its own kind
        config["mlp_ratio"] = _mlp_ratio(vit, checkpoint)
        config["norm_eps"] = known.get("norm_eps")
    has_bias = any(f"blocks.0.attn.{name}" in vit for name in QKV_BIASES)
    optional = {
        "reg_tokens": (registers > 0 or named, registers),
        "class_token": ("cls_token" not in vit, False),
        "init_values": ("blocks.0.ls1.gamma" in vit, 1e-5),
        "qkv_bias": (checkpoint.rotary or not has_bias, has_bias),
        "pre_norm": ("norm_pre.weight" in vit and not checkpoint.rotary, True),
        "final_norm": (known.get("final_norm") is False, False),
        "pos_embed": ("pos_embed" in known, known.get("pos_embed")),
    }
    if not named:
        biased = any(name.endswith(PROJ_BIASES) for name in vit)
        optional["proj_bias"] = (not biased, False)
        optional["embed_norm_layer"] = ("patch_embed.norm.bias" in vit, "layernorm")
    return config | {k: value for k, (there, value) in optional.items() if there}


def _img_size(checkpoint: Checkpoint, patch_size: int) -> int | list[int]:
    grid = encoder_state(checkpoint)[1] or checkpoint.grid_size
    if grid is None:
        raise ValueError(
            f"'{checkpoint.path}' has no position table; create the encoder with the "
            "right img_size."
        )
    size = [patch_size * side for side in grid]
    return size[0] if size[0] == size[1] else size


def encoder_state(
    checkpoint: Checkpoint, wanted: Grid | None = None
) -> tuple[State, Grid | None]:
    """Tensors of the encoder by its own names, and the grid of their position table.

    Args:
        checkpoint:
            Of any layout.
        wanted:
            Grid of the encoder that they are for, see `positions.folded`.

    Raises:
        ValueError: If nothing tells the grid.
    """
    state = part(checkpoint.state, "encoder.")
    told = checkpoint.grid_size
    try:
        vit, grid = folded(part(state, "vit."), checkpoint.prefixes, told, wanted)
    except ValueError as error:
        raise ValueError(f"'{checkpoint.path}' cannot be used: {error}.") from error
    return state | {f"vit.{name}": tensor for name, tensor in vit.items()}, grid


def numerics(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of `Stellar` that continued training must keep, as far as known.

    Args:
        checkpoint:
            Of any layout.

    Returns:
        Those of `NUMERICS`; no tensor shows them.
    """
    known = {**checkpoint.assumed, **checkpoint.config}
    values = {name: known.get(name) for name in NUMERICS}
    return {name: value for name, value in values.items() if value is not None}


def inherited(checkpoint: Checkpoint, model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Stellar` that training takes over from weights of the encoder.

    Args:
        checkpoint:
            Of any layout.
        model:
            Arguments that are given. They win, and if `model_name` is among them, so do
            all sizes.

    Returns:
        Those of `NUMERICS` as far as they are known, and all that the encoder is built
        from, where no model is named.

    Raises:
        ValueError: If no model is named and the sizes are not known.
    """
    known = numerics(checkpoint)
    if "model_name" in model:
        return known
    size = model.get("img_size")
    known |= encoder_config(checkpoint, model.get("num_heads"), size)
    fresh = [] if checkpoint.num_queries else ["num_queries"]
    return {k: v for k, v in known.items() if k not in ("localization", *fresh)}


def heads(checkpoint: Checkpoint, num_heads: int | None = None) -> int:
    """Attention heads of the encoder: as given, by the config, or by the width.

    Raises:
        ValueError: If none of them tells.
    """
    if num_heads is not None:
        return num_heads
    known = {**checkpoint.assumed, **checkpoint.config}
    if "num_heads" in known:
        return known["num_heads"]
    width = _patches(part(checkpoint.state, "encoder.vit."), checkpoint)[0]
    if width not in HEADS_OF_WIDTH:
        raise ValueError(
            f"The number of attention heads of '{checkpoint.path}' is not known: a "
            f"width of {width} does not tell (known: {HEADS_OF_WIDTH}). Pass "
            "num_heads. `stellar evaluate` has --model_kwargs '{\"num_heads\": 3}', "
            "`stellar pretrain` --model.model.num_heads; a config.json beside the file "
            'with "num_heads" does it, too.'
        )
    return HEADS_OF_WIDTH[width]


def _decoder_config(checkpoint: Checkpoint, num_heads: int | None) -> dict[str, Any]:
    decoder = part(checkpoint.state, "decoder.")
    if not decoder:
        return {}
    needed = {"proj.weight", "blocks.0.mlp.fc1.weight", "head.weight"}
    missing = needed - {name for name, tensor in decoder.items() if tensor.ndim > 1}
    if missing:
        raise ValueError(
            f"'{checkpoint.path}' has a decoder without {', '.join(sorted(missing))} "
            "as matrices."
        )
    width = decoder["proj.weight"].shape[0]
    num_heads = num_heads or checkpoint.config.get("decoder_num_heads")
    if num_heads is None:
        if width % DECODER_HEAD_WIDTH:
            raise ValueError(
                f"The number of heads of the decoder of '{checkpoint.path}' is not "
                f"known: its width {width} is no multiple of {DECODER_HEAD_WIDTH}. "
                "Pass decoder_num_heads."
            )
        num_heads = width // DECODER_HEAD_WIDTH
    config: dict[str, Any] = {
        "decoder_dim": width,
        "decoder_depth": depth(decoder),
        "decoder_num_heads": num_heads,
        "decoder_mlp_ratio": _mlp_ratio(decoder, checkpoint),
    }
    if decoder["head.weight"].ndim == 2:
        config["target"] = "tokens"
        config["num_codes"] = decoder["head.weight"].shape[0]
        if tokenizer := part(checkpoint.state, "tokenizer."):
            config["tokenizer"] = tokenizer_sizes(tokenizer, str(checkpoint.path))
    return config


def _patches(vit: State, checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and patch size."""
    kernel = vit.get("patch_embed.proj.weight")
    shape = None if kernel is None else tuple(kernel.shape)
    if shape is None or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(
            f"'{checkpoint.path}' ({checkpoint.read_as}) has no patch embedding of RGB "
            f"images on square patches: patch_embed.proj.weight is {shape}, expected "
            "(width, 3, patch size, patch size)."
        )
    return shape[0], shape[2]


def depth(vit: State) -> int:
    """Number of transformer blocks that the names tell."""
    blocks = [int(found[1]) for name in vit if (found := _BLOCK.match(name))]
    return max(blocks, default=-1) + 1


def _mlp_ratio(vit: State, checkpoint: Checkpoint) -> float:
    inner, outer = (vit.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if (
        inner is None
        or outer is None
        or not inner.ndim == outer.ndim == 2
        or inner.shape[0] != outer.shape[1]
    ):
        raise ValueError(
            f"'{checkpoint.path}' ({checkpoint.read_as}) has no plain MLP in block 0; "
            "for a gated one create the encoder by its timm name and use "
            "load_encoder_weights."
        )
    return mlp_ratio(*inner.shape)


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which timm, which rounds the product down, makes a width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
