"""TiTok's files, whose names are ours: what their tensors and their config tell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from stellar_plugin.arguments import check_arguments
from stellar_plugin.checkpoints.checkpoint import Architecture, Checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.layouts import TITOK
from stellar_plugin.checkpoints.methods import Files
from stellar_plugin.checkpoints.names import State
from stellar_plugin.checkpoints.readers import as_mapping
from stellar_plugin.networks.titok import TiTok

_LATER = (
    "only TiTok with codes (B-64, L-32, S-128 and the later ..._vq8k) is read, as "
    "tokenizer_titok_b64.bin"
)


def read_titok(raw: RawCheckpoint, state: State, files: Files | None) -> Checkpoint:
    """Reads a TiTok, whole or of its first stage of training, without pixel decoder.

    Raises:
        ValueError: If it is one of the later variants that are not read, tensors that
            tell its sizes are missing, or its config.json is that of another.
    """
    told = as_mapping(raw.config.get("model"), "model of config.json")
    told = as_mapping(told.get("vq_model"), "model.vq_model of config.json")
    _refuse_later(state, told)
    try:
        sizes = _sizes(state)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"it is no whole TiTok, its sizes miss {error}") from error
    _check_config(told, sizes)
    # Of those published, the first ones do and the later ones do not.
    assumed = {"use_l2_norm": sizes["is_legacy"]}
    known = {name: told[name] for name in assumed if name in told}
    check_arguments(known, TiTok)
    return Checkpoint(
        raw.path,
        TITOK,
        state,
        network=Architecture(TiTok, {**sizes, **assumed, **known}),
        config=files.numerics() if files else {},
        assumed={name: v for name, v in assumed.items() if name not in known},
        num_queries=sizes["num_queries"],
    )


def _refuse_later(state: State, told: Mapping[str, Any]) -> None:
    if "decoder.text_guidance_proj.weight" in state:
        raise ValueError(f"it is TA-TiTok, whose decoder reads a text too; {_LATER}")
    if not any(name.startswith(("decoder.", "quantize.")) for name in state):
        raise ValueError(
            "it is the encoder of a TiTok alone: take the whole file, as "
            "tokenizer_titok_b64.bin"
        )
    if told.get("quantize_mode") == "vae" or "quantize.embedding.weight" not in state:
        raise ValueError(f"it is a TiTok of a VAE, without codes; {_LATER}")


def _sizes(state: State) -> dict[str, Any]:
    num_queries, width = state["latent_tokens"].shape
    num_codes, token_size = state["quantize.embedding.weight"].shape
    patch_size = state["encoder.patch_embed.weight"].shape[3]
    side = math.isqrt(len(state["encoder.positional_embedding"]) - 1)
    levels = _count(state, r"pixel_decoder\.up\.(\d+)\.")
    convolutions = [f"pixel_decoder.up.{i}.block.0.conv1.weight" for i in range(levels)]
    return {
        "embed_dim": width,
        "depth": _count(state, r"encoder\.transformer\.(\d+)\."),
        "num_queries": num_queries,
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "token_size": token_size,
        "num_codes": num_codes,
        "decoder_dim": len(state["decoder.decoder_embed.weight"]),
        "decoder_depth": _count(state, r"decoder\.transformer\.(\d+)\."),
        # Its decoder tells: the later ones end in pixels.
        "is_legacy": "decoder.conv_out.weight" not in state,
        "pixel_widths": [len(state[name]) for name in convolutions],
    }


def _check_config(told: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises ValueError if a config.json is not that of the tensors."""
    names = {
        "num_latent_tokens": "num_queries",
        "codebook_size": "num_codes",
        "token_size": "token_size",
        "is_legacy": "is_legacy",
    }
    wrong = [
        f"{name} {told[name]}, the weights {sizes[ours]}"
        for name, ours in names.items()
        if told.get(name, sizes[ours]) != sizes[ours]
    ]
    if wrong:
        raise ValueError(
            f"config.json says {'; '.join(wrong)}; take the files of one model"
        )


def _count(state: State, pattern: str) -> int:
    """How many different numbers the pattern finds in the names."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})
