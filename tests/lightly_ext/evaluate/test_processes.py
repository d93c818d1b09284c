"""Two processes find what one finds: scores, unreadable images, what is cached."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from lightly_ext.data import read_image
from lightly_ext.evaluate.classification.knn import run_knn
from lightly_ext.evaluate.classification.linear import run_linear
from lightly_ext.evaluate.datasets import find_classification_set
from lightly_ext.evaluate.discovery.discover import run_discover
from lightly_ext.evaluate.fingerprints import Contents
from lightly_ext.evaluate.images import ImageFiles, centre_crop
from lightly_ext.evaluate.presets import class_folders
from lightly_ext.evaluate.probing.equivariance import run_equivariance
from lightly_ext.evaluate.probing.stability import run_stability
from lightly_ext.evaluate.probing.where import run_where
from lightly_ext.evaluate.reconstruction.autoencoder import build_autoencoder
from lightly_ext.evaluate.reconstruction.decoder_training import train_decoder
from stellar_plugin.protocols import KNN, RECONSTRUCTION_FINETUNED
from tests import distributed
from tests.lightly_ext.data.streams.shard_files import image_table, write_tar
from tests.lightly_ext.evaluate.small import (
    IMAGE_SIZE,
    SIZES,
    Given,
    make_given,
    write_images,
    write_model,
)

CLASSES = ("cat", "dog", "eel")
NEIGHBOURS, TEMPERATURE = 3, 0.07


class Found(NamedTuple):
    """What two processes found.

    Attributes:
        folder: Where the data are, as they were left.
        source: The model.
        alone: What one process found before that.
        found: By process.
    """

    folder: Path
    source: str
    alone: list[Any]
    found: list[dict[str, Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All that two processes do, as their start takes the most time."""
    folder = tmp_path_factory.mktemp("processes")
    source = write_model(folder / "model")
    whole = _write_classes(folder / "set")
    _write_masks(folder)
    given = _given(folder, source, output=str(folder / "one"))
    alone = [_scores(given, folder / "set") for _ in range(2)]
    (folder / "meet").mkdir()
    work: Callable[..., Any] = partial(_of_process, folder, source, whole)
    found = distributed.run(work, folder / "meet")
    return Found(folder, source, alone, found)


def _write_classes(data: Path) -> dict[Path, bytes]:
    """Writes images, some unreadable, and returns what belongs into two of these."""
    for seed, name in enumerate(f"{p}/{c}" for p in ("train", "val") for c in CLASSES):
        write_images(data / name, 14, seed=seed)  # classes mean nothing
    broken = [data / name for name in ("train/dog/0003.png", "train/eel/0008.png")]
    whole = {path: path.read_bytes() for path in broken}
    for path in (*broken, data / "val/cat/0005.png"):
        path.write_bytes(b"no image")
    return whole


def _write_shards(folder: Path) -> None:
    """Writes the images as tars and as parquet, which `datasets` converts."""
    (folder / "parquet").mkdir()
    for part in ("train", "val"):
        files = class_folders(folder / "set" / part)
        images = [(files.root / name).read_bytes() for name in files.names]
        named = dict(zip(files.names, images, strict=True))
        write_tar(folder / "tars" / f"{part}.tar", named)
        label = [files.classes[i] for i in files.labels or ()]
        table = image_table(images, files.names, label=label)
        parquet.write_table(table, folder / "parquet" / f"{part}-0.parquet")


def _write_masks(folder: Path) -> None:
    """Writes images and masks, an unreadable one among them."""
    data, masks = write_images(folder / "images", 7, size=(64, 70)), folder / "masks"
    rng = np.random.default_rng(0)
    masks.mkdir()
    for path in data.iterdir():
        coarse = rng.integers(3, size=(4, 5), dtype=np.uint8)
        Image.fromarray(coarse).resize((70, 64), 0).save(masks / path.name)
    (data / "broken.png").write_bytes(b"no PNG")
    Image.new("L", (70, 64)).save(masks / "broken.png")
    for i in range(20):  # so that one broken image is not too many
        for part in (data, masks):
            (part / f"copy{i}.png").write_bytes((part / "0000.png").read_bytes())


@pytest.mark.slow
class TestTwoProcesses:
    def test_all_of_them_find_the_same(self, processes: Found) -> None:
        assert processes.found[0] == processes.found[1]

    def test_classification__as_one(self, processes: Found) -> None:
        """Into an empty cache, from the cache, after repairs; and brute force."""
        folder = processes.folder
        given = _given(folder, processes.source, output=str(folder / "one"))
        alone = [*processes.alone, _scores(given, folder / "set")]
        assert processes.found[0]["classification"] == alone
        accuracy = _brute_force(given, folder / "set")
        assert 0 < accuracy < 1
        assert alone[-1]["knn"] == pytest.approx(accuracy)
        assert [found["num_reused"] for found in alone] == [
            [0, 81],
            [81, 81],
            [81, 83],
        ]

    def test_shards__as_one_folder(self, processes: Found) -> None:
        """Read from tars, and from parquet that both want to convert."""
        folder = processes.folder
        given = _given(folder, processes.source, output=str(folder / "one"))
        expected = [_scores(given, folder / "set") for _ in range(2)][-1]
        assert expected["num_reused"] == [83, 83]
        assert processes.found[0]["shards"] == [expected, expected]

    def test_decoder__unreadable_images_of_both(self, processes: Found) -> None:
        assert processes.found[0]["decoder"] == [2, 2]

    def test_probing_experiments__as_one(self, processes: Found) -> None:
        alone = _probing(processes.folder, processes.source, devices=1)
        for ours, expected in zip(processes.found[0]["probing"], alone, strict=True):
            assert ours.keys() == expected.keys()
            assert ours["num_images"] == 27
            for name, value in expected.items():
                assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-12), name


