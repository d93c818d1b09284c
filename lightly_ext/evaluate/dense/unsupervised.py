"""Segmentation without labels: clusters of patches, matched to classes afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.evaluate.dense.k_means import centre_scores, k_means
from lightly_ext.evaluate.dense.label_maps import (
    IGNORED,
    LabelledImages,
    SegmentationSet,
)
from lightly_ext.evaluate.dense.labels import find_segmentation_set
from lightly_ext.evaluate.dense.matching import (
    NO_CLASS,
    MatchScores,
    many_to_one,
    match_scores,
    one_class_scores,
    one_to_one,
    uniform_scores,
)
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import CachedFeatures, FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel, select_tokens
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.prototypes import load_sparse_head
from lightly_ext.evaluate.reduction import count_unreadable, reduce_sum
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.modules import STELLARProjectionHead
from lightly_ext.randomness import mix_seeds
from stellar_plugin.hashes import weights_sha256
from stellar_plugin.protocols import (
    CLUSTER_RESTARTS,
    CLUSTER_ROUNDS,
    CLUSTERED_IMAGES,
    CLUSTERED_PATCHES,
    UNSUPERVISED_SEGMENTATION,
    UNSUPERVISED_SEGMENTATION_PROTOTYPES,
    UnsupervisedSegmentationProtocol,
)

PATCHES = "patches"
LOCALIZATION, WINNERS = "localization", "winners"
FEATURES = ("dense", "lowrank")
MANY_TO_ONE = "_many_to_one"


def check_unsupervised_segmentation(
    results: Results,
    data: str,
    features: str,
    clusters: int | None,
    prototypes: bool,
) -> SegmentationSet:
    """Finds the data set; see `Results.required`."""
    check_positive(clusters=clusters)
    if features not in FEATURES:
        raise ValueError(f"features must be dense or lowrank, got '{features}'.")
    if prototypes and (clusters is not None or features != FEATURES[0]):
        raise ValueError(
            "prototypes are clusters of tokens that were trained: leave out clusters "
            "and features, which make others."
        )
    found = find_segmentation_set(data).limited(results.limit)
    num_classes = len(found.classes)
    if clusters is not None and clusters < num_classes:
        raise ValueError(
            f"{clusters} clusters cannot be matched to the {num_classes} classes of "
            f"{found.name}: name at least as many, or none for one each."
        )
    return found


@evaluation
def run_unsupervised_segmentation(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    features: str = FEATURES[0],
    clusters: int | None = None,
    prototypes: bool = False,
) -> Result:
    """Scores clusters of patches that are matched to classes: no label trains anything.

    Clusters are found in images of the training part, whose labels are not read. Labels
    of the test part decide which cluster is which class, and then score it.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder with `images/train`, `images/val`, `masks/train` and `masks/val`; or
            the NAME of a known set, or NAME:FOLDER: cocostuff27, cityscapes27, voc,
            voc-aug, ade20k, cityscapes.
        features:
            "dense", the patches, or "lowrank", what the tokens of STELLAR say of them.
        clusters:
            Number of k-means clusters. None takes as many as there are classes; of more
            the best of each class is matched.
        prototypes:
            Take the prototypes of a STELLAR checkpoint in place of clusters.

    Returns:
        The scores, see `stellar_plugin.protocols.UNSUPERVISED_SEGMENTATION`.

    Raises:
        ValueError: If an option or the data set is impossible, or the model has no
            prototypes.
        RuntimeError: If too many images are unreadable, or no px has a class.
    """
    found = results.required(check_unsupervised_segmentation)
    number, head = clusters or len(found.classes), None
    if prototypes:
        head = _head(model, len(found.classes))
        number = head.prototypes.out_features
    protocol = _protocol(model, results, found, features, number, prototypes)
    results.announce(model, protocol)
    cache = FeatureCache(model, devices, results.cache)
    inputs = {"data": _fingerprint(results, found)}
    if head is None:
        regions = cluster_regions(cache, protocol, features, number, found)
    else:
        inputs["prototypes"] = weights_sha256(head)
        regions = prototype_regions(cache, protocol, head, found.test)
    counts, num_unreadable = count_px(model, devices, protocol, regions, found.test)
    scores, chance, facts = summarize(counts, found.classes)
    scores["num_images"] = len(found.test) - num_unreadable
    result = results.result(
        model,
        "unsupervised-segmentation",
        found.name,
        protocol,
        scores,
        inputs,
        chance,
        feature=protocol.features,
        num_unreadable=num_unreadable,
        **regions.facts,
        **facts,
    )
    results.save(result)
    return result


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
        maps = scores.mT.unflatten(1, grid)[None]
        maps = F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
        return clusters[maps[0].argmax(dim=0)]


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


def count_px(
    model: FrozenModel,
    devices: Devices,
    protocol: UnsupervisedSegmentationProtocol,
    regions: Regions,
    test: LabelledImages,
) -> tuple[Tensor, int]:
    """Counts the px of each cluster with each class.

    Returns:
        Int64 tensor with shape (num_clusters, num_classes), of all processes, and the
        number of images that are unreadable, or their label maps.

    Raises:
        ValueError: If a label map has a value that is no class.
        RuntimeError: If too many are unreadable, or no px has a class.
    """
    grid, num_classes = model.map_size(protocol.crop), len(test.values)
    counts = torch.zeros(regions.num_clusters * num_classes, dtype=torch.int64)
    known = set(regions.cached.readable.tolist())
    loader = devices.loader(cast(Any, test.cut(protocol, model.origin.interpolation)))
    unreadable = []
    for batch in devices.progress(loader, "labels", len(loader)):
        labels = test.classes(batch)
        readable = batch.readable.tolist()
        for i, number in enumerate(batch.number.tolist()):
            if not readable[i] or number not in known:
                unreadable.append(number)
                continue
            classes = labels[i]
            found = regions.at_px(number, grid, protocol.crop).cpu()
            valid = classes != IGNORED
            pairs = found[valid] * num_classes + classes[valid]
            counts += pairs.bincount(minlength=len(counts))
    num_unreadable = count_unreadable(devices, test.files, unreadable)
    counts = reduce_sum(devices, counts).view(-1, num_classes)
    if not counts.any():
        raise RuntimeError(
            f"No px of the {len(test) - num_unreadable} test images has a class: all "
            "are ignored."
        )
    return counts, num_unreadable


def summarize(
    counts: Tensor, classes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Scores, what guessing gives, and what is of single classes, of `count_px`."""
    matched = one_to_one(counts)
    ours, joined = (match_scores(counts, m) for m in (matched, many_to_one(counts)))
    scores = {**_named(ours), **_named(joined, MANY_TO_ONE)}
    labels = counts.sum(dim=0)
    one, uniform = one_class_scores(labels), uniform_scores(labels, len(counts))
    chance = {k: max(v, _named(uniform)[k]) for k, v in _named(one).items()}
    # Random clusters all have the commonest class.
    chance |= _named(one, MANY_TO_ONE)
    cluster_of = {int(c): i for i, c in enumerate(matched.tolist()) if c != NO_CLASS}
    facts = {
        "guesses": {"one class": _named(one), "uniform clusters": _named(uniform)},
        "class_iou": dict(zip(classes, ours.ious.tolist(), strict=True)),
        "class_cluster": {name: cluster_of[i] for i, name in enumerate(classes)},
        "num_clusters_used": int(counts.any(dim=1).sum()),
    }
    return scores, chance, facts


