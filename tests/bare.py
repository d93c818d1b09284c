"""Environments in which only what an extra declares can be imported.

Folders of links to the files of installed distributions: a moment, where an
installation takes minutes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Both hold the module cv2: a bare machine has the one that needs no libGL.
SAME = {"opencv-python": "opencv-python-headless"}


def closure(package: Distribution, extra: str) -> set[str]:
    """Names of the distributions that `pip install 'package[extra]'` would install."""
    found: set[tuple[str, str]] = set()
    open_ = [(package, extra)]
    while open_:
        source, wanted = open_.pop()
        for text in source.requires or ():
            required = Requirement(text)
            if required.marker and not required.marker.evaluate({"extra": wanted}):
                continue
            name = canonicalize_name(required.name)
            name = SAME.get(name, name)
            for each in ("", *required.extras):
                if (
                    name != canonicalize_name(package.name)
                    and (name, each) not in found
                ):
                    found.add((name, each))
                    open_.append((distribution(name), each))
    return {name for name, _ in found}


@functools.cache
def _owners() -> dict[str, set[str]]:
    """Names of the distributions that put files below each module."""
    return {
        top: {SAME.get(name, name) for name in map(canonicalize_name, owners)}
        for top, owners in packages_distributions().items()
    }


def link(names: Iterable[str], folder: Path) -> None:
    """Fills a folder with links to the files of distributions, and to no others."""
    folder.mkdir()
    names = set(names)
    shared = {top for top, owners in _owners().items() if owners - names}
    for name in names:
        installed = distribution(name)
        root = Path(str(installed.locate_file("")))
        for file in installed.files or ():
            if file.parts[0] in ("..", "__pycache__"):
                continue
            # Of a folder that others put files into, the files alone.
            part = Path(file if file.parts[0] in shared else file.parts[0])
            target = folder / part
            if not os.path.lexists(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(root / part)
