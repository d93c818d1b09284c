from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from lightly_ext.evaluate.datasets import (
    find_classification_set,
    find_images,
    find_labelled_images,
)
from lightly_ext.evaluate.presets import PRESETS
from tests.lightly_ext.evaluate.small import write_classes, write_images

WNIDS = [f"n{i:08d}" for i in range(1000)]
FOODS = [f"food_{i:03d}" for i in range(101)]
SCENES = [f"/{chr(97 + i % 26)}/scene{i}" for i in range(365)]
GRADE_HEADER = "name, patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"


def touch(root: Path, names: Iterable[str]) -> None:
    """Empty files: finding a data set opens no image."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_imagenet(root: Path) -> None:
    for part in ("train", "val"):
        touch(root / part, [f"{wnid}/{part}_{wnid}.JPEG" for wnid in WNIDS])


def write_kaggle(root: Path) -> None:
    images = root / "ILSVRC/Data/CLS-LOC"
    touch(images / "train", [f"{wnid}/{wnid}_1.JPEG" for wnid in WNIDS])
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1000)]
    touch(images / "val", [f"{name}.JPEG" for name in names])
    # Image i has class 999 - i; a second box is of no interest.
    rows = [
        f"{n},{w} 85 1 499 272 {w} 1 2 3 4 "
        for n, w in zip(names, WNIDS[::-1], strict=True)
    ]
    write_text(root / "LOC_val_solution.csv", ["ImageId,PredictionString", *rows])


def write_pets(root: Path) -> None:
    # Capitals are cats, as in the set; ids follow the names without regard to case.
    breeds = [f"Cat_breed_{i:02d}" for i in range(12)]
    breeds += [f"dog_breed_{i:02d}" for i in range(12, 37)]
    for part, numbers in (("trainval", (1, 10, 2)), ("test", (3,))):
        rows = [
            f"{breed}_{n} {i + 1} {1 if i < 12 else 2} {i + 1}"
            for i, breed in enumerate(breeds)
            for n in numbers
        ]
        write_text(root / f"annotations/{part}.txt", rows)
        touch(root / "images", [f"{row.split()[0]}.jpg" for row in rows])
    touch(root / "images", ["Abyssinian_100.mat", "._stray_1.jpg"])


def write_food(root: Path, as_json: bool = False) -> None:
    write_text(root / "meta/classes.txt", FOODS)
    for part, numbers in (("train", (5, 6, 7)), ("test", (8,))):
        lists = {food: [f"{food}/{n}" for n in numbers] for food in FOODS}
        images = [image for part_images in lists.values() for image in part_images]
        if as_json:
            write_text(root / f"meta/{part}.json", [json.dumps(lists)])
        else:
            write_text(root / f"meta/{part}.txt", images)
        touch(root / "images", [f"{image}.jpg" for image in images])


def write_glas(root: Path) -> None:
    # Every third is benign: 29 of 85 and 27 of 80.
    parts = {"train": 85, "testA": 60, "testB": 20}
    names = [f"{part}_{i + 1}" for part, num in parts.items() for i in range(num)]
    grades = ["benign" if i % 3 == 0 else "malignant" for i in range(len(names))]
    rows = [
        f"{n}, {i}, {g}, moderately differentiated"
        for i, (n, g) in enumerate(zip(names, grades, strict=True))
    ]
    write_text(root / "Grade.csv", [GRADE_HEADER, *rows])
    touch(root, [f"{name}{end}.bmp" for name in names for end in ("", "_anno")])


def write_places(root: Path, train: str = "data_256", val: str = "val_256") -> None:
    rows = [f"{scene} {i}" for i, scene in enumerate(SCENES)]
    write_text(root / "categories_places365.txt", rows)
    rows = [f"{s}/0000000{n}.jpg {i}" for i, s in enumerate(SCENES) for n in (2, 1)]
    write_text(root / "places365_train_standard.txt", rows)
    touch(root / train, [row.split()[0][1:] for row in rows])
    # Image i has class 364 - i.
    rows = [f"Places365_val_{i:08d}.jpg {364 - i}" for i in range(365)]
    write_text(root / "places365_val.txt", rows)
    touch(root / val, [row.split()[0] for row in rows])


class TestFindClassificationSet:
    @pytest.mark.parametrize("test", ["val", "test"])
    def test_image_folders(self, tmp_path: Path, test: str) -> None:
        write_classes(tmp_path / "animals", ("train", test), num=2)
        found = find_classification_set(f"{tmp_path}/animals/")
        assert found.name == "animals" and found.train_scale == (0.5, 1.0)
        assert found.train.classes == found.test.classes == ("cat", "dog", "eel")
        assert found.train.names[:3] == ["cat/0000.png", "cat/0001.png", "dog/0000.png"]
        assert found.train.labels == found.test.labels == [0, 0, 1, 1, 2, 2]
        assert found.test.root == tmp_path / "animals" / test

    def test_image_folders__val_before_test(self, tmp_path: Path) -> None:
        write_classes(tmp_path, ("train", "val"), num=1)
        touch(tmp_path / "test", ["without_label.jpg"])
        assert find_classification_set(str(tmp_path)).test.root.name == "val"

    @pytest.mark.parametrize("name", ["", "imagenet:"])
    def test_imagenet(self, tmp_path: Path, name: str) -> None:
        write_imagenet(tmp_path)
        found = find_classification_set(f"{name}{tmp_path}")
        assert found.name == "ImageNet-1K" and found.train_scale == (0.2, 1.0)
        assert list(found.test.classes) == WNIDS
        assert found.test.labels == list(range(1000))

    @pytest.mark.parametrize("name", ["", "imagenet:"])
    def test_imagenet__kaggle(self, tmp_path: Path, name: str) -> None:
        write_kaggle(tmp_path)
        found = find_classification_set(f"{name}{tmp_path}")
        assert found.name == "ImageNet-1K" and found.train_scale == (0.2, 1.0)
        assert list(found.train.classes) == list(found.test.classes) == WNIDS
        assert found.train.names[7] == "n00000007/n00000007_1.JPEG"
        # In the order of classes, so a limit takes of every class.
        assert found.test.labels == list(range(1000))
        assert found.test.names[0] == "ILSVRC2012_val_00000999.JPEG"
        assert (found.test.root / found.test.names[0]).is_file()

    @pytest.mark.parametrize("name", ["", "pets:"])
    def test_pets(self, tmp_path: Path, name: str) -> None:
        write_pets(tmp_path)
        found = find_classification_set(f"{name}{tmp_path}")
        assert found.name == "Oxford-IIIT Pet" and found.train_scale == (0.5, 1.0)
        assert len(found.train) == 111 and len(found.test) == 37
        assert len(found.test.classes) == 37
        assert found.train.names[:2] == ["Cat_breed_00_1.jpg", "Cat_breed_00_10.jpg"]
        assert found.test.labels == list(range(37))
        assert found.test.classes[36] == "dog_breed_36"

    @pytest.mark.parametrize("name", ["", "food101:"])
    @pytest.mark.parametrize("as_json", [False, True])
    def test_food(self, tmp_path: Path, name: str, as_json: bool) -> None:
        write_food(tmp_path, as_json)
        found = find_classification_set(f"{name}{tmp_path}")
        assert found.name == "Food-101" and found.train_scale == (0.5, 1.0)
        assert found.train.labels == [i for i in range(101) for _ in range(3)]
        assert found.test.names[100] == "food_100/8.jpg"
        assert list(found.test.classes) == FOODS

    @pytest.mark.parametrize("name", ["", "glas:"])
    def test_glas(self, tmp_path: Path, name: str) -> None:
        write_glas(tmp_path)
        found = find_classification_set(f"{name}{tmp_path}")
        assert found.name == "GlaS" and found.test.classes == ("benign", "malignant")
        assert found.train.labels == [0] * 29 + [1] * 56
        assert found.test.labels == [0] * 26 + [1] * 54
        assert not any("anno" in name for name in found.test.names)
        assert {n.split("_")[0] for n in found.test.names} == {"testA", "testB"}

    @pytest.mark.parametrize(
        ("train", "val", "name", "shown"),
        [
            ("data_256", "val_256", "places365", "Places365"),
            ("data_256_standard", "val_256", "places365", "Places365"),
            ("data_large", "val_large", "places365-large", "Places365 (large)"),
        ],
    )
    def test_places__lists(
        self, tmp_path: Path, train: str, val: str, name: str, shown: str
    ) -> None:
        write_places(tmp_path, train, val)
        forced = find_classification_set(f"{name}:{tmp_path}")
        assert find_classification_set(str(tmp_path)) == forced
        assert forced.name == shown and forced.train_scale == (0.5, 1.0)
        assert forced.train.root == tmp_path / train
        assert len(forced.train) == 730 and forced.train.classes[0] == "a/scene0"
        assert forced.train.names[0] == "a/scene0/00000001.jpg"
        first = forced.test.names[forced.test.classes.index("a/scene0")]
        assert first == "Places365_val_00000364.jpg"

    def test_places__image_folders(self, tmp_path: Path) -> None:
        names = [f"{p}/scene{i}/1.jpg" for p in ("train", "val") for i in range(365)]
        touch(tmp_path, names)
        found = find_classification_set(f"places365:{tmp_path}")
        assert found.name == "Places365" and len(found.test) == 365

    @pytest.mark.parametrize(
        ("name", "write", "folder"),
        [
            ("glas", write_glas, "data/glas"),
            ("food101", write_food, "data/food101/food-101"),
            ("pets", write_pets, "data/pets/oxford-iiit-pet"),
        ],
    )
    def test_name(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        write: Callable[[Path], None],
        folder: str,
    ) -> None:
        write(tmp_path / folder)
        monkeypatch.chdir(tmp_path)
        assert find_classification_set(name).name == PRESETS[name].name

    def test_name__below_the_home_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Shells leave the "~" of glas:~/sets alone.
        write_glas(tmp_path / "sets")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(find_classification_set("glas:~/sets").test) == 80

    def test_limit__of_every_class(self, tmp_path: Path) -> None:
        write_food(tmp_path)
        labels = find_classification_set(str(tmp_path)).train.limited(101).labels
        assert labels == list(range(101))


class TestErrors:
    def test_no_folder(self, tmp_path: Path) -> None:
        pattern = r"no folder '.*/nowhere'\.\nGive a folder, or NAME.*\nNames: imagenet"
        with pytest.raises(FileNotFoundError, match=pattern.replace(r"\n", r"\s")):
            find_classification_set(str(tmp_path / "nowhere"))

    @pytest.mark.parametrize("name", PRESETS)
    def test_no_folder__shows_the_layout(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"'data/{name}' for ") as error:
            find_classification_set(name)
        assert all(
            f"  {line}\n" in str(error.value) for line in PRESETS[name].tree.split("\n")
        )

    @pytest.mark.parametrize("name", PRESETS)
    def test_preset__empty_folder(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(FileNotFoundError, match="is expected as\n") as error:
            find_classification_set(f"{name}:{tmp_path}")
        assert PRESETS[name].tree.split("\n")[-1] in str(error.value)

    def test_unknown_layout(self, tmp_path: Path) -> None:
        write_classes(tmp_path, ("training", "val"), num=1)
        pattern = r"no folders 'train' and 'val' in .*train/CLASS.*known: imagenet"
        with pytest.raises(FileNotFoundError, match=pattern):
            find_classification_set(str(tmp_path))

    def test_empty_class(self, tmp_path: Path) -> None:
        write_classes(tmp_path, num=1)
        (tmp_path / "val" / "fox").mkdir()
        with pytest.raises(ValueError, match=r"1 of 4 classes have no .*val': fox"):
            find_classification_set(str(tmp_path))

    def test_image_without_class(self, tmp_path: Path) -> None:
        write_classes(tmp_path, num=1)
        write_images(tmp_path / "val", 1)
        with pytest.raises(ValueError, match=r"val/0000.png' has no class"):
            find_classification_set(str(tmp_path))

    def test_other_classes(self, tmp_path: Path) -> None:
        write_classes(tmp_path, ("train",), ("cat", "dog", "eel"), num=1)
        write_classes(tmp_path, ("val",), ("cat", "fox"), num=1)
        pattern = r"2 only in training \(dog, eel\), 1 only in test \(fox\)"
        with pytest.raises(ValueError, match=pattern):
            find_classification_set(str(tmp_path))

    def test_other_number_of_classes(self, tmp_path: Path) -> None:
        write_classes(tmp_path, num=1)
        pattern = r"ImageNet-1K has 1000 classes, .* has 3: give a part of it as a fold"
        with pytest.raises(ValueError, match=pattern):
            find_classification_set(f"imagenet:{tmp_path}")

    @pytest.mark.parametrize(
        ("write", "lost", "source"),
        [
            (write_kaggle, "ILSVRC/Data/CLS-LOC/val/*0[0-4].JPEG", "LOC_val_sol"),
            (write_pets, "images/*_0[0-4]_3.jpg", r"annotations/test\.txt"),
            (write_food, "images/food_00[0-4]/5.jpg", r"meta/train\.txt"),
            (write_glas, "train_[1-5].bmp", r"Grade\.csv"),
            (write_places, "val_256/*36[0-4].jpg", r"places365_val\.txt"),
        ],
    )
    def test_listed_file_is_missing(
        self, tmp_path: Path, write: Callable[[Path], None], lost: str, source: str
    ) -> None:
        write(tmp_path)
        paths = sorted(tmp_path.glob(lost))
        for path in paths:
            path.unlink()
        pattern = rf"{len(paths)} of \d+ images that '.*{source}.*' lists are not in"
        with pytest.raises(FileNotFoundError, match=pattern) as error:
            find_classification_set(str(tmp_path))
        named = ["/".join(path.parts[-2:]) for path in paths]
        if write is not write_food:  # the only one of these with images in folders
            named = [path.name for path in paths]
        assert sum(name in str(error.value) for name in named) == 3

    @pytest.mark.parametrize(
        ("name", "write", "file"),
        [
            ("imagenet", write_kaggle, "LOC_val_solution.csv"),
            ("pets", write_pets, "annotations/test.txt"),
            ("food101", write_food, "meta/test.txt"),
            ("places365", write_places, "categories_places365.txt"),
        ],
    )
    def test_list_is_missing(
        self, tmp_path: Path, name: str, write: Callable[[Path], None], file: str
    ) -> None:
        write(tmp_path)
        (tmp_path / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"no file '{tmp_path}/{file}'"):
            find_classification_set(f"{name}:{tmp_path}")

    def test_bad_grade(self, tmp_path: Path) -> None:
        write_glas(tmp_path)
        path = tmp_path / "Grade.csv"
        path.write_text(path.read_text().replace("2, 1, malignant", "2, 1, unclear"))
        with pytest.raises(ValueError, match="'train_2' the grade 'unclear', which is"):
            find_classification_set(str(tmp_path))

    def test_glas__unknown_part(self, tmp_path: Path) -> None:
        write_glas(tmp_path)
        with (tmp_path / "Grade.csv").open("a") as file:
            file.write("valid_1, 9, benign, adenomatous\n")
        with pytest.raises(ValueError, match="lists 'valid_1', which is none of"):
            find_classification_set(str(tmp_path))

    def test_wrong_csv(self, tmp_path: Path) -> None:
        write_text(tmp_path / "Grade.csv", ["image;grade", "train_1;benign"])
        pattern = r"columns name, grade \(GlaS\); it has image;grade"
        with pytest.raises(ValueError, match=pattern):
            find_classification_set(str(tmp_path))

    def test_wrong_list(self, tmp_path: Path) -> None:
        write_pets(tmp_path)
        write_text(tmp_path / "annotations/test.txt", ["Cat_breed_00_3 1"])
        pattern = r"test.txt' should have 4 columns, got 'Cat_breed_00_3 1'"
        with pytest.raises(ValueError, match=pattern):
            find_classification_set(str(tmp_path))

    def test_unknown_class(self, tmp_path: Path) -> None:
        write_places(tmp_path)
        path = tmp_path / "places365_val.txt"
        path.write_text(path.read_text().replace("0000.jpg 364", "0000.jpg 365"))
        pattern = "'Places365_val_00000000.jpg' the class '365', which is not among the"
        with pytest.raises(ValueError, match=pattern):
            find_classification_set(str(tmp_path))


class TestFindImages:
    def test_folder__to_any_depth(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_images(tmp_path / "photos/a/b", 2)
        write_images(tmp_path / "photos", 1)
        name, files = find_images(str(tmp_path / "photos"))
        assert name == "photos" and files.labels is None
        assert files.names == ["0000.png", "a/b/0000.png", "a/b/0001.png"]
        monkeypatch.chdir(tmp_path / "photos")
        assert find_images(".")[0] == "photos"

    def test_preset(self, tmp_path: Path) -> None:
        write_glas(tmp_path)
        name, files = find_images(f"glas:{tmp_path}")
        assert name == "GlaS" and len(files) == 80 and files.labels is None
        assert len(find_images(f"glas:{tmp_path}", "train")[1]) == 85

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            find_images(str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="no image below"):
            find_images(str(tmp_path))


class TestFindLabelledImages:
    def test_folder_of_classes(self, tmp_path: Path) -> None:
        touch(tmp_path / "photos", ["dog/1.png", "cat/1.png", "cat/0.png"])
        name, files = find_labelled_images(str(tmp_path / "photos"))
        assert name == "photos" and files.classes == ("cat", "dog")
        assert files.names == ["cat/0.png", "cat/1.png", "dog/1.png"]
        assert files.labels == [0, 0, 1]
        assert find_labelled_images(str(tmp_path / "photos"), 2)[1].labels == [0, 0]

    def test_part_of_a_set(self, tmp_path: Path) -> None:
        root = write_classes(tmp_path / "photos", num=1)
        for data in (root, root / "val"):
            name, files = find_labelled_images(str(data))
            assert name == "photos (val)" and files.root == root / "val"
        write_glas(tmp_path / "glas")
        for named in (f"glas:{tmp_path / 'glas'}", str(tmp_path / "glas")):
            name, files = find_labelled_images(named)
            assert name == "GlaS (test)" and len(files) == 80

    def test_no_classes(self, tmp_path: Path) -> None:
        touch(tmp_path, ["0.png", "cat/0.png"])
        with pytest.raises(ValueError, match=r"0.png' has no class"):
            find_labelled_images(str(tmp_path))


def test_classes_that_differ_in_normalisation_alone(tmp_path: Path) -> None:
    write_classes(tmp_path, ["train"], ["caf\u00e9", "tea"], num=1)
    write_classes(tmp_path, ["val"], ["cafe\u0301", "tea"], num=1)
    with pytest.raises(ValueError, match=r"1 only in training.*Unicode normalisation"):
        find_classification_set(str(tmp_path))
