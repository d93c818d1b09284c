"""Command lines that are made of functions: their arguments are the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from jsonargparse import ArgumentParser

from stellar_cli.errors import raise_errors


def command_parser(command: str, what: str) -> ArgumentParser:
    """A parser whose errors are raised, and shown in one place.

    Args:
        command:
            The command, as a user types it.
        what:
            What it does, a sentence.
    """
    parser = ArgumentParser(prog=command, description=what)
    raise_errors(parser)
    return parser


def parse(
    parser: ArgumentParser,
    options: Sequence[str],
    function: Callable[..., Any],
    *others: Callable[..., Any],
) -> dict[str, Any]:
    """Reads options: lists may be given several times, switches may stand alone.

    Args:
        parser:
            Knows the options.
        options:
            What the user typed.
        function:
            The function of the command, which says what is a list.
        others:
            Other functions and classes whose arguments are options: with the function
            they say what is a switch.

    Returns:
        Values by name.

    Raises:
        OptionError: If there is no such option, or its value is of another kind.
    """
    options = _flags(_repeatable(options, function), (function, *others))
    return vars(parser.parse_args(options))


def take(values: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Takes out the options that are arguments of a function or class.

    Args:
        values:
            Values of options by name, without these afterwards.
        function:
            The function.
    """
    names = inspect.signature(function).parameters
    return {name: values.pop(name) for name in names if name in values}


def _repeatable(options: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Lets options that are lists be given several times: `--query A --query B`."""
    lists = [
        f"--{name}"
        for name, parameter in inspect.signature(function).parameters.items()
        if str(parameter.annotation).startswith("list")
    ]
    # "+" is how jsonargparse appends.
    return [
        f"{name}+{equals}{value}" if name in lists and not value.startswith("[") else o
        for o in options
        for name, equals, value in [o.partition("=")]
    ]


def _flags(
    options: Sequence[str], functions: Sequence[Callable[..., Any]]
) -> list[str]:
    """Lets options that are switches stand alone: `--untrained` means true."""
    switches = [
        f"--{name}"
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation in ("bool", "bool | None")
    ]
    return [
        f"{o}=true" if o in switches and following.startswith("--") else o
        for o, following in zip_longest(options, options[1:], fillvalue="--")
    ]
