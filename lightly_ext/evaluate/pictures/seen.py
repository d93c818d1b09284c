"""Images and what a model makes of them, as columns of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.pictures.gallery import CLUSTER_TITLE
from stellar_plugin.pca import pca_pictures
from stellar_plugin.protocols import CLUSTERS
from stellar_plugin.visualize import (
    Uint8Array,
    highlight,
    overlay_localization,
    scale_maps,
    shown_mass,
    strongest_token,
    threshold_maps,
    token_maps,
    token_masses,
    token_palette,
    without_absent,
)

LEAD_TITLE = "tokens, by their lead"
STRONGEST_TITLE = "strongest token"
PCA_TITLE = "patch features, PCA"


@dataclass(frozen=True)
class Seen:
    """Images, and what a model makes of them.

    Attributes:
        names:
            Names of the files.
        pictures:
            The images as the model gets them, uint8 (num_images, height, width, 3).
        dense:
            Patch features, float32 with shape (num_images, num_patches, dim).
        grid_size:
            Height and width of the patch grid.
        localization:
            Localization matrices, float32 with shape (num_images, num_patches,
            num_tokens), None for a model without.
        clusters:
            Cluster of each patch where there is no localization, int64 with shape
            (num_images, num_patches).
        decoded:
            Reconstructions like `pictures`, None for a model without decoder.
    """

    names: Sequence[str]
    pictures: Uint8Array
    dense: Tensor
    grid_size: tuple[int, int]
    localization: Tensor | None
    clusters: Tensor | None
    decoded: Uint8Array | None


def sheet_columns(seen: Seen) -> dict[str, Uint8Array]:
    """Pictures of the sheets by the titles of their columns, in the size of the images.

    Args:
        seen:
            The images and what a model made of them.

    Returns:
        Arrays with shape (num_images, height, width, 3).
    """
    height, width = seen.pictures.shape[1:3]
    columns = {"input": seen.pictures}
    if seen.localization is not None:
        strongest = strongest_token(seen.localization)
        for title, matrix in {
            LEAD_TITLE: seen.localization,
            STRONGEST_TITLE: strongest,
        }.items():
            shown = overlay_localization(seen.pictures, matrix, seen.grid_size)
            columns[title] = shown
    if seen.clusters is not None:
        parts = F.one_hot(seen.clusters, CLUSTERS).float()
        shown = overlay_localization(seen.pictures, parts, seen.grid_size)
        columns[CLUSTER_TITLE] = shown
    columns[PCA_TITLE] = pca_pictures(seen.dense, seen.grid_size, (height, width))
    if seen.decoded is not None:
        columns["reconstruction"] = seen.decoded
    return columns


def token_pictures(
    seen: Seen, number: int, threshold: float | None
) -> dict[str, Uint8Array]:
    """Each token of an image alone, how much of the image it has, and of a patch.

    Args:
        seen:
            The images and what a model made of them, localization included.
        number:
            Number of the image.
        threshold:
            As for `run_visualize`.

    Returns:
        Pictures with shape (height, width, 3) by their titles, the input first.
    """
    assert seen.localization is not None
    picture = seen.pictures[number]
    localization = seen.localization[number : number + 1]
    masses, num_patches = token_masses(localization[0]).tolist(), localization.shape[1]
    height, width = picture.shape[:2]
    present = without_absent(localization)
    maps = token_maps(present, seen.grid_size, (height, width))[0]
    peaks = maps.amax(dim=(1, 2)).tolist()
    maps = scale_maps(maps) if threshold is None else threshold_maps(maps, threshold)
    pictures = {"input": picture}
    for token, colour in enumerate(token_palette(len(maps))):
        title = f"token {token}, {shown_mass(masses[token], num_patches)}"
        if peaks[token]:
            title += f", maximum {peaks[token]:.2f}"
        pictures[title] = highlight(picture[None], maps[token, None], colour)[0]
    return pictures
