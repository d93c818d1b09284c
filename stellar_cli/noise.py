"""Lines that help nobody who types a command."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

# Where warnings of this package come from.
OURS = tuple(
    str(Path(__file__).parents[1] / name) + "/"
    for name in ("lightly_ext", "stellar_plugin", "stellar_cli", "mm_configs")
)
_usual_format = warnings.formatwarning

# Logger and what is between other words of its own.
ADVERTISEMENTS = {"pytorch_lightning.utilities.rank_zero": "try installing [litlogger]"}
# Of Lightning's own calls.
DEPRECATIONS = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)


def leave_out() -> None:
    """Leaves out advertisements, and deprecations that only other packages can mend.

    What a logger or `warnings` says beside these is said as before; warnings of this
    package come without the line of code that says them.
    """
    for logger, words in ADVERTISEMENTS.items():
        logging.getLogger(logger).addFilter(_Without(words))
    for message in DEPRECATIONS:
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = _format


def _format(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if category is UserWarning and filename.startswith(OURS):
        return f"Warning: {message}\n"
    return _usual_format(message, category, filename, lineno, line)


class _Without(logging.Filter):
    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self._words not in record.getMessage()
