"""Images in tars, parquet and Hugging Face data sets, instead of in a folder."""

from lightly_ext.data.streams.dataset import SHUFFLE_BUFFER, StreamDataset
from lightly_ext.data.streams.labelled import LabelledStreamDataset
from lightly_ext.data.streams.shards import Shard, open_shards
from lightly_ext.data.streams.sources import Source, find_source, find_splits
from lightly_ext.data.streams.table import ImageTable

__all__ = [
    "SHUFFLE_BUFFER",
    "ImageTable",
    "LabelledStreamDataset",
    "Shard",
    "Source",
    "StreamDataset",
    "find_source",
    "find_splits",
    "open_shards",
]
