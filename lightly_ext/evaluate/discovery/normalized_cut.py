"""An object by a normalised cut of the patches, as TokenCut [0] finds it.

- [0]: Self-Supervised Transformers for Unsupervised Object Discovery using Normalized
  Cut, 2022, https://arxiv.org/abs/2202.11539
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.ndimage import label
from torch import Tensor
from torch.nn import functional as F

from stellar_plugin.protocols import NCUT_SIMILARITY, NCUT_WEAK_EDGE

# Patches with the same neighbours have equal values but for rounding; of those with the
# largest, the first is taken.
ROUNDING = 1e-6


def cut_object(dense: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Finds the patches of one object in an image.

    Patches whose features have a cosine similarity above a threshold are joined by
    edges of weight 1, all others by weak ones. The second eigenvector is cut at its
    mean; the object is on the side of its largest absolute value, all patches that hang
    together with the one that has it. Where no edge is weak, there is nothing to cut,
    and the object is the whole image.

    In float64 on the CPU; other images of a batch have no part in it.

    Args:
        dense:
            Patch features of one image with shape (num_patches, dim).
        grid_size:
            Height and width of the patch grid.

    Returns:
        Which patches are the object, bool with shape (num_patches,), at least one.
    """
    unit = F.normalize(dense.detach().cpu().double(), dim=1)
    strong = (unit @ unit.T > NCUT_SIMILARITY).numpy()
    if strong.all():
        return torch.ones(len(dense), dtype=torch.bool)
    vector = second_eigenvector(np.where(strong, 1.0, NCUT_WEAK_EDGE))
    size = np.abs(vector)
    seed = int((size >= (1 - ROUNDING) * size.max()).argmax())
    above = vector > vector.mean()
    side = (above == above[seed]).reshape(grid_size)
    components = label(side)[0].flatten()
    return torch.from_numpy(components == components[seed])


def second_eigenvector(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solves (D - W) y = lambda D y for the second smallest lambda.

    Args:
        weights:
            Positive weights of the edges W, symmetric with shape (n, n), n at least 2;
            D has the sums of its rows on the diagonal.

    Returns:
        y with shape (n,); its sign means nothing.
    """
    degrees = np.diag(weights.sum(axis=1))
    _, vectors = eigh(degrees - weights, degrees, subset_by_index=[1, 1])
    return vectors[:, 0]
