"""Loads any encoder: a checkpoint, a timm model, raw patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.raw_patches import RawPatches
from lightly_ext.evaluate.result import random_weights
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import (
    Checkpoint,
    load_encoder,
    load_encoder_weights,
    load_network,
    methods,
    model_config,
    read_checkpoint,
    untrained_encoder,
    untrained_network,
)
from stellar_plugin.checkpoints.files import TIMM_PREFIX, timm_model
from stellar_plugin.checkpoints.layouts import TIMM as TIMM_LAYOUT
from stellar_plugin.checkpoints.load import ASSUMED, LICENSE, READ_AS, TAKEN, TOLD_BY
from stellar_plugin.checkpoints.recognise import WRAPPERS, unwrap, which_was_taken
from stellar_plugin.checkpoints.timm_models import architecture, settings_of
from stellar_plugin.encoder import StellarEncoder, is_plain
from stellar_plugin.hashes import file_sha256, weights_sha256
from stellar_plugin.networks import Network, TimmNetwork
from stellar_plugin.weight_files import read_tensors, usable

NOT_A_VIT = "pooled by the network"
PATCHES = "patches"
RAW_PATCHES = "raw patches"


def load_frozen_model(
    model: str,
    weights: str | None = None,
    untrained: bool = False,
    name: str | None = None,
    seed: int = 0,
    model_kwargs: dict[str, Any] | None = None,
) -> FrozenModel:
    """Loads any encoder.

    Args:
        model:
            What to evaluate: file, folder, "stellar-b16", hub repository or "timm:NAME"
            (ViT or not), of any layout that is read; "patches" is no model at all.
        weights:
            Weight file of a timm model, instead of timm's own weights.
        untrained:
            Evaluate the same architecture with random weights, drawn by the seed.
        name:
            Name of the model in tables. None makes one of `model`: that of the paper's
            tables for a file that is called as published and tells the same method.
        seed:
            Decides on random weights.
        model_kwargs:
            What a file does not tell or shall be otherwise: of a ViT arguments of
            `StellarEncoder` such as '{"pos_antialias": false, "img_size": [32, 64],
            "num_heads": 6}', of another network those of its family.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If weights and model do not fit, or timm has no such model.
    """
    arguments = model_kwargs or {}
    timm_name = (
        model.removeprefix(TIMM_PREFIX) if model.startswith(TIMM_PREFIX) else None
    )
    if weights is not None and (timm_name is None or untrained):
        raise ValueError(
            f"weights belong to a timm model ('timm:NAME') that is not untrained, the "
            f"model is '{model}'; name the file as the model itself."
        )
    patches = model.partition(":")[0] == PATCHES and not Path(model).exists()
    is_vit = not patches if timm_name is None else is_plain(architecture(timm_name))
    if arguments and not is_vit:
        raise ValueError(
            f"model_kwargs are arguments of ViTs, '{model}' is none; leave them out."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if patches:
            loaded = _of_patches(model)
        elif timm_name is None or (is_vit and weights is None and not untrained):
            loaded = _of_checkpoint(model, untrained, arguments)
        elif is_vit:
            loaded = _of_timm_vit(timm_name, weights, untrained, arguments)
        else:
            loaded = _of_timm(timm_name, weights, untrained)
    name = name or _name(weights or model, loaded.origin.method)
    if untrained:
        name = f"{name} (untrained)"
        if loaded.origin.method != RAW_PATCHES:
            digest = random_weights(seed)
            loaded.origin = replace(loaded.origin, sha256=digest, seed=seed)
    loaded.origin = replace(loaded.origin, name=name, arguments=arguments)
    return loaded


def load_like(model: FrozenModel, source: str) -> FrozenModel:
    """Loads another encoder beside one: on its device, random if that one is.

    Args:
        model:
            The one, whose `model_kwargs` tell of its own file alone.
        source:
            As `model` of `load_frozen_model`.
    """
    untrained, seed = model.origin.untrained, model.origin.seed or 0
    other = load_frozen_model(source, untrained=untrained, seed=seed)
    return other.to(model.mean.device)


def load_untrained(model: FrozenModel, seed: int) -> FrozenModel:
    """The same architecture with random weights, on the same device.

    Feature and preprocessing stay those of the model, whatever random weights have.

    Args:
        model:
            The trained one.
        seed:
            Decides on the weights.
    """
    arguments = dict(model.origin.arguments)
    if isinstance(model.backbone, StellarEncoder):
        arguments["pos_antialias"] = model.backbone.pos_antialias  # as weights told
    other = load_frozen_model(
        model.origin.source, untrained=True, seed=seed, model_kwargs=arguments
    )
    origin = replace(
        model.origin,
        sha256=random_weights(seed),
        seed=seed,
        name=f"{model.origin.name} (untrained)",
    )
    loaded = FrozenModel(other.backbone, origin, other.has_decoder)
    return loaded.to(model.mean.device)


def load_stellar(model: FrozenModel) -> Stellar:
    """The whole STELLAR model with decoder, on the device, without gradients.

    Args:
        model:
            Its encoder, which it shares.

    Raises:
        ValueError: If the model is not STELLAR.
    """
    origin = model.origin
    if not origin.is_stellar:
        raise ValueError(
            f"This needs a STELLAR model with its decoder, '{origin.source}' is "
            f"{origin.method}: a decoder of its features is trained by --form scratch "
            "--train FOLDER."
        )
    checkpoint = read_checkpoint(origin.source)
    num_heads = origin.arguments.get("num_heads")
    if origin.seed is None:
        stellar = Stellar.from_checkpoint(checkpoint, num_heads=num_heads)
    else:
        config = {**model_config(checkpoint, num_heads), **origin.arguments}
        with torch.random.fork_rng():
            torch.manual_seed(origin.seed)
            stellar = Stellar(**config).eval()
    assert isinstance(model.backbone, StellarEncoder)
    stellar.encoder = model.backbone  # also as `model_kwargs` have it
    return stellar.requires_grad_(False).to(model.mean.device)


def _of_patches(source: str) -> FrozenModel:
    size = source.partition(":")[2] or "16"
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"'{source}' must be '{PATCHES}' or '{PATCHES}:SIZE' in px.")
    origin = Origin(source, RAW_PATCHES, "no weights", feature="cls")
    return FrozenModel(RawPatches(int(size)), origin)


def _of_checkpoint(
    source: str, untrained: bool, arguments: Mapping[str, Any]
) -> FrozenModel:
    checkpoint = read_checkpoint(source)
    if checkpoint.network is not None:
        if untrained:
            network = untrained_network(checkpoint, **arguments)
            return _frozen(source, checkpoint, network)
        network, report = load_network(checkpoint, **arguments)
        return _frozen(source, checkpoint, network, report.facts)
    # Fresh projections, as for a file of timm's layout, would localize nothing.
    fresh = {} if checkpoint.has_localization else {"localization": False}
    arguments = {**fresh, **arguments}
    if untrained:
        encoder = untrained_encoder(checkpoint, **arguments)
        return _frozen(source, checkpoint, encoder)
    encoder, report = load_encoder(checkpoint, **arguments)
    return _frozen(source, checkpoint, encoder, report.facts)


def _of_timm_vit(
    name: str, weights: str | None, untrained: bool, arguments: Mapping[str, Any]
) -> FrozenModel:
    """A ViT of timm with other weights than timm's."""
    told = settings_of(architecture(name), name)
    arguments = {"pos_antialias": True if untrained else None, **arguments}
    encoder = StellarEncoder(name, num_queries=0, **arguments)
    if weights is None:
        method = methods.of_timm(told["timm_name"])
        checkpoint = Checkpoint(Path(name), TIMM_LAYOUT, {}, method)
        facts = {}
    else:
        checkpoint = read_checkpoint(weights)
        try:
            facts = load_encoder_weights(encoder, checkpoint).facts
        except ValueError as error:
            raise ValueError(
                f"{error} Its own network is built by --model {weights}."
            ) from error
        facts |= _other_images(checkpoint, told, facts.get(ASSUMED, ""))
        by_name = methods.of_timm(name)
        if by_name and not checkpoint.method and checkpoint.layout == TIMM_LAYOUT:
            checkpoint = replace(checkpoint, method=by_name)
            facts[TOLD_BY] = f"timm's name {name}"
            facts |= {LICENSE: by_name.license} if by_name.license else {}
    checkpoint = replace(
        checkpoint,
        config={**told, **checkpoint.config},
        images={**told, **checkpoint.images},
    )
    return _frozen(f"{TIMM_PREFIX}{name}", checkpoint, encoder, facts)


