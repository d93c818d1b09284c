"""What may stand for an image when images are compared: one vector or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.boxes import map_boxes
from lightly_ext.evaluate.features import CachedFeatures
from lightly_ext.evaluate.frozen_model import FrozenModel, pool
from lightly_ext.evaluate.parts import Parts, cluster_parts, token_parts
from lightly_ext.metrics.late_interaction import best_matches
from stellar_plugin.encoder import L2_NORM_EPS
from stellar_plugin.protocols import COLOURS, THUMBNAIL

TOKENS, PATCHES, CLUSTERS = "tokens", "patches", "clusters"
# One vector of features each, as `frozen_model.pool` names them.
POOLED = {"cls": "cls", "mean_token": "sparse", "mean_patch": "dense"}
WITH_PARTS = (TOKENS, CLUSTERS)


def thumbnails(images: Tensor) -> Tensor:
    """Small images less their mean, float32 with shape (batch_size, dim)."""
    small = F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)
    return small - small.mean(dim=1, keepdim=True)


def histograms(images: Tensor) -> Tensor:
    """Roots of how many px of uint8 images have each colour, (batch_size, dim)."""
    levels = (images.long() * COLOURS // 256).flatten(2)
    colours = (levels[:, 0] * COLOURS + levels[:, 1]) * COLOURS + levels[:, 2]
    counts = torch.zeros(len(images), COLOURS**3, device=images.device)
    ones = torch.ones_like(colours, dtype=counts.dtype)
    return counts.scatter_add(1, colours, ones).sqrt()


# Of an image, without a model.
UNLEARNED = {"pixels": thumbnails, "colours": histograms}


@dataclass(frozen=True)
class Form:
    """One vector for each image, which is everywhere in it.

    Attributes:
        arrays:
            Arrays by name with a row per image, mostly on disk: "vectors" of unit
            length or zero, with shape (num_images, num_vectors, dim).
        rows:
            The row of each image that counts, int64 with shape (num_readable,).
        grid_size:
            Height and width of the patch grid.
        crop:
            Side of the crop in px.
        device:
            Where to compute.
        dtype:
            In which precision: in float64 equal images have equal scores, wherever they
            stand.
    """

    arrays: Mapping[str, NDArray[np.generic]]
    rows: NDArray[np.int64]
    grid_size: tuple[int, int]
    crop: int
    device: torch.device
    dtype: ClassVar[torch.dtype] = torch.float64

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors of an image, and their dimension."""
        _, num, dim = self.arrays["vectors"].shape
        return num, dim

    def vectors(self, chosen: Any) -> Tensor:
        """Vectors of some images, with shape (num_chosen, num_vectors, dim)."""
        return self._array("vectors", chosen).to(self.device, self.dtype)

    def weights(self, chosen: Any) -> Tensor:
        """What each vector weighs in a query, float32 (num_chosen, num_vectors)."""
        return torch.ones(len(self.rows[chosen]), 1)

    def weights_in(self, number: int, shares: Tensor) -> Tensor:
        """The same for what lies in a region, float32 (num_vectors,).

        Args:
            number:
                Number of the image.
            shares:
                Share of each patch in the region, with shape (num_patches,); sums to
                one.
        """
        return torch.ones(1)

    def regions(self, query: Tensor, weights: Tensor, answers: Any) -> Tensor:
        """Where in its answers a query is found.

        Args:
            query:
                Vectors of the query, with shape (num_vectors, dim).
            weights:
                What each weighs, with shape (num_vectors,).
            answers:
                Numbers of the images.

        Returns:
            Boxes in px of the crop, float64 with shape (num_answers, 4).
        """
        whole = torch.tensor([0, 0, self.crop, self.crop], dtype=torch.float64)
        return whole.expand(len(self.rows[answers]), 4)

    def all_regions(self, chosen: Any) -> Tensor | None:
        """Boxes of all parts of images, (num_chosen, num_vectors, 4); None without."""
        return None

    def _array(self, name: str, chosen: Any) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name][self.rows[chosen]]))

    def _boxes(self, maps: Tensor) -> Tensor:
        return map_boxes(maps.unflatten(-1, self.grid_size).cpu(), self.crop)


class PartsForm(Form):
    """Parts, and a map of each, which is the array "maps"."""

    def weights(self, chosen: Any) -> Tensor:
        """The share of the patches that each part has."""
        return self._maps(chosen).mean(dim=2)

    def weights_in(self, number: int, shares: Tensor) -> Tensor:
        """The share of the region that each part has."""
        return self._maps([number])[0] @ shares.float()

    def regions(self, query: Tensor, weights: Tensor, answers: Any) -> Tensor:
        """Boxes of the parts that are most like the query's heaviest."""
        heaviest = query[weights.argmax()][None]
        matched = best_matches(heaviest, self.vectors(answers))[1][:, 0].cpu()
        return self._boxes(self._maps(answers)[range(len(matched)), matched])

    def all_regions(self, chosen: Any) -> Tensor:
        """Boxes of all parts."""
        return self._boxes(self._maps(chosen))

    def _maps(self, chosen: Any) -> Tensor:
        return self._array("maps", chosen).float()


