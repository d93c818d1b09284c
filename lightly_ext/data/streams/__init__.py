"""Images in tars, parquet and Hugging Face data sets, instead of in a folder."""

from lightly_ext.data.streams.sources import Source, find_source

__all__ = ["Source", "find_source"]
