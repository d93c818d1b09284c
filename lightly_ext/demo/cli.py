"""`stellar demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightly_ext.demo.imagenette import cache_folder, download_imagenette
from lightly_ext.demo.run import run_demo
from lightly_ext.quick_start.cli import add_minutes, check_minutes, check_seed
from lightly_ext.quick_start.run import run_try
from stellar_cli.errors import OptionError, raise_errors

DIGITS_OUTPUT, PHOTOS_OUTPUT = Path("runs/demo"), Path("runs/photo_demo")


def main(argv: Sequence[str]) -> None:
    """Runs `stellar demo`.

    Args:
        argv:
            Arguments behind the command.
    """
    parser = argparse.ArgumentParser(
        prog="stellar demo",
        description="Pretrains a small STELLAR, without labels, evaluates it, and "
        "writes a page with pictures: on boards of handwritten digits, in a few "
        "minutes on a CPU, without network; with --photos `stellar try` on "
        "photographs. For photos of your own: stellar try FOLDER.",
    )
    # Where it was, once.
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument(
        "--photos",
        action="store_true",
        help=f"Imagenette at 160 px, downloaded once (94 MB) into {cache_folder()}",
    )
    add_minutes(parser)
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for everything; an earlier demo in it is replaced, also one that "
        f"was stopped (default: {DIGITS_OUTPUT}, of photographs {PHOTOS_OUTPUT})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="decides on boards, weights and views (default: 0)",
    )
    raise_errors(parser)
    arguments = parser.parse_args(argv)
    if arguments.data is not None:
        raise OptionError("Photos of your own: stellar try FOLDER.")
    check_seed(arguments.seed)
    if not arguments.photos:
        if arguments.minutes is not None:
            raise OptionError("--minutes belongs to --photos.")
        run_demo(arguments.output or DIGITS_OUTPUT, arguments.seed)
        return
    check_minutes(arguments.minutes)
    folder, names = download_imagenette(cache_folder())
    run_try(
        folder,
        arguments.output or PHOTOS_OUTPUT,
        arguments.seed,
        arguments.minutes,
        title="STELLAR on Imagenette",
        class_names=names,
    )