def _named(scores: MatchScores, end: str = "") -> dict[str, float]:
    return {f"mIoU{end}": scores.miou, f"accuracy{end}": scores.accuracy}


def _head(model: FrozenModel, num_classes: int) -> STELLARProjectionHead:
    """Head and prototypes of a model whose tokens are somewhere, at least as many."""
    model.require_localization()
    head = load_sparse_head(model)
    if head.prototypes.out_features < num_classes:
        raise ValueError(
            f"{head.prototypes.out_features} prototypes cannot be matched to "
            f"{num_classes} classes: leave them out, for k-means clusters."
        )
    return head


def _protocol(
    model: FrozenModel,
    results: Results,
    found: SegmentationSet,
    features: str,
    number: int,
    prototypes: bool,
) -> UnsupervisedSegmentationProtocol:
    if prototypes:
        protocol = UNSUPERVISED_SEGMENTATION_PROTOTYPES
    else:
        feature = model.resolve_feature(features)
        protocol = UNSUPERVISED_SEGMENTATION.replace(features=feature)
    return results.protocol(
        model,
        protocol,
        data=found.name,
        parts=f"{number} {'prototypes' if prototypes else 'k-means clusters'}",
        classes=str(found.values),
        num_classes=len(found.classes),
    )


def _fingerprint(results: Results, found: SegmentationSet) -> str:
    train = found.train.files.limited(CLUSTERED_IMAGES)
    return results.fingerprint(train, found.test.files, found.test.maps)
