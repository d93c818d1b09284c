"""Recipes of `stellar pretrain`, and what each says otherwise than its base."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from lightly_ext.evaluate.result import markdown_table
from lightly_ext.pretrain.recipes import BASE_RECIPES, RECIPES, recipe_names


class Value(NamedTuple):
    """A value of a recipe.

    Attributes:
        text:
            As it stands in the file.
        note:
            The comment behind it.
    """

    text: str
    note: str


def values_of(path: Path) -> dict[str, Value]:
    """Values of a recipe by the option that sets them, "model.lr".

    Args:
        path:
            The YAML file.
    """
    text = path.read_text("utf-8")
    root = yaml.compose(text)
    return dict(_values(root, "", text.splitlines())) if root else {}


def _values(
    node: yaml.Node, name: str, lines: list[str]
) -> Iterator[tuple[str, Value]]:
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            yield from _values(value, f"{name}.{key.value}".lstrip("."), lines)
        return
    start, end = node.start_mark, node.end_mark
    line = lines[start.line]
    yield name, Value(line[start.column : end.column], line[end.column :].lstrip(" #"))


def comment_of(path: Path) -> str:
    """The comment that a recipe opens with, as Markdown: what is indented is code."""
    parts: list[tuple[bool, list[str]]] = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[2:]
        code = text.startswith("  ")
        # Where a new sentence begins a line, so does a new paragraph.
        if not parts or parts[-1][0] != code:
            parts.append((code, []))
        parts[-1][1].append(text)
    return "\n".join(
        f"```bash\n{textwrap.dedent(chr(10).join(lines))}\n```\n"
        if code
        else " ".join(lines).replace("*", r"\*") + "\n"
        for code, lines in parts
    )


def recipes_page() -> str:
    """Every recipe, its comment and what it changes."""
    bases = {method: values_of(path) for method, path in BASE_RECIPES.items()}
    pages = []
    for method, path in BASE_RECIPES.items():
        rows = [(f"`{k}`", f"`{v.text}`", v.note) for k, v in bases[method].items()]
        table = markdown_table([("option", "value", ""), *rows])
        pages.append(f"## {path.stem}\n\n{comment_of(path)}\n{table}\n")
    for name in recipe_names():
        pages.append(_recipe(name, bases))
    return "\n".join(pages)


def _recipe(name: str, bases: dict[str, dict[str, Value]]) -> str:
    path = RECIPES / f"{name}.yaml"
    values = values_of(path)
    method = values.pop("method", Value("stellar", "")).text
    base = bases[method]
    rows = [
        (
            f"`{option}`",
            f"`{base[option].text}`" if option in base else "",
            f"`{value.text}`",
            value.note,
        )
        for option, value in values.items()
    ]
    table = markdown_table([("option", BASE_RECIPES[method].stem, "here", ""), *rows])
    return f"## {name}\n\n{comment_of(path)}\n{table}\n"