def _other_images(
    checkpoint: Checkpoint, told: Mapping[str, Any], assumed: str
) -> dict[str, str]:
    """Says that timm's model has not the mean and std of the method, which are left."""
    method = checkpoint.method
    ours = tuple(told["mean"]), tuple(told["std"])
    if method is None or method.feature is None or "mean" in checkpoint.config:
        return {}
    if ours == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        return {}
    text = f"mean and std of timm's model, {method.name} has ImageNet's"
    return {ASSUMED: ", ".join(filter(None, [assumed, text]))}


def _frozen(
    source: str,
    checkpoint: Checkpoint,
    encoder: StellarEncoder | Network,
    facts: Mapping[str, str] | None = None,
) -> FrozenModel:
    method, config, images = checkpoint.method, checkpoint.config, checkpoint.images
    facts = dict(facts or {})
    told = {*config, *checkpoint.assumed}
    if facts and method is None and "mean" not in told:
        untold = [facts.get(ASSUMED, ""), "mean and std of ImageNet"]
        facts[ASSUMED] = ", ".join(filter(None, untold))
    origin = Origin(
        source,
        method.name if method else checkpoint.layout,
        _sha256(checkpoint.path, encoder),
        mean=tuple(config.get("mean", IMAGENET_DEFAULT_MEAN)),
        std=tuple(config.get("std", IMAGENET_DEFAULT_STD)),
        interpolation=images.get("interpolation", "bicubic"),
        feature=method.feature if method else None,
        image_size=encoder.image_size,
        crop_pct=images.get("crop_pct"),
        facts=facts,
    )
    return FrozenModel(encoder, origin, checkpoint.has_decoder)


