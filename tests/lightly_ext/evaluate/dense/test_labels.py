from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.evaluate.dense.label_maps import IGNORED, SegmentationSet
from lightly_ext.evaluate.dense.labels import find_segmentation_set
from lightly_ext.evaluate.masks import MaskedSample

SIZE = (6, 4)  # height and width


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(path)


def _map(path: Path, *values: int) -> None:
    """A label map with these values, the first at all other px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(SIZE, values[0], dtype=np.uint8)
    array.flat[: len(values)] = values
    Image.fromarray(array).save(path)


def _folder(root: Path) -> Path:
    for part, value in (("train", 2), ("val", 1)):
        _image(root / "images" / part / "a" / "0.jpg")
        _map(root / "masks" / part / "a" / "0.png", 0, value, 255)
    return root


def _voc(root: Path) -> None:
    lists = {"train": "A", "aug": "B", "val": "C"}
    for part, name in lists.items():
        path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
        _image(root / "JPEGImages" / f"{name}.jpg")
        augmented = "Aug" if part == "aug" else ""
        _map(root / f"SegmentationClass{augmented}" / f"{name}.png", 0, 20, 255)


def _ade20k(root: Path) -> None:
    for part in ("training", "validation"):
        _image(root / "images" / part / "ADE_1.jpg")
        _map(root / "annotations" / part / "ADE_1.png", 0, 1, 150)


def _cityscapes(root: Path, kind: str = "labelIds", *values: int) -> None:
    for part in ("train", "val"):
        _image(root / "leftImg8bit" / part / "bonn" / "b_1_leftImg8bit.png")
        path = root / "gtFine" / part / "bonn" / f"b_1_gtFine_{kind}.png"
        _map(path, *(values or (0, 7, 9, 33)))


def _coco(root: Path) -> None:
    for part in ("train2017", "val2017"):
        _image(root / "images" / part / "9.jpg")
        _map(root / "annotations" / part / "9.png", 255, 0, 1, 181, 156)


def _classes(found: SegmentationSet) -> list[str | None]:
    """Classes of the values of the first training map, in the order of its px."""
    path = found.train.maps.root / found.train.maps.names[0]
    mask = torch.from_numpy(np.array(Image.open(path)).astype(np.int32))
    values = found.values(mask).flatten().tolist()
    return [None if v == IGNORED else found.classes[v] for v in dict.fromkeys(values)]


class TestFindSegmentationSet:
    def test_folder__values_are_classes(self, tmp_path: Path) -> None:
        found = find_segmentation_set(str(_folder(tmp_path / "mine")))
        assert found.name == "mine" and found.classes == ("0", "1", "2")
        assert found.train.files.names == found.test.files.names == ["a/0.jpg"]
        assert found.test.maps.names == ["a/0.png"]
        assert _classes(found) == ["0", "2", None]
        for part in ("train", "val"):  # what does not occur is no class
            _map(tmp_path / "mine" / "masks" / part / "a" / "0.png", 9, 4, 255)
        found = find_segmentation_set(str(tmp_path / "mine"))
        assert found.classes == ("4", "9") and _classes(found) == ["9", "4", None]
        (tmp_path / "mine" / "classes.txt").write_text("sky\nsea\nsand\nship\n")
        found = find_segmentation_set(str(tmp_path / "mine"))
        assert str(found.values) == "4 (sky, sea, sand, ...); ignored values: 255"

    def test_voc__lists(self, tmp_path: Path) -> None:
        _voc(tmp_path)
        found = find_segmentation_set(f"voc:{tmp_path}")
        assert found.train.files.names == ["JPEGImages/A.jpg"]
        assert found.test.maps.names == ["SegmentationClass/C.png"]
        assert len(found.classes) == 21
        assert _classes(found) == ["background", "tv monitor", None]
        found = find_segmentation_set(f"voc-aug:{tmp_path}")
        names = ["SegmentationClass/A.png", "SegmentationClassAug/B.png"]
        assert found.train.maps.names == names and len(found.test) == 1

    def test_ade20k__zero_is_ignored(self, tmp_path: Path) -> None:
        _ade20k(tmp_path)
        found = find_segmentation_set(f"ade20k:{tmp_path}")
        assert found.test.maps.names == ["annotations/validation/ADE_1.png"]
        assert _classes(found) == [None, "1", "150"]
        rows = [f"{i}\t0.1\t1\t1\tclass{i}, alias" for i in range(1, 151)]
        (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tName", *rows]))
        found = find_segmentation_set(f"ade20k:{tmp_path}")
        assert _classes(found) == [None, "class1", "class150"]

    def test_cityscapes__ids_train_ids_and_27_classes(self, tmp_path: Path) -> None:
        _cityscapes(tmp_path)
        found = find_segmentation_set(f"cityscapes:{tmp_path}")
        assert len(found.classes) == 19
        assert _classes(found) == [None, "road", "bicycle"]
        found = find_segmentation_set(f"cityscapes27:{tmp_path}")
        assert len(found.classes) == 27
        assert _classes(found) == [None, "road", "parking", "bicycle"]
        _cityscapes(tmp_path, "labelTrainIds", 255, 0, 18, 13)
        found = find_segmentation_set(f"cityscapes:{tmp_path}")
        assert found.train.maps.names == [
            "gtFine/train/bonn/b_1_gtFine_labelTrainIds.png"
        ]
        assert _classes(found) == [None, "road", "bicycle", "car"]

    def test_coco_stuff__ids_less_one(self, tmp_path: Path) -> None:
        _coco(tmp_path)
        found = find_segmentation_set(f"cocostuff27:{tmp_path}")
        assert len(found.classes) == 27
        assert _classes(found) == [None, "person", "vehicle", "solid", "sky"]

    def test_bad__says_what_is_expected(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"(?s)classes\.txt.*Names: voc,"):
            find_segmentation_set(str(tmp_path / "none"))
        with pytest.raises(FileNotFoundError, match=r"Segmentation/train\.txt"):
            find_segmentation_set(f"voc:{tmp_path}")
        with pytest.raises(FileNotFoundError, match="masks/train"):
            find_segmentation_set(str(tmp_path))
        _voc(tmp_path)
        (tmp_path / "SegmentationClass" / "C.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 of 1 label maps.*C\.png"):
            find_segmentation_set(f"voc:{tmp_path}")
        Image.new("L", (9, 9)).save(tmp_path / "SegmentationClass" / "C.png")
        with pytest.raises(ValueError, match="9 x 9 px, its image 4 x 6 px"):
            find_segmentation_set(f"voc:{tmp_path}")
        folder = _folder(tmp_path / "one")
        (folder / "classes.txt").write_text("sky")
        with pytest.raises(ValueError, match="1 classes: 2 to 255"):
            find_segmentation_set(str(folder))


class TestLabelledImages:
    def test_classes__unreadable_and_unknown(self, tmp_path: Path) -> None:
        part = find_segmentation_set(str(_folder(tmp_path))).train
        masks = torch.tensor([[[0, 2, 255]], [[0, 7, 0]]], dtype=torch.int32)
        images = torch.zeros(2, 3, 1, 3, dtype=torch.uint8)

        def batch(*readable: bool) -> MaskedSample:
            numbers, known = torch.tensor([5, 0]), torch.tensor(readable)
            return MaskedSample(images, masks, numbers, known)  # type: ignore[arg-type]

        assert part.classes(batch(True, False)).tolist() == [[[0, 2, -1]], [[-1] * 3]]
        with pytest.raises(ValueError, match=r"0\.png' has the value 7.*3 \(0, 1, 2"):
            part.classes(batch(True, True))

    def test_limited__keeps_pairs(self, tmp_path: Path) -> None:
        for i in range(4):
            _image(tmp_path / "images" / "train" / f"{i}.jpg")
            _map(tmp_path / "masks" / "train" / f"{i}.png", i, 0)
        _image(tmp_path / "images" / "val" / "0.jpg")
        _map(tmp_path / "masks" / "val" / "0.png", 0)
        found = find_segmentation_set(str(tmp_path)).limited(2)
        assert found.train.files.names == ["0.jpg", "2.jpg"]
        assert found.train.maps.names == ["0.png", "2.png"]
