from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.evaluate.annotations import find_boxes, read_coco
from lightly_ext.evaluate.images import folder_images

HEIGHT, WIDTH = 20, 30
HEAD = "file,x0,y0,x1,y1\n"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of 30 x 20 px, of which c/2.jpg is stored on its side."""
    folder = tmp_path / "images"
    for name in ("a/0.png", "1.png", "c/2.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        size = (WIDTH, HEIGHT, 3) if name.endswith("jpg") else (HEIGHT, WIDTH, 3)
        exif = Image.Exif()
        if name.endswith("jpg"):
            exif[274] = 6
        image = Image.fromarray(np.zeros(size, np.uint8))
        image.save(folder / name, exif=exif)
    return folder


def _csv(path: Path, text: str, head: str = HEAD) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + text)
    return str(path)


def _coco(path: Path, images: list[dict[str, Any]], boxes: list[dict]) -> str:
    path.write_text(json.dumps({"images": images, "annotations": boxes}))
    return str(path)


def _listed(boxes: list[torch.Tensor]) -> list[list[list[float]]]:
    assert all(b.dtype == torch.float64 and b.shape[1:] == (4,) for b in boxes)
    return [b.tolist() for b in boxes]


class TestFindBoxes:
    @pytest.mark.parametrize("place", ["folder", "beside"])
    def test_find_boxes__csv(self, images: Path, place: str) -> None:
        # Names are relative to the images, or to the folder of the file.
        prefix, folder = {"folder": ("", images / "x"), "beside": ("images/", images)}[
            place
        ]
        text = "".join(
            f"{prefix}{line}\n"
            for line in (
                "c/2.jpg,0,0,29,19",
                "other.png,5,5,99,99",
                "a/0.png,3,4,3,10",
                "c/2.jpg,1,2,8,9",
            )
        )
        path = _csv(folder.parent / "boxes.csv", text)
        files = folder_images(images)
        assert list(files.names) == ["1.png", "a/0.png", "c/2.jpg"]
        assert _listed(find_boxes(files, path)) == [
            [],
            [[3, 4, 4, 11]],
            [[0, 0, 30, 20], [1, 2, 9, 10]],
        ]
        assert _listed(find_boxes(files[[2]], path)) == [
            [[0, 0, 30, 20], [1, 2, 9, 10]]
        ]

    def test_find_boxes__csv_of_spreadsheets(self, images: Path) -> None:
        # A mark of UTF-8, columns in another order, one more, and CRLF.
        path = images / "boxes.csv"
        path.write_bytes("\ufeffx1,y1,file,label,x0,y0\r\n8,9,1.png,ü,1,2\r\n".encode())
        boxes = find_boxes(folder_images(images), str(path))
        assert _listed(boxes) == [[[1, 2, 9, 10]], [], []]

    def test_find_boxes__csv_that_counts_to_the_width(self, images: Path) -> None:
        path = _csv(images.parent / "boxes.csv", "1.png,0,0,30,20")
        boxes = find_boxes(folder_images(images), path)
        assert _listed(boxes) == [[[0, 0, 30, 20]], [], []]

    def test_find_boxes__coco(self, images: Path) -> None:
        listed = [
            {"id": 7, "file_name": "c/2.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 3, "file_name": "1.png"},
            {"id": 4, "file_name": "nowhere.png", "height": 9, "width": 9},
        ]
        boxes = [
            {"id": 1, "image_id": 7, "bbox": [1.5, 2, 3, 4.25]},
            {"id": 2, "image_id": 3, "bbox": [20, 10, 10.4, 10]},  # rounded
            {"id": 3, "image_id": 3, "bbox": [0, 0, 30, 20], "iscrowd": 1},
            {"id": 4, "image_id": 3, "bbox": [2, 2, 0, 5]},  # no inside
            {"id": 5, "image_id": 4, "bbox": [0, 0, 90, 90]},
            {"id": 6, "image_id": 7, "bbox": [0, 0, 30, 20], "iscrowd": 0},
        ]
        path = _coco(images.parent / "boxes.json", listed, boxes)
        assert _listed(find_boxes(folder_images(images), path)) == [
            [[20, 10, 30, 20]],
            [],
            [[1.5, 2, 4.5, 6.25], [0, 0, 30, 20]],
        ]

    @pytest.mark.parametrize(
        ("head", "line", "message"),
        [
            ("file,x0,y0,x1\n", "1.png,1,2,3", "no column y1: its first line is file"),
            ("", "1.png,1,2,3,4", "no column file, x0, y0, x1, y1"),
            (HEAD, "1.png,1,2,3", r"Line 2 of .* has no four numbers .*None"),
            (HEAD, "1.png,0,0,1,1\n1.png,1,2,x,4", r"Line 3 of .*'x'"),
            (HEAD, "1.png,1,2,nan,4", r"line 2 of .* has no finite numbers"),
            (HEAD, "1.png,5,2,3,4", r"line 2 of .* is reversed"),
            (HEAD, "1.png,1,2,31,4", r"line 2 of .* ends 2 px outside of .*30 x 20 px"),
            (HEAD, "1.png,-2,2,3,4", r"line 2 of .* ends 2 px outside"),
            (HEAD, "9.png,1,2,3,4", r"names no image of .*, for example '9.png'"),
            (HEAD, "", "names no image of .*images': names are relative"),
        ],
    )
    def test_find_boxes__wrong_csv(
        self, images: Path, head: str, line: str, message: str
    ) -> None:
        path = _csv(images.parent / "boxes.csv", line, head)
        with pytest.raises(ValueError, match=message):
            find_boxes(folder_images(images), path)

    @pytest.mark.parametrize(
        ("box", "message"),
        [
            ({"bbox": [1, 2, 3]}, "Annotation 5 of .* has no `bbox` of four numbers"),
            ({}, "Annotation 5 of .* has no `bbox`"),
            ({"bbox": [1, 2, -3, 4]}, "annotation 5 of .* is reversed"),
            ({"bbox": [0, 0, 31.5, 4]}, r"annotation 5 of .* ends 1.5 px outside"),
            ({"image_id": 9}, "annotates image 9, which it does not list"),
            ({"iscrowd": 1}, "has no box of the images in"),
        ],
    )
    def test_find_boxes__wrong_coco(
        self, images: Path, box: dict[str, Any], message: str
    ) -> None:
        box = {"id": 5, "image_id": 1, **box}
        path = _coco(images.parent / "b.json", [{"id": 1, "file_name": "1.png"}], [box])
        with pytest.raises(ValueError, match=message):
            find_boxes(folder_images(images), path)

    def test_find_boxes__other_files(self, images: Path) -> None:
        files = folder_images(images)
        with pytest.raises(
            FileNotFoundError, match=r"no file 'nowhere.csv' with boxes"
        ):
            find_boxes(files, "nowhere.csv")
        for content in (b"[1, 2", b"[]", b'{"images": [{"id": 1}]}', b"\xff\xfe\x00"):
            (images / "b.json").write_bytes(content)
            with pytest.raises(ValueError, match="is no JSON in COCO's form"):
                find_boxes(files, str(images / "b.json"))
        (images / "b.csv").write_bytes(b"\xff\xfe\x00file")
        with pytest.raises(ValueError, match="cannot be read as CSV"):
            find_boxes(files, str(images / "b.csv"))
        listed = [{"id": 1, "file_name": "c/2.jpg", "height": WIDTH, "width": HEIGHT}]
        path = _coco(images / "b.json", listed, [])
        with pytest.raises(
            ValueError, match=r"2.jpg' is 20 x 30 px, but it is 30 x 20"
        ):
            read_coco(files, path)
