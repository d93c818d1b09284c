"""Scores of what queries found, and how they are shown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightly_ext.evaluate.report.scores import RETRIEVAL_MEASURES
from lightly_ext.evaluate.result import Result, markdown_table
from lightly_ext.evaluate.retrieval.locations import Locations, whole_crops
from lightly_ext.evaluate.retrieval.queries import Asked, Measured
from lightly_ext.evaluate.retrieval.ranking import random_precision


def form_scores(
    measured: Mapping[str, Measured], asked: Asked, located: bool
) -> tuple[dict[str, float | int | None], dict[str, float]]:
    """Scores of all forms.

    Args:
        measured:
            What the queries found, by form.
        asked:
            The queries.
        located:
            Whether locations are scored.

    Returns:
        - Scores by name, and numbers of images; None where no answer is of the class of
          its query.
        - Standard errors of those that are means over queries.

    Raises:
        RuntimeError: If no query has anything of a box in its crop.
    """
    scores: dict[str, float | int | None] = {}
    errors = {}
    has_box = next(iter(measured.values())).answers > 0
    if located and not has_box.any():
        raise RuntimeError(
            "No query has anything of a box in its crop: leave --boxes out, or name "
            "other images."
        )
    for name, of in measured.items():
        precision = of.precision[asked.numbers]
        scores[f"{name}_map"] = float(_class_means(precision, asked).mean())
        scores[f"{name}_query_map"] = float(precision.mean())
        errors[f"{name}_query_map"] = _standard_error(precision)
        if located:
            of_located = Measured(*(values[has_box] for values in of))
            shares = of_located.hits / of_located.answers
            errors[f"{name}_location"] = _standard_error(shares)
            for measure, value in _locations(of_located).items():
                scores[f"{name}_{measure}"] = value
    scores |= {"num_images": len(asked.files), "num_queries": len(asked.numbers)}
    if located:
        scores["num_located_queries"] = int(has_box.sum())
    return scores, errors


def _locations(of: Measured) -> dict[str, float | None]:
    """Scores of the locations of queries with a box."""
    right = float(of.right.sum())
    scores = {
        "location": float((of.hits / of.answers).mean()),
        "location_of_class": float(of.right_hits.sum()) / right if right else None,
    }
    oracle = float((of.oracle / of.answers).mean())
    return scores if math.isnan(oracle) else {**scores, "location_oracle": oracle}


def _class_means(values: Tensor, asked: Asked) -> Tensor:
    """Means of a value of each query over the classes of queries, float64."""
    labels = asked.labels[asked.numbers]
    sums = torch.bincount(labels, values.double(), minlength=len(asked.files.classes))
    counts = torch.bincount(labels, minlength=len(asked.files.classes))
    return sums[counts > 0] / counts[counts > 0]


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0


def chance_levels(
    names: Sequence[str], asked: Asked, locations: Locations | None, crop: int
) -> dict[str, float]:
    """A random order; and of a random image with a box, the whole crop."""
    precision = random_precision(asked.num_relevant, len(asked.files) - 1)
    levels = {
        "map": float(_class_means(precision, asked).mean()),
        "query_map": float(precision.mean()),
    }
    if locations is not None:
        known = locations.known
        hits = whole_crops(locations, crop)[known].double()
        levels["location"] = float(hits.mean())
    return {f"{name}_{measure}": v for name in names for measure, v in levels.items()}


def classes_csv(measured: Mapping[str, Measured], asked: Asked) -> str:
    """Mean average precision of every class."""
    labels = asked.labels[asked.numbers]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["class", "num_queries", *(f"{name}_map" for name in measured)])
    means = [
        _class_means(of.precision[asked.numbers], asked) for of in measured.values()
    ]
    found = labels.unique()
    for i, label in enumerate(found.tolist()):
        values = [f"{float(m[i]):.6f}" for m in means]
        rows.writerow(
            [asked.files.classes[label], int((labels == label).sum()), *values]
        )
    return text.getvalue()


def retrieval_table(result: Result, names: Sequence[str]) -> str:
    """The scores as a Markdown table: a row for each form of an image.

    Its columns stand below each other in a terminal, too.

    Args:
        result:
            The result, with chance, and with the untrained scores if there are any.
        names:
            The forms.
    """
    found = {
        measure: title
        for measure, title in RETRIEVAL_MEASURES.items()
        if any(f"{name}_{measure}" in result.scores for name in names)
        and measure != "query_map"
    }
    untrained = ["untrained"] if result.untrained else []
    head = [result.model]
    for title in found.values():
        head += [title, *untrained]
    rows = [head]
    for name in names:
        rows.append([name])
        for measure in found:
            for scores in (result.scores, result.untrained)[: 1 + len(untrained)]:
                rows[-1].append(_percent(scores.get(f"{name}_{measure}")))
    chance = [result.chance.get(f"{names[0]}_{measure}") for measure in found]
    rows.append(["chance"])
    for value in chance:
        rows[-1] += [_percent(value), *([""] * len(untrained))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return markdown_table(
        [
            [f"{row[0]:{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]
            for row in rows
        ]
    )


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
