"""Scores that are curves, as tables with a column per point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the points of the curves of a task are.
AXES = {
    "rank": "number of tokens",
    "equivariance": "shift in px",
    "stability": "area of the crop",
    "efficiency": "batch size",
}


def axis_title(task: str) -> str:
    """What the points of the curves of a task are, in words."""
    return AXES.get(task, "point")


def point_place(at: str) -> float:
    """Place of a point on its curve, 0 where it is no number."""
    try:
        return float(at)
    except ValueError:
        return 0.0


def curve_rows(
    task: str, scores: Mapping[str, Any], untrained: Mapping[str, Any]
) -> list[list[str]]:
    """The curves among scores as one table of text, the head first.

    Args:
        task:
            Name of the task.
        scores:
            Scores by name; those that are no curves are left out.
        untrained:
            Scores of the same architecture with random weights, as far as there are.

    Returns:
        A row per curve, below it the untrained one; empty if there are no curves. The
        head begins with the title of the axis; a point that a curve lacks is "".
    """
    curves: list[tuple[str, Mapping[str, Any]]] = []
    for name, value in scores.items():
        if isinstance(value, Mapping):
            curves.append((name.replace("_", " "), value))
            if isinstance(beside := untrained.get(name), Mapping):
                curves.append(("- untrained", beside))
    points = sorted({at for _, curve in curves for at in curve}, key=point_place)
    rows = [[n, *(_shown(c.get(at)) for at in points)] for n, c in curves]
    return [[axis_title(task), *points], *rows] if rows else []


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
