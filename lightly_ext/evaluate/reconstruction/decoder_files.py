"""Trained decoders on disk: weights, sizes, and what they were trained for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.reconstruction.autoencoder import (
    FrozenAutoencoder,
    decoder_arguments,
)
from stellar_plugin.checkpoints import CONFIG_NAME, WEIGHTS_NAME


def read_config(folder: Path) -> dict[str, Any]:
    """What a trained decoder is.

    Raises:
        FileNotFoundError: If the folder holds none.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no trained decoder in '{folder}': '{CONFIG_NAME}' is missing."
        )
    return json.loads(path.read_text())


def load_decoder(autoencoder: FrozenAutoencoder, folder: Path) -> None:
    """Loads trained weights into the decoder.

    Raises:
        FileNotFoundError: If training has not ended.
        ValueError: If the decoder is of another architecture.
    """
    expected, found = decoder_arguments(autoencoder.decoder), read_config(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(
            f"'{folder}' has no {WEIGHTS_NAME}: its training has not ended."
        )
    if found["decoder"] != expected:
        raise ValueError(
            f"The decoder in '{folder}' has sizes {found['decoder']}, needed are "
            f"{expected}."
        )
    safetensors.torch.load_model(autoencoder.decoder, folder / WEIGHTS_NAME)


def check_same(found: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Raises ValueError unless a folder holds the training that a config describes."""
    config = json.loads(json.dumps(config))  # lists instead of tuples
    other = [name for name, value in config.items() if found.get(name) != value]
    if other:
        raise ValueError(
            f"'{folder}' holds another training, which differs in {', '.join(other)}: "
            "choose another --output, or remove it."
        )


def write_config(
    folder: Path, config: dict[str, Any], autoencoder: FrozenAutoencoder
) -> None:
    """Writes what a decoder is trained for, and its sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "decoder": decoder_arguments(autoencoder.decoder)}
    replace_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def check_stored(
    stored: dict[str, Any], identity: dict[str, Any], decoder: str
) -> None:
    """Raises ValueError unless a trained decoder fits what is wanted."""
    for name, value in identity.items():
        if stored.get(name) != value:
            raise ValueError(
                f"The decoder in '{decoder}' was trained for {name} "
                f"'{stored.get(name)}', this run has '{value}'."
            )
