"""Images to learn from: folders, views, and Lightning's data module."""

from lightly_ext.data.datamodule import StellarDataModule, num_cpus
from lightly_ext.data.image_folder import (
    ImageFolderDataset,
    list_images,
    read_image,
)
from lightly_ext.data.views import (
    EpochSampler,
    SeededViews,
    SingleViewTransform,
    ViewBatch,
    collate_views,
    epoch_order,
)

__all__ = [
    "EpochSampler",
    "ImageFolderDataset",
    "SeededViews",
    "SingleViewTransform",
    "StellarDataModule",
    "ViewBatch",
    "collate_views",
    "epoch_order",
    "list_images",
    "num_cpus",
    "read_image",
]
