"""Options of every command, as its own parser knows them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from pytorch_lightning.cli import LightningArgumentParser

from lightly_ext.evaluate.result import markdown_table
from stellar_cli.__main__ import COMMANDS, EVALUATE, main
from stellar_cli.pretrain_help import OPTIONS
from stellar_cli.tasks import TASKS

HEADER = ("option", "value", "default", "meaning")
KINDS = {bool: "true, false", int: "int", float: "float", str: "text", Path: "path"}
RST_ROLE = re.compile(r":\w+:`~?")


class Option(NamedTuple):
    """A row of a table, in Markdown.

    Attributes:
        name:
            As it is typed: "`--limit`", or "`SOURCE`" of an argument without a name.
        kind:
            What it takes.
        default:
            Its default, "required" where there is none.
        meaning:
            Its help.
    """

    name: str
    kind: str
    default: str
    meaning: str


@functools.cache
def parser_of(*words: str) -> argparse.ArgumentParser:
    """The parser that a command makes for its `--help-all`.

    Args:
        words:
            The command, ("evaluate", "knn").
    """
    found: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, _: Any = None) -> None:
        found.append(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", keep),
        contextlib.suppress(SystemExit),
    ):
        main([*words, "--help-all"])
    return found[0]


def listed(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Arguments that a user can give, without those that only show help."""
    return [
        action
        for action in parser._actions
        if argparse.SUPPRESS not in (action.default, action.help)
    ]


def options_of(*words: str) -> list[Option]:
    """Options of a command.

    Args:
        words:
            The command, ("evaluate", "knn").
    """
    parser = parser_of(*words)
    defaults: Any = {}
    if isinstance(parser, LightningArgumentParser):  # those of the base recipe
        defaults = parser.get_defaults()
    return [
        option_of(action, defaults.get(action.dest, action.default))
        for action in listed(parser)
    ]


def names_of(action: argparse.Action) -> list[str]:
    """How an argument is typed. `--name+` appends, and is told in no table."""
    named = [name for name in action.option_strings if not name.endswith("+")]
    return named or [str(action.metavar or action.dest).upper()]


def option_of(action: argparse.Action, default: Any) -> Option:
    """The row of an argument.

    Args:
        action:
            The argument.
        default:
            Its default, the parser's or that of a recipe.
    """
    required = action.required and action.nargs != "?"
    return Option(
        ", ".join(f"`{name}`" for name in names_of(action)),
        _kind(action),
        "required" if required else _default(action, default),
        _text(action.help or ""),
    )


def _default(action: argparse.Action, default: Any) -> str:
    if default is None or default == {}:
        return ""
    if isinstance(action, argparse._StoreTrueAction):
        return "off"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _kind(action: argparse.Action) -> str:
    hint = getattr(action, "_typehint", action.type)
    choices = list(action.choices or ())
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        choices = list(typing.get_args(hint))
    elif len(arguments) == 1 and None in (*typing.get_args(hint), None):
        hint = arguments[0]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if action.nargs == 0:
        return "alone"
    if hint is None:
        return "text"
    return KINDS.get(hint, "") if isinstance(hint, type) else ""


def _text(text: str) -> str:
    """Help as Markdown in a table: reStructuredText's roles are names in it."""
    text = " ".join(text.replace(str(Path.home()), "~").split())
    text = RST_ROLE.sub("`", text)
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_$\[\\])", r"\\\1", part)
        for part in parts
    )


def _table(options: Iterable[Option]) -> str:
    return markdown_table([HEADER, *options]) + "\n"


def pretrain_page() -> str:
    """Options of `stellar pretrain`: those that matter, then all, of both methods."""
    pages = ["## Those that matter\n"]
    for title, options in OPTIONS.items():
        rows = [(*_name_and_default(told), _text(t)) for told, t in options.items()]
        table = markdown_table([("option", "default", "meaning"), *rows])
        pages.append(f"### {title}\n\n{table}\n")
    stellar, mae = (
        options_of("pretrain", "--config", recipe)
        for recipe in ("photos", "photos_prior")
    )
    groups = {
        "The run": [o for o in stellar if "." not in o.name],
        "Model and loss": _starting(stellar, "--model."),
        "Images": _starting(stellar, "--data."),
        "Lightning's Trainer": _starting(stellar, "--trainer."),
    }
    pages.append("## All of them\n")
    pages += [f"### {title}: all\n\n{_table(rows)}" for title, rows in groups.items()]
    known = {option.name for option in stellar}
    own = [o for o in mae if o not in stellar]
    gone = [o.name for o in stellar if o.name not in {o.name for o in mae}]
    pages.append(
        "## The prior, `--method mae`\n\nRecipe `photos_prior`. Options that it lacks: "
        f"{', '.join(sorted(gone))}. Those that are its own or have another default or "
        f"meaning:\n\n{_table(sorted(own, key=lambda o: o.name in known))}"
    )
    return "\n".join(pages)


def _name_and_default(told: str) -> tuple[str, str]:
    name, _, default = told.partition(" ")
    return f"`--{name}`", f"`{default}`" if default else ""


def _starting(options: Sequence[Option], start: str) -> list[Option]:
    return [option for option in options if option.name.startswith(f"`{start}")]


def tasks_page() -> str:
    """Options of every task of `stellar evaluate`, those of all tasks once."""
    options = {task: options_of("evaluate", task) for task in TASKS}
    with_model = [o for o in options.values() if any(x.name == "`--model`" for x in o)]
    shared = [o for o in with_model[0] if all(o in others for others in with_model)]
    pages = [f"## Options of every task\n\n{_table(shared)}"]
    for task, (_, what) in TASKS.items():
        own = [option for option in options[task] if option not in shared]
        also = f" Also as `stellar {task}`." if task in COMMANDS else ""
        more = (
            ""
            if task == "report"
            else "; [those of every task](#options-of-every-task)"
        )
        pages.append(
            f"## {task}\n\n`stellar evaluate {task}`: {what}{more}.{also}\n\n"
            f"{_table(own)}"
        )
    return "\n".join(pages)


def commands_page() -> str:
    """Options of the other commands."""
    pages = []
    for command, (module, extra, what) in COMMANDS.items():
        if module == EVALUATE or command == "pretrain":
            continue
        text = _text(parser_of(command).description or what)
        pages.append(
            f"## stellar {command}\n\n{text.strip()} Extra: `{extra}`.\n\n"
            f"{_table(options_of(command))}"
        )
    return "\n".join(pages)
