"""Two processes find what one finds: scores, unreadable images, what is cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightly_ext.data import read_image
from lightly_ext.evaluate.classification.knn import run_knn
from lightly_ext.evaluate.classification.linear import run_linear
from lightly_ext.evaluate.datasets import find_classification_set
from lightly_ext.evaluate.fingerprints import fingerprint
from lightly_ext.evaluate.images import ImageFiles, centre_crop
from lightly_ext.evaluate.reconstruction.autoencoder import build_autoencoder
from lightly_ext.evaluate.reconstruction.decoder_training import train_decoder
from stellar_plugin.protocols import KNN, RECONSTRUCTION_FINETUNED
from tests import distributed
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
EMPTY, CACHED, REPAIRED = range(3)


@pytest.mark.slow
def test_evaluation__two_processes_as_one(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    data = tmp_path / "set"
    for seed, name in enumerate(f"{p}/{c}" for p in ("train", "val") for c in CLASSES):
        write_images(data / name, 14, seed=seed)  # classes mean nothing
    broken = [data / name for name in ("train/dog/0003.png", "train/eel/0008.png")]
    whole = {path: path.read_bytes() for path in broken}
    given = _given(tmp_path, source, output=str(tmp_path / "one"))
    for path in broken:
        path.write_bytes(b"no image")
    (data / "val/cat/0005.png").write_bytes(b"no image")
    alone = [_scores(given, data, EMPTY), _scores(given, data, CACHED)]
    (tmp_path / "meet").mkdir()
    work: Callable[..., Any] = partial(_of_process, tmp_path, source, whole)
    first, second = distributed.run(work, tmp_path / "meet")
    assert first == second
    for path, content in whole.items():
        path.write_bytes(content)
    alone.append(_scores(given, data, REPAIRED))
    assert first["evaluations"] == alone
    assert first["decoder"] == [2, 2]
    accuracy = _brute_force(given, data)
    assert 0 < accuracy < 1 and alone[REPAIRED]["knn"] == pytest.approx(accuracy)


def _given(folder: Path, source: str, **options: Any) -> Given:
    return make_given(folder, source, batch_size=5, **SIZES, **options)


def _scores(given: Given, data: Path, run: int) -> dict[str, Any]:
    knn = run_knn(*given, str(data), neighbours=NEIGHBOURS, temperature=TEMPERATURE)
    linear = run_linear(*given, str(data), epochs=2, lrs=[1e-3, 1e-2], batch_sizes=[6])
    found = find_classification_set(str(data))
    return {
        "run": run,
        "fingerprint": fingerprint(
            given.devices, given.results.cache, found.train, found.test
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
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    names |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="localhost")
    output = str(folder / "two")
    given = _given(folder, source, output=output, devices=world_size)
    data = folder / "set"
    evaluations = [_scores(given, data, EMPTY), _scores(given, data, CACHED)]
    decoder = _decoders(given, folder)
    given.devices.fabric.barrier()
    if rank == 0:
        for path, content in whole.items():
            path.write_bytes(content)
    given.devices.fabric.barrier()
    evaluations.append(_scores(given, data, REPAIRED))
    return {"evaluations": evaluations, "decoder": decoder}


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
