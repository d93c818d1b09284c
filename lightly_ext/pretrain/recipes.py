"""Recipes in YAML: those of this package, those of users, and those of earlier runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from stellar_cli.errors import OptionError, did_you_mean, raise_errors

RECIPES = Path(__file__).parents[1] / "recipes"
# What every recipe of a method starts from.
BASE_RECIPES = {"stellar": RECIPES / "base.yaml", "mae": RECIPES / "base_mae.yaml"}
# The resolved recipe of a run, in its folder.
RUN_RECIPE = "config.yaml"
MAX_DEPTH = 50


def recipe_names() -> list[str]:
    """Names of the recipes in this package, for `--config`."""
    bases = BASE_RECIPES.values()
    paths = [path for path in RECIPES.rglob("*.yaml") if path not in bases]
    return sorted(
        path.relative_to(RECIPES).with_suffix("").as_posix() for path in paths
    )


def merge_recipes(argv: Sequence[str]) -> list[str]:
    """Makes one recipe of the base and all that `-c` and `--config` name.

    Later ones win. jsonargparse replaces arguments that are dictionaries as a whole: a
    recipe with one weight of the loss would silently drop what the base says of the
    others. `--from-run` takes the recipe of a run in place of the base, all but its
    output folder. The last `method` that is named decides on the base; what recipes of
    another one say of `model` is left out.

    Args:
        argv:
            Arguments behind the command.

    Returns:
        The arguments with one `--config`, in front of the options that it yields to.
            It names the method.

    Raises:
        OptionError: If a recipe, a method or a run does not exist, or a run is repeated
            without an output folder.
    """
    parser = argparse.ArgumentParser(
        "stellar pretrain", add_help=False, allow_abbrev=False
    )
    raise_errors(parser)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--from-run", "--from_run", type=Path)
    parser.add_argument("--method")
    known, rest = parser.parse_known_args(argv)
    recipes = [_load(_recipe_path(name)) for name in known.config]
    if known.from_run is not None:
        recipes.insert(0, _of_run(known.from_run))
    recipe = _of_method(recipes, known.method, repeated=known.from_run is not None)
    given = any(option.partition("=")[0] == "--output" for option in rest)
    if known.from_run is not None and not given and "output" not in recipe:
        raise OptionError(
            f"--from-run repeats the run in '{known.from_run}'; name the folder of the "
            "new one with --output."
        )
    runs = [Path(name).parent for name in known.config if _is_of_run(Path(name))]
    if runs and "--resume" in rest:
        # The run that lies there, wherever it was when its recipe was written.
        recipe["output"] = str(runs[-1])
    return [f"--config={json.dumps(recipe)}", *rest]


def recipe_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The recipe in arguments that `merge_recipes` has made."""
    recipe: dict[str, Any] = json.loads(arguments[0].removeprefix("--config="))
    return recipe


def _of_method(
    recipes: list[dict[str, Any]], asked: str | None, repeated: bool
) -> dict[str, Any]:
    """Recipes as one, on top of the base of their method unless a run is repeated."""
    named = [recipe.get("method") for recipe in [*recipes, {"method": asked}]]
    method = next(filter(None, reversed(named)), "stellar")
    if method not in BASE_RECIPES:
        raise OptionError(
            f"There is no method '{method}'.{did_you_mean(str(method), BASE_RECIPES)} "
            f"Methods: {', '.join(BASE_RECIPES)}."
        )
    of_another = False
    repeated = repeated and (named[0] or "stellar") == method
    result = {} if repeated else _load(BASE_RECIPES[method])
    for recipe, name in zip(recipes, named[:-1], strict=True):
        of_another = method != name if name else of_another
        kept = {k: v for k, v in recipe.items() if k != "model" or not of_another}
        result = _merged(result, kept)
    return {**result, "method": method}


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(text)
        recipe = json.loads(json.dumps(get_loader("yaml")(text) or {}))
    except Exception as error:  # no YAML, or a list that holds itself
        raise OptionError(f"'{path}' is no recipe in YAML: {error}.") from error
    if not isinstance(recipe, dict):
        raise OptionError(f"'{path}' is no recipe: it has no options by name.")
    for name in ("trainer", "model", "data"):
        # The parser takes a number for a trainer. A text may name another file.
        if not isinstance(recipe.get(name, {}), (dict, str)):
            raise OptionError(f"'{path}' has no options by name under '{name}'.")
    return recipe


def _check_depth(text: str) -> None:
    """The loader, which is in C, ends the process where there is no end of brackets."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} times")


def _of_run(folder: Path) -> dict[str, Any]:
    path = folder / RUN_RECIPE
    if not path.is_file():
        raise OptionError(f"--from-run: there is no run in '{folder}', no {path}.")
    return {k: v for k, v in _load(path).items() if k not in ("output", "resume")}


def _is_of_run(path: Path) -> bool:
    return path.name == RUN_RECIPE and (path.parent / "checkpoints").is_dir()


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if old.get("class_path") != new.get("class_path", old.get("class_path")):
        return new  # the arguments of another class
    return {**old, **{k: _merged(old[k], v) if k in old else v for k, v in new.items()}}


def _recipe_path(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    names = recipe_names()
    if name in names:
        return RECIPES / f"{name}.yaml"
    own = ", ".join(name for name in names if "/" not in name)
    raise OptionError(
        f"There is no recipe file '{name}'.{did_you_mean(name, names)} "
        f"Recipes of the package: {own}, and ablations/NAME."
    )
