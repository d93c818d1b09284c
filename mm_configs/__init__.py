"""Configs of mmsegmentation. They come with the package; `stellar configs` lists them.

`mim train mmseg "$(stellar configs stellar_ade20k)"` runs one from anywhere, and a
config anywhere inherits one by
`_base_ = __import__("mm_configs").path("stellar_ade20k")`.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The configs that can be run, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("[!_]*.py"))


def path(name: str) -> str:
    """Where a config is.

    Args:
        name:
            One of `names()`, or a base such as "_base_/stellar_linear".

    Raises:
        FileNotFoundError: If there is no such config.
    """
    file = _FOLDER / f"{name}.py"
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no config '{name}'; `stellar configs` lists them."
        )
    return str(file)


def purpose(name: str) -> str:
    """What a config is for: the first sentence of the comment that it opens with."""
    comment = []
    for line in Path(path(name)).read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).split(". ")[0].rstrip(".")
