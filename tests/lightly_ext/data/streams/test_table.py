from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from lightly_ext.data import (
    ImageFolderDataset,
    SingleViewTransform,
    StellarDataModule,
    read_image,
)
from lightly_ext.data.streams import (
    LabelledStreamDataset,
    find_source,
    find_splits,
    open_shards,
    shards,
)
from lightly_ext.data.streams.table import ImageTable
from lightly_ext.transforms import STELLARTransform
from tests.lightly_ext.data.streams.shard_files import (
    encoded_images,
    image_table,
    write_arrow,
    write_parquet,
    write_table,
    write_tar,
)

IMAGES = encoded_images(5)


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def table(place: Path | str) -> ImageTable:
    open_shards.cache_clear()  # files are rewritten
    source = find_source(place)
    assert source is not None
    return ImageTable(source)


def write_samples(path: Path, **files: list[object]) -> Path:
    """A tar of samples; files by their suffixes, None for those that are missing."""
    written = {}
    for number, image in enumerate(IMAGES):
        written[f"{number:03}.png"] = image
        for suffix, values in files.items():
            value = values[number]
            data = value if isinstance(value, str) else json.dumps(value)
            if value is not None:
                written[f"{number:03}.{suffix}"] = data.encode()
    return write_tar(path, written)


class TestImageTable:
    def test_read__tars_without_unpacking(self, tmp_path: Path) -> None:
        first = {"./b/1.png": IMAGES[0], "./a/2.x.PNG": IMAGES[1], "./a/2.txt": b"x"}
        write_tar(tmp_path / "0.tar", first)
        write_tar(tmp_path / "1.tar", {"c/0.png": IMAGES[2]})
        found = table(tmp_path)
        assert found.names == ["b/1.png", "a/2.x.PNG", "c/0.png"]
        assert [found.read(i) for i in range(len(found))] == IMAGES[:3]
        assert found.shown(2) == f"{tmp_path}/1.tar/c/0.png"
        assert found.files == [tmp_path / "0.tar", tmp_path / "1.tar"]

    def test_names__the_same_ones_in_several_tars(self, tmp_path: Path) -> None:
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar", {"0.png": IMAGES[number]})
        found = table(tmp_path)
        assert found.names == ["0.tar/0.png", "1.tar/0.png"]
        assert found.shown(1) == f"{tmp_path}/1.tar/0.png"

    def test_init__headers_of_a_tar_are_read_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = Mock(wraps=shards._open_tar)
        monkeypatch.setattr(shards, "_open_tar", opened)
        path = write_samples(tmp_path / "x.tar", cls=[1, 0, 1, 1, 0])
        found = table(path)
        assert found.labels().numbers == [1, 0, 1, 1, 0]
        assert found.names[-1] == "004.png"
        opened.assert_called_once_with(str(path))

    def test_names__of_tables(self, tmp_path: Path) -> None:
        found = table(write_arrow(tmp_path / "x.arrow", IMAGES * 3))
        assert found.names[:2] + found.names[-1:] == ["00", "01", "14"]
        assert found.read(14) == IMAGES[4]
        assert found.shown(14) == f"{tmp_path}/x.arrow/14"
        paths = [f"/photos/{c}/{i}.png" for i, c in enumerate("abcab")]
        found = table(write_arrow(tmp_path / "y.arrow", IMAGES, paths=paths))
        assert found.names == ["a/0.png", "b/1.png", "c/2.png", "a/3.png", "b/4.png"]

    def test_read__parquet_as_it_is_now(
        self, tmp_path: Path, datasets_cache: Path
    ) -> None:
        path = write_parquet(tmp_path / "x.parquet", IMAGES)
        found = table(path)
        assert [found.read(i) for i in range(5)] == IMAGES
        assert all(file.is_relative_to(datasets_cache) for file in found.files)
        assert table(path).files == found.files
        stat = path.stat()
        write_parquet(path, IMAGES[::-1])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert [table(path).read(i) for i in range(5)] == IMAGES[::-1]


