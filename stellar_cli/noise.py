"""Lines of other packages that help nobody who types a command."""

from __future__ import annotations

import logging
import warnings

# Logger and what is between other words of its own.
ADVERTISEMENTS = {"pytorch_lightning.utilities.rank_zero": "try installing [litlogger]"}
# Of Lightning's own calls.
DEPRECATIONS = (r"`isinstance\(treespec, LeafSpec\)` is deprecated",)


def leave_out() -> None:
    """Leaves out advertisements, and deprecations that only other packages can mend.

    What a logger or `warnings` says beside these is said as before.
    """
    for logger, words in ADVERTISEMENTS.items():
        logging.getLogger(logger).addFilter(_Without(words))
    for message in DEPRECATIONS:
        warnings.filterwarnings("ignore", message)


class _Without(logging.Filter):
    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self._words not in record.getMessage()
