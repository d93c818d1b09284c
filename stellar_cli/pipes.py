"""Readers that want no more of what is printed, as `head` does."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def closed_pipes() -> Iterator[None]:
    """Ends the process without a word where nobody reads its output any more.

    Raises:
        SystemExit: With status 1, then.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # at exit, Python would complain of it
    except BrokenPipeError:
        if not output_is_closed():
            raise
        # What is left is flushed at exit, too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        raise SystemExit(1) from None


def output_is_closed() -> bool:
    """Whether it was the reader of stdout who left: processes have other pipes, too."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # of a notebook or a test
        return False
    asked = select.poll()
    asked.register(output, 0)
    return any(told & (select.POLLERR | select.POLLHUP) for _, told in asked.poll(0))
