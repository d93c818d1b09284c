"""Data sets for classification, in the folder layouts that people have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightly_ext.evaluate.images import ImageFiles, folder_images
from lightly_ext.image_folder import ImageFolderDataset
from stellar_plugin.protocols import LINEAR_PAPER


@dataclass(frozen=True)
class ClassificationSet:
    """A training and a test part with the same classes.

    Attributes:
        name:
            Name of the set in tables.
        train:
            Images to train on and to choose with.
        test:
            Images to score on.
        train_scale:
            Range of the area of random crops in training, as fractions of the image.
    """

    name: str
    train: ImageFiles
    test: ImageFiles
    train_scale: tuple[float, float]


def find_classification_set(data: str) -> ClassificationSet:
    """Finds a data set for classification.

    Args:
        data:
            Folder with the parts `train` and `val` or `test`, each with a subfolder of
            images per class.

    Raises:
        ValueError: If the parts are not there or have different classes.
    """
    root = Path(data)
    parts = []
    for name in ("train", "val"):
        found = ImageFolderDataset(root / name, labelled=True)
        names = [str(found.file(i).relative_to(root / name)) for i in range(len(found))]
        labels = [] if found.labels is None else found.labels.tolist()
        parts.append(ImageFiles(root / name, names, labels, found.classes))
    assert LINEAR_PAPER.train_scale is not None
    return ClassificationSet(root.name, parts[0], parts[1], LINEAR_PAPER.train_scale)


def find_images(data: str) -> tuple[str, ImageFiles]:
    """Finds images without labels.

    Args:
        data:
            Folder of images, nested to any depth.

    Returns:
        Name of the set in tables, and its images.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    return Path(data).name, folder_images(data)
