"""Object discovery without labels, scored as the object-centric literature does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightly_ext.evaluate.clusters import check_clusters
from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.discovery.finding import (
    OF_BOXES,
    OF_CLASSES,
    OF_INSTANCES,
    Objects,
    find_objects,
    true_boxes,
)
from lightly_ext.evaluate.discovery.objects import (
    BACKGROUND,
    IGNORED,
    ObjectImages,
    ObjectSample,
)
from lightly_ext.evaluate.discovery.picture import save_picture
from lightly_ext.evaluate.discovery.scores import (
    adjusted_rand_index,
    is_found,
    part_boxes,
)
from lightly_ext.evaluate.discovery.segments import (
    Segments,
    centre_segments,
    cluster_segments,
    grid_segments,
    ncut_segments,
    token_segments,
)
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.masks import LabelValues, listed_files
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.probing.localization import (
    best_overlap,
    overlap_counts,
    overlap_ious,
)
from lightly_ext.evaluate.reduction import ImageMeans, count_unreadable
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import CLUSTERS, DISCOVER, DiscoverProtocol

TOKENS, PATCH_CLUSTERS, NCUT = KINDS = ("tokens", "clusters", "ncut")
# References that know nothing of the image.
GRID, CENTRE = "grid", "centre"
NUM_PICTURES = 6


def check_discover(
    results: Results,
    data: str,
    masks: str | None,
    class_masks: str | None,
    boxes: str | None,
    split: str | None,
    background: tuple[int, ...] | int,
    ignore: tuple[int, ...] | int,
    parts: list[str] | None,
    clusters: int | None,
) -> tuple[str, ImageFiles, Objects]:
    """Finds images, their name and their objects; see `Results.required`."""
    check_positive(clusters=clusters)
    unknown = sorted(set(parts or ()) - set(KINDS))
    if unknown:
        raise ValueError(f"parts are {', '.join(KINDS)}, got '{unknown[0]}'.")
    name, files = find_images(data)
    if split is not None:
        files = listed_files(files, split)
        name = f"{name} ({Path(split).stem})"
    files = files.limited(results.limit)
    if clusters is not None and parts and PATCH_CLUSTERS not in parts:
        raise ValueError(
            f"{clusters} clusters are no part of what is scored: leave them out, or "
            f"name --parts {PATCH_CLUSTERS} too."
        )
    values = LabelValues.of(background, ignore)
    return name, files, find_objects(files, masks, class_masks, boxes, values)


@evaluation
def run_discover(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    masks: str | None = None,
    class_masks: str | None = None,
    boxes: str | None = None,
    split: str | None = None,
    background: tuple[int, ...] | int = 0,
    ignore: tuple[int, ...] | int = 255,
    parts: list[str] | None = None,
    clusters: int | None = None,
) -> Result:
    """Scores objects that are found without labels: mBO, foreground ARI, CorLoc.

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
            Folder of label images with the names of the images, one integer per px and
            instance, for example Pascal VOC's `SegmentationObject`; or a JSON file of
            COCO. None scores boxes alone.
        class_masks:
            The same with one integer per class, for example `SegmentationClass`;
            without, `mbo_c` is not told. COCO's JSON tells the classes itself.
        boxes:
            JSON file of COCO, or CSV with the columns file, x0, y0, x1, y1 in px, the
            last ones inclusive. None takes boxes around the instances of the masks.
        split:
            File with the names of the images to use, one per line. None uses all.
        background:
            Value of the background in label images, or several as '[0, 1]'; '[]' if
            there is none.
        ignore:
            Value of px that count nowhere in label images, or several.
        parts:
            What is scored: `tokens`, `clusters` of patches, `ncut`, which is TokenCut's
            object; may be given several times. None takes all that the model allows.
        clusters:
            Number of clusters. None takes as many as there are tokens, else 16.

    Returns:
        The scores, see `stellar_plugin.protocols.DISCOVER`, with the name of the parts
        before them; `grid_` is a uniform grid with as many cells, `centre_` a box in
        the centre of half the area.

    Raises:
        FileNotFoundError: If a file or folder is not there.
        ValueError: If the model has not what `parts` asks for, or images and objects do
            not fit.
        RuntimeError: If no image has an object.
    """
    name, files, objects = results.required(check_discover)
    kinds = _kinds(model, devices, parts, clusters)
    protocol = results.protocol(
        model, DISCOVER, data=name, classes=objects.meaning, parts=_said(kinds)
    )
    if PATCH_CLUSTERS in kinds.counts:
        check_clusters(model, protocol.crop, kinds.counts[PATCH_CLUSTERS])
    images = ObjectImages(
        files, objects.labels, objects.num_labels, protocol, model.origin.interpolation
    )
    results.announce(model, protocol)
    scores, chance, provenance = _score(kinds, images, objects, protocol)
    inputs = {"data": results.fingerprint(files)}
    inputs |= {k: results.fingerprint(found) for k, found in objects.files.items()}
    provenance |= {"masks": masks, "class_masks": class_masks, "boxes": boxes}
    result = results.result(
        model, "discover", name, protocol, scores, inputs, chance, **provenance
    )
    folder = results.save(result)
    if devices.rank == 0:
        _save_picture(folder / "discover.png", kinds, images, objects, protocol)
    return result


@dataclass(frozen=True)
class Kinds:
    """The kinds of parts that images are cut into.

    Attributes:
        model:
            What is evaluated.
        devices:
            Where it runs.
        counts:
            Number of parts of each kind, in the order of the scores.
    """

    model: FrozenModel
    devices: Devices
    counts: dict[str, int]

    def __call__(self, images: Tensor) -> dict[str, list[Segments]]:
        """Segments of uint8 images by kind, on the CPU."""
        with torch.no_grad(), self.devices.fabric.autocast():
            result = self.model(self.devices.fabric.to_device(images))
            size = (images.shape[-2], images.shape[-1])
            return {kind: self._cut(kind, result, size) for kind in self.counts}

    def _cut(
        self, kind: str, result: Factorization, size: tuple[int, int]
    ) -> list[Segments]:
        if kind == TOKENS:
            return token_segments(result, size)
        if kind == PATCH_CLUSTERS:
            seed = self.devices.seed
            return cluster_segments(result, size, self.counts[kind], seed)
        return ncut_segments(result, size)

    @property
    def grids(self) -> dict[int, str]:
        """Names of the uniform grids by their number of cells."""
        counts = [n for kind, n in self.counts.items() if kind != NCUT]
        return {n: f"{GRID}_{n}" if n != counts[0] else GRID for n in counts}

    def references(self, crop: int) -> dict[str, Segments]:
        """Segments that know nothing of an image, by name."""
        size = (crop, crop)
        grids = {name: grid_segments(n, size) for n, name in self.grids.items()}
        return {**grids, CENTRE: centre_segments(size)}

    def reference(self, kind: str, score: str) -> str:
        """What says how much chance gives: as many parts, or one box."""
        one_box = kind == NCUT or score == OF_BOXES[0]
        return CENTRE if one_box else self.grids[self.counts[kind]]


def _kinds(
    model: FrozenModel, devices: Devices, parts: list[str] | None, clusters: int | None
) -> Kinds:
    has_tokens = bool(model.num_queries) and model.has_localization
    if parts is None:
        parts = [kind for kind in KINDS if kind != TOKENS or has_tokens]
    if TOKENS in parts and not has_tokens:
        raise ValueError(
            f"'{model.origin.label}' has no tokens with a localization: --parts "
            f"{PATCH_CLUSTERS} cuts its images by their patches instead."
        )
    num_clusters = clusters or (model.num_queries if has_tokens else CLUSTERS)
    counts = {TOKENS: model.num_queries, PATCH_CLUSTERS: num_clusters, NCUT: 2}
    return Kinds(model, devices, {k: n for k, n in counts.items() if k in parts})


def _said(kinds: Kinds) -> str:
    """The kinds of parts for the card."""
    words = {
        TOKENS: "tokens, the strongest of each patch",
        PATCH_CLUSTERS: "k-means clusters of patches of one image",
        NCUT: "parts by a normalised cut of patches",
    }
    return "; ".join(f"{kind}: {n} {words[kind]}" for kind, n in kinds.counts.items())


def _score(
    kinds: Kinds, images: ObjectImages, objects: Objects, protocol: DiscoverProtocol
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Scores, chance and provenance over the images of all processes."""
    devices, references = kinds.devices, kinds.references(protocol.crop)
    names = [f"{k}_{s}" for k in (*kinds.counts, *references) for s in objects.scores]
    means, unreadable = ImageMeans[str](names), []
    loader = devices.loader(cast(Any, images))
    for batch in devices.progress(loader, "discover", len(loader)):
        unreadable += batch.number[~batch.readable].tolist()
        segments = kinds(batch.image)
        for i in batch.readable.nonzero().flatten().tolist():
            truth = ObjectSample(*(values[i] for values in batch))
            boxes = true_boxes(truth, objects, protocol)
            of_image = {kind: found[i] for kind, found in segments.items()}
            for kind, found in {**of_image, **references}.items():
                for score, value in image_scores(found, truth.labels, boxes).items():
                    one = torch.tensor([value], dtype=torch.float64)
                    means.add(f"{kind}_{score}", one)
    num_unreadable = count_unreadable(devices, images.files, unreadable)
    try:
        reduced = means.reduce(devices)
    except RuntimeError as error:
        raise RuntimeError(f"{error} None has an object in its crop.") from error
    num_images = {s: reduced[f"{CENTRE}_{s}"].num_images for s in objects.scores}
    num_empty = len(images) - num_unreadable - max(num_images.values())
    if num_empty:
        devices.say(f"Left out: {num_empty} images without any object in the crop.")
    values = {name: mean.value for name, mean in reduced.items()}
    chance = {
        f"{k}_{s}": values[f"{kinds.reference(k, s)}_{s}"]
        for k in kinds.counts
        for s in objects.scores
    }
    provenance = {
        "num_unreadable": num_unreadable,
        "num_empty": num_empty,
        "num_images_by_score": num_images,
        "standard_error": {n: mean.standard_error for n, mean in reduced.items()},
    }
    scores = {**values, "num_images": max(num_images.values())}
    return scores, chance, provenance