def _of_timm(name: str, weights: str | None, untrained: bool) -> FrozenModel:
    if weights is None and not untrained:
        model = timm_model(name)
    else:
        model = timm.create_model(name, num_classes=0)
    path = Path(weights or name)
    facts = {READ_AS: f"timm's {type(model).__name__}", TOLD_BY: "timm's name"}
    if weights is not None and (choice := _load_strictly(model, path)):
        facts[TAKEN] = choice
    digest = _sha256(path, model)
    data = resolve_data_config({}, model=model)
    origin = Origin(
        f"{TIMM_PREFIX}{name}",
        NOT_A_VIT,
        digest,
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
        feature="cls",
        image_size=tuple(data["input_size"][1:]),
        crop_pct=data["crop_pct"],
        facts=facts,
    )
    return FrozenModel(TimmNetwork(model), origin)


def _load_strictly(model: nn.Module, path: Path) -> str:
    """Loads the tensors of a file that the model needs, whatever stands before them.

    Returns:
        Which were taken of several, see `which_was_taken`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file '{path}'.")
    tensors, wrappers, left = unwrap(read_tensors(path)[0])
    wanted = model.state_dict()
    first = next(iter(wanted))
    found = {}
    for prefix in (n.removesuffix(first) for n in tensors if n.endswith(first)):
        state = {k: tensors[prefix + k] for k in wanted if prefix + k in tensors}
        if all(k in state and state[k].shape == v.shape for k, v in wanted.items()):
            found[prefix] = state
    if not found:
        raise ValueError(
            f"'{path}' does not hold the weights of {type(model).__name__}: under no "
            f"prefix are there all of its {len(wanted)} tensors ('{first}', ...) in "
            f"their shapes.{_other_network(path)}"
        )
    chosen = _nearest(list(found), path)
    state = found.pop(chosen)
    usable({k: v for k, v in state.items() if v.is_floating_point()}, path)
    model.load_state_dict(state)
    return which_was_taken(wrappers, left, chosen, [p.rstrip(".") for p in found])


def _other_network(path: Path) -> str:
    """What a file holds that is none of timm's model, "" if that is not known."""
    try:
        checkpoint = read_checkpoint(path)
    except ValueError:
        return ""
    if checkpoint.network is None:
        return f" It was read as {checkpoint.read_as}: evaluate it by --model {path}."
    family, sizes = checkpoint.network.family.__name__, checkpoint.network.arguments
    text = ", ".join(f"{name}={value}" for name, value in sizes.items())
    return (
        f" It holds a {family} ({text}), read as {checkpoint.read_as}: evaluate it by "
        f"--model {path}."
    )


def _nearest(prefixes: list[str], path: Path) -> str:
    """The prefix of the weights to take: of the shortest the one that is evaluated."""
    parts = [len(prefix.split(".")) for prefix in prefixes]
    nearest = [p for p, n in zip(prefixes, parts, strict=True) if n == min(parts)]
    for word in ("encoder_q", *WRAPPERS):  # MoCo evaluates the encoder of queries
        known = [prefix for prefix in nearest if word in prefix.split(".")]
        if len(known) == 1:
            return known[0]
    if len(nearest) > 1:
        raise ValueError(
            f"'{path}' holds several such networks, under {nearest}; save the one you "
            "want alone."
        )
    return nearest[0]


def _name(source: str, method: str) -> str:
    system = methods.system_of(source, method)
    return system.name if system else short_name(source)


def short_name(source: str) -> str:
    """Short: "my_run" of "runs/my_run/model", "mae" of "x/mae.pth"."""
    path = Path(source)
    parts = [p for p in path.parts if p not in ("model", "checkpoint", "checkpoints")]
    name = parts[-1] if parts else source
    if path.suffix in (".pth", ".pt", ".ckpt", ".tar", ".safetensors", ".bin"):
        name = name.removesuffix(path.suffix)
    return name


def _sha256(path: Path, model: nn.Module) -> str:
    return file_sha256(path) if path.is_file() else f"weights {weights_sha256(model)}"
