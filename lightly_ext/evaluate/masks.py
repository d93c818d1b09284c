"""Ground-truth masks: one integer per px, beside the images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from lightly_ext.data import list_images
from lightly_ext.evaluate.images import (
    EvaluationImages,
    ImageFiles,
    centre_crop,
    seen_size,
)
from stellar_plugin.image_conversion import cut_ends
from stellar_plugin.protocols import CropProtocol

# JPEG and WebP change the values that they store.
EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif")
MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
NUM_LOOKED_AT = 32


@dataclass(frozen=True)
class LabelValues:
    """Which values of a mask are no segments.

    Attributes:
        background: Values of the background, empty where there is none.
        ignore: Values of px that count nowhere.
    """

    background: tuple[int, ...]
    ignore: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks the values."""
        both = set(self.background) & set(self.ignore)
        if both:
            raise ValueError(f"background and ignore share the values {sorted(both)}.")
        negative = [v for v in (*self.background, *self.ignore) if v < 0]
        if negative:
            raise ValueError(f"Labels are 0 or more, got {negative}.")

    def __str__(self) -> str:
        """For the card of a protocol."""
        background, ignore = (
            ", ".join(map(str, sorted(values))) or "none"
            for values in (self.background, self.ignore)
        )
        return f"background {background}; ignored {ignore}; all others are segments"

    @classmethod
    def of(
        cls, background: tuple[int, ...] | int, ignore: tuple[int, ...] | int
    ) -> LabelValues:
        """Of single values or several, as options have them."""
        both = (background, ignore)
        return cls(*((v,) if isinstance(v, int) else tuple(v) for v in both))


class MaskedSample(NamedTuple):
    """One image with its mask, or what stands for an unreadable pair.

    Attributes:
        image: uint8 tensor with shape (3, crop, crop).
        mask: int32 tensor with shape (crop, crop).
        number: Number of the image in the list.
        readable: Whether both files could be read.
    """

    image: Tensor
    mask: Tensor
    number: int
    readable: bool


class MaskedImages(Dataset[MaskedSample]):
    """Image files and their masks, resized and cut in the same way.

    Args:
        files:
            The images.
        masks:
            The mask of each image.
        protocol:
            Says `resize` and `crop`.
        interpolation:
            How images are resized, "bicubic" or "bilinear"; labels are always nearest.
    """

    def __init__(
        self,
        files: ImageFiles,
        masks: Sequence[Path],
        protocol: CropProtocol,
        interpolation: str,
    ) -> None:
        self.files = files
        self.masks = masks
        self.images = EvaluationImages(files, centre_crop(protocol, interpolation))
        self.cut = label_crop(protocol)

    def __len__(self) -> int:
        """Returns the number of pairs, unreadable ones included."""
        return len(self.files)

    def __getitem__(self, index: int) -> MaskedSample:
        """Reads an image and its mask."""
        image, number, readable, _ = self.images[index]
        try:
            mask = self.cut(read_mask(self.masks[index])[None])[0]
        except Exception:  # decoders raise anything on broken files
            mask = torch.zeros(image.shape[1:], dtype=torch.int32)
            readable = False
        return MaskedSample(image, mask, number, readable)


def label_crop(protocol: CropProtocol) -> v2.Transform:
    """Resizes labels and cuts out their centre as `images.centre_crop` does images.

    Args:
        protocol:
            Says `resize` and `crop`.
    """
    # NEAREST would be half a px off the image.
    mode = InterpolationMode.NEAREST_EXACT
    return v2.Compose(
        [cut_ends, v2.Resize(protocol.resize, mode), v2.CenterCrop(protocol.crop)]
    )


def read_mask(path: Path) -> Tensor:
    """Reads a label image; of a palette image the indices.

    Args:
        path:
            File with one integer per px.

    Returns:
        int32 tensor with shape (height, width).
    """
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image).astype(np.int32))


