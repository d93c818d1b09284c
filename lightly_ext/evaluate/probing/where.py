"""Localization against ground-truth masks, without training anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.durable import replacing
from lightly_ext.evaluate.clusters import check_clusters, cluster_patches
from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.masks import (
    LabelValues,
    MaskedImages,
    check_values,
    find_masks,
    listed_files,
)
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.pictures.gallery import (
    CLUSTER_COLOURS,
    CLUSTER_TITLE,
    TOKEN_COLOURS,
    draw_rows,
)
from lightly_ext.evaluate.probing.localization import (
    best_overlap,
    best_parts_iou,
    one_to_one_overlap,
    overlap_counts,
    overlap_ious,
    parts_iou,
    uniform_parts,
)
from lightly_ext.evaluate.reduction import ImageMeans, count_unreadable, reduce_sum
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.protocols import (
    CLUSTERS,
    WHERE,
    WHERE_CLUSTERS,
    WhereProtocol,
)
from stellar_plugin.visualize import overlay, to_pictures, token_palette

ORACLE = "foreground_iou_oracle"
FOREGROUND = "foreground_iou"
# The model, and the reference that knows nothing of the image.
PREFIXES = ("", "grid_")
NUM_PICTURES = 6


def check_where(
    results: Results,
    data: str,
    masks: str,
    split: str | None,
    background: tuple[int, ...] | int,
    ignore: tuple[int, ...] | int,
    clusters: int | None,
) -> tuple[str, ImageFiles, list[Path], LabelValues]:
    """Finds images, their name, masks and label values; see `Results.required`."""
    check_positive(clusters=clusters)
    values = LabelValues.of(background, ignore)
    name, files = find_images(data)
    if split is not None:
        files = listed_files(files, split)
        name = f"{name} ({Path(split).stem})"
    files = files.limited(results.limit)
    paths = find_masks(files, masks)
    check_values(paths, values)
    if values.background and clusters is None and len(files) < 2:
        raise ValueError(
            f"'{data}' has one image: tokens are decided on in some images and scored "
            "in others, so two are needed."
        )
    return name, files, paths, values


@evaluation
def run_where(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    masks: str,
    split: str | None = None,
    background: tuple[int, ...] | int = 0,
    ignore: tuple[int, ...] | int = 255,
    clusters: int | None = None,
) -> Result:
    """Scores where the tokens are: the strongest token of each patch against masks.

    For models without latent queries clusters of patches take the place of tokens.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder of images, or tars, parquet or hf:NAME of the hub; or the name of a
            known set.
        masks:
            Folder of label images with the names of the images, one integer per px, for
            example Pascal VOC's `SegmentationClass`.
        split:
            File with the names of the images to use, one per line. None uses all.
        background:
            Label value, or several as '[0, 1]', of the background; '[]' if there is
            none, then there is no foreground score.
        ignore:
            Label value, or several, of px that count nowhere.
        clusters:
            Cut each image into so many k-means clusters of its patches. None takes the
            tokens of a model with latent queries, else 16 clusters.

    Returns:
        The scores, see `stellar_plugin.protocols.WHERE` and, for clusters,
        `WHERE_CLUSTERS`; those that start with `grid_` are of a uniform grid with as
        many cells as there are tokens or clusters.

    Raises:
        ValueError: If the model has tokens without localization, or fewer patches than
            clusters, or images and masks do not fit.
        RuntimeError: If too few images have a segment.
    """
    name, files, paths, values = results.required(check_where)
    cut = _cut(model, devices, clusters)
    protocol = results.protocol(model, cut.protocol, data=name, classes=str(values))
    if cut.clusters is not None:
        check_clusters(model, protocol.crop, cut.clusters)
    images = MaskedImages(files, paths, protocol, model.origin.interpolation)
    results.announce(model, protocol)
    counts, num_unreadable = _count(cut, images, values)
    scores, errors = _reduce(cut, counts, bool(values.background))
    num_empty = len(images) - num_unreadable - scores["num_images"]
    if num_empty:
        devices.say(f"Left out: {num_empty} images without any segment in the crop.")
    provenance = {"num_unreadable": num_unreadable, "num_empty": num_empty}
    provenance |= {"standard_error": errors, "masks": masks}
    grid = PREFIXES[1]
    chance = {k.removeprefix(grid): v for k, v in scores.items() if k.startswith(grid)}
    inputs = {"data": results.fingerprint(files)}
    names = [str(path.relative_to(masks)) for path in paths]
    inputs["masks"] = results.fingerprint(ImageFiles(Path(masks), names))
    result = results.result(
        model, "where", name, protocol, scores, inputs, chance, **provenance
    )
    folder = results.save(result)
    if devices.rank == 0:
        _save_picture(folder / "where.png", cut, images, values)
    return result


@dataclass(frozen=True)
class Cut:
    """How images are cut into parts: by the strongest token, or by similar patches.

    Attributes:
        model:
            What is evaluated.
        devices:
            Where it runs.
        clusters:
            Number of clusters, None for tokens.
    """

    model: FrozenModel
    devices: Devices
    clusters: int | None

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return self.model.num_queries if self.clusters is None else self.clusters

    @property
    def part(self) -> str:
        """What a part is."""
        return "token" if self.clusters is None else "cluster"

    @property
    def protocol(self) -> WhereProtocol:
        """The card."""
        if self.clusters is None:
            return WHERE
        parts = WHERE_CLUSTERS.parts.replace(str(CLUSTERS), str(self.clusters))
        return WHERE_CLUSTERS.replace(parts=parts)

    def scores(self, foreground: bool) -> list[str]:
        """Names of the scores, with those of the foreground or without."""
        names = [f"{self.part}_overlap", f"{self.part}_overlap_one_to_one"]
        if not foreground:
            return names
        # A role is carried from image to image: equal clusters mean nothing there.
        roles = [FOREGROUND] if self.clusters is None else []
        return [*roles, ORACLE, *names]

    def __call__(self, images: Tensor) -> Tensor:
        """Part at each px of uint8 images, on the CPU."""
        with torch.no_grad(), self.devices.fabric.autocast():
            result = self.model(self.devices.fabric.to_device(images))
            if self.clusters is None:
                winners = result.localization.float().cpu().argmax(dim=2)
            else:
                seed = self.devices.seed
                winners = cluster_patches(result.dense, self.clusters, seed)
        height, width = images.shape[-2:]
        return parts_at_px(winners, result.grid_size, (height, width))


@dataclass
class ImageCounts:
    """How the parts of one image and its labels overlap.

    Attributes:
        number:
            Number of the image.
        counts:
            For the model and for the grid: px in each part with each label, ignored
            px left out, int64 with shape (num_parts, num_labels).
        segments:
            Which labels are segments, bool with shape (num_labels,).
    """

    number: int
    counts: tuple[Tensor, ...]
    segments: Tensor

    def hits(self, partition: int) -> Tensor:
        """Foreground px in each part."""
        return self.counts[partition][:, self.segments].sum(dim=1)

    def misses(self, partition: int) -> Tensor:
        """Background px in each part."""
        return self.counts[partition][:, ~self.segments].sum(dim=1)


def parts_at_px(
    parts: Tensor, grid_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Part at each px, of the part of each patch.

    Args:
        parts:
            Numbers of parts with shape (batch_size, num_patches).
        grid_size:
            Height and width of the patch grid.
        size:
            Height and width of the image in px.

    Returns:
        Numbers of parts, int64 with shape (batch_size, height, width).
    """
    grid = parts.unflatten(1, grid_size)
    maps = F.interpolate(grid[:, None].float(), size=size, mode="nearest-exact")
    return maps[:, 0].long()


