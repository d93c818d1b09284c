"""Where an index lies: in a folder, or on a server."""

from __future__ import annotations

from lightly_ext.search.image_index import ImageIndex
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.server_index import ServerIndex
from lightly_ext.search.token_index import TokenIndex


def open_index(index: str, server: str | None = None) -> ImageIndex:
    """Opens an index.

    Args:
        index:
            Its folder; on a server its name.
        server:
            URL of the Qdrant server that has it, None for a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read.
        OSError: If the server does not answer.
        RuntimeError: If the server refuses.
    """
    if server is None:
        return TokenIndex.open(index)
    return ServerIndex.open(server, index)


def create_index(index: str, card: IndexCard, server: str | None = None) -> ImageIndex:
    """Makes an index, or opens one of tokens that were made in the same way.

    Args:
        index:
            As for `open_index`.
        card:
            What made the tokens.
        server:
            As for `open_index`.

    Raises:
        ValueError: If an index of other tokens is there.
    """
    if server is None:
        return TokenIndex.create(index, card)
    return ServerIndex.create(server, index, card)
