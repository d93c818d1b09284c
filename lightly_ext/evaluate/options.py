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


def check_files(**options: str | None) -> None:
    """Checks that options are files, or None.

    Raises:
        FileNotFoundError: If one is not.
    """
    for option, value in options.items():
        if value is not None and not Path(value).is_file():
            raise FileNotFoundError(f"There is no file '{value}': --{option} FILE.")