class TestLabels:
    @pytest.mark.parametrize(
        ("files", "classes", "numbers"),
        [
            ({"cls": [1, 0, 10, 1, 0]}, "0 1 10", [1, 0, 2, 1, 0]),
            (
                {"cls": ["eel\n", "cat", "cat", "eel", "dog"]},
                "cat dog eel",
                [2, 0, 0, 2, 1],
            ),
            (
                {"json": [{"label": i % 2, "width": 9} for i in range(5)]},
                "0 1",
                [0, 1, 0, 1, 0],
            ),
            # Files of classes go first.
            ({"cls": [7] * 5, "json": [{"label": i} for i in range(5)]}, "7", [0] * 5),
        ],
    )
    def test_labels__beside_images(
        self, files: dict, classes: str, numbers: list[int], tmp_path: Path
    ) -> None:
        found = table(write_samples(tmp_path / "x.tar", **files)).labels()
        assert found == (numbers, tuple(classes.split()))

    def test_labels__two_of_one_name(self, tmp_path: Path) -> None:
        files = {"1.png": IMAGES[0], "1.cls": b"1", "1.CLS": b"2"}
        found = table(write_tar(tmp_path / "x.tar", files))
        with pytest.raises(ValueError, match=r"x.tar has 1.CLS more than once, with"):
            found.labels()

    def test_labels__in_folders(self, tmp_path: Path) -> None:
        files = dict(zip(("./b/0.png", "./a/z/1.png"), IMAGES, strict=False))
        found = table(write_tar(tmp_path / "x.tar", files)).labels()
        assert found == ([1, 0], ("a", "b"))

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, r"x.tar/000.png has no class, got '': expected .*\.cls beside"),
            ({"cls": [0, 1, None, 1, 0]}, r"x.tar/002.png has no class, got None"),
            ({"cls": [0, -1, -1, 1, 0]}, r"x.tar/001.png has no class, got '-1'"),
            ({"json": [{"label": [1]}] * 5}, r"x.tar/000.png has no class, got \[1\]"),
            ({"json": [{"label": 1, "class": 2}] * 5}, "may be in label, class of"),
        ],
    )
    def test_labels__errors(self, files: dict, message: str, tmp_path: Path) -> None:
        found = table(write_samples(tmp_path / "x.tar", **files))
        with pytest.raises(ValueError, match=message):
            found.labels()

    @pytest.mark.parametrize(
        ("columns", "noted", "classes", "numbers"),
        [
            ({"cls": [3, 3, 5, 5, 3]}, {}, "3 5", [0, 0, 1, 1, 0]),
            (
                {"id": list("abcde"), "target": list("yxxyy")},
                {},
                "x y",
                [1, 0, 0, 1, 1],
            ),
            # The type goes first, and `label` among equals.
            (
                {"class": [0, 1, 2, 1, 0], "label": [9] * 5},
                {"class": "b c a"},
                "a b c",
                [1, 2, 0, 2, 1],
            ),
            ({"cls": [0] * 5, "label": [1, 0, 1, 0, 1]}, {}, "0 1", [1, 0, 1, 0, 1]),
        ],
    )
    def test_labels__in_columns(
        self,
        columns: dict,
        noted: dict,
        classes: str,
        numbers: list[int],
        tmp_path: Path,
    ) -> None:
        features = {
            name: {"_type": "ClassLabel", "names": names.split()}
            for name, names in noted.items()
        }
        path = tmp_path / "x.arrow"
        found = table(write_arrow(path, IMAGES, noted=features, **columns)).labels()
        assert found == (numbers, tuple(classes.split()))

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"kind": [1] * 5}, "no column of classes: .* There are: image, kind"),
            (
                {"cls": [1] * 5, "target": [1] * 5},
                "more than one .*: cls, target. Name",
            ),
            ({"label": [1, 1, -1, 1, 1]}, "x.arrow/2 has no class, got -1"),
            ({"label": [1, 1, 1, None, 1]}, "x.arrow/3 has no class, got None"),
            ({"label": [0.5] * 5}, "no column of classes"),
        ],
    )
    def test_labels__errors_of_columns(
        self, columns: dict, message: str, tmp_path: Path
    ) -> None:
        found = table(write_arrow(tmp_path / "x.arrow", IMAGES, **columns))
        with pytest.raises(ValueError, match=message):
            found.labels()

    @pytest.mark.parametrize("kind", ["arrow", "parquet"])
    @pytest.mark.parametrize("names", [["a", "b"], None])
    def test_labels__numbers_of_other_names_in_another_file(
        self, kind: str, names: list[str] | None, tmp_path: Path, datasets_cache: Path
    ) -> None:
        for number, classes in enumerate((["b", "a"], names)):
            note = {"_type": "ClassLabel", "names": classes}
            noted = {"label": note} if classes else {}
            path = tmp_path / f"{number}.{kind}"
            rows = image_table(IMAGES, noted=noted, label=[0, 1, 0, 1, 0])
            write_table(path, rows)
        found = table(tmp_path)
        if kind == "arrow" and names:  # each is read by its own
            assert found.labels().numbers == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
            return
        with pytest.raises(ValueError, match=rf"0\.{kind} .*and .*1\.{kind} do"):
            found.labels()


