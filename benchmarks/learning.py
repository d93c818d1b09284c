"""Does it learn on photographs? Methods at equal time, on a folder with labels.

    python benchmarks/learning.py PHOTOS --minutes 40 --methods mae stellar
    python benchmarks/learning.py PHOTOS --minutes 5 --device cuda --jobs 14 --runs FILE

PHOTOS has train/CLASS/*.jpg, val/CLASS/*.jpg and, for CorLoc, boxes.csv
(file,x0,y0,x1,y1 in px, inclusive). All methods share the ViT, its initialisation, the
batch size, the code of the views and the training loop. Time counts the process'
seconds on a CPU, and those of the clock on a GPU, where equally many runs at a time
are fair; STELLAR's includes its prior's. Scores come along the way: k nearest
neighbours, logistic regression and effective rank of every frozen feature, CorLoc of
the maps. Everything is written as it comes, into results.jsonl and losses.jsonl of the
output folder; table.md, scores.csv and pictures at the end.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.learning_runs.photos import PhotoSets, load_sets
from benchmarks.learning_runs.report import write_report
from benchmarks.learning_runs.runs import (
    METHODS,
    RESULTS,
    Run,
    Setting,
    read_runs,
    run_all,
)


def main(arguments: list[str] | None = None) -> None:
    """Runs the methods and writes the report."""
    args = _parser().parse_args(arguments)
    start = time.time()
    if args.table:
        print(write_report(args.output))
        return
    if (args.output / RESULTS).exists():
        raise FileExistsError(
            f"'{args.output}' holds results already: name another --output, or write "
            "the report of these by --table."
        )
    runs = _runs(args)
    sets = _sets(args, runs)
    print(
        f"{len(sets.train.labels)} photos to learn from, {len(sets.test.labels)} of "
        f"{'a tuning set' if args.tune else 'val'} to score on; {len(runs)} runs.",
        flush=True,
    )
    setting = Setting(
        output=args.output,
        priors=args.priors or args.output / "priors",
        device=args.device,
        unit=_unit(args),
        photos=sets.sha256,
        amount=args.steps or args.tflop or 60 * args.minutes,
        bf16=args.bf16,
        deadline=start + args.deadline,
    )
    run_all(runs, sets, setting, args.jobs)
    print(write_report(args.output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of the runs"
    )
    parser.add_argument(
        "--runs", type=Path, help='JSON list of {"name", "method", "seeds", "set"}'
    )
    parser.add_argument("--minutes", type=float, default=40.0, help="of each run")
    parser.add_argument("--steps", type=int, help="steps of each run, for minutes")
    parser.add_argument(
        "--tflop", type=float, help="10^12 operations of each run, for minutes"
    )
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), help="seconds of all training"
    )
    parser.add_argument("--tune", action="store_true", help="score on a part of train")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--priors", type=Path, help="folder of priors, kept")
    parser.add_argument("--table", action="store_true", help="write the report alone")
    return parser


def _unit(args: argparse.Namespace) -> str:
    if args.steps:
        return "steps"
    if args.tflop:
        return "tflop"
    return "cpu" if args.device == "cpu" else "wall"


def _runs(args: argparse.Namespace) -> list[Run]:
    changes = dict(pair.split("=", 1) for pair in args.set)
    if args.runs is None:
        name = " ".join(args.set)
        return [
            Run(f"{method} {name}".strip(), method, seed, changes)
            for seed in args.seeds
            for method in args.methods
        ]
    return [
        replace(run, changes={**changes, **run.changes}) for run in read_runs(args.runs)
    ]


def _sets(args: argparse.Namespace, runs: list[Run]) -> PhotoSets:
    sizes = {run.options.size for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"All runs of a call share a size of image, got {sizes}.")
    return load_sets(args.folder, sizes.pop(), args.tune)


if __name__ == "__main__":
    main()
