"""Checks that options of several commands have in common."""

from __future__ import annotations


def check_positive(**options: int | None) -> None:
    """Checks that options are at least 1, or None.

    Raises:
        ValueError: If one is not.
    """
    for option, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}.")
