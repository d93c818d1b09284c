"""Where weights come from, in a file beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.layouts import STELLAR
from stellar_plugin.weight_files import read_json

PROVENANCE_NAME = "provenance.json"
# The weights that a provenance is of.
WEIGHTS_SHA256 = "weights_sha256"
STARTED_FROM = "started_from"


def read_provenance(folder: Path) -> dict[str, Any]:
    """What is recorded in a folder, nothing where there is no record.

    Raises:
        ValueError: If the record is damaged.
    """
    path = folder / PROVENANCE_NAME
    return read_json(path) if path.is_file() else {}


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Writes a record beside saved weights."""
    text = json.dumps(without_home(provenance), indent=1, default=str)
    (folder / PROVENANCE_NAME).write_text(text + "\n")


def origin(checkpoint: Checkpoint, source: str | Path) -> dict[str, Any]:
    """What is known of weights that something started from.

    Args:
        checkpoint:
            What `read_checkpoint` returned.
        source:
            What it was called with.

    Returns:
        "source", "is_local" (and not of the hub), "read_as", "license" (of published
        weights, "" where it is not stated) and, of weights of this package, their own
        "provenance".
    """
    # A method's licence is that of its authors' files, not of one's own training.
    own = checkpoint.layout == STELLAR
    method = None if own else checkpoint.method
    facts = {
        "source": str(source),
        "is_local": Path(source).exists(),
        "read_as": checkpoint.read_as,
        "license": method.license if method else "",
    }
    told = read_provenance(checkpoint.path.parent) if own else {}
    return {**facts, "provenance": told} if told else facts


def loaded_provenance(checkpoint: Checkpoint, source: str | Path) -> dict[str, Any]:
    """The record of a model that was loaded, arguments as for `origin`."""
    started = origin(checkpoint, source)
    return started.get("provenance") or {STARTED_FROM: started}


def saved_provenance(loaded: Mapping[str, Any], weights_sha256: str) -> dict[str, Any]:
    """The record of weights that are saved.

    Args:
        loaded:
            That of the model, as it was loaded or trained.
        weights_sha256:
            SHA-256 of the file of weights.

    Returns:
        The record. Where the weights are no longer those that it is of, one that says
            that they started from those.
    """
    if loaded.get(WEIGHTS_SHA256, weights_sha256) == weights_sha256:
        return {**loaded, WEIGHTS_SHA256: weights_sha256}
    before = {"source": f"weights with sha256 {loaded[WEIGHTS_SHA256]}"}
    started = {**before, "read_as": "STELLAR", "license": "", "provenance": loaded}
    return {STARTED_FROM: started, WEIGHTS_SHA256: weights_sha256}


def without_home(told: Any) -> Any:
    """The same with ~ for the home folder, whose name is nobody's business.

    Args:
        told:
            A text, or lists and dictionaries of texts.
    """
    if isinstance(told, Mapping):
        return {name: without_home(value) for name, value in told.items()}
    if isinstance(told, (list, tuple)):
        return [without_home(value) for value in told]
    home = str(Path.home())
    if isinstance(told, Path):
        told = str(told)
    if not isinstance(told, str) or home == "/":
        return told
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", told)


def inherited_license(provenance: Mapping[str, Any]) -> tuple[str, str]:
    """Licence of the published weights that all began with, and what they are.

    Returns:
        Two texts, empty where none is known.
    """
    started = provenance.get(STARTED_FROM)
    if not started:
        return "", ""
    if started["license"]:
        return started["license"], f"{started['source']} ({started['read_as']})"
    return inherited_license(started.get("provenance", {}))
