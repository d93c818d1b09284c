"""What lies beside saved weights for `AutoModel` of Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL_TYPE = "stellar"
CODE_NAME = "modeling_stellar.py"
PROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_MAP = {"AutoImageProcessor": "modeling_stellar.StellarImageProcessor"}
# What config.json has for transformers, beside the arguments of `Stellar`.
TRANSFORMERS_KEYS: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "architectures": ["StellarModel"],
    "auto_map": {
        "AutoConfig": "modeling_stellar.StellarConfig",
        "AutoModel": "modeling_stellar.StellarModel",
        **PROCESSOR_MAP,
    },
}
# What transformers adds to it.
ADDED_KEYS = ("transformers_version", "dtype", "torch_dtype")
# The code itself stays in the package: one place for the numbers, and whoever lacks the
# package is told by transformers what to install.
CODE = '''\
"""STELLAR for transformers, from the package: pip install stellar-plugin"""

from stellar_plugin.transformers import (
    StellarConfig,
    StellarImageProcessor,
    StellarModel,
)
'''


def without_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without what only transformers reads."""
    theirs = {*TRANSFORMERS_KEYS, *ADDED_KEYS}
    return {name: value for name, value in config.items() if name not in theirs}


def write_code(folder: Path) -> None:
    """Writes the file of code that config.json names."""
    (folder / CODE_NAME).write_text(CODE)


def write_processor(
    folder: Path, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Writes what `AutoImageProcessor` makes inputs of photos by.

    Args:
        folder:
            Folder of the model.
        size:
            Height and width of inputs in px.
        mean:
            Per-channel mean, of [0, 1] intensities.
        std:
            Per-channel standard deviation.
    """
    settings = {
        "image_processor_type": "StellarImageProcessor",
        "auto_map": PROCESSOR_MAP,
        "size": dict(zip(("height", "width"), size, strict=True)),
        "image_mean": list(mean),
        "image_std": list(std),
    }
    (folder / PROCESSOR_NAME).write_text(json.dumps(settings, indent=2) + "\n")
