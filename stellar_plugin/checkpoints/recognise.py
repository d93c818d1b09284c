"""Which layout a checkpoint has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from stellar_plugin.arguments import check_arguments
from stellar_plugin.checkpoints import methods
from stellar_plugin.checkpoints.aim import read_aim
from stellar_plugin.checkpoints.beit import read_beit
from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint, read_source
from stellar_plugin.checkpoints.layouts import (
    AIM,
    BEIT,
    HAIKU,
    LAYOUTS,
    OFFICIAL,
    RESNET,
    STELLAR,
    SWIN,
    TIMM,
    TITOK,
    TRANSFORMERS,
)
from stellar_plugin.checkpoints.names import State, part
from stellar_plugin.checkpoints.readers import (
    read_official,
    read_own,
    read_timm_like,
    read_transformers,
)
from stellar_plugin.checkpoints.refused import refuse
from stellar_plugin.checkpoints.resnet import in_order, read_haiku, read_resnet
from stellar_plugin.checkpoints.swin import read_swin
from stellar_plugin.checkpoints.titok import read_titok
from stellar_plugin.state_dict import shown, unwrapped
from stellar_plugin.tokenizer import is_tokenizer
from stellar_plugin.weight_files import usable

# Dictionaries that anybody wraps weights in, the one to prefer first: evaluation reads
# the average of the weights where there is one. Those of single methods come before.
WRAPPERS = (
    "teacher",
    "teacher_backbone",
    "teacher_embedding_model",
    "teacher_embedding_model_wrapper",
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "backbone",
    "student",
    "encoder",
)
# Our own training checkpoints hold a model, and maybe its teacher.
PREFERRED_OWN = ("model",)
READERS = {
    OFFICIAL: read_official,
    TRANSFORMERS: read_transformers,
    TIMM: read_timm_like,
    BEIT: read_beit,
    TITOK: read_titok,
    RESNET: read_resnet,
    HAIKU: read_haiku,
    AIM: read_aim,
    SWIN: read_swin,
}
MAX_NESTING = 16


class Told(TypedDict, total=False):
    """Arguments of `Stellar` that files of other layouts tell."""

    model_name: str
    num_queries: int
    num_heads: int
    decoder_num_heads: int
    activation: str
    norm_eps: float | None
    pos_antialias: bool
    pos_embed: str
    final_norm: bool
    img_size: int | Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]


def read_checkpoint(
    source: str | Path, *, variant: str | None = None, **hub_kwargs: Any
) -> Checkpoint:
    """Reads a checkpoint of any known layout.

    Args:
        source:
            File, folder, "stellar-b16" and its like, hub repository ("owner/name") or
            timm model ("timm:NAME"). An existing path wins.
        variant:
            Which file of a hub repository, for example "b16" of "microsoft/STELLAR".
        hub_kwargs:
            revision, cache_dir, token, local_files_only, force_download.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ValueError: If the file cannot be read, is of no known layout or mixes several,
            or holds tensors with which no model can compute.
    """
    found = parse(read_source(source, variant, **hub_kwargs))
    heads = {f"{name}.{k}": v for name, h in found.heads.items() for k, v in h.items()}
    state = usable({**found.state, **heads}, found.path)
    return replace(
        found,
        state={name: state[name] for name in found.state},
        heads={name: part(state, f"{name}.") for name in found.heads},
    )


def parse(raw: RawCheckpoint) -> Checkpoint:
    """Recognises the layout from the names, and renames.

    Args:
        raw:
            What a source holds.

    Raises:
        ValueError: If the layout is not known or the tensors do not fit it.
    """
    with _naming(raw.path):
        tensors, wrappers, left = unwrap(raw.content)
    refuse(tensors, raw.path)
    if methods.ORDERED in wrappers:
        tensors = in_order(tensors)
    layout, prefix, others = _recognise(tensors, raw.path)
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    outside = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    _refuse_mixture(layout, inside, raw.path)
    method, files, rule = methods.recognised(
        layout,
        _telling({*inside, *outside}, prefix),
        {*wrappers, *prefix.split(".")},
        inside,
        raw.path.name,
    )
    with _naming(raw.path):
        _check_alike(inside)
        if layout == STELLAR:
            result = read_own(raw, inside, outside, left)
        else:
            result = READERS[layout](raw, inside, files)
            ignored = (*result.ignored, *outside, *left)
            result = replace(result, ignored=ignored)
        told = {k: v for k, v in result.config.items() if k in Told.__annotations__}
        check_arguments(told, Told)
    # A head on top says more than the name of what it was put on.
    if result.method is not None and (method is None or method.feature):
        method, rule = result.method, result.rule
    choice = which_was_taken(wrappers, left, prefix, others)
    return replace(result, method=method, rule=rule, choice=choice)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in errors of what it holds."""
    try:
        yield
    except ValueError as error:
        text = str(error).removesuffix(".")
        raise ValueError(f"'{path}' cannot be used: {text}.") from error


