"""Scores and results in a form that can be stored: JSON, each in its own place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stellar_plugin.mmseg.card.card import Readings
from stellar_plugin.protocols import card_digest

# What two runs of the same thing may differ in.
INCIDENTAL = {"versions", "checkpoint", "tested", "num_classes_in_mean"}


def read_scores(metrics: Mapping[str, Any], percent: set[str]) -> Readings:
    """Scores by the last part of their names: the protocol tells metrics apart.

    Args:
        metrics:
            What the metrics returned. What is no number is left out, infinite and NaN
            is None; names that would be the same stay whole.
        percent:
            Names of scores in percent; they become fractions.
    """
    short = [name.rpartition("/")[2] for name in metrics]
    scores: dict[str, Any] = {}
    notes = []
    for name, last in zip(metrics, short, strict=True):
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


def as_json(result: Mapping[str, Any]) -> str:
    """A result as JSON, which has no NaN and no infinity: null."""
    return json.dumps(_finite(result), indent=2, allow_nan=False, default=str) + "\n"


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
        other = _identity(path.read_text(encoding="utf-8"))
        if other != _identity(text):
            moved = path.parent / f"segmentation-{other}" / path.name
            moved.parent.mkdir(exist_ok=True)
            os.replace(path, moved)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    return moved


def _finite(value: Any) -> Any:
    """A value without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _identity(text: str) -> str:
    """Short name of everything that decides on a stored result."""
    try:
        result = json.loads(text)
        provenance = result["provenance"].items()
    except (ValueError, TypeError, KeyError, AttributeError):
        return card_digest({"text": text})
    decides = {k: v for k, v in provenance if k not in INCIDENTAL}
    return card_digest({**result, "scores": None, "provenance": decides})
