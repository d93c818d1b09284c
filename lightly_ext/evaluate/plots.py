"""Line plots of scores, in one look for all figures."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lightly_ext.durable import replacing

# Colours of Okabe and Ito, which colour-blind readers can tell apart; markers tell
# series apart in grey as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>"
GREY = "#666666"


def save_line_plot(
    path: Path,
    series: Mapping[str, Mapping[float, float]],
    x_label: str,
    y_label: str,
    errors: Mapping[str, Mapping[float, float]] | None = None,
    references: Mapping[str, float] | None = None,
    title: str = "",
    log: bool = False,
) -> None:
    """Draws named series of numbers as lines and saves them as a PNG.

    Args:
        path:
            File to write.
        series:
            Points of each line, y by x.
        x_label:
            What x is, with its unit.
        y_label:
            What y is, with its unit.
        errors:
            Half widths of a band around lines, for some or all of the series, for all
            of their x.
        references:
            Values without x, drawn as dashed horizontal lines: in the colour of the
            series of the same name, or in grey with a name of their own.
        title:
            Text above the plot.
        log:
            Both axes are logarithmic, with a tick at each x.

    Raises:
        ValueError: If there is no series, or one without points.
    """
    if not series or not all(series.values()):
        raise ValueError(f"A line plot needs points in every series, got {series}.")
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, series, errors or {}, references or {})
    axes.set(xlabel=x_label, ylabel=y_label)
    if log:
        ticks = sorted({x for points in series.values() for x in points})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.xaxis.minorticks_off()
    if title:
        axes.set_title(title, fontsize=10)
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = BytesIO()
    figure.savefig(pixels, dpi=150)
    # A plot has few colours; as a palette it takes a third of the bytes.
    picture = Image.open(pixels).convert("RGB")
    with replacing(path) as new:
        picture.quantize(dither=Image.Dither.NONE).save(new, "png", optimize=True)


def _draw(
    axes: Axes,
    series: Mapping[str, Mapping[float, float]],
    errors: Mapping[str, Mapping[float, float]],
    references: Mapping[str, float],
) -> None:
    colours = dict(zip(series, cycle(COLOURS), strict=False))
    for (name, points), marker in zip(series.items(), cycle(MARKERS), strict=False):
        xs = sorted(points)
        ys = np.array([points[x] for x in xs])
        colour = colours[name]
        axes.plot(xs, ys, color=colour, marker=marker, label=name, lw=1.8, ms=5)
        if name in errors:
            half = np.array([errors[name][x] for x in xs])
            axes.fill_between(xs, ys - half, ys + half, color=colour, alpha=0.18, lw=0)
    styles = cycle(("--", ":", "-."))
    for (name, value), style in zip(references.items(), styles, strict=False):
        if name in series:
            axes.axhline(value, color=colours[name], linestyle="--", lw=1.2)
        else:
            axes.axhline(value, color=GREY, linestyle=style, lw=1.2, label=name)


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
