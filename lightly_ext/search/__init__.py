"""Search over the tokens of many images: what is alike, and where."""

from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import Found, ImageIndex
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.server_index import ServerIndex
from lightly_ext.search.token_index import TokenIndex

__all__ = ["Entries", "Found", "ImageIndex", "IndexCard", "ServerIndex", "TokenIndex"]