class TestFindSplits:
    @pytest.mark.parametrize(
        "names",
        [
            ["train-000.tar", "train-001.tar", "val-000.tar"],
            ["train/0.tar", "train/1.tar", "val/0.tar"],
            [
                "data/imagenet_train_0.tar",
                "data/imagenet_train_1.tar",
                "data/x-val-0.tar",
            ],
            [
                "train-00000-of-00002.parquet",
                "train-00001-of-00002.parquet",
                "val-1.parquet",
            ],
        ],
    )
    def test_find_splits__of_files(self, names: list[str], tmp_path: Path) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        kind = Path(names[0]).suffix
        for place in (tmp_path, f"{tmp_path}/**/*{kind}"):
            found = find_splits(place)
            assert found is not None
            files = {name: list(source.files) for name, source in found.items()}
            paths = [str(tmp_path / name) for name in names]
            assert files == {"train": paths[:2], "val": paths[2:]}

    def test_find_splits__one_and_none(self, tmp_path: Path) -> None:
        for name in ("valley-0.tar", "train/1.tar"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        found = find_splits(tmp_path)
        assert found is not None
        assert [(name, len(part.files)) for name, part in found.items()] == [("", 2)]
        (tmp_path / "test-0.tar").touch()
        with pytest.raises(
            ValueError, match=r"test, train, and files of none: .*valley"
        ):
            find_splits(tmp_path)
        (tmp_path / "x.png").touch()
        assert find_splits(tmp_path) is None
        assert find_splits(tmp_path / "gone") is None

    def test_find_splits__of_datasets(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict({"x": [1]})
        saved = datasets.DatasetDict({"train": rows, "validation": rows})
        saved.save_to_disk(tmp_path / "saved")
        rows.to_parquet(tmp_path / "hub" / "train-0.parquet")
        rows.to_parquet(tmp_path / "hub" / "test-0.parquet")
        for text, splits in (
            (f"{tmp_path}/saved", ["train", "validation"]),
            (f"hf:{tmp_path}/saved", ["train", "validation"]),
            (f"hf:{tmp_path}/hub", ["train", "test"]),
            (f"hf:{tmp_path}/hub:test", ["test"]),
            (f"hf:{tmp_path}/hub:default", ["train", "test"]),
            (f"hf:{tmp_path}/hub:default:test", ["test"]),
        ):
            found = find_splits(text)
            assert found is not None
            assert list(found) == splits
            assert all(len(source.files) == 1 for source in found.values())
        for text, message in (
            (f"hf:{tmp_path}/hub:val", r"no split val. There are: test, train\."),
            (
                f"hf:{tmp_path}/saved:val",
                r"no split val. There are: train, validation\.",
            ),
            (f"hf:{tmp_path}/hub:default:val", "no split val"),
            ("hf:", "should be hf:NAME"),
        ):
            with pytest.raises(ValueError, match=message):
                find_splits(text)


class TestLabelledStreamDataset:
    def test_samples__as_of_a_folder(self, tmp_path: Path) -> None:
        names = ("b/1.png", "a/2.png", "b/0.png", "a/10.png", "c/0.png")
        contents = [b"broken", *IMAGES[1:]]
        write_tar(tmp_path / "x.tar", dict(zip(names, contents, strict=True)))
        for name, data in zip(names, contents, strict=True):
            (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(data)
        folder = ImageFolderDataset(tmp_path / "folder", labelled=True)
        source = find_source(tmp_path / "x.tar")
        assert source is not None
        dataset = LabelledStreamDataset(source)
        assert dataset.classes == folder.classes
        assert dataset.labels.tolist() == folder.labels.tolist() == [0, 0, 1, 1, 2]
        assert dataset.file(3) == tmp_path / "x.tar" / "b/1.png"
        with pytest.warns(UserWarning, match=r"unreadable image .*x.tar/b/1\.png"):
            found = [dataset[i] for i in range(len(dataset))]
        with pytest.warns(UserWarning, match=r"unreadable image .*folder/b/1\.png"):
            expected = [folder[i] for i in range(len(folder))]
        assert [label for _, label in found] == [label for _, label in expected]
        for (image, _), (other, _) in zip(found, expected, strict=True):
            assert torch.equal(image, other)

    def test_datamodule__online_knn(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        train, val = tmp_path / "train-0.tar", tmp_path / "val-0.arrow"
        files = {f"{'ab'[i % 2]}/{i}.png": IMAGES[i % 5] for i in range(20)}
        write_tar(train, files)
        write_arrow(val, IMAGES, label=list("ababa"))
        small = STELLARTransform(2, 1, global_crop_size=24, local_crop_size=12)
        home = "~/train-0.tar"
        data = StellarDataModule(home, home, "~/val-0.arrow", 4, 0, small)
        data.setup()
        loaders = data.val_dataloader()
        (_, bank), (views, queries) = (
            map(torch.cat, zip(*loader, strict=True)) for loader in loaders
        )
        assert bank.tolist() == [0] * 10 + [1] * 10
        assert queries.tolist() == [0, 0, 0, 1, 1]
        view = SingleViewTransform(24)
        assert torch.equal(views[1], view(read_image(IMAGES[2])))
        write_arrow(val, IMAGES, label=list("abcba"))
        open_shards.cache_clear()
        data = StellarDataModule(str(train), str(train), str(val), 4, 0, small)
        with pytest.raises(ValueError, match=r"only one of them has images of: c"):
            data.setup()
