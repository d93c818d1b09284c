from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.evaluate.discovery.objects import (
    CocoLabels,
    LabelImages,
    ObjectImages,
    boxes_in_crop,
    check_object,
    decode_mask,
)
from lightly_ext.evaluate.images import folder_images
from lightly_ext.evaluate.masks import LabelValues
from stellar_plugin.protocols import DISCOVER

SIZE = (6, 8)


def _runs(mask: np.ndarray) -> list[int]:
    """COCO's runs: lengths of 0s and 1s in turns, column by column, 0s first."""
    runs, value = [0], 0
    for px in mask.T.flatten().tolist():
        if px != value:
            runs, value = [*runs, 0], px
        runs[-1] += 1
    return runs


def _text(runs: list[int]) -> str:
    """COCO's text of runs: 5 bits a letter, from the fourth on as differences."""
    text = ""
    for i, run in enumerate(runs):
        number = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits = number & 31
            number >>= 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def _annotation(mask: Any, **fields: Any) -> dict[str, Any]:
    if isinstance(mask, np.ndarray):
        mask = {"size": list(mask.shape), "counts": _runs(mask)}
    return {"id": 3, "category_id": 7, "segmentation": mask, **fields}


def _rectangle(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=int)
    mask[y0:y1, x0:x1] = 1
    return mask


class TestDecodeMask:
    def test_decode_mask__runs_and_their_text(self) -> None:
        rng = np.random.default_rng(0)
        for density in (0.02, 0.5, 0.98):
            mask = (rng.random((40, 50)) < density).astype(int)
            text = {"size": [40, 50], "counts": _text(_runs(mask))}
            for of in (mask, text):
                found = decode_mask(_annotation(of), (40, 50), "a.json")
                np.testing.assert_array_equal(found, mask == 1)

    def test_decode_mask__polygons_drawn_by_hand(self) -> None:
        # Corners lie between px; two polygons of one object.
        polygons = [[1, 1, 4, 1, 4, 5, 1, 5], [6, 0, 8, 0, 8, 2, 6, 2]]
        expected = _rectangle(1, 1, 5, 4) + _rectangle(0, 6, 2, 8)
        found = decode_mask(_annotation(polygons), SIZE, "a.json")
        np.testing.assert_array_equal(found, expected == 1)
        # Px whose centres are inside; those on the edge may go either way.
        triangle = decode_mask(_annotation([[0, 0, 30, 0, 0, 30]]), (30, 30), "a")
        y, x = np.mgrid[:30, :30] + 0.5
        assert triangle[x + y < 29].all() and not triangle[x + y > 31].any()

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (None, "Annotation 3 of 'a.json' has no `segmentation` of polygons or"),
            ([[1, 2]], "Annotation 3 of 'a.json' has no"),
            ({"size": [6, 8]}, "Annotation 3 of 'a.json' has no"),
            (np.zeros((8, 6), int), "annotation 3 of 'a.json' is 6 x 8 px, its image"),
        ],
    )
    def test_decode_mask__wrong(self, mask: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            decode_mask(_annotation(mask), SIZE, "a.json")


class TestCheckObject:
    @pytest.mark.parametrize("category", [None, "dog", -1, 1.5, True])
    def test_check_object__no_class(self, category: Any) -> None:
        annotation = _annotation(_rectangle(0, 0, 3, 4), category_id=category)
        with pytest.raises(
            ValueError, match=f"Annotation 3.*`category_id` '?{category}"
        ):
            check_object(annotation, "a.json")

    @pytest.mark.parametrize("mask", [None, [], {}])
    def test_check_object__no_mask(self, mask: Any) -> None:
        with pytest.raises(ValueError, match=r"Annotation 3.*so no mask.*--boxes"):
            check_object(_annotation(mask), "a.json")


class TestCocoLabels:
    def test_coco_labels__instances_classes_overlaps_and_crowds(self) -> None:
        annotations = [
            _annotation(_rectangle(0, 0, 3, 4), category_id=0),
            _annotation(_rectangle(2, 2, 6, 8), category_id=90),
            _annotation(_rectangle(5, 0, 6, 3), category_id=1, iscrowd=1),
        ]
        labels = CocoLabels([[], annotations], "a.json")
        instances = _rectangle(0, 0, 3, 4) + 2 * _rectangle(2, 2, 6, 8)
        classes = _rectangle(0, 0, 3, 4) + 91 * _rectangle(2, 2, 6, 8)
        for mask in (instances, classes):
            mask[2:3, 2:4] = -1  # of two objects
            mask[5, :3] = -1  # of a crowd
        found = labels(1, SIZE)
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found.numpy(), [instances, classes])
        assert not labels(0, SIZE).any()


class TestObjectImages:
    def test_object_images__cut_as_the_image(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        instances, classes = rng.integers(5, size=(2, 8, 12), dtype=np.uint8)
        instances[3, 3:5] = 255
        for name, array in (("i", instances), ("c", classes), ("x", instances * 50)):
            (tmp_path / name).mkdir()
            Image.fromarray(array).save(tmp_path / name / "0.png")
        values = LabelValues((1,), (255,))
        paths = [[tmp_path / name / "0.png"] for name in ("i", "c")]
        labels = LabelImages(*paths, values)
        protocol = DISCOVER.replace(resize=8, crop=6)
        files = folder_images(tmp_path / "x")
        images = ObjectImages(files, labels, 2, protocol, "bilinear")
        sample = images[0]
        cut = np.stack([instances, classes])[:, 1:7, 3:9].astype(int)
        expected = np.where(cut == 1, 0, np.where(cut == 255, -1, cut + 1))
        np.testing.assert_array_equal(sample.labels.numpy(), expected)
        red = sample.image[0].numpy()
        np.testing.assert_array_equal(red, (instances * 50)[1:7, 3:9])
        assert sample.readable and sample.size.tolist() == [8, 12]

        alone = ObjectImages(files, None, 0, protocol, "bilinear")[0]
        assert alone.labels.shape == (0, 6, 6) and alone.readable
        (tmp_path / "c" / "0.png").write_bytes(b"no PNG")
        broken = images[0]
        assert not broken.readable and not broken.labels.any()


class TestBoxesInCrop:
    def test_boxes_in_crop__what_is_seen(self) -> None:
        # 40 x 80 px, resized to 20 x 40, of which the middle 16 x 16 are cut out.
        protocol = DISCOVER.replace(resize=20, crop=16)
        boxes = torch.tensor(
            [[24.0, 4, 56, 36], [30, 10, 34, 12], [0, 0, 30, 40], [0, 0, 23, 40]]
        )
        found = boxes_in_crop(boxes, torch.tensor([40, 80]), protocol)
        assert found.tolist() == [[0, 0, 16, 16], [3, 3, 5, 4], [0, 0, 3, 16]]
