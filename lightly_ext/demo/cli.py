"""`stellar demo`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from lightly_ext.demo.photos.imagenette import cache_folder, download_imagenette
from lightly_ext.demo.photos.run import run_photo_demo
from lightly_ext.demo.run import run_demo
from stellar_cli.errors import OptionError, raise_errors

DIGITS_OUTPUT, PHOTOS_OUTPUT = Path("runs/demo"), Path("runs/photo_demo")
MINUTES = 10.0


def main(argv: Sequence[str]) -> None:
    """Runs `stellar demo`.

    Args:
        argv:
            Arguments behind the command.
    """
    parser = argparse.ArgumentParser(
        prog="stellar demo",
        description="Pretrains a small STELLAR, without labels, evaluates it, and "
        "writes a page with pictures. Without options: on boards of handwritten "
        "digits, in a few minutes on a CPU, without network. With --data or --photos: "
        "on photographs, a prior first.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="photos of your own, nested to any depth; subfolders train and val are "
        "the split, subfolders in them the classes, where there are any",
    )
    source.add_argument(
        "--photos",
        action="store_true",
        help=f"Imagenette at 160 px, downloaded once (94 MB) into {cache_folder()}",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"time of pretraining on photographs (default: {MINUTES:g})",
    )
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
    if arguments.data is None and not arguments.photos:
        if arguments.minutes is not None:
            raise OptionError("--minutes belongs to --data or --photos.")
        run_demo(arguments.output or DIGITS_OUTPUT, arguments.seed)
        return
    minutes = MINUTES if arguments.minutes is None else arguments.minutes
    if not 0 < minutes < math.inf:
        raise OptionError(f"--minutes must be above 0, got {minutes:g}.")
    output = arguments.output or PHOTOS_OUTPUT
    if arguments.data is not None:
        run_photo_demo(arguments.data, output, arguments.seed, minutes)
        return
    folder, names = download_imagenette(cache_folder())
    run_photo_demo(
        folder, output, arguments.seed, minutes, "STELLAR on Imagenette", names
    )
