"""Reading objects of somebody else's classes, of which anything may be missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from stellar_plugin.mmseg.card.described import joined
from stellar_plugin.protocols import NOT_TOLD

# What reads a field, or several fields as a dict.
Readers = Mapping[str | tuple[str, ...], Callable[[], Any]]


class Readings(NamedTuple):
    """Fields, and why some of them are not told."""

    fields: dict[str, Any]
    notes: list[str]


def read(readers: Readers) -> Readings:
    """Reads each on its own: what raises is "not told", with a note that says why.

    Args:
        readers:
            Functions by the names of the fields that they read; the function of a
            tuple of names returns a dict.
    """
    fields: dict[str, Any] = {}
    notes = []
    for key, reader in readers.items():
        names = (key,) if isinstance(key, str) else key
        try:
            found = reader()
            fields |= {key: found} if isinstance(key, str) else found
        except Exception as error:
            fields |= dict.fromkeys(names, NOT_TOLD)
            notes.append(f"{joined(names)} not told: {error!r}")
    return Readings(fields, notes)