class PatchesForm(Form):
    """All patches, of which there are too many for float64."""

    dtype = torch.float32

    def weights(self, chosen: Any) -> Tensor:
        """All alike."""
        num = self.shape[0]
        return torch.full((len(self.rows[chosen]), num), 1 / num)

    def weights_in(self, number: int, shares: Tensor) -> Tensor:
        """Their share of the region."""
        return shares.float()

    def regions(self, query: Tensor, weights: Tensor, answers: Any) -> Tensor:
        """Boxes of the cosines with the mean patch."""
        mean = weights.to(query) @ query  # of any length: maps have their own maximum
        return self._boxes((self.vectors(answers) @ mean).clamp(min=0))


def form_shapes(
    model: FrozenModel, crop: int, clusters: int
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The forms of images that a model gives.

    Args:
        model:
            The model.
        crop:
            Side of the images in px.
        clusters:
            Number of clusters of patches.

    Returns:
        - Number of vectors of an image and their dimension, by form.
        - Of the other forms why the model does not have them.
    """
    black = torch.zeros(1, 3, crop, crop, device=model.mean.device)
    with torch.no_grad():
        result = model.unchecked(black)
    num_patches, dim = result.dense.shape[1:]
    missing: dict[str, str] = {}
    if not model.num_queries:
        missing |= dict.fromkeys((TOKENS, "mean_token"), "no latent queries")
    elif not model.has_localization:
        missing[TOKENS] = "no localization of its tokens"
    if result.cls is None:
        missing["cls"] = "no CLS token"
    if num_patches < clusters:
        missing[CLUSTERS] = f"{num_patches} patches, fewer than {clusters} clusters"
    cls_dim = 0 if result.cls is None else result.cls.shape[-1]
    shapes = {
        TOKENS: (model.num_queries, dim),
        "cls": (1, cls_dim),
        "mean_token": (1, dim),
        "mean_patch": (1, dim),
        PATCHES: (num_patches, dim),
        CLUSTERS: (clusters, dim),
        "pixels": (1, 3 * THUMBNAIL**2),
        "colours": (1, COLOURS**3),
    }
    return {n: s for n, s in shapes.items() if n not in missing}, missing


def form_arrays(
    model: FrozenModel, names: Sequence[str], clusters: int, seed: int
) -> Callable[[Tensor], dict[str, Tensor]]:
    """What computes the arrays of forms of uint8 images, for `FeatureCache`.

    Args:
        model:
            The model.
        names:
            Some of `RETRIEVAL_FORMS`.
        clusters:
            Number of clusters of patches.
        seed:
            Decides on the start of the clusters.
    """

    def compute(images: Tensor) -> dict[str, Tensor]:
        result = model(images)
        found: dict[str, Tensor] = {}
        if TOKENS in names:
            found |= _of_parts(TOKENS, token_parts(result))
        if CLUSTERS in names:
            parts = cluster_parts(result, clusters, seed)
            found |= _of_parts(CLUSTERS, parts._replace(maps=parts.maps.byte()))
        if PATCHES in names:
            found[PATCHES] = unit(result.dense).half()
        for name in POOLED.keys() & set(names):
            found[name] = unit(pool(result, POOLED[name]))[:, None]
        for name in UNLEARNED.keys() & set(names):
            found[name] = unit(UNLEARNED[name](images))[:, None]
        return found

    return compute


def unit(vectors: Tensor) -> Tensor:
    """Vectors of unit length, float32; those of zeros stay."""
    return F.normalize(vectors.float(), dim=-1, eps=L2_NORM_EPS)


def open_form(
    name: str,
    cached: CachedFeatures,
    grid_size: tuple[int, int],
    crop: int,
    device: torch.device,
) -> Form:
    """A form of the readable images.

    Args:
        name:
            One of `RETRIEVAL_FORMS`.
        cached:
            The arrays of `form_arrays`.
        grid_size:
            As for `Form`.
        crop:
            As for `Form`.
        device:
            As for `Form`.
    """
    arrays = {"vectors": cached.arrays[name]}
    kind = PatchesForm if name == PATCHES else Form
    if name in WITH_PARTS:
        arrays["maps"], kind = cached.arrays[_maps_of(name)], PartsForm
    rows = cast(NDArray[np.int64], cached.readable.numpy())
    return kind(arrays, rows, grid_size, crop, device)


def _of_parts(name: str, parts: Parts) -> dict[str, Tensor]:
    return {name: unit(parts.vectors), _maps_of(name): parts.maps}


def _maps_of(name: str) -> str:
    return f"{name}_maps"