def count_image(
    number: int, parts: Tensor, mask: Tensor, num_parts: int, values: LabelValues
) -> ImageCounts | None:
    """Counts overlaps of an image; None if it has no segment.

    Args:
        number:
            Number of the image.
        parts:
            Part of each px, for the model and for the grid: int64 with shape (2,
            height, width).
        mask:
            Label of each px, with shape (height, width).
        num_parts:
            Number of parts.
        values:
            Which labels are no segments.
    """
    valid = ~torch.isin(mask, torch.tensor(values.ignore, dtype=mask.dtype))
    both = [overlap_counts(p[valid], mask[valid], num_parts) for p in parts]
    labels = both[0][1]
    background = torch.tensor(values.background, dtype=mask.dtype)
    segments = ~torch.isin(labels, background)
    if not segments.any():
        return None
    return ImageCounts(number, tuple(counts for counts, _ in both), segments)


def _cut(model: FrozenModel, devices: Devices, clusters: int | None) -> Cut:
    """By what was asked for; otherwise by tokens, if there are some."""
    if clusters is None and not model.num_queries:
        clusters = CLUSTERS
    if clusters is None and not model.has_localization:
        raise ValueError(
            f"'{model.origin.label}' has tokens but no localization of them: "
            f"--clusters {CLUSTERS} cuts its images by their patches instead."
        )
    return Cut(model, devices, clusters)


