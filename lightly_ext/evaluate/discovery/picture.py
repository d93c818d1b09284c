"""A picture of images, their objects and what was found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightly_ext.durable import replacing
from lightly_ext.evaluate.discovery.objects import BACKGROUND, ObjectSample
from lightly_ext.evaluate.discovery.scores import part_boxes
from lightly_ext.evaluate.discovery.segments import Segments
from lightly_ext.evaluate.masks import LabelValues
from lightly_ext.evaluate.pictures.gallery import CLUSTER_COLOURS, draw_rows
from lightly_ext.evaluate.probing.where import grey_labels
from stellar_plugin.visualize import Uint8Array, overlay, to_pictures, token_palette

OBJECT_COLOUR, TRUE_COLOUR = (255, 255, 255), (255, 210, 0)


def save_picture(
    path: Path,
    names: Sequence[str],
    samples: Sequence[ObjectSample],
    boxes: Sequence[Tensor],
    segments: Mapping[str, Sequence[Segments]],
) -> None:
    """Rows: images with the boxes of their objects, instances, parts of each kind.

    Args:
        path:
            Where it is written.
        names:
            Names of the images.
        samples:
            The images.
        boxes:
            Boxes of the objects of each.
        segments:
            Segments of each, by kind.
    """
    pixels = torch.stack([sample.image for sample in samples])
    pictures = to_pictures(pixels / 255)
    rows = {"images": outlined(pictures, boxes, TRUE_COLOUR)}
    if len(samples[0].labels):
        masks = torch.stack([sample.labels[0] for sample in samples])
        rows["instances"] = grey_labels(masks, LabelValues((BACKGROUND,), ()))
    for kind, found in segments.items():
        palette = token_palette(found[0].num_parts)
        parts = palette[torch.stack([f.parts for f in found]).numpy()]
        of_objects = [part_boxes((~f.object).long(), 1) for f in found]
        rows[kind] = outlined(overlay(pictures, parts), of_objects, OBJECT_COLOUR)
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
