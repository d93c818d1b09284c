"""The command `stellar`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Module of each command, imported only when the command runs.
COMMANDS = {
    "convert": ("stellar_plugin.convert_cli", "convert weights between layouts"),
    "pretrain": ("lightly_ext.pretrain_cli", "pretrain on a folder of images"),
    "evaluate": ("lightly_ext.evaluate.cli", "every table and figure of the paper"),
    "demo": ("lightly_ext.demo.cli", "pretrain, evaluate and look, in minutes on CPU"),
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
    for name, (_, text) in COMMANDS.items():
        subparsers.add_parser(name, help=text, add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    try:
        module = importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("lightly_ext", "stellar_plugin"):
            raise
        extra = {"demo": "demo", "evaluate": "eval"}.get(command, "pretrain")
        sys.exit(
            f"`stellar {command}` needs the package '{error.name}': "
            f"pip install 'stellar-plugin[{extra}]'"
        )
    module.main(arguments[1:])


if __name__ == "__main__":
    main()
