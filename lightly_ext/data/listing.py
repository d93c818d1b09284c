"""Images below any folder, by the names of the files."""

from __future__ import annotations

import os
from collections import Counter, deque
from pathlib import Path

from PIL import features
from pytorch_lightning.utilities import rank_zero_warn

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib"),
    *(".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *((".avif",) if features.check("avif") else ()),
    *((".jp2", ".j2k", ".j2c", ".jpx") if features.check("jpg_2000") else ()),
)

# Between folders while names are sorted: before all that a name may hold.
_SEPARATOR = "\0"
_SHOWN = 10


def list_images(folder: Path) -> list[str]:
    """Lists the images below a folder.

    Names that start with a dot are left out. Symbolic links are followed, but every
    folder is read once: a link to one that is read anyway, or to one above, is left
    out. Files with other suffixes, and whatever cannot be read, are left out with one
    warning that counts and names them.

    Args:
        folder:
            The folder, searched to any depth.

    Returns:
        Paths relative to the folder, each folder's entries in sorted order.

    Raises:
        ValueError: If the folder does not exist or holds no image.

    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {printable(folder)}.")
    names, left_out = _walk(folder)
    if not names:
        raise ValueError(
            f"There is no image below {printable(folder)}: no file name ends in "
            f"{', '.join(EXTENSIONS)}.{left_out and f' There is: {left_out}.'}"
        )
    if left_out:
        rank_zero_warn(f"Not read as images below {printable(folder)}: {left_out}.")
    names.sort()
    for number, name in enumerate(names):  # in place, there may be millions
        names[number] = name.replace(_SEPARATOR, "/")
    return names


def printable(text: object) -> str:
    """Text for one line of any output: line breaks and undecodable bytes escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )


def _walk(folder: Path) -> tuple[list[str], str]:
    """Names of the images, in no order, with `_SEPARATOR`, and what else there is."""
    names: list[str] = []
    suffixes: Counter[str] = Counter()
    problems: list[str] = []
    root = os.path.realpath(folder)
    # What leads to the folder counts as read: a link to it is a loop.
    read = {str(parent) for parent in Path(root).parents}
    folders, links = deque([("", root)]), deque[tuple[str, str]]()
    while folders or links:  # links last: real places win
        prefix, path = (folders or links).popleft()
        if path in read:
            problems.append(f"{prefix} (is read elsewhere)")
            continue
        read.add(path)
        try:
            with os.scandir(path) as iterator:
                entries = sorted(iterator, key=lambda entry: entry.name)
        except OSError as error:
            problems.append(f"{prefix} ({error.strerror})")
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    if entry.is_symlink():
                        links.append((name + _SEPARATOR, os.path.realpath(entry.path)))
                    else:
                        folders.append((name + _SEPARATOR, entry.path))
                elif not entry.name.lower().endswith(EXTENSIONS):
                    suffixes[os.path.splitext(entry.name)[1].lower()] += 1
                # A link to nowhere is an image that cannot be read.
                elif entry.is_file() or not os.path.exists(entry.path):
                    names.append(name)
                else:
                    problems.append(f"{name} (no file)")
            except OSError as error:  # a link to itself, a disk that is gone
                problems.append(f"{name} ({error.strerror})")
    return names, _summary(suffixes, problems)


def _summary(suffixes: Counter[str], problems: list[str]) -> str:
    parts = [
        f"{count} {printable(suffix) or 'without suffix'}"
        for suffix, count in suffixes.most_common(_SHOWN)
    ]
    others = suffixes.total() - sum(dict(suffixes.most_common(_SHOWN)).values())
    if others:
        parts.append(f"{others} of {len(suffixes) - _SHOWN} other suffixes")
    parts += [printable(text.replace(_SEPARATOR, "/")) for text in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        parts.append(f"{len(problems) - _SHOWN} more that cannot be read")
    return ", ".join(parts)
