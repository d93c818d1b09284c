"""Scores and results in a form that can be stored: JSON, each in its own place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stellar_plugin.mmseg.card.reading import Readings
from stellar_plugin.mmseg.metric import NUM_CLASSES
from stellar_plugin.protocols import NOT_TOLD, card_digest, json_values

# What decides beside the card, the weights and the images.
OPTIONS = (
    *("seed", "precision", "mean", "std", "num_train_images", "settings", "classes"),
)
# What two runs of the same thing may differ in.
INCIDENTAL = {
    *("versions", "checkpoint", "tested", "num_classes_in_mean", "num_images_left_out")
}


def read_scores(metrics: Mapping[str, Any], percent: set[str]) -> Readings:
    """Scores by the last part of their names: the protocol tells metrics apart.

    Args:
        metrics:
            What the metrics returned. Numbers of classes and what is no number are
            left out, infinite and NaN is None; names that would be the same stay whole.
        percent:
            Names of scores in percent; they become fractions.
    """
    short = [name.rpartition("/")[2] for name in metrics]
    scores: dict[str, Any] = {}
    notes = []
    for name, last in zip(metrics, short, strict=True):
        if last == NUM_CLASSES:
            continue
        try:
            value = float(metrics[name])
        except (TypeError, ValueError, RuntimeError):
            notes.append(f"'{name}' is no number and not stored")
            continue
        if not math.isfinite(value):
            notes.append(f"'{name}' is {value}, stored as null")
        elif name in percent:
            value = value / 100
        key = last if short.count(last) == 1 else name
        scores[key] = round(value, 6) if math.isfinite(value) else None
    return Readings(scores, notes)


def class_counts(metrics: Mapping[str, Any]) -> Any:
    """Over how many classes the mean is; of several metrics a list, by their names."""
    names = [n for n in sorted(metrics) if n.rpartition("/")[2] == NUM_CLASSES]
    counts = [metrics[name] for name in names]
    return counts[0] if len(counts) == 1 else counts


def make_result(
    names: Mapping[str, Any],
    scores: Mapping[str, float | None],
    card: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """A result in the form of its file, with its identity.

    Args:
        names:
            What "model" and "data" are called.
        scores:
            Fractions by name.
        card:
            The protocol card.
        provenance:
            Where the numbers come from.
    """
    options = {name: provenance.get(name, NOT_TOLD) for name in OPTIONS}
    return {
        "task": "segmentation",
        **names,
        "scores": scores,
        "protocol": card,
        "provenance": provenance,
        "identity": {
            "model": {"sha256": provenance["sha256"]},
            "options": options,
            "inputs": {"images": provenance["images_sha256"]},
        },
    }


def as_json(result: Mapping[str, Any]) -> str:
    """A result as JSON, which has no NaN and no infinity: null."""
    text = json.dumps(json_values(result), indent=2, allow_nan=False, default=str)
    return f"{text}\n"


def as_stored(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it is read back: of plain values alone."""
    stored: dict[str, Any] = json.loads(as_json(result))
    return stored


def write_result(path: Path, text: str) -> Path | None:
    """Writes a result, as a whole or not at all.

    The result of anything else that is there moves to a folder beside it.

    Args:
        path:
            The file.
        text:
            The result as JSON.

    Returns:
        Where the other result is now, None if there was none.
    """
    moved = None
    if path.is_file():
        other = _identity(path.read_bytes())
        if other != _identity(text.encode()):
            moved = path.parent / f"segmentation-{other}" / path.name
            moved.parent.mkdir(exist_ok=True)
            os.replace(path, moved)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return moved


def _identity(text: bytes) -> str:
    """Short name of everything that decides on a stored result."""
    try:
        result = json.loads(text)
        provenance = result["provenance"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return card_digest({"text": text.hex()})
    decides = {k: v for k, v in provenance if k not in INCIDENTAL}
    return card_digest({**result, "scores": None, "provenance": decides})