def image_scores(segments: Segments, labels: Tensor, boxes: Tensor) -> dict[str, float]:
    """Scores of one image, those that its objects allow.

    Args:
        segments:
            Its parts.
        labels:
            Its labels as in `ObjectSample`.
        boxes:
            Edges of its objects in px of the crop with shape (n, 4).
    """
    scores = {}
    for name, mask in zip((OF_INSTANCES[0], OF_CLASSES[0]), labels, strict=False):
        valid = mask != IGNORED
        of_valid = (segments.parts[valid], mask[valid], segments.num_parts)
        counts, values = overlap_counts(*of_valid)
        are_objects = values > BACKGROUND
        if not are_objects.any():
            continue
        scores[name] = best_overlap(overlap_ious(counts)[:, are_objects])
        if name == OF_INSTANCES[0]:
            scores[OF_INSTANCES[1]] = adjusted_rand_index(counts[:, are_objects])
    if len(boxes):
        found = part_boxes((~segments.object).long(), 1)
        scores[OF_BOXES[0]] = is_found(found, boxes)
        every = part_boxes(segments.parts, segments.num_parts)
        scores[OF_BOXES[1]] = is_found(every, boxes)
    return scores


def _save_picture(
    path: Path,
    kinds: Kinds,
    images: ObjectImages,
    objects: Objects,
    protocol: DiscoverProtocol,
) -> None:
    count = min(NUM_PICTURES, len(images))
    samples = [images[i * len(images) // count] for i in range(count)]
    samples = [sample for sample in samples if sample.readable]
    if samples:
        names = [images.files.names[sample.number] for sample in samples]
        boxes = [true_boxes(sample, objects, protocol) for sample in samples]
        segments = kinds(torch.stack([sample.image for sample in samples]))
        save_picture(path, names, samples, boxes, segments)
