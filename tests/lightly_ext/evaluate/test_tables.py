"""Images in tars, parquet and arrow files give what the same ones in a folder give."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightly_ext.data.streams import ImageTable, open_shards
from lightly_ext.evaluate import fingerprints
from lightly_ext.evaluate.annotations import find_boxes
from lightly_ext.evaluate.classification.knn import run_knn
from lightly_ext.evaluate.classification.linear import run_linear
from lightly_ext.evaluate.datasets import (
    find_classification_set,
    find_images,
    find_labelled_images,
)
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.fingerprints import content_hashes
from lightly_ext.evaluate.images import EvaluationImages
from lightly_ext.evaluate.masks import find_masks
from lightly_ext.evaluate.pictures.visualize import check_visualize
from lightly_ext.evaluate.presets import PRESETS, class_folders
from lightly_ext.evaluate.probing.rank import _test_images
from lightly_ext.evaluate.reconstruction.reconstruction import _training_set
from lightly_ext.evaluate.results import Results
from tests.lightly_ext.data.streams.shard_files import (
    image_table,
    write_arrow,
    write_tar,
)
from tests.lightly_ext.evaluate.small import (
    SIZES,
    make_given,
    write_images,
    write_model,
)

CLASSES = ("cat", "dog", "eel")
NUM = {"train": 8, "val": 7}  # of each class


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as folder, tars, parquet, and as `save_to_disk` writes them."""
    root = tmp_path_factory.mktemp("sets")
    for seed, (part, name) in enumerate((p, c) for p in NUM for c in CLASSES):
        write_images(root / "folder" / part / name, NUM[part], seed=seed)
        # Turned by its metadata.
        path = root / "folder" / part / name / "0001.jpg"
        exif = Image.Exif()
        exif[274] = 6
        image = Image.open(path.with_suffix(".png"))
        path.with_suffix(".png").unlink()
        image.save(path, exif=exif, quality=90)
    (root / "folder/val/dog/0003.png").write_bytes(b"no image")
    for part in NUM:
        write_part(root, part)
    (root / "saved/dataset_dict.json").write_text('{"splits": ["train", "val"]}')
    return root


def write_part(root: Path, part: str) -> None:
    names = class_folders(root / "folder" / part).names[::-1]
    images = [(root / "folder" / part / name).read_bytes() for name in names]
    files = dict(zip(names, images, strict=True))
    for shard in range(2):  # in no order
        some = {name: files[name] for name in names[shard::2]}
        write_tar(root / "tars" / f"{part}-{shard}.tar", some)
    from pyarrow import parquet

    labels = {"label": [CLASSES.index(name.split("/")[0]) for name in names]}
    noted = {"label": {"_type": "ClassLabel", "names": CLASSES}}
    (root / "parquet").mkdir(exist_ok=True)
    path = root / "parquet" / f"{part}-00000-of-00001.parquet"
    parquet.write_table(image_table(images, names, noted, **labels), path)
    folder = root / "saved" / part
    write_arrow(folder / "data.arrow", images, paths=names, noted=noted, **labels)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')


@pytest.fixture(autouse=True)
def datasets_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(accelerator="cpu", num_workers=0)


PLACES = ("tars", "parquet", "saved")


