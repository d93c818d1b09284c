"""Table and pictures of results, as far as they are there."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.learning_runs.options import Options
from benchmarks.learning_runs.runs import LOSSES, RESULTS
from lightly_ext.evaluate.plots import save_line_plot

FEATURES = ("sparse", "cls", "dense", "lowrank", "tokens")
SWITCH = "at its prior's end"

Line = dict[str, Any]


def write_report(folder: Path) -> str:
    """Writes `scores.csv`, `table.md` and pictures.

    Returns:
        The table, and the errors of runs that failed.
    """
    found = _lines(folder / RESULTS)
    lines = [line for line in found if "scores" in line]
    errors = [line for line in found if "error" in line]
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "seed", "fraction", "used", "images", "score", "value"))
        for line in lines:
            head = [line[k] for k in ("run", "seed", "fraction", "used", "images")]
            writer.writerows([*head, *item] for item in line["scores"].items())
    table = markdown(lines)
    (folder / "table.md").write_text(table)
    for kind in ("knn", "linear"):
        curves = best_curves(lines, kind)
        if curves:
            label = "kNN" if kind == "knn" else "linear probe"
            save_line_plot(
                folder / f"{kind}.png",
                curves,
                "share of the time, prior included",
                f"{label} of the best feature, %",
            )
    losses = _mean_curves(
        (line["run"], line["fraction"], line["total"])
        for line in _lines(folder / LOSSES)
    )
    if losses:
        save_line_plot(folder / "losses.png", losses, "share of the time", "loss")
    failed = [f"{line['run']}, seed {line['seed']}: {line['error']}" for line in errors]
    return "\n".join([table, *failed])


def markdown(lines: Iterable[Line]) -> str:
    """Table of the scores at the end, mean over seeds, in %: kNN / linear.

    A run that a deadline cut off has a row of its own, which says where.
    """
    rows: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        rows[line["run"]][line["seed"]] = line
        if line["method"] == "stellar" and len(rows[line["run"]]) > 0:
            switch = rows[f"{line['run']}, {SWITCH}"]
            switch.setdefault(line["seed"], line)
    head = ("run", "seeds", *FEATURES, "rank", "CorLoc", "images / s")
    text = [_row(head), _row(["---"] * len(head))]
    for name, by_seed in rows.items():
        if name.endswith(SWITCH):
            ended = list(by_seed.values()) if _has_prior(by_seed) else []
            cut_off = []
        else:
            cut_off = [line for line in by_seed.values() if _is_cut_off(line)]
            ended = [line for line in by_seed.values() if line not in cut_off]
        if ended:
            text.append(_row([name, str(len(ended)), *_cells(ended)]))
        for line in cut_off:
            where = f"{name}, cut off at {line['fraction']:.0%}"
            text.append(_row([where, "1", *_cells([line])]))
    return "\n".join(text) + "\n"


def best_curves(lines: Iterable[Line], kind: str) -> dict[str, dict[float, float]]:
    """Score of the best feature in %, mean over seeds, by run and share of time."""
    lines = list(lines)
    points = (
        (line["run"], line["fraction"], 100 * best_score(line["scores"], kind))
        for line in lines
        if line["method"] not in ("raw", "untrained")
    )
    return _mean_curves(points)


def best_score(scores: Mapping[str, float], kind: str) -> float:
    """The best of the features' scores of a kind, "knn" or "linear"."""
    return max(value for name, value in scores.items() if name.startswith(f"{kind}_"))


def _is_cut_off(line: Line) -> bool:
    """Whether a run ended before its time was over."""
    end = 1.0
    if line["run"] == "prior":
        end = float(line["set"].get("prior_share", Options.prior_share))
    return line["method"] != "untrained" and line["fraction"] < 0.99 * end


def _has_prior(by_seed: Mapping[int, Line]) -> bool:
    return all("knn_sparse" not in line["scores"] for line in by_seed.values())


def _cells(lines: list[Line]) -> list[str]:
    scores = [line["scores"] for line in lines]

    def mean(name: str, factor: float = 100.0) -> str:
        values = [s[name] for s in scores if name in s]
        return f"{factor * statistics.mean(values):.1f}" if values else ""

    cells = []
    for name in FEATURES:
        pair = mean(f"knn_{name}"), mean(f"linear_{name}")
        cells.append(" / ".join(pair) if pair[0] else "")
    ranks = [mean(f"rank_{name}", 1.0) for name in FEATURES[:3]]
    cells.append(" / ".join(rank for rank in ranks if rank))
    corloc = [mean("corloc"), mean("corloc_best")]
    cells.append(" / ".join(share for share in corloc if share))
    speeds = [line["images"] / line["used"] for line in lines if line["used"]]
    cells.append(f"{statistics.mean(speeds):.0f}" if speeds else "")
    return cells


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean_curves(
    points: Iterable[tuple[str, float, float]],
) -> dict[str, dict[float, float]]:
    """Means of y of points (name, x, y) by name and x, to a hundredth."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, x, y in points:
        values[name][round(x, 2)].append(y)
    return {
        name: {x: statistics.mean(ys) for x, ys in of_name.items()}
        for name, of_name in values.items()
    }


def _lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
