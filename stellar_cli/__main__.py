"""`stellar COMMAND ...`: imports a command only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from stellar_cli.tasks import check_task

EVALUATE = "lightly_ext.evaluate.cli"
# Module, extra and purpose of each command.
COMMANDS = {
    "convert": ("stellar_plugin.convert_cli", "export", "convert weights"),
    "pretrain": ("lightly_ext.pretrain.cli", "pretrain", "pretrain on images"),
    "evaluate": (EVALUATE, "eval", "every table and figure of the paper"),
    "visualize": (EVALUATE, "eval", "localization, PCA, reconstruction"),
    "concepts": (EVALUATE, "eval", "nearest tokens of a folder, as a page"),
    "report": (EVALUATE, "eval", "stored results as the paper's tables"),
    "demo": (
        "lightly_ext.demo.cli",
        "demo",
        "pretrain, evaluate, look: minutes on CPU",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `stellar COMMAND ...`.

    Args:
        argv:
            Arguments, those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="stellar",
        description="STELLAR: an image as a few sparse tokens and where they are.",
        epilog="`stellar COMMAND --help` lists the options of a command.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (_, _, text) in COMMANDS.items():
        subparsers.add_parser(name, help=text, add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    name, extra, _ = COMMANDS[command]
    # Some tasks of `stellar evaluate` are commands of their own too.
    if name != EVALUATE or command == "evaluate":
        arguments = arguments[1:]
    if name == EVALUATE:
        check_task(arguments)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("lightly_ext", "stellar_plugin"):
            raise
        sys.exit(
            f"`stellar {command}` needs the package '{error.name}': "
            f"pip install 'stellar-plugin[{extra}]'"
        )
    module.main(arguments)


if __name__ == "__main__":
    main()
