"""The demo's table: which number means what, and what training gained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightly_ext.demo.metrics import Scores

NO_MODEL, RANDOM, TRAINED = "no model", "random weights", "trained"
COLUMNS = (NO_MODEL, RANDOM, TRAINED)
HEADER = ("metric", *COLUMNS, "gain")
MISSING = "–"


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        key:
            Name of the value in the scores.
        title:
            What the reader sees.
        task:
            Rows of one task compete: the gain of training is measured against the best
            untrained value of all of them.
        explanation:
            How it is measured, one sentence.
        is_decibel:
            Values are decibels; all others are fractions, shown in percent.
    """

    key: str
    title: str
    task: str
    explanation: str
    is_decibel: bool = False

    def show(self, value: float | None, sign: str = "") -> str:
        """Formats a value for people."""
        if value is None:
            return MISSING
        scaled, unit = (value, " dB") if self.is_decibel else (100 * value, "")
        return f"{scaled:{sign}.1f}{unit}"


_PROBE = "logistic regression on standardised features, C = 1"
METRICS = (
    Metric(
        "knn_sparse",
        "kNN accuracy, sparse tokens",
        "knn",
        "Which digit is on a board with a single class: cosine kNN, k = 20, "
        "temperature 0.07, on the mean of the sparse tokens. No model: mean and "
        "standard deviation of raw patches.",
    ),
    Metric("knn_dense", "kNN accuracy, dense features", "knn", "The same, patches."),
    Metric(
        "linear_sparse",
        "linear accuracy, sparse tokens",
        "linear",
        f"The same question and features, {_PROBE}.",
    ),
    Metric(
        "linear_dense",
        "linear accuracy, dense features",
        "linear",
        "The same, patches.",
    ),
    Metric(
        "map_sparse",
        "multi-label mAP, sparse tokens",
        "map",
        f"Which digits are on a board with one to three classes: one-vs-rest {_PROBE}.",
    ),
    Metric("map_dense", "multi-label mAP, dense features", "map", "The same, patches."),
    Metric(
        "patch_miou_lowrank",
        "patch mIoU (linear probe on patches), low-rank",
        "patch_miou",
        f"Each patch is background or a digit: {_PROBE}. The label is the digit in the "
        "patch's cell, if any. No model: raw pixels of the patch.",
    ),
    Metric(
        "patch_miou_dense",
        "patch mIoU (linear probe on patches), dense",
        "patch_miou",
        "The same on dense features.",
    ),
    Metric(
        "mmseg_miou",
        "mmseg mIoU (mim train), low-rank",
        "mmseg_miou",
        "Linear probe of mmsegmentation on low-rank features, scored pixel by pixel at "
        "full resolution. A digit's label is the box it was drawn in.",
    ),
    Metric(
        "foreground_iou",
        "foreground IoU, localization maps",
        "foreground_iou",
        "No probe: each query is digit or background by majority on training boards, "
        "patches go to their strongest query. No model: every patch is a digit.",
    ),
    Metric(
        "psnr",
        "reconstruction PSNR",
        "psnr",
        "Mean over test boards. No model: the mean training board.",
        is_decibel=True,
    ),
    Metric(
        "prototype_usage",
        "prototype usage",
        "prototype_usage",
        "Entropy of the nearest prototypes of all tokens, in percent of the largest "
        "possible.",
    ),
)


def gain(metric: Metric, scores: Mapping[str, Scores]) -> float | None:
    """How far the trained value is above the best untrained one of its task.

    Args:
        metric:
            A row of the table.
        scores:
            Scores by column.

    Returns:
        The difference, or None if a side is missing.
    """
    rivals = [m.key for m in METRICS if m.task == metric.task]
    untrained = [
        scores[column][key]
        for column in (NO_MODEL, RANDOM)
        for key in rivals
        if key in scores[column]
    ]
    trained = scores[TRAINED].get(metric.key)
    if trained is None or not untrained:
        return None
    return trained - max(untrained)


def table_rows(scores: Mapping[str, Scores]) -> list[list[str]]:
    """Rows of text: title, one value per column, gain over the best untrained."""
    return [
        [
            metric.title,
            *(metric.show(scores[column].get(metric.key)) for column in COLUMNS),
            metric.show(gain(metric, scores), sign="+"),
        ]
        for metric in METRICS
    ]


def to_markdown(scores: Mapping[str, Scores]) -> str:
    """The table with notes, in Markdown."""
    lines = [HEADER, ["---", *["---:"] * (len(COLUMNS) + 1)], *table_rows(scores)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "\n".join(f"- **{m.title}:** {m.explanation}" for m in METRICS)
    return (
        f"{table}\n\nPercent unless a unit is shown. Gain: trained minus the best "
        f"untrained value of the same task (sparse or dense, with or without a model)."
        f"\n\n{notes}\n"
    )


def to_json(scores: Mapping[str, Scores], facts: Mapping[str, Any]) -> str:
    """The table for programs: fractions in 0 to 1, decibels, and facts of the run."""
    metrics = {
        metric.key: {
            "title": metric.title,
            "unit": "dB" if metric.is_decibel else "fraction",
            **{column: scores[column].get(metric.key) for column in COLUMNS},
            "gain": gain(metric, scores),
        }
        for metric in METRICS
    }
    return json.dumps({**facts, "metrics": metrics}, indent=2) + "\n"
