"""Curves as the pages draw them, in SVG; charts.html has the macro."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Points of a line; each is the mean of what lies between.
MAX_POINTS = 200
WIDTH, HEIGHT = 300, 120
# Positive curves whose values differ by more have a logarithmic scale.
MAX_RATIO = 1000
# Values by what grows to the right.
Points = Mapping[int, float] | Mapping[float, float]


class Chart(NamedTuple):
    """A curve, in a box of `WIDTH` x `HEIGHT`.

    Attributes:
        title:
            What is shown.
        latest:
            Its last value.
        lines:
            Pairs of x and y, y downwards, as SVG has them, for each part of the curve.
        low, high:
            Values at the lower and upper edge.
        first, last:
            Where the left and the right edge are, for example steps.
        references:
            Heights of lines across, by their names.
        marks:
            Distances of upright lines from the left edge, by their names.
        logarithmic:
            Whether heights are those of logarithms.
    """

    title: str
    latest: str
    lines: list[str]
    low: str
    high: str
    first: float
    last: float
    references: dict[str, float]
    marks: dict[str, float]
    logarithmic: bool


def draw_chart(
    title: str,
    parts: Sequence[Points],
    references: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
    ends: tuple[float, float] | None = None,
) -> Chart:
    """Draws a curve.

    Args:
        title:
            What is shown.
        parts:
            The finite values of each part of the curve.
        references:
            Values to compare with, by their names.
        marks:
            Places on the axis, by their names.
        ends:
            Left and right edge. None takes those of the curve.
    """
    references = references or {}
    curves = [_thinned(points) for points in parts]
    values = [*(y for curve in curves for _, y in curve), *references.values()]
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 10
        low, high = low - margin, high + margin or 1.0
    logarithmic = low > 0 and high / low > MAX_RATIO
    scale = math.log if logarithmic else float
    places = [x for points in parts for x in points]
    first, last = ends or (min(places), max(places))
    width = last - first or 1

    def height(value: float) -> float:
        share = (scale(high) - scale(value)) / (scale(high) - scale(low))
        return round(HEIGHT * share, 1)

    def distance(place: float) -> float:
        return round(WIDTH * (place - first) / width, 1)

    return Chart(
        title=title,
        latest=f"{curves[-1][-1][1]:.4g}",
        lines=[" ".join(f"{distance(x)},{height(y)}" for x, y in c) for c in curves],
        low=f"{low:.3g}",
        high=f"{high:.3g}",
        first=round(first, 1),
        last=round(last, 1),
        references={f"{k} {v:.3g}": height(v) for k, v in references.items()},
        marks={name: distance(place) for name, place in (marks or {}).items()},
        logarithmic=logarithmic,
    )


def _thinned(points: Points) -> list[tuple[float, float]]:
    """Means of neighbouring points; the first and the last stay as they are."""
    pairs = sorted(points.items())
    size = -(-len(pairs) // MAX_POINTS)
    inner = [pairs[i : i + size] for i in range(1, len(pairs) - 1, size)]
    means = [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in inner
    ]
    return [pairs[0], *means, *pairs[1:][-1:]]
