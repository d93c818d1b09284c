"""`stellar COMMAND ...`: imports a command only when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence

from stellar_cli import clock
from stellar_cli.errors import OptionError, closest, shown
from stellar_cli.noise import leave_out
from stellar_cli.pipes import closed_pipes
from stellar_cli.pretrain_help import pretrain_help
from stellar_cli.tasks import TASKS, check_task
from stellar_cli.version import version_text

EVALUATE = "lightly_ext.evaluate.cli"
# Module, extra and purpose of each command.
COMMANDS = {
    "convert": ("stellar_plugin.convert_cli", "export", "convert weights"),
    "try": ("lightly_ext.quick_start.cli", "eval", "your photos to a result: minutes"),
    "pretrain": ("lightly_ext.pretrain.cli", "pretrain", "pretrain on images"),
    "evaluate": (EVALUATE, "eval", "every table and figure of the paper"),
    "visualize": (EVALUATE, "eval", "localization, PCA, reconstruction"),
    "atlas": (EVALUATE, "eval", "what is in a folder, as a page to walk"),
    "index": ("lightly_ext.search.index", "search", "tokens of a folder, for search"),
    "search": ("lightly_ext.search.search", "search", "images like a photo, and where"),
    "export": ("lightly_ext.search.export", "search", "tokens of an index as a table"),
    "report": (EVALUATE, "eval", "stored results as the paper's tables"),
    "configs": ("stellar_cli.configs", "mmseg", "configs for `mim train mmseg`"),
    "demo": (
        "lightly_ext.demo.cli",
        "demo",
        "pretrain, evaluate, look: minutes on CPU",
    ),
}
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `stellar COMMAND ...`.

    Args:
        argv:
            Arguments, those of the process by default.
    """
    with closed_pipes():
        _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> None:
    if not sys.stdout.isatty():
        # Else rich would draw its bars into notebooks, which ask for colours.
        os.environ.setdefault("TTY_INTERACTIVE", "0")
    clock.began = time.monotonic()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in HELP:
        print(_help())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(version_text())
        return
    with shown("stellar", debug):
        _check_command(arguments[0])
    words = 2 if arguments[0] == "evaluate" and {*arguments[1:2]} & TASKS.keys() else 1
    with shown(" ".join(["stellar", *arguments[:words]]), debug):
        _run(*arguments)


def _help() -> str:
    commands = [f"  {name:12}{what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: stellar COMMAND ...\n",
            "STELLAR: an image as a few sparse tokens and where they are.\n",
            *commands,
            "\n`stellar COMMAND --help` lists the options of a command.",
            "With `--debug`, errors show where they happened.",
            "`stellar --version` says what a report of a mistake should name.",
        ]
    )


def _check_command(name: str) -> None:
    if name not in COMMANDS:
        # Tasks are typed as commands, too.
        close = closest(name, [*COMMANDS, *TASKS])
        typed = close if close in COMMANDS else f"evaluate {close}"
        question = f" Did you mean '{typed}'?" if close else ""
        raise OptionError(f"There is no command '{name}'.{question}")


def _run(command: str, *options: str) -> None:
    if command == "pretrain" and not {*HELP}.isdisjoint(options):
        print(pretrain_help())
        return
    # The name is --help for the parsers.
    arguments = [
        "--help" if option in ("--help-all", "--help_all") else option
        for option in options
    ]
    leave_out()
    name, extra, _ = COMMANDS[command]
    if command == "evaluate":
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
    # Some tasks of `stellar evaluate` are commands of their own too.
    if name == EVALUATE and command != "evaluate":
        module.main([command, *arguments], f"stellar {command}")
    else:
        module.main(arguments)


if __name__ == "__main__":
    main()
