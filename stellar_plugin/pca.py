"""Pictures of patch features: their principal components as colours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stellar_plugin.visualize import Uint8Array, to_pictures, token_maps

# Percentiles of a principal component that become 0 and 1: a few odd patches must not
# take all the contrast.
_PCA_RANGE = (1.0, 99.0)


def principal_components(features: Tensor, num_components: int = 3) -> Tensor:
    """Directions in which features vary most, always with the same sign.

    Args:
        features:
            Features with shape (num_features, dim).
        num_components:
            Number of directions, at most dim.

    Returns:
        Orthonormal directions, float64 on the CPU with shape (num_components, dim), the
        one of the largest variance first. The largest entry of each by magnitude is
        positive.

    Raises:
        ValueError: If features have fewer dimensions than there are components.
    """
    if features.shape[1] < num_components:
        raise ValueError(
            f"{num_components} principal components need features with as many "
            f"dimensions, these have {features.shape[1]}."
        )
    centred = features.detach().cpu().double()
    centred = centred - centred.mean(dim=0)
    directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors.mT.flip(0)
    directions = directions[:num_components]
    largest = directions.abs().argmax(dim=1, keepdim=True)
    return directions * directions.gather(1, largest).sign()


def pca_pictures(
    dense: Tensor, grid_size: tuple[int, int], image_size: tuple[int, int]
) -> Uint8Array:
    """Shows patch features as colours: their first three principal components.

    The components are those of all patches of all images together, so that equal
    colours mean similar patches across the pictures. Each is scaled by its 1st and 99th
    percentile over all patches; what lies outside is clipped.

    Args:
        dense:
            Patch features with shape (batch_size, num_patches, dim).
        grid_size:
            Height and width of the patch grid.
        image_size:
            Height and width of the pictures in pixels.

    Returns:
        Pictures with shape (batch_size, height, width, 3). The first component is red,
        the second green, the third blue; a component that does not vary is grey.

    Raises:
        ValueError: If the grid does not have as many patches, or dim is less than 3.
    """
    features = dense.detach().flatten(0, 1).cpu().double()
    centred = features - features.mean(dim=0)
    scores = (centred @ principal_components(features).mT).numpy()
    low, high = np.percentile(scores, _PCA_RANGE, axis=0)
    span = high - low
    varies = span > 1e-6 * float(features.abs().max())  # below is rounding
    unit = np.where(varies, (scores - low) / np.where(varies, span, 1.0), 0.5)
    colours = torch.from_numpy(unit.clip(0, 1)).unflatten(0, dense.shape[:2])
    return to_pictures(token_maps(colours, grid_size, image_size))
