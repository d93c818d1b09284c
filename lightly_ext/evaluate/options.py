"""Checks that options of several commands have in common."""

from __future__ import annotations

import os
from pathlib import Path


def check_positive(**options: int | None) -> None:
    """Checks that options are at least 1, or None.

    Raises:
        ValueError: If one is not.
    """
    for option, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}.")


def check_writable(folder: Path) -> None:
    """Checks that a folder is there and writable, or can be made.

    Raises:
        ValueError: If it cannot.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"output '{folder}' is no folder: '{there}' is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"output '{folder}' cannot be written: '{there}' is read-only. Name "
            "another folder with --output."
        )


def check_new_file(option: str, file: str) -> None:
    """Checks that a file can be written, whether it is there or not.

    Args:
        option:
            Where it was named, "--json".
        file:
            The file.

    Raises:
        FileNotFoundError: If its folder is not there.
        ValueError: If it is a folder.
        PermissionError: If its folder cannot be written into.
    """
    path, folder = Path(file), Path(file).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder '{path.parent}' for {option} '{file}': make it, or "
            "name another file."
        )
    if path.is_dir():
        raise ValueError(f"{option} '{file}' is a folder: name a file in it.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{option} '{file}' cannot be written: its folder is read-only. Name a "
            "file in another one."
        )


def check_files(**options: str | None) -> None:
    """Checks that options are files, or None.

    Raises:
        FileNotFoundError: If one is not.
    """
    for option, value in options.items():
        if value is not None and not Path(value).is_file():
            raise FileNotFoundError(f"There is no file '{value}': --{option} FILE.")
