"""Images to learn from: folders, views, and Lightning's data module."""

from lightly_ext.data.datamodule import StellarDataModule, num_cpus
from lightly_ext.data.image_folder import (
    ImageFolderDataset,
    list_images,
    read_image,
)
from lightly_ext.data.views import SingleViewTransform, ViewBatch, collate_views

__all__ = [
    "ImageFolderDataset",
    "SingleViewTransform",
    "StellarDataModule",
    "ViewBatch",
    "collate_views",
    "list_images",
    "num_cpus",
    "read_image",
]
