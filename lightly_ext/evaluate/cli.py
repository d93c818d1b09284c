"""`stellar evaluate TASK`: one command for every table and figure."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from lightly_ext.evaluate.command_line import command_parser, parse, take
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.results import Results
from stellar_cli.tasks import TASKS


def main(argv: Sequence[str], command: str | None = None) -> None:
    """Runs `stellar evaluate`.

    Args:
        argv:
            A task of `stellar_cli.tasks.TASKS`, then its options.
        command:
            What was typed before the options, `stellar evaluate TASK` by default.

    Raises:
        OptionError: If there is no such option, or its value is of another kind.
    """
    task, options = argv[0], list(argv[1:])
    module_name, what = TASKS[task]
    command = command or f"stellar evaluate {task}"
    module, name = _import(task, module_name, command), task.replace("-", "_")
    function = getattr(module, f"run_{name}")
    needs_model = "model" in inspect.signature(function).parameters
    parser = command_parser(command, f"{what}.")
    # `report` takes folders of results where the others take a model.
    if needs_model:
        parser.add_function_arguments(load_frozen_model, skip={"seed"})
        parser.add_class_arguments(Devices)
        parser.add_class_arguments(Results, skip={"devices"})
        skipped: set[str | int] = {"model", "devices", "results", "protocol"}
        parser.add_function_arguments(function, skip=skipped)
    else:
        parser.add_function_arguments(function, as_positional=True)
    values = parse(parser, options, function, load_frozen_model, Results)
    if needs_model:
        values |= _begin(values, getattr(module, f"check_{name}"))
    function(**values)


def _begin(values: dict[str, Any], check: Callable[..., Any]) -> dict[str, Any]:
    """Makes devices, results and model of their options, which are taken out.

    Loading a model takes long, so what the task needs beside it is checked before.
    """
    devices = Devices(**take(values, Devices))
    results = Results(devices, **take(values, Results))
    results.look_ahead(check, values)
    model = load_frozen_model(**take(values, load_frozen_model), seed=devices.seed)
    devices.say(model.origin.reading)
    return {"model": model.to(devices.device), "devices": devices, "results": results}


def _import(task: str, module_name: str, command: str) -> ModuleType:
    try:
        return importlib.import_module(f"lightly_ext.evaluate.{module_name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("lightly_ext", "stellar_plugin"):
            raise
        extra = "text" if task == "align-text" else "eval"
        sys.exit(
            f"`{command}` needs the package '{error.name}': "
            f"pip install 'stellar-plugin[{extra}]'"
        )
