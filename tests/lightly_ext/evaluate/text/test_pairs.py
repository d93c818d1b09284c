from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightly_ext.evaluate.text.pairs import find_pairs


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(("suffix", "sign"), [(".csv", ","), (".tsv", "\t")])
def test_find_pairs__table(images: Path, suffix: str, sign: str) -> None:
    rows = [
        ("caption", "image"),  # in any order, and with a byte order mark
        ("one", "images/b.jpg"),
        ('"two, three"', "images/a.jpg"),
        ("  four ", "images/b.jpg"),
        ("", "images/c.jpg"),
    ]
    path = images.parent / f"pairs{suffix}"
    text = "\n".join(sign.join(row) for row in rows)
    path.write_text(f"\ufeff{text}", encoding="utf-8")
    pairs = find_pairs(str(path))
    assert pairs.name == "pairs"
    assert pairs.files.names == ["images/b.jpg", "images/a.jpg"]
    assert pairs.captions == [["one", "four"], ["two, three"]]
    assert pairs.texts == ["one", "four", "two, three"]
    assert pairs.owners.tolist() == [0, 0, 1]
    assert pairs.counts.tolist() == [2, 1]


def test_find_pairs__coco(images: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
        "annotations": [
            {"image_id": 3, "caption": "three\n"},
            {"image_id": 7, "caption": "seven"},
            {"image_id": 3, "caption": "also three"},
        ],
    }
    path = images.parent / "captions.json"
    path.write_text(json.dumps(content))
    pairs = find_pairs(str(path), str(images))
    assert dict(zip(pairs.files.names, pairs.captions, strict=True)) == {
        "a.jpg": ["three", "also three"],
        "b.jpg": ["seven"],
    }
    assert pairs.files.root == images


def test_find_pairs__records(images: Path) -> None:
    content = [
        {"image": "a.jpg", "caption": ["one", "two"]},
        {"image": "c.jpg", "caption": "three"},
    ]
    path = images / "test.json"
    path.write_text(json.dumps(content))
    pairs = find_pairs(str(path))
    assert pairs.captions == [["one", "two"], ["three"]]


def test_find_pairs__folder(images: Path) -> None:
    (images / "a.txt").write_text("one\n\ntwo\n")
    (images / "c.txt").write_text("three")
    pairs = find_pairs(str(images))
    assert pairs.files.names == ["a.jpg", "c.jpg"]
    assert pairs.captions == [["one", "two"], ["three"]]


def test_limited__spread_with_their_captions(images: Path) -> None:
    rows = [{"image": f"{n}.jpg", "caption": n} for n in "abcdef"]
    path = images / "test.json"
    path.write_text(json.dumps(rows))
    pairs = find_pairs(str(path))
    assert pairs.limited(3).texts == ["a", "c", "e"]
    assert pairs.limited(3).files.names == ["a.jpg", "c.jpg", "e.jpg"]
    assert len(pairs.limited(None)) == len(pairs.limited(9)) == 6


def test_find_pairs__bad_input(images: Path) -> None:
    root = images.parent
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'nowhere.csv'"):
        find_pairs("nowhere.csv")
    (root / "x.parquet").touch()
    with pytest.raises(ValueError, match=r"none of .csv, .tsv, .json"):
        find_pairs(str(root / "x.parquet"))
    (root / "x.csv").write_text("file,text\na.jpg,one\n")
    with pytest.raises(ValueError, match="must name the columns 'image' and"):
        find_pairs(str(root / "x.csv"))
    (root / "x.csv").write_text("image,caption\na.jpg,one\n")
    with pytest.raises(FileNotFoundError, match="give the folder that their names"):
        find_pairs(str(root / "x.csv"))
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        find_pairs(str(root / "x.csv"), str(root / "none"))
    assert len(find_pairs(str(root / "x.csv"), str(images))) == 1
    (root / "x.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match="no caption in"):
        find_pairs(str(root / "x.csv"))
    (root / "x.json").write_text('[{"file": "a.jpg"}]')
    with pytest.raises(ValueError, match="neither COCO's captions"):
        find_pairs(str(root / "x.json"))
    with pytest.raises(ValueError, match=r"No image in .* has a caption.*a\.txt"):
        find_pairs(str(images))
