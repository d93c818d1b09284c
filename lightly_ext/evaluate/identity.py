"""What decides on a result (identity), and where it comes from (provenance)."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from lightly_ext.data import JPEG_DECODER, jpeg_decoder
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from stellar_plugin.checkpoints import WEIGHTS_NAME
from stellar_plugin.checkpoints.load import LICENSE, TOLD_BY
from stellar_plugin.hashes import architecture_sha256, file_sha256
from stellar_plugin.protocols import Protocol

PACKAGES = ("stellar-plugin", "torch", "torchvision", "timm", "torchmetrics")
# All options of a run decide on its result, but for these: they change no score, ...
NOT_DECIDING = {
    *("output", "batch_size", "num_workers", "accelerator", "devices"),
    *("controls", "resume", "force", "against"),
}
# ... what these name is on the card in another form, ...
ON_THE_CARD = {
    *("protocol", "lr", "train_batch_size", "pairs_per_batch", "background", "ignore"),
    *("inception", "lpips_net", "tokenizer", "text_weights", "clusters"),
}
# ... and of these the contents decide, which a task tells as `inputs`.
BY_CONTENT = {
    *("data", "images", "train", "masks", "split", "others", "zero_shot", "boxes"),
    *("class_names", "retrieval", "retrieval_images", "winoground", "mmvp"),
    "class_masks",
}
# Folders of parts that are trained already.
TRAINED_PARTS = {"decoder", "probe"}
# Of a model's origin, the names that a user gave to it.
NAMES = ("source", "name")


def run_identity(
    model: FrozenModel,
    devices: Devices,
    protocol: Protocol,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """What decides on a score beside the card: "model", "options" and "inputs".

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        protocol:
            The protocol as it is run; what it knows is on the card.
        options:
            All other options of the run, by name.
        inputs:
            Fingerprints of all data that decides, by what it is for.

    Returns:
        Values as JSON stores them.
    """
    origin = {
        f.name: getattr(model.origin, f.name)
        for f in fields(Origin)
        if f.name not in NAMES
    }
    # Random weights are read from nowhere; how a method was found out, and who may use
    # its weights, decides not.
    facts = {} if model.origin.untrained else dict(model.origin.facts)
    origin["facts"] = {k: v for k, v in facts.items() if k not in (TOLD_BY, LICENSE)}
    of_devices = {n: getattr(devices, n, None) for n in signature(Devices).parameters}
    options = {**of_devices, **options}
    left_out = NOT_DECIDING | ON_THE_CARD | BY_CONTENT | {"model", "results"}
    options = {
        name: value
        for name, value in options.items()
        if name not in left_out and not hasattr(protocol, name)
    }
    options = {k: v for k, v in options.items() if v is not None}
    for part in TRAINED_PARTS & options.keys():
        options[part] = file_sha256(Path(options[part], WEIGHTS_NAME))
    identity = {
        "model": {"architecture": architecture_sha256(model.backbone), **origin},
        "options": options,
        "inputs": inputs,
    }
    return json.loads(json.dumps(identity))  # as it is stored


def run_provenance(model: FrozenModel, devices: Devices) -> dict[str, Any]:
    """Model, device, versions and command of a run."""
    origin = model.origin
    return {
        "model": origin.label,
        "method": origin.method,
        "sha256": origin.sha256,
        "weights": origin.facts,
        "mean": origin.mean,
        "std": origin.std,
        "interpolation": origin.interpolation,
        "image_size": origin.image_size,
        "crop_pct": origin.crop_pct,
        "num_queries": model.num_queries,
        "seed": devices.seed,
        "precision": devices.precision,
        "batch_size": devices.batch_size,
        "device": f"{devices.world_size} x {_device_name(devices.device)}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            JPEG_DECODER: str(jpeg_decoder()),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
        "command": " ".join(["stellar", *sys.argv[1:]]),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"
