"""What users read when a command cannot do what they asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OptionError(ValueError):
    """Wrong options; the command ends with status 2, as those of argparse do."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question that names what is closest to a misspelt name.

    Args:
        name:
            What was given.
        names:
            What there is.

    Returns:
        The question with a space in front, empty if nothing is close.
    """
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
