"""Segmentation without labels: clusters of patches, matched to classes afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightly_ext.durable import replacing
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
from lightly_ext.evaluate.dense.regions import (
    Regions,
    cluster_regions,
    prototype_regions,
)
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.masks import MaskedImages
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.pictures.gallery import draw_rows
from lightly_ext.evaluate.prototypes import load_sparse_head
from lightly_ext.evaluate.reduction import count_unreadable, reduce_sum
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.hashes import weights_sha256
from stellar_plugin.protocols import (
    CLUSTERED_IMAGES,
    UNSUPERVISED_SEGMENTATION,
    UNSUPERVISED_SEGMENTATION_PROTOTYPES,
    UnsupervisedSegmentationProtocol,
)
from stellar_plugin.visualize import to_pictures, token_palette

FEATURES = ("dense", "lowrank")
MANY_TO_ONE = "_many_to_one"
NUM_PICTURES = 6
NO_CLASS_GREY = 128


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
    cache = FeatureCache(model, devices, results.contents)
    inputs = {"data": _fingerprint(results, found)}
    if head is None:
        regions = cluster_regions(cache, protocol, features, number, found)
    else:
        inputs["prototypes"] = weights_sha256(head)
        regions = prototype_regions(cache, protocol, head, found.test)
    images = found.test.cut(protocol, model.origin.interpolation)
    grid = model.map_size(protocol.crop)
    counts, num_unreadable = count_px(devices, images, found.test, regions, grid)
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
    folder = results.save(result)
    if devices.rank == 0:
        path = folder / "segments.png"
        _save_picture(path, images, found.test, regions, grid, one_to_one(counts))
    return result


def count_px(
    devices: Devices,
    images: MaskedImages,
    test: LabelledImages,
    regions: Regions,
    grid: tuple[int, int],
) -> tuple[Tensor, int]:
    """Counts the px of each cluster with each class.

    Args:
        devices:
            The processes, each of which counts a share.
        images:
            Images and label maps as they are cut.
        test:
            The same as files, with the classes.
        regions:
            Clusters of the same images.
        grid:
            Height and width of the patch grid.

    Returns:
        Int64 tensor with shape (num_clusters, num_classes), of all processes, and the
        number of images that are unreadable, or their label maps.

    Raises:
        ValueError: If a label map has a value that is no class.
        RuntimeError: If too many are unreadable, or no px has a class.
    """
    num_classes = len(test.values)
    counts = torch.zeros(regions.num_clusters * num_classes, dtype=torch.int64)
    known = set(regions.cached.readable.tolist())
    loader = devices.loader(cast(Any, images))
    unreadable = []
    for batch in devices.progress(loader, "labels", len(loader)):
        labels = test.classes(batch)
        readable = batch.readable.tolist()
        for i, number in enumerate(batch.number.tolist()):
            if not readable[i] or number not in known:
                unreadable.append(number)
                continue
            classes = labels[i]
            found = regions.at_px(number, grid, classes.shape[-1]).cpu()
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


def _save_picture(
    path: Path,
    images: MaskedImages,
    test: LabelledImages,
    regions: Regions,
    grid: tuple[int, int],
    classes: Tensor,
) -> None:
    """Rows: images, their classes, the classes of their clusters."""
    numbers = regions.cached.readable.tolist()
    count = min(NUM_PICTURES, len(numbers))
    samples = [images[numbers[i * len(numbers) // count]] for i in range(count)]
    samples = [sample for sample in samples if sample.readable]
    if not samples:
        return
    batch = default_collate(samples)
    side = batch.mask.shape[-1]
    found = [classes[regions.at_px(s.number, grid, side).cpu()] for s in samples]
    # The last colour is what -1, no class, takes.
    palette = np.concatenate(
        [token_palette(len(test.values)), np.full((1, 3), NO_CLASS_GREY, np.uint8)]
    )
    rows = {
        "images": to_pictures(batch.image / 255),
        "classes": palette[test.classes(batch).numpy()],
        "clusters": palette[torch.stack(found).numpy()],
    }
    legend = (
        "Colours are classes: of the labels, and those that clusters are matched to; "
        "grey has none."
    )
    with replacing(path) as new:
        names = [test.files.names[sample.number] for sample in samples]
        draw_rows(names, rows, legend).save(new, "png", optimize=True)
