"""`stellar demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightly_ext.demo.run import run_demo
from stellar_cli.errors import raise_errors


def main(argv: Sequence[str]) -> None:
    """Runs `stellar demo`.

    Args:
        argv:
            Arguments behind the command.
    """
    parser = argparse.ArgumentParser(
        prog="stellar demo",
        description="Pretrains a small STELLAR on boards of handwritten digits, from "
        "random weights and without labels, evaluates it, and writes a page with "
        "pictures. Takes a few minutes on a CPU and downloads nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        help="folder for everything; an earlier demo in it is replaced",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides on boards and weights"
    )
    raise_errors(parser)
    arguments = parser.parse_args(argv)
    run_demo(arguments.output, arguments.seed)
