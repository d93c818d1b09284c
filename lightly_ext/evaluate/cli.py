"""`stellar evaluate TASK`: one command for every table and figure."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser

from lightly_ext.evaluate.session import Session

# Module and purpose of each task, which is the function `run_TASK` there; imported only
# when the task runs.
TASKS = {
    "knn": ("classification.knn", "k nearest neighbours of frozen features"),
    "linear": ("classification.linear", "linear probe on cached features"),
    "linear-paper": ("classification.linear", "linear probe on augmented views"),
    "finetune": ("classification.finetune", "the whole network, fine-tuned"),
    "reconstruction": (
        "reconstruction.reconstruction",
        "FID, LPIPS, PSNR, SSIM",
    ),
    "equivariance": ("probing.equivariance", "S and L under shifts"),
    "stability": ("probing.stability", "features under random crops"),
    "rank": ("probing.rank", "number of tokens against FID and accuracy"),
    "where": ("probing.where", "localization against ground-truth masks"),
    "efficiency": ("efficiency", "time of each part"),
    "align-text": ("text.align_text", "a probe towards a text tower"),
    "visualize": ("pictures.visualize", "localization, PCA, reconstruction"),
    "concepts": ("pictures.concepts", "nearest tokens of a folder, as a page"),
    "report": ("report.report", "stored results as the paper's tables"),
}


def main(argv: Sequence[str]) -> None:
    """Runs `stellar evaluate`.

    Args:
        argv:
            Arguments behind the command: the task, then its options.
    """
    if not argv or argv[0] not in TASKS:
        text = "\n".join(f"  {name:15} {what}" for name, (_, what) in TASKS.items())
        print(f"usage: stellar evaluate TASK --model SOURCE ...\n\nTasks:\n{text}")
        print("\n`stellar evaluate TASK --help` lists the options of a task.")
        sys.exit(0 if argv and argv[0] in ("-h", "--help") else 2)
    task, options = argv[0], list(argv[1:])
    module_name, what = TASKS[task]
    function = getattr(_import(task, module_name), f"run_{task.replace('-', '_')}")
    needs_session = "session" in inspect.signature(function).parameters
    parser = ArgumentParser(prog=f"stellar evaluate {task}", description=f"{what}.")
    if needs_session:
        parser.add_class_arguments(Session, fail_untyped=True)
    # `report` takes folders of results where the others take a model.
    parser.add_function_arguments(
        function, as_positional=not needs_session, skip={"session"}
    )
    options = _flags(_repeatable(options, function), (function, Session))
    values = vars(parser.parse_args(options))
    try:
        if needs_session:
            names = inspect.signature(Session).parameters
            session = Session(**{k: values.pop(k) for k in names})
            values["session"] = session
        function(**values)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"stellar evaluate {task}: {error}")


def _repeatable(options: list[str], function: Callable[..., Any]) -> list[str]:
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


def _flags(options: list[str], functions: Sequence[Callable[..., Any]]) -> list[str]:
    """Lets options that are switches stand alone: `--untrained` means true."""
    switches = [
        f"--{name}"
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation in (bool, "bool")
    ]
    return [
        f"{o}=true" if o in switches and following.startswith("--") else o
        for o, following in zip(options, [*options[1:], "--"], strict=True)
    ]


def _import(task: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(f"lightly_ext.evaluate.{module_name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("lightly_ext", "stellar_plugin"):
            raise
        extra = "text" if task == "align-text" else "eval"
        sys.exit(
            f"`stellar evaluate {task}` needs the package '{error.name}': "
            f"pip install 'stellar-plugin[{extra}]'"
        )
