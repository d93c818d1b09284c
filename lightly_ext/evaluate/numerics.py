"""How features are computed: what decides on them beside the images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.data import JPEG_DECODER, jpeg_decoder
from lightly_ext.durable import replacing
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from stellar_plugin.hashes import architecture_sha256
from stellar_plugin.protocols import NOT_TOLD

# Each version a little differently.
PACKAGES = ("stellar-plugin", "torch", "torchvision", "timm", "pillow")
KNOWN = "known.npz"
# How far rounding moves features, as a fraction of the largest one.
TOLERANCE = {"32-true": 1e-3}
HALF_TOLERANCE = 3e-2


def numerics(model: FrozenModel, devices: Devices) -> dict[str, Any]:
    """Weights, how they are read, and how images come to them, as values for JSON."""
    origin = model.origin
    return {
        "architecture": architecture_sha256(model.backbone),
        "sha256": origin.sha256,
        "mean": list(origin.mean),
        "std": list(origin.std),
        "interpolation": origin.interpolation,
        "precision": devices.precision,
    }


def numerics_folder(
    cache: Path,
    devices: Devices,
    identity: Mapping[str, Any],
    known: Mapping[str, NDArray[Any]],
    versions: Mapping[str, str],
) -> Path:
    """Folder of all features that are computed in the same way.

    What hashes of weights and architecture do not tell, the features of one known input
    do: how the code reads the weights.

    Args:
        cache:
            Folder of the folders.
        devices:
            Where it runs.
        identity:
            What decides on them, with the "precision".
        known:
            Features of an input that is always the same.
        versions:
            Versions that decide too, by name.
    """
    identity = {
        **identity,
        "device": devices.device.type,
        "versions": dict(versions),
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    tolerance = TOLERANCE.get(identity["precision"], HALF_TOLERANCE)
    folders = (cache / f"{digest}-{i}" for i in count())
    return devices.of_first(
        lambda: next(f for f in folders if _holds(f, known, tolerance))
    )


def known_image() -> Tensor:
    """Smooth colours to compute features of, uint8 with shape (1, 3, 8, 8)."""
    values = torch.arange(3 * 8 * 8) * 89 % 251
    return values.view(1, 3, 8, 8).byte()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages, by name."""
    return {name: _version(name) for name in packages}


def image_versions() -> dict[str, str]:
    """Versions of what reads, resizes and encodes images, by name."""
    return versions(PACKAGES) | {JPEG_DECODER: str(jpeg_decoder())}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # installed under another name, as pillow-simd is
        return NOT_TOLD


def _holds(folder: Path, known: Mapping[str, NDArray[Any]], tolerance: float) -> bool:
    """Whether a folder is new, or of features like these; a new one becomes theirs."""
    path = folder / KNOWN
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as new, new.open("wb") as file:
                np.savez(file, **known)  # type: ignore[arg-type]
        except OSError as error:
            raise OSError(
                f"'{path}' cannot be written: {error.strerror}. Make room, or name "
                "another folder with --output."
            ) from error
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = dict(arrays)
    except Exception:  # numpy and zipfile raise anything on broken files
        return False
    return stored.keys() == known.keys() and all(
        _equal(stored[name], values, tolerance) for name, values in known.items()
    )


def _equal(a: NDArray[Any], b: NDArray[Any], tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = 1 if a.dtype.kind in "iu" else 0
    a, b = a.astype(np.float64), b.astype(np.float64)
    most = max(step, tolerance * np.abs(b).max(initial=0))
    return np.allclose(a, b, rtol=0, atol=most, equal_nan=True)
