"""Clusters of the patches of images: k-means, or the prototypes of STELLAR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.dense.k_means import centre_scores, k_means
from lightly_ext.evaluate.dense.label_maps import LabelledImages, SegmentationSet
from lightly_ext.evaluate.features import CachedFeatures, FeatureCache
from lightly_ext.evaluate.frozen_model import select_tokens
from lightly_ext.modules import STELLARProjectionHead
from lightly_ext.randomness import mix_seeds
from stellar_plugin.hashes import weights_sha256
from stellar_plugin.protocols import (
    CLUSTER_RESTARTS,
    CLUSTER_ROUNDS,
    CLUSTERED_IMAGES,
    CLUSTERED_PATCHES,
    UnsupervisedSegmentationProtocol,
)

PATCHES = "patches"
LOCALIZATION, WINNERS = "localization", "winners"
# Parts whose maps are in memory at once.
PARTS_AT_ONCE = 64


class Regions(NamedTuple):
    """Clusters of the images that are scored.

    Attributes:
        cached: What is known of each image, on disk.
        scores: Maps the rows of an image to scores of its parts, float32 with shape
            (num_patches, num_parts), and the cluster of each part, int64.
        num_clusters: Number of clusters.
        facts: What is known of them, for the provenance.
    """

    cached: CachedFeatures
    scores: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
    num_clusters: int
    facts: Mapping[str, Any]

    def at_px(self, number: int, grid: tuple[int, int], side: int) -> Tensor:
        """Cluster at each px of an image, int64 with shape (side, side)."""
        rows = {
            name: torch.from_numpy(array[number].copy())
            for name, array in self.cached.arrays.items()
        }
        scores, clusters = self.scores(rows)
        return clusters[strongest_at_px(scores, grid, side)]


def strongest_at_px(scores: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The part with the largest score at each px; of equal ones the first.

    Args:
        scores:
            Scores of the patches, float32 with shape (num_patches, num_parts); between
            patches they are bilinear.
        grid:
            Height and width of the patch grid.
        side:
            Height and width of the image in px.

    Returns:
        Int64 tensor with shape (side, side).
    """
    best, parts = None, None
    for first, block in enumerate(scores.mT.split(PARTS_AT_ONCE)):
        maps = block.unflatten(1, grid)[None]
        maps = F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
        values, found = maps[0].max(dim=0)
        found += first * PARTS_AT_ONCE
        if best is None or parts is None:
            best, parts = values, found
        else:
            parts = found.where(values > best, parts)
            best = values.maximum(best)
    assert parts is not None
    return parts


def cluster_regions(
    cache: FeatureCache,
    protocol: UnsupervisedSegmentationProtocol,
    feature: str,
    num_clusters: int,
    found: SegmentationSet,
) -> Regions:
    """k-means clusters of patches of training images, in test images.

    Args:
        cache:
            Where patches are kept.
        protocol:
            How images are cut.
        feature:
            "dense" or "lowrank".
        num_clusters:
            Number of clusters.
        found:
            The images.
    """
    model, devices = cache.model, cache.devices

    def compute(images: Tensor) -> dict[str, Tensor]:
        patches = select_tokens(model(images), feature).float()
        # Half precision: half the space, and sums that are exact, see `lloyd`.
        return {PATCHES: F.normalize(patches, dim=2).half()}

    kind = f"{feature} patches of unit length"
    train = found.train.files.limited(CLUSTERED_IMAGES)
    of = cache.features(train, protocol, kind, compute)
    scored = cache.features(found.test.files, protocol, kind, compute)
    drawn = draw_patches(of, devices.seed)
    clustering = k_means(
        devices, drawn, num_clusters, devices.seed, CLUSTER_RESTARTS, CLUSTER_ROUNDS
    )
    centres = clustering.centres.to(devices.device)
    clusters = torch.arange(num_clusters, device=devices.device)

    def scores(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        patches = rows[PATCHES].to(devices.device).float()
        return centre_scores(patches, centres), clusters

    facts = {
        "num_reused": of.num_reused + scored.num_reused,
        "clustered_images": len(of.readable),
        "clustered_patches": len(drawn),
        "inertia": clustering.inertia,
        "iterations": clustering.iterations,
        "converged": clustering.converged,
    }
    return Regions(scored, scores, num_clusters, facts)


def draw_patches(cached: CachedFeatures, seed: int) -> Tensor:
    """At most `CLUSTERED_PATCHES` patches, equally many of each readable image.

    Args:
        cached:
            The patches of all images.
        seed:
            Decides on them, of each image on others.

    Returns:
        Float16 tensor with shape (num_drawn, dim).
    """
    patches = cached.arrays[PATCHES]
    each = min(patches.shape[1], CLUSTERED_PATCHES // len(cached.readable))
    drawn = []
    for number in cached.readable.tolist():
        generator = torch.Generator().manual_seed(mix_seeds(seed, number))
        places = torch.randperm(patches.shape[1], generator=generator)[:each]
        drawn.append(torch.from_numpy(patches[number][places.sort().values.numpy()]))
    return torch.cat(drawn)


def prototype_regions(
    cache: FeatureCache,
    protocol: UnsupervisedSegmentationProtocol,
    head: STELLARProjectionHead,
    test: LabelledImages,
) -> Regions:
    """The prototype of the strongest token.

    Args:
        cache:
            Where they are kept.
        protocol:
            How images are cut.
        head:
            Knows the prototype of a token.
        test:
            Images that are scored.
    """
    model, device = cache.model, cache.devices.device

    def compute(images: Tensor) -> dict[str, Tensor]:
        result = model(images)
        logits = head.prototypes(head(result.sparse.float()))
        winners = logits.argmax(dim=2)
        return {LOCALIZATION: result.localization.half(), WINNERS: winners}

    kind = f"prototypes {weights_sha256(head)[:16]}"
    cached = cache.features(test.files, protocol, kind, compute)

    def scores(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return rows[LOCALIZATION].float().to(device), rows[WINNERS].to(device)

    facts = {"num_reused": cached.num_reused}
    return Regions(cached, scores, head.prototypes.out_features, facts)