def _given(folder: Path, source: str, **options: Any) -> Given:
    return make_given(folder, source, batch_size=5, **SIZES, **options)


def _scores(given: Given, data: Path) -> dict[str, Any]:
    knn = run_knn(*given, str(data), neighbours=NEIGHBOURS, temperature=TEMPERATURE)
    linear = run_linear(*given, str(data), epochs=2, lrs=[1e-3, 1e-2], batch_sizes=[6])
    found = find_classification_set(str(data))
    return {
        "fingerprint": Contents(given.devices, given.results.cache).fingerprint(
            found.train, found.test
        ),
        "knn": knn.scores["accuracy"],
        "linear": linear.scores["accuracy"],
        "unreadable": [r.provenance["unreadable"] for r in (knn, linear)],
        "num_reused": [r.provenance["num_reused"] for r in (knn, linear)],
    }


def _of_process(
    folder: Path, source: str, whole: dict[Path, bytes], rank: int, world_size: int
) -> dict[str, Any]:
    """What one of several processes finds, started as torchrun does."""
    distributed.say_as_torchrun(rank, world_size)
    output = str(folder / "two")
    given = _given(folder, source, output=output, devices=world_size)
    data = folder / "set"
    classification = [_scores(given, data) for _ in range(2)]
    decoder = _decoders(given, folder)
    given.devices.fabric.barrier()
    if rank == 0:
        for path, content in whole.items():
            path.write_bytes(content)
        _write_shards(folder)
    given.devices.fabric.barrier()
    classification.append(_scores(given, data))
    probing = _probing(folder, source, world_size)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    shards = [_scores(given, folder / kind) for kind in ("tars", "parquet")]
    return {
        "classification": classification,
        "decoder": decoder,
        "probing": probing,
        "shards": shards,
    }


def _probing(folder: Path, source: str, devices: int) -> list[dict[str, Any]]:
    options = {"devices": devices, "resize": 62, "crop": 32, "batch_size": 4}
    given = make_given(folder, source, output=str(folder / "probing"), **options)
    assert given.devices.world_size == devices
    data = str(folder / "images")
    results = [
        run_equivariance(*given, data),
        *run_stability(*given, data),
        run_where(*given, data, str(folder / "masks")),
        run_where(*given, data, str(folder / "masks"), clusters=3),
        run_discover(*given, data, str(folder / "masks")),
    ]
    return [dict(result.scores) for result in results]


def _decoders(given: Given, folder: Path) -> list[int]:
    """Unreadable images of a training, and of one more epoch of it."""
    files = find_classification_set(str(folder / "set")).train
    counts = []
    for epochs in (1, 2):
        protocol = RECONSTRUCTION_FINETUNED.replace(
            **SIZES, batch_sizes=(6,), epochs=epochs
        )
        autoencoder = build_autoencoder(
            given.model, given.devices, True, "lowrank", None, None, IMAGE_SIZE
        )
        place = folder / "decoder"
        counts.append(
            train_decoder(given.devices, autoencoder, files, protocol, place, {})
        )
        given.devices.fabric.barrier()
        (place / "model.safetensors").unlink(missing_ok=True)
        given.devices.fabric.barrier()
    return counts


def _brute_force(given: Given, data: Path) -> float:
    """Accuracy of the neighbours' votes, image by image."""
    found = find_classification_set(str(data))
    (train, labels), (test, truth) = (
        _features(given, files) for files in (found.train, found.test)
    )
    correct = 0
    for feature, label in zip(test, truth, strict=True):
        similarity = train @ feature
        nearest = np.argsort(-similarity, kind="stable")[:NEIGHBOURS]
        votes = np.zeros(3)
        for i in nearest:
            votes[labels[i]] += np.exp(similarity[i] / TEMPERATURE)
        correct += int(votes.argmax()) == label
    return correct / len(test)


def _features(given: Given, files: ImageFiles) -> tuple[Any, list[int]]:
    """Unit vectors of the readable images, and their classes."""
    crop = centre_crop(KNN.replace(**SIZES), given.model.origin.interpolation)
    rows, labels = [], []
    assert files.labels is not None
    for name, label in zip(files.names, files.labels, strict=True):
        try:
            image = read_image(files.root / name)
        except OSError:
            continue
        row = given.model.pooled(crop(image)[None], "sparse")[0].double()
        rows.append(row / row.norm())
        labels.append(label)
    return torch.stack(rows).numpy(), labels
