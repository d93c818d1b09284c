"""`stellar try`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from lightly_ext.quick_start.run import run_try
from stellar_cli import clock
from stellar_cli.errors import OptionError, raise_errors

OUTPUT = Path("runs/try")


def main(argv: Sequence[str]) -> None:
    """Runs `stellar try`.

    Args:
        argv:
            Arguments behind the command.
    """
    parser = argparse.ArgumentParser(
        prog="stellar try",
        description="From a folder of photos to a result: chooses recipe, model, batch "
        "and steps from the photos and the machine, says what it chose and when it "
        "ends, trains a prior and STELLAR without labels, and compares them with "
        "random weights and raw pixels on one page.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="photos, nested to any depth, or tars, parquet, hf:NAME; subfolders train "
        "and val are the split, subfolders in them the classes, where there are any",
    )
    add_minutes(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="folder for everything; an earlier try in it is replaced, the same one "
        f"that was stopped goes on (default: {OUTPUT})",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides on weights and views (default: 0)"
    )
    raise_errors(parser)
    arguments = parser.parse_args(argv)
    check_minutes(arguments.minutes)
    check_seed(arguments.seed)
    run_try(
        arguments.folder,
        arguments.output,
        arguments.seed,
        arguments.minutes,
        clock.began,
    )


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the time of a try."""
    parser.add_argument(
        "--minutes",
        type=float,
        help="time of everything (default: 10 for up to 1500 photos, more for more)",
    )


def check_minutes(minutes: float | None) -> None:
    """Raises an OptionError if a time is impossible."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise OptionError(f"--minutes must be above 0, got {minutes:g}.")


def check_seed(seed: int) -> None:
    """Raises an OptionError if a seed is none for NumPy, which Lightning seeds."""
    if not 0 <= seed < 2**32:
        raise OptionError(f"--seed must be in 0 to 2**32 - 1, got {seed}.")
