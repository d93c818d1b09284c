"""How a command of README or docs is checked, and how it is run."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import io
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from stellar_cli.__main__ import main
from tests.snippets.blocks import ROOT
from tests.snippets.rules import reason_not_to_run
from tests.stellar_plugin.mmseg.mmseg_sets import tool


class Parsed(BaseException):
    """Ends a command behind its options; no command catches it."""


def stop_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every command end once its parser has read all that was typed."""
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

        def parse_args(
            self: Any, *args: Any, original: Any = parser.parse_args, **kwargs: Any
        ) -> None:
            original(self, *args, **kwargs)
            raise Parsed

        monkeypatch.setattr(parser, "parse_args", parse_args)


def check(words: tuple[str, ...]) -> None:
    """Checks what a program is given; commands end by `Parsed`.

    Raises:
        AssertionError: If the program is not known.
        Exception: What the parser raises.
    """
    program, *rest = words
    match program:
        case "stellar":
            _parse(rest)
        case "sbatch":
            assert (ROOT / "lightly_ext/recipes" / rest[0]).is_file(), rest[0]
            _parse(["pretrain", *rest[1:]])
        case "torchrun":
            _check_torchrun(rest)
        case "mim":
            _check_mim(rest)
        case "cd" | "git":
            pass
        case "pip":
            _check_extras(rest)
        case "make":
            makefile = (ROOT / "Makefile").read_text()
            assert rest[0] in re.findall(r"^(\w+):", makefile, re.MULTILINE), rest[0]
        case "python":
            _check_python(rest)
        case _:
            assert program in PROGRAMS or reason_not_to_run(" ".join(words)), (
                f"'{program}' is not known: run it in tests/snippets/programs.py, or "
                "say why not in tests/snippets/rules.py."
            )


def _parse(arguments: list[str]) -> None:
    try:
        with suppress(Parsed), redirect_stdout(io.StringIO()):
            main(["--debug", *arguments])
    except SystemExit as end:  # as --help does
        assert end.code in (0, None), end.code


def _check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    module = arguments[1 if arguments[0] == "-m" else 0]
    module = module.removesuffix(".py").replace("/", ".")
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if module.startswith(("benchmarks.", "docs.")):
        words = [module, *arguments[arguments[0] == "-m" :][1:]]
        with pytest.MonkeyPatch.context() as patch, suppress(Parsed):
            patch.setattr(sys, "argv", words)
            runpy.run_module(module, run_name="__main__")


def _check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    with suppress(Parsed):
        get_args_parser().parse_args(arguments)
    if "-m" in arguments:
        module, *options = arguments[arguments.index("-m") + 1 :]
        assert module == "stellar_cli"
        _parse(options)


def _check_mim(arguments: list[str]) -> None:
    task, package, config, *options = arguments
    assert (task in ("train", "test"), package) == (True, "mmseg")
    assert config == "my_data.py" or Path(config).is_file(), f"there is no '{config}'"
    with suppress(Parsed):
        _mim_parser().parse_args(options)


def _mim_parser() -> argparse.ArgumentParser:
    """The options that `mim train mmseg` and `mim test mmseg` hand on."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--checkpoint")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--work-dir")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    return parser


def _check_extras(arguments: list[str]) -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    for names in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        for name in names.split(","):
            known = parser["options.extras_require"]
            assert name in known, f"setup.cfg has no extra '{name}'"


def run(words: list[str], folder: Path) -> None:
    """Runs a command in a folder, where the process is.

    Raises:
        Exception: What it raises.
        SystemExit: If it ends with an error.
    """
    try:
        PROGRAMS[words[0]](words, folder)
    except SystemExit as end:
        if end.code not in (0, None):
            raise


def _run_stellar(words: list[str], folder: Path) -> None:
    if words[1] == "pretrain" and "--resume" not in words:
        # As a reader, who has no run of this name yet; recipes name one by their name.
        recipes = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        named = [f"runs/{Path(recipe).stem}" for recipe in recipes]
        if "--output" in words:
            named.append(words[words.index("--output") + 1])
        shutil.rmtree(folder / ["runs/pretrain", *named][-1], ignore_errors=True)
    main(["--debug", *words[1:]])


def _run_mim(words: list[str], folder: Path) -> None:
    _, task, _, config, *options = words
    values = [word for word in options if "=" in word]
    others = [word for word in options if word not in (*values, "--cfg-options")]
    tool(task, config, *others, "--cfg-options", *values, folder=folder)
    for path in folder.glob("work_dirs/*/iter_?.pth"):  # as after all the iterations
        shutil.copy(path, path.with_name("iter_40000.pth"))


def _run_python(words: list[str], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [words[0], *words[3:]])
        if words[1] == "-m":
            runpy.run_module(words[2], run_name="__main__")
        else:
            exec(words[2], {"__name__": "__main__"})


PROGRAMS: dict[str, Callable[[list[str], Path], Any]] = {
    "stellar": _run_stellar,
    "mim": _run_mim,
    "python": _run_python,
    "cp": lambda words, folder: shutil.copy(*words[1:]),
}