def _count(
    cut: Cut, images: MaskedImages, values: LabelValues
) -> tuple[list[ImageCounts], int]:
    """Counts of the images of this process; unreadable images of all processes."""
    devices, num_parts = cut.devices, cut.num_parts
    loader = devices.loader(cast(Any, images))
    found, unreadable = [], []
    for batch in devices.progress(loader, "where", len(loader)):
        unreadable += batch.number[~batch.readable].tolist()
        size = batch.mask.shape[1:]
        cuts = cut(batch.image)
        grid = uniform_parts(num_parts, size)
        for i in batch.readable.nonzero().flatten().tolist():
            parts = torch.stack([cuts[i], grid])
            number = int(batch.number[i])
            counts = count_image(number, parts, batch.mask[i], num_parts, values)
            found += [] if counts is None else [counts]
    return found, count_unreadable(devices, images.files, unreadable)


def _reduce(
    cut: Cut, counts: list[ImageCounts], foreground: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """Scores and standard errors over the images of all processes."""
    kinds = cut.scores(foreground)
    means = ImageMeans[str](prefix + kind for prefix in PREFIXES for kind in kinds)
    for partition, prefix in enumerate(PREFIXES):
        roles = _roles(cut, counts, partition) if FOREGROUND in kinds else None
        for image in counts:
            values = _image_scores(cut, image, partition, roles)
            for kind in kinds:
                value = torch.tensor([values[kind]], dtype=torch.float64)
                means.add(prefix + kind, value)
    reduced = means.reduce(cut.devices)
    scores: dict[str, Any] = {name: mean.value for name, mean in reduced.items()}
    scores["num_images"] = next(iter(reduced.values())).num_images
    return scores, {name: mean.standard_error for name, mean in reduced.items()}


def _roles(cut: Cut, counts: list[ImageCounts], partition: int) -> Tensor:
    """Which parts are foreground in even and in odd images: (2, num_parts), bool.

    Decided on the images of the other half, by majority of px.
    """
    sums = torch.zeros(2, 2, cut.num_parts, dtype=torch.int64)
    for image in counts:
        sums[image.number % 2, 0] += image.hits(partition)
        sums[image.number % 2, 1] += image.misses(partition)
    sums = reduce_sum(cut.devices, sums)
    if not sums.sum(dim=(1, 2)).all():
        raise RuntimeError(
            "Fewer than two images with a segment, one of even and one of odd number: "
            "too few to decide on tokens in some images and to score others."
        )
    hits, misses = sums.flip(0).unbind(1)
    return hits > misses


def _image_scores(
    cut: Cut, image: ImageCounts, partition: int, roles: Tensor | None
) -> dict[str, float]:
    ious = overlap_ious(image.counts[partition])[:, image.segments]
    hits, misses = image.hits(partition), image.misses(partition)
    scores = {
        ORACLE: best_parts_iou(hits, misses),
        f"{cut.part}_overlap": best_overlap(ious),
        f"{cut.part}_overlap_one_to_one": one_to_one_overlap(ious),
    }
    if roles is not None:
        scores[FOREGROUND] = parts_iou(hits, misses, roles[image.number % 2])
    return scores


def _save_picture(
    path: Path, cut: Cut, images: MaskedImages, values: LabelValues
) -> None:
    """Rows: images, their masks in grey, the part of each patch."""
    count = min(NUM_PICTURES, len(images))
    samples = [images[i * len(images) // count] for i in range(count)]
    samples = [sample for sample in samples if sample.readable]
    if not samples:
        return
    pixels = torch.stack([sample.image for sample in samples])
    masks = torch.stack([sample.mask for sample in samples])
    pictures = to_pictures(pixels / 255)
    palette = token_palette(cut.num_parts)
    of_tokens = cut.clusters is None
    rows = {
        "images": pictures,
        "labels": grey_labels(masks, values),
        "strongest token" if of_tokens else CLUSTER_TITLE: overlay(
            pictures, palette[cut(pixels).numpy()]
        ),
    }
    names = [images.files.names[sample.number] for sample in samples]
    legend = (
        "Labels in grey, the lighter the higher; background and ignored px are black. "
        f"{TOKEN_COLOURS if of_tokens else CLUSTER_COLOURS}"
    )
    with replacing(path) as new:
        draw_rows(names, rows, legend).save(new, "png", optimize=True)


def grey_labels(masks: Tensor, values: LabelValues) -> NDArray[np.uint8]:
    """Labels as grey levels, dark to light, as colours are those of tokens.

    Args:
        masks:
            Labels with shape (..., height, width).
        values:
            Which of them are no segments: those are black.

    Returns:
        Pictures with shape (..., height, width, 3).
    """
    no_segment = torch.tensor((*values.background, *values.ignore), dtype=masks.dtype)
    labels = masks.unique()
    segments = labels[~torch.isin(labels, no_segment)]
    levels = torch.linspace(80, 255, len(segments)).round()
    grey = torch.zeros(masks.shape)
    for label, level in zip(segments.tolist(), levels, strict=True):
        grey[masks == label] = level
    return grey.byte()[..., None].expand(*masks.shape, 3).numpy()
