"""The parts of all images of a folder, in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.features import CachedFeatures, FeatureCache
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.parts import Cut, Parts
from stellar_plugin.encoder import L2_NORM_EPS
from stellar_plugin.protocols import CropProtocol
from stellar_plugin.visualize import ABSENT_PATCHES

# Bytes that the widest tensor of one block takes: small beside any memory, large enough
# for a device to be busy.
BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class PartTable:
    """The parts of the readable images of a folder; the large arrays stay in files.

    Attributes:
        files:
            The readable images; everything else has an entry for each of them.
        rows:
            Their rows in `units` and `maps`, int64 with shape (num_images,).
        units:
            Vectors of unit length, zero where there is none, float16 with shape
            (num_rows, num_parts, dim).
        norms:
            Lengths of the vectors before, float32 with shape (num_images, num_parts).
        maps:
            Share that each part has of each patch, in steps of 1 / 255 of its largest,
            uint8 with shape (num_rows, num_parts, num_patches).
        peaks:
            The largest share, float32 with shape (num_images, num_parts).
        masses:
            Share that it has of its image, float32 with shape (num_images, num_parts).
        grid_size:
            Height and width of the patch grid.
    """

    files: ImageFiles
    rows: NDArray[np.int64]
    units: NDArray[np.generic]
    norms: Tensor
    maps: NDArray[np.generic]
    peaks: Tensor
    masses: Tensor
    grid_size: tuple[int, int]

    @property
    def num_parts(self) -> int:
        """Parts of one image."""
        return self.masses.shape[1]

    @property
    def present(self) -> Tensor:
        """Whether a part is somewhere, bool (num_images, num_parts).

        A part that has less than `ABSENT_PATCHES` of one patch in all is nowhere.
        """
        return self.masses * self.maps.shape[2] >= ABSENT_PATCHES

    def units_of(self, images: NDArray[np.int64]) -> Tensor:
        """Unit vectors of some images, float32 (len(images), num_parts, dim).

        Args:
            images:
                Numbers of readable images.
        """
        units = torch.from_numpy(np.array(self.units[self.rows[images]])).float()
        return F.normalize(units, dim=-1, eps=L2_NORM_EPS)  # as exact as they can be

    def maps_of(self, images: NDArray[np.int64]) -> Tensor:
        """Maps of some images, float32 in [0, 1] (len(images), num_parts, patches)."""
        steps = torch.from_numpy(np.array(self.maps[self.rows[images]])).float()
        return steps * (self.peaks[images, :, None] / 255)

    def blocks(self, width: int) -> list[NDArray[np.int64]]:
        """Numbers of all images, some at a time.

        Args:
            width:
                Numbers in the widest vector that is computed of a part: sets how many
                images are in a block.
        """
        size = max(1, BLOCK_BYTES // (4 * self.num_parts * width))
        starts = range(0, len(self.rows), size)
        return [np.arange(i, min(i + size, len(self.rows))) for i in starts]


def part_table(
    cache: FeatureCache, files: ImageFiles, protocol: CropProtocol, cut: Cut
) -> tuple[PartTable, CachedFeatures]:
    """Cuts all images into parts, or reads what an earlier run left on disk.

    Args:
        cache:
            Computes the features, or has them.
        files:
            The images.
        protocol:
            Says what part of an image is seen.
        cut:
            Cuts it into parts.

    Returns:
        The parts, and the features that they are of.

    Raises:
        RuntimeError: If more than 5 % of the images are unreadable.
    """

    def compute(images: Tensor) -> Mapping[str, Tensor]:
        return quantised(cut(cache.model(images)))

    kind = f"parts and maps: {cut.kind}"
    cached = cache.features(files, protocol, kind, compute)
    table = PartTable(
        files[cached.readable.tolist()],
        cached.readable.numpy(),
        cached.arrays["units"],
        cached.rows("norms"),
        cached.arrays["maps"],
        cached.rows("peaks"),
        cached.rows("masses"),
        cache.model.map_size(protocol.crop),
    )
    return table, cached


def quantised(parts: Parts) -> dict[str, Tensor]:
    """Vectors and maps as they are kept: 2 bytes and 1 byte a number.

    Args:
        parts:
            Parts of a batch.

    Returns:
        "units", "norms", "maps", "peaks" and "masses" of `PartTable`, a row per image.
    """
    peaks = parts.maps.amax(dim=2)
    steps = parts.maps / peaks.clamp(min=torch.finfo().tiny)[..., None] * 255
    return {
        "units": F.normalize(parts.vectors, dim=-1, eps=L2_NORM_EPS).half(),
        "norms": parts.vectors.norm(dim=-1),
        "maps": steps.round().byte(),
        "peaks": peaks,
        "masses": parts.masses,
    }
