"""Images in tars, parquet and Hugging Face data sets, instead of in a folder."""

from lightly_ext.data.streams.dataset import SHUFFLE_BUFFER, StreamDataset
from lightly_ext.data.streams.shards import Shard, open_shards
from lightly_ext.data.streams.sources import Source, find_source

__all__ = [
    "SHUFFLE_BUFFER",
    "Shard",
    "Source",
    "StreamDataset",
    "find_source",
    "open_shards",
]
