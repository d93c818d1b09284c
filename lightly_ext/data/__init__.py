"""Images to learn from: folders, views, and Lightning's data module."""

from lightly_ext.data.datamodule import StellarDataModule, num_cpus
from lightly_ext.data.image_folder import ImageFolderDataset
from lightly_ext.data.images import ImageDataset, epoch_order
from lightly_ext.data.jpeg import JPEG_DECODER, jpeg_decoder
from lightly_ext.data.listing import list_images, printable
from lightly_ext.data.reading import MAX_PIXELS, read_image
from lightly_ext.data.views import (
    EpochSampler,
    SampleKey,
    SeededViews,
    SingleViewTransform,
    TrainingViews,
    ViewBatch,
    collate_views,
)

__all__ = [
    "JPEG_DECODER",
    "MAX_PIXELS",
    "EpochSampler",
    "ImageDataset",
    "ImageFolderDataset",
    "SampleKey",
    "SeededViews",
    "SingleViewTransform",
    "StellarDataModule",
    "TrainingViews",
    "ViewBatch",
    "collate_views",
    "epoch_order",
    "jpeg_decoder",
    "list_images",
    "num_cpus",
    "printable",
    "read_image",
]