class TestScores:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return write_model(tmp_path_factory.mktemp("model"))

    def scores(self, root: Path, place: str, model: str, output: Path) -> list[Any]:
        given = make_given(output, model, **SIZES)
        data = str(root / place)
        options = {"epochs": 2, "lrs": [1e-3, 1e-2], "batch_sizes": [6]}
        results = (
            run_knn(*given, data, neighbours=3),
            run_linear(*given, data, **options),
        )
        same = ("unreadable", "num_reused", "lr", "batch_size")
        told = [{k: r.provenance.get(k) for k in same} for r in results]
        inputs = [dict(r.identity["inputs"]) for r in results]
        guesses = [p.read_text() for p in sorted(output.glob("out/*/guesses.csv"))]
        return [[dict(r.scores) for r in results], told, inputs, guesses]

    def test_scores__as_of_the_folder(
        self, root: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected = self.scores(root, "folder", model, tmp_path / "folder")
        assert 0 < expected[0][0]["accuracy"] < 1
        assert expected[1][0]["unreadable"] == {"train": 0, "test": 1}
        for place in PLACES:
            capsys.readouterr()
            assert self.scores(root, place, model, tmp_path / place) == expected, place
            said = capsys.readouterr().out
            shard = {"tars": "val-0.tar/", "parquet": "", "saved": "val/"}[place]
            path = f"{root}/{place}/{shard}dog/0003.png"
            assert f"1 of 21 images is unreadable ({path})" in said
        # Features are those of the folder, whose cache has them.
        given = make_given(tmp_path / "folder", model, **SIZES)
        result = run_knn(*given, str(root / "tars"), neighbours=3)
        assert result.provenance["num_reused"] == 44


class TestImageFiles:
    @pytest.mark.parametrize("place", PLACES)
    def test_images__as_files(self, place: str, root: Path) -> None:
        for part in NUM:
            expected = find_images(str(root / "folder" / part))[1]
            found = find_images(f"{root}/{place}/{part}*")[1]
            assert found.names == expected.names
            assert found.limited(5).names == expected.limited(5).names
            images = EvaluationImages(found, identity)
            folder = EvaluationImages(expected, identity)
            for ours, theirs in zip(images, folder, strict=True):
                assert all(map(torch.equal, tensors(ours), tensors(theirs)))
            chosen = EvaluationImages(found[[4, 2]], identity)[0]
            assert torch.equal(chosen.image, images[4].image)

    def test_hashes__read_once_until_a_tar_is_replaced(
        self, devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
        path, cache = tmp_path / "x.tar", tmp_path / "cache"

        reads, read = [], ImageTable.read

        def counted(table: ImageTable, index: int) -> bytes | Path:
            reads.append(index)
            return read(table, index)

        def hashes() -> list[str]:
            open_shards.cache_clear()
            files = find_images(str(path))[1]
            return content_hashes(devices, cache, files).astype(str).tolist()

        monkeypatch.setattr(ImageTable, "read", counted)
        for contents, num_reads in (("ab", 2), ("xb", 4)):
            stat = path.stat() if path.exists() else None
            images = {f"{i}.png": c.encode() for i, c in enumerate(contents)}
            write_tar(tmp_path / "other.tar", images)
            if stat:  # another tar of the same size and time of change
                os.utime(
                    tmp_path / "other.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns)
                )
                assert (tmp_path / "other.tar").stat().st_size == stat.st_size
            (tmp_path / "other.tar").replace(path)
            for _ in range(2):
                assert hashes() == [sha256(c.encode()).hexdigest() for c in contents]
                assert len(reads) == num_reads


class TestFind:
    def test_classes_and_names(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(root))
        expected = find_classification_set(str(root / "folder"))
        for place in PLACES:
            found = find_classification_set(str(root / place))
            assert found.name == place
            for ours, theirs in (
                (found.train, expected.train),
                (found.test, expected.test),
            ):
                assert ours.classes == theirs.classes == CLASSES
                assert ours.labels == theirs.labels
                assert ours.names == theirs.names
            name, files = find_labelled_images(str(root / place))
            assert name == f"{place} (val)"
            assert files.labels == expected.test.labels
            assert find_images(str(root / place), "train")[0] == f"{place} (train)"
        found = find_classification_set(f"hf:{root}/parquet")
        assert (found.name, found.test.labels) == ("parquet", expected.test.labels)
        assert find_images(f"hf:{root}/parquet:train")[0] == "parquet (train)"
        for place in (root, "~"):
            assert find_images(f"{place}/tars/*.tar")[0] == "tars/*.tar"
        assert find_images("~/folder/val")[0] == "val"
        assert len(find_images(f"{root}/tars/*.tar")[1]) == 45
        assert len(find_images(f"{root}/tars/val-1.tar")[1]) == 10

    def test_named_set(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"GlaS has 2 classes, '.*/tars' has 3"):
            find_classification_set(f"glas:{root}/tars")
        monkeypatch.setitem(PRESETS, "glas", replace(PRESETS["glas"], num_classes=3))
        found = find_classification_set(f"glas:{root}/tars")
        assert (found.name, len(found.train), len(found.test)) == ("GlaS", 24, 21)
        assert find_images(f"glas:{root}/tars/*.tar")[0] == "GlaS"

    def test_parts__missing_and_different(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "train-0.tar", {"a/0.png": b"", "b/1.png": b""})
        pattern = r"has no split by name\. Expected is a split train, .* val-0000\.tar"
        with pytest.raises(FileNotFoundError, match=pattern):
            find_classification_set(str(tmp_path))
        write_tar(tmp_path / "test-0.tar", {"a/0.png": b"", "c/1.png": b""})
        with pytest.raises(
            ValueError, match=r"1 only in training \(b\), 1 only in test"
        ):
            find_classification_set(str(tmp_path))
        write_tar(tmp_path / "extra" / "train-0.tar", {"0.png": b""})
        write_tar(tmp_path / "extra" / "dev-0.tar", {"0.png": b""})
        with pytest.raises(ValueError, match=r"train-0.tar/0.png has no class, got ''"):
            find_classification_set(str(tmp_path / "extra"))

    def test_no_files(self, root: Path) -> None:
        files = find_images(f"{root}/tars/val*")[1]
        with pytest.raises(ValueError, match=r"Annotations name .* none: unpack them"):
            find_boxes(files, "boxes.csv")

    def test_masks__by_the_names_in_a_tar(self, root: Path, tmp_path: Path) -> None:
        files = find_images(f"{root}/tars/val*")[1]
        for name in files.names:
            path = (tmp_path / name).with_suffix(".png")
            path.parent.mkdir(exist_ok=True)
            size = (40, 36) if name.endswith("1.jpg") else (36, 40)
            Image.new("L", size).save(path)
        assert find_masks(files, str(tmp_path))[1] == tmp_path / "cat" / "0001.png"
        Image.new("L", (36, 40)).save(tmp_path / "cat" / "0001.png")
        with pytest.raises(ValueError, match=r"cat/0001.png' is 36 x 40 px, its image"):
            find_masks(files, str(tmp_path))

    def test_training_images_that_are_scored(self, root: Path) -> None:
        scored = find_images(f"{root}/tars/*-0.tar")[1]
        with pytest.raises(ValueError, match=r"23 images .* '.*/train-0\.tar/"):
            _training_set(f"{root}/tars/{{train,val}}-0.tar", scored, None)
        assert _training_set(f"{root}/tars/val-1.tar", scored, None) is not None

    def test_images_of_other_tasks(self, root: Path) -> None:
        data = str(root / "tars")
        classes = find_classification_set(data)
        name, files = find_images(_test_images(data, classes))
        assert (name, sorted(files.names)) == ("tars (val)", sorted(classes.test.names))
        given = Devices(accelerator="cpu", num_workers=0)
        results = Results(given, str(root / "out"))
        name, files = check_visualize(results, f"{data}/val-0.tar", 3, False, None)
        assert (name, len(files)) == ("tars/val-0.tar", 3)


def identity(image: torch.Tensor) -> torch.Tensor:
    return image


def tensors(sample: Sequence[Any]) -> list[torch.Tensor]:
    return list(map(torch.as_tensor, sample))
