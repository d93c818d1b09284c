"""Object discovery without labels, scored as the object-centric literature does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightly_ext.durable import replacing
from lightly_ext.evaluate.annotations import find_boxes, read_coco
from lightly_ext.evaluate.clusters import check_clusters
from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.discovery.objects import (
    BACKGROUND,
    IGNORED,
    CocoLabels,
    LabelImages,
    Labels,
    ObjectImages,
    ObjectSample,
    boxes_in_crop,
    pycocotools_mask,
)
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
from lightly_ext.evaluate.masks import (
    LabelValues,
    check_values,
    find_masks,
    listed_files,
)
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.pictures.gallery import CLUSTER_COLOURS, draw_rows
from lightly_ext.evaluate.probing.localization import (
    best_overlap,
    overlap_counts,
    overlap_ious,
)
from lightly_ext.evaluate.probing.where import grey_labels
from lightly_ext.evaluate.reduction import ImageMeans, count_unreadable
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.encoder import Factorization
from stellar_plugin.protocols import CLUSTERS, DISCOVER, DiscoverProtocol
from stellar_plugin.visualize import Uint8Array, overlay, to_pictures, token_palette

TOKENS, PATCH_CLUSTERS, NCUT = KINDS = ("tokens", "clusters", "ncut")
# References that know nothing of the image.
GRID, CENTRE = "grid", "centre"
# Scores by what they need.
OF_INSTANCES, OF_CLASSES = ("mbo_i", "fg_ari"), ("mbo_c",)
OF_BOXES = ("corloc", "corloc_oracle")
NUM_PICTURES = 6
OBJECT_COLOUR, TRUE_COLOUR = (255, 255, 255), (255, 210, 0)


class Objects(NamedTuple):
    """The objects of all images, as a user names them.

    Attributes:
        labels: Reads labels of px, None if there are boxes alone.
        num_labels: 2 with classes, 1 without, 0 for boxes alone.
        boxes: Edges of each image in px, None to take those around its instances.
        meaning: How they were read, for the card.
        files: Folder and names of all files that were read, by what they are.
    """

    labels: Labels | None
    num_labels: int
    boxes: Sequence[Tensor] | None
    meaning: str
    files: dict[str, ImageFiles]

    @property
    def scores(self) -> list[str]:
        """Names of the scores that they allow."""
        of_labels = [(), OF_INSTANCES, (*OF_INSTANCES, *OF_CLASSES)][self.num_labels]
        return [*of_labels, *OF_BOXES]


def check_discover(
    results: Results,
    data: str,
    masks: str | None,
    class_masks: str | None,
    boxes: str | None,
    split: str | None,
    background: int,
    ignore: int,
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
    values = LabelValues((background,), (ignore,))
    objects = _masks(files, masks, class_masks, values)
    if boxes is not None:
        found = find_boxes(files, boxes)
        meaning = "; ".join(filter(None, [objects.meaning, "boxes of a file"]))
        objects = objects._replace(
            boxes=found,
            meaning=meaning,
            files={**objects.files, "boxes": _one_file(boxes)},
        )
    if not objects.num_labels and objects.boxes is None:
        raise ValueError(
            "There is nothing to compare with: name masks with --masks, a folder of "
            "label images or a JSON file of COCO, or boxes with --boxes."
        )
    return name, files, objects


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
    background: int = 0,
    ignore: int = 255,
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
            Folder of images, or the name of a known set.
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
            Value of the background in label images.
        ignore:
            Value of px that count nowhere in label images.
        parts:
            What is scored: `tokens`, `clusters` of patches, `ncut`, which is TokenCut's
            object; may be given several times. None takes all that the model allows.
        clusters:
            Number of clusters. None takes as many as there are tokens, else 16.

    Returns:
        The scores, see `stellar_plugin.protocols.DISCOVER`, with the name of the parts
        before them; "grid_" is a uniform grid with as many cells, "centre_" a box in
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


def _masks(
    files: ImageFiles, masks: str | None, class_masks: str | None, values: LabelValues
) -> Objects:
    if masks is None:
        if class_masks is not None:
            raise ValueError("--class_masks needs --masks, which tell the instances.")
        return Objects(None, 0, None, "", {})
    if masks.lower().endswith(".json"):
        return _coco_masks(files, masks, class_masks)
    found = find_masks(files, masks)
    check_values(found, values)
    inputs = {"masks": _below(masks, found)}
    of_classes = None
    if class_masks is not None:
        of_classes = find_masks(files, class_masks)
        check_values(of_classes, values)
        inputs["class_masks"] = _below(class_masks, of_classes)
    labels = LabelImages(found, of_classes, values)
    meaning = f"instances of label images: {values}"
    return Objects(labels, len(inputs), None, meaning, inputs)


def _coco_masks(files: ImageFiles, masks: str, class_masks: str | None) -> Objects:
    if class_masks is not None:
        raise ValueError(
            f"'{masks}' tells the classes itself: leave --class_masks out."
        )
    annotations = read_coco(files, masks)
    if not any(map(len, annotations)):
        raise ValueError(f"'{masks}' has no object of the images in '{files.root}'.")
    pycocotools_mask()
    labels = CocoLabels(annotations, masks)
    return Objects(labels, 2, None, "instances of COCO", {"masks": _one_file(masks)})


def _below(folder: str, paths: Sequence[Path]) -> ImageFiles:
    return ImageFiles(Path(folder), [str(path.relative_to(folder)) for path in paths])


def _one_file(path: str) -> ImageFiles:
    return ImageFiles(Path(path).parent, [Path(path).name])


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
    reduced = means.reduce(devices)
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


def true_boxes(
    sample: ObjectSample, objects: Objects, protocol: DiscoverProtocol
) -> Tensor:
    """Boxes of the objects of an image, float64 (n, 4) in px of the crop."""
    if objects.boxes is not None:
        boxes = objects.boxes[int(sample.number)]
        return boxes_in_crop(boxes, sample.size, protocol)
    values, instances = sample.labels[0].unique(return_inverse=True)
    return part_boxes(instances, len(values))[values > BACKGROUND]


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
    """Rows: images with the boxes of their objects, instances, parts of each kind."""
    count = min(NUM_PICTURES, len(images))
    samples = [images[i * len(images) // count] for i in range(count)]
    samples = [sample for sample in samples if sample.readable]
    if not samples:
        return
    pixels = torch.stack([sample.image for sample in samples])
    pictures = to_pictures(pixels / 255)
    true = [true_boxes(sample, objects, protocol) for sample in samples]
    rows = {"images": outlined(pictures, true, TRUE_COLOUR)}
    if objects.num_labels:
        masks = torch.stack([sample.labels[0] for sample in samples])
        rows["instances"] = grey_labels(masks, LabelValues((BACKGROUND,), ()))
    for kind, found in kinds(pixels).items():
        palette = token_palette(kinds.counts[kind])
        parts = palette[torch.stack([f.parts for f in found]).numpy()]
        boxes = [part_boxes((~f.object).long(), 1) for f in found]
        rows[kind] = outlined(overlay(pictures, parts), boxes, OBJECT_COLOUR)
    names = [images.files.names[sample.number] for sample in samples]
    legend = (
        "Yellow: boxes of the objects. White: box of the object that was found without "
        f"labels. {CLUSTER_COLOURS}"
    )
    with replacing(path) as new:
        draw_rows(names, rows, legend).save(new, "png", optimize=True)


def outlined(
    pictures: Uint8Array, boxes: Sequence[Tensor], colour: tuple[int, int, int]
) -> Uint8Array:
    """Draws boxes into pictures.

    Args:
        pictures:
            Pictures with shape (num_images, height, width, 3).
        boxes:
            Edges of each in px with shape (n, 4).
        colour:
            RGB colour of the lines.
    """
    width = max(1, pictures.shape[2] // 100)
    drawn = [Image.fromarray(picture) for picture in pictures]
    for picture, of_picture in zip(drawn, boxes, strict=True):
        draw = ImageDraw.Draw(picture)
        for x0, y0, x1, y1 in of_picture.round().long().tolist():
            draw.rectangle(
                (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), None, colour, width
            )
    return np.stack([np.asarray(picture) for picture in drawn])