def _telling(names: set[str], prefix: str) -> set[str]:
    """Names that may tell the method, not those of every ViT in lightly's wrappers.

    These keep timm's classifier, which nothing trains, and have a mask token.
    """
    outer, _, last = prefix.rstrip(".").rpartition(".")
    mask_token = f"{outer}.mask_token".removeprefix(".")
    masked = last == "vit" and mask_token in names
    if masked or (last == "_model" and outer.endswith(("wrapped_model", "_wrapper"))):
        return {n for n in names if n != mask_token and not n.startswith("head.")}
    return names


def which_was_taken(
    wrappers: list[str], left: list[str], prefix: str, others: list[str]
) -> str:
    """Which of several weights in a file were taken, "" if there is one.

    Args:
        wrappers:
            Dictionaries around them, see `unwrap`.
        left:
            What is beside those.
        prefix:
            What stands in front of their names.
        others:
            What stands in front of the names of the others.
    """
    known = _wrappers()
    beside = [name for name in left if name in known] + others
    taken = ".".join(filter(None, [*wrappers, prefix.rstrip(".")]))
    return f"those of '{taken}', not of {shown(beside)}" if beside else ""


def unwrap(content: Mapping[str, Any]) -> tuple[State, list[str], list[str]]:
    """Takes tensors out of dictionaries, and their names out of wrapping modules.

    Args:
        content:
            What a file holds.

    Returns:
        Tensors, the dictionaries around them, and the names of what is beside those.

    Raises:
        ValueError: If two tensors have one name inside wrapping modules.
    """
    wrappers: list[str] = []
    left: list[str] = []
    known = _wrappers()
    while len(wrappers) < MAX_NESTING:  # a pickle may hold itself
        inner = [w for w in known if isinstance(content.get(w), Mapping)]
        if not inner:
            break
        left += [str(name) for name in content if name != inner[0]]
        wrappers.append(inner[0])
        content = content[inner[0]]
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    left += [str(name) for name in content if name not in tensors]
    return unwrapped(tensors), wrappers, left


def _check_alike(tensors: State) -> None:
    """Refuses what cannot be put together with other tensors."""
    devices = {tensor.device for tensor in tensors.values()}
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.layout is not torch.strided or (tensor.is_meta and len(devices) > 1)
    ]
    if odd:
        raise ValueError(f"it holds tensors without values, or sparse: {shown(odd)}")


def _wrappers() -> tuple[str, ...]:
    """All known wrappers, the one to prefer first."""
    of_methods = (word for word in methods.wrappers() if word not in WRAPPERS)
    return *of_methods, *WRAPPERS


def _recognise(tensors: State, path: Path) -> tuple[str, str, list[str]]:
    """Layout, what stands in front of its names, and of other ViTs' in the file."""
    for layout in LAYOUTS:
        for anchor in layout.anchors:
            prefixes = [
                name.removesuffix(anchor)
                for name in tensors
                if name == anchor or name.endswith(f".{anchor}")
            ]
            if prefixes:
                words = PREFERRED_OWN if layout.name == STELLAR else _wrappers()
                chosen = _preferred(prefixes, words, path)
                others = [p.rstrip(".") for p in prefixes if p != chosen]
                return layout.name, chosen, others
    if is_tokenizer(tensors):
        raise ValueError(
            f"'{path}' holds the tokenizer MaskGIT-VQGAN, no encoder whose features "
            "are evaluated: name it by --tokenizer where something decodes to codes."
        )
    raise ValueError(
        f"'{path}' is of no known layout. Its names: "
        f"{shown(list(tensors)) or 'none, it holds no tensors'}. Known layouts: "
        f"{methods.known_layouts()}. What stands before the names does not matter, "
        "'teacher_backbone.vit.' or a dictionary 'state_dict'."
    )


def _refuse_mixture(layout: str, inside: State, path: Path) -> None:
    if layout not in (OFFICIAL, TRANSFORMERS):
        return
    timm = [name for name in inside if name.startswith(("blocks.", "patch_embed."))]
    if timm:
        raise ValueError(
            f"'{path}' mixes layouts: it is {layout} by its other names, {shown(timm)} "
            "are timm's; save one ViT alone."
        )


def _preferred(prefixes: list[str], words: tuple[str, ...], path: Path) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    for word in words:
        chosen = [prefix for prefix in prefixes if word in prefix.split(".")]
        if len(chosen) == 1:
            return chosen[0]
    raise ValueError(
        f"'{path}' mixes several ViTs, under {prefixes}; save the one you want alone."
    )