def listed_files(files: ImageFiles, split: str) -> ImageFiles:
    """The images that a text file lists.

    Args:
        files:
            All images.
        split:
            File with one name per line, relative to the folder of the images, with or
            without extension; as in Pascal VOC's `ImageSets/Segmentation/val.txt`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an image is not there, or none is listed.
    """
    if not Path(split).is_file():
        raise FileNotFoundError(f"There is no file '{split}' with names of images.")
    numbers = {_stem(name): i for i, name in enumerate(files.names)}
    names = [line.strip() for line in Path(split).read_text().splitlines()]
    stems = [n if n in numbers else _stem(n) for n in names if n]
    if not stems:
        raise ValueError(f"'{split}' lists no image.")
    missing = [stem for stem in stems if stem not in numbers]
    if missing:
        raise ValueError(
            f"'{split}' lists {len(missing)} images that are not in '{files.root}', for"
            f" example '{missing[0]}'."
        )
    return files[[numbers[stem] for stem in stems]]


def find_masks(files: ImageFiles, folder: str) -> list[Path]:
    """Finds the mask of every image, and checks that it is one.

    Args:
        files:
            The images.
        folder:
            Folder with masks of the same names below it; extensions may differ.

    Returns:
        Paths of the masks, in the order of the images.

    Raises:
        ValueError: If a mask is missing, is no label image, or has another size than
            its image.
    """
    root = Path(folder)
    found = [n for n in list_images(root) if n.lower().endswith(EXTENSIONS)]
    paths = {_stem(name): root / name for name in found}
    missing = [name for name in files.names if _stem(name) not in paths]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images have no mask in '{folder}', for "
            f"example '{missing[0]}': a mask has the image's name and one of "
            f"{', '.join(EXTENSIONS)}."
        )
    masks = [paths[_stem(name)] for name in files.names]
    for index, mask in enumerate(masks):
        check_pair(files.source(index), mask)
    return masks


def check_values(masks: Sequence[Path], values: LabelValues) -> None:
    """Looks into some masks, whether background and segments are as they were said.

    Args:
        masks:
            The masks, of which at most 32 are read, spread over the list.
        values:
            What was said.

    Raises:
        ValueError: If there is no background in any of them, or nothing else.
    """
    count = min(len(masks), NUM_LOOKED_AT)
    seen: set[int] = set()
    for i in range(count):
        try:
            seen.update(read_mask(masks[i * len(masks) // count]).unique().tolist())
        except Exception:  # an unreadable one is counted later
            continue
    said = f"{count} masks that were looked at have the values {_shown(seen)}"
    if values.background and not seen & set(values.background):
        raise ValueError(
            f"No px is background {_shown(values.background)}: {said}. Name the right "
            "values with --background, or none with --background '[]'."
        )
    if not seen - set(values.background) - set(values.ignore):
        raise ValueError(
            f"All px are background {_shown(values.background)} or ignored "
            f"{_shown(values.ignore)}: {said}."
        )


def check_pair(image: Path | bytes, mask_path: Path) -> None:
    """Checks that a file is a label image of the size of its image.

    Raises:
        ValueError: If it is none; an unreadable file is counted when it is read.
    """
    try:
        with Image.open(mask_path) as mask:
            mask_size, mode = mask.size[::-1], mask.mode
    except OSError:
        return
    size = seen_size(image)
    if size is None:
        return
    if mode not in MODES:
        raise ValueError(
            f"'{mask_path}' is no label image: it has mode {mode} instead of one "
            "integer per px. Convert colours into class numbers first."
        )
    if mask_size != size:
        raise ValueError(
            f"'{mask_path}' is {mask_size[1]} x {mask_size[0]} px, its image "
            f"{size[1]} x {size[0]} px."
        )


def _stem(name: str) -> str:
    """Path without the extension."""
    return name[: len(name) - len(Path(name).suffix)]


def _shown(values: Collection[int]) -> str:
    shown = sorted(values)
    return ", ".join(map(str, shown[:10])) + (", ..." if len(shown) > 10 else "")
