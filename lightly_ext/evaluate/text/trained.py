"""Trained probes: made once, kept in a folder, found again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lightly_ext.durable import replace_text, replace_weights
from lightly_ext.evaluate.classification.split import hold_out
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.numerics import numerics
from lightly_ext.evaluate.results import Results
from lightly_ext.evaluate.text.pairs import Pairs
from lightly_ext.evaluate.text.probe import TOKENS, AttentionProbe, cached_tokens
from lightly_ext.evaluate.text.retrieval import recall_chance
from lightly_ext.evaluate.text.tower import TextTower, embed_texts
from lightly_ext.evaluate.text.training import (
    MOST_HELD_OUT,
    Alignment,
    TrainingPairs,
    held_out_loader,
    training_loader,
)
from lightly_ext.evaluate.training import fit
from stellar_plugin.checkpoints import CONFIG_NAME, WEIGHTS_NAME
from stellar_plugin.protocols import AlignTextProtocol, card_digest


@dataclass(frozen=True)
class TrainedProbe:
    """A probe that is ready to be scored.

    Attributes:
        folder:
            Where it is stored.
        module:
            The probe, in evaluation mode, on the device.
        protocol:
            How it was trained.
        config:
            What it belongs to: "model", hash of the encoder; "text", hash of the text
            tower; "feature"; and "training", what was measured when it was trained.
    """

    folder: Path
    module: AttentionProbe
    protocol: AlignTextProtocol
    config: dict[str, Any]


def train_probe(
    cache: FeatureCache,
    results: Results,
    tower: TextTower,
    pairs: Pairs,
    protocol: AlignTextProtocol,
    feature: str,
) -> TrainedProbe:
    """Trains a probe and stores it, or continues, or takes what is there.

    Args:
        cache:
            Computes the features, or has them.
        results:
            Where the folder of the probe is kept.
        tower:
            The text tower.
        pairs:
            Images with captions.
        protocol:
            Says how to train.
        feature:
            One of `FEATURES`.

    Raises:
        ValueError: If a batch cannot be filled, or not be shared by the devices.
        RuntimeError: If training was interrupted, or too many images are unreadable.
    """
    model, devices = cache.model, cache.devices
    identity: dict[str, Any] = {
        "model": model.origin.sha256,
        "text": tower.sha256,
        "feature": feature,
        "protocol": protocol.card(),
        "pairs": results.fingerprint(pairs.files, beside=pairs.captions),
        "seed": devices.seed,
        "numerics": numerics(model, devices),
    }
    inputs = {"pairs": identity["pairs"]}
    decides = {**identity, **results.identity(model, protocol, inputs)}
    folder = results.output / f"align-text-probe-{card_digest(decides)}"
    if (folder / CONFIG_NAME).exists():
        devices.say(f"The trained probe is in {folder} already.")
        return load_probe(model, folder, tower)
    data = _training_pairs(cache, tower, pairs, protocol, feature)
    module = _fit(devices, data, protocol, folder)
    chance = recall_chance(data.starts.diff()[data.held_out])
    training = {
        "data": pairs.name,
        "num_images": len(pairs),
        "num_unreadable": len(pairs) - len(data.train) - len(data.held_out),
        "num_train": len(data.train),
        "num_held_out": len(data.held_out),
        "inverse_temperature": module.log_scale.exp().item(),
        "held_out": {**module.recalls, "chance": chance},
    }
    if devices.rank == 0:
        _store(folder, module.probe, {**identity, "training": training})
    devices.fabric.barrier()
    return load_probe(model, folder, tower)


def load_probe(model: FrozenModel, folder: Path, tower: TextTower) -> TrainedProbe:
    """Loads a trained probe.

    Args:
        model:
            The encoder.
        folder:
            The folder.
        tower:
            The text tower.

    Raises:
        FileNotFoundError: If there is no trained probe in the folder.
        ValueError: If it was trained for another encoder or text tower.
    """
    check_probe_files(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    _check(config["model"], model.origin.sha256, folder, "encoder", "model")
    _check(config["text"], tower.sha256, folder, "text tower", "text_weights")
    module = AttentionProbe(**config["sizes"])
    safetensors.torch.load_model(module, folder / WEIGHTS_NAME)
    module.requires_grad_(False).eval().to(model.mean.device)
    protocol = AlignTextProtocol(**config["protocol"])
    return TrainedProbe(folder, module, protocol, config)


def check_probe_files(folder: Path) -> None:
    """Checks that a folder holds a trained probe.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"There is no trained probe in '{folder}': '{name}' is missing."
            )


def _check(found: str, needed: str, folder: Path, what: str, option: str) -> None:
    if found != needed:
        raise ValueError(
            f"The probe in '{folder}' was trained for another {what} (hash "
            f"{found[:16]}, this one is {needed[:16]}): name that one as --{option}."
        )


def _training_pairs(
    cache: FeatureCache,
    tower: TextTower,
    pairs: Pairs,
    protocol: AlignTextProtocol,
    feature: str,
) -> TrainingPairs:
    texts = embed_texts(cache.devices, cache.folder, tower, pairs.texts)
    cached = cached_tokens(cache, pairs.files, protocol, feature)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), pairs.counts.cumsum(0)])
    train, held_out = hold_out(cached.readable, MOST_HELD_OUT)
    cache.devices.say(
        f"{pairs.name}: {len(train)} images to train on, {len(held_out)} held out, "
        f"{cached.num_unreadable} unreadable, {len(texts)} captions."
    )
    return TrainingPairs(cached.arrays[TOKENS], texts, starts, train, held_out)


def _fit(
    devices: Devices, pairs: TrainingPairs, protocol: AlignTextProtocol, folder: Path
) -> Alignment:
    batch_size = protocol.batch_sizes[0]
    loader = training_loader(devices, pairs, batch_size)
    held_out = held_out_loader(devices, pairs, batch_size)
    with torch.random.fork_rng():
        torch.manual_seed(devices.seed)
        probe = AttentionProbe(pairs.tokens.shape[2], pairs.texts.shape[1])
    module = Alignment(probe, protocol, pairs, devices.rank, devices.world_size)
    options = {"log_every_n_steps": 10, "num_sanity_val_steps": 0}
    fit(devices, module, protocol, folder, loader, held_out, **options)
    return module


def _store(folder: Path, probe: AttentionProbe, config: dict[str, Any]) -> None:
    """Writes the probe; the file that tells so comes last."""
    replace_weights(folder / WEIGHTS_NAME, probe)
    sizes = {"dim": probe.dim, "text_dim": probe.text_dim}
    text = json.dumps({**config, "sizes": sizes}, indent=2)
    replace_text(folder / CONFIG_NAME, f"{text}\n")
