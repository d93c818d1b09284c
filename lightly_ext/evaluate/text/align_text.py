"""Concept alignment with language: frozen features against a frozen text tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightly_ext.evaluate.classification.split import hold_out
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache, check_present
from lightly_ext.evaluate.frozen_model import FrozenModel, check_feature_name
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.text.mmvp import Mmvp
from lightly_ext.evaluate.text.pairs import Pairs, find_pairs
from lightly_ext.evaluate.text.probe import (
    cached_tokens,
    embed_images,
    resolve_tokens,
)
from lightly_ext.evaluate.text.retrieval import Retrieval
from lightly_ext.evaluate.text.tasks import TextTask
from lightly_ext.evaluate.text.tower import (
    TextTower,
    check_text_tower,
    embed_texts,
    load_text_tower,
)
from lightly_ext.evaluate.text.trained import (
    TrainedProbe,
    check_probe_files,
    load_probe,
    train_probe,
)
from lightly_ext.evaluate.text.training import MOST_HELD_OUT
from lightly_ext.evaluate.text.winoground import Winoground
from lightly_ext.evaluate.text.zero_shot import ZeroShot
from lightly_ext.evaluate.training import fitting_batch
from stellar_plugin.protocols import ALIGN_TEXT, AlignTextProtocol

TASK = "align-text"


def check_align_text(
    results: Results,
    data: str | None,
    images: str | None,
    features: str,
    text_model: str,
    text_weights: str | None,
    probe: str | None,
    zero_shot: str | None,
    class_names: str | None,
    retrieval: str | None,
    retrieval_images: str | None,
    winoground: str | None,
    mmvp: str | None,
    epochs: int | None,
    lr: float | None,
    pairs_per_batch: int | None,
) -> tuple[list[TextTask], Pairs | None]:
    """Finds the sets to score and the pairs to train on; see `Results.required`."""
    check_feature_name(features)
    training = {"epochs": epochs, "lr": lr, "pairs_per_batch": pairs_per_batch}
    _check_training(data, probe, training)
    if probe is not None:
        if not any((zero_shot, retrieval, winoground, mmvp)):
            raise ValueError(
                "There is nothing to score: name a set as zero_shot, retrieval, "
                "winoground or mmvp."
            )
        check_probe_files(Path(probe))
    num_pairs = pairs_per_batch or ALIGN_TEXT.batch_sizes[0]
    if num_pairs % results.devices.world_size:
        raise ValueError(
            f"A batch of {num_pairs} pairs cannot be shared by "
            f"{results.devices.world_size} devices: choose another --pairs_per_batch."
        )
    check_text_tower(text_model, text_weights)
    limit = results.limit
    tasks: list[TextTask] = []
    if zero_shot is not None:
        tasks.append(ZeroShot.find(zero_shot, class_names, limit))
    if retrieval is not None:
        tasks.append(Retrieval.find(retrieval, retrieval_images, limit))
    if winoground is not None:
        tasks.append(Winoground.find(winoground, limit))
    if mmvp is not None:
        tasks.append(Mmvp.find(mmvp, limit))
    pairs = None if data is None else find_pairs(data, images).limited(limit)
    for files in [task.files for task in tasks] + ([pairs.files] if pairs else []):
        check_present(files)
    return tasks, pairs


@evaluation
def run_align_text(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str | None = None,
    images: str | None = None,
    features: str = "auto",
    text_model: str = "ViT-B-16",
    text_weights: str | None = "openai",
    probe: str | None = None,
    zero_shot: str | None = None,
    class_names: str | None = None,
    retrieval: str | None = None,
    retrieval_images: str | None = None,
    winoground: str | None = None,
    mmvp: str | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    pairs_per_batch: int | None = None,
) -> list[Result]:
    """One attention-pooling probe on frozen features, towards a frozen text tower.

    The probe is trained on images with captions, stored, and found again when the same
    command is repeated. Then it is scored on every set that is named.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Images with captions to train on: a .csv or .tsv file with the columns
            "image" and "caption", COCO's captions as .json, or a folder of x.jpg and
            x.txt. Not needed with `probe`.
        images:
            Folder that names of images in `data` are relative to. None takes the folder
            of the file.
        features:
            "auto" (sparse tokens for STELLAR, else the tokens of the method, patches
            included), or one of sparse, dense, cls, cls+dense and lowrank.
        text_model:
            Text tower: a model of open_clip, or "local-dir:FOLDER" or
            "hf-hub:REPOSITORY".
        text_weights:
            Weight file of the text tower, or open_clip's name of the weights.
        probe:
            Folder of a trained probe, to score it without training.
        zero_shot:
            Classification set whose test part is classified zero-shot.
        class_names:
            Text file with a line "FOLDER NAME" for each class of `zero_shot`. None
            takes the names of the folders, for the 1000 of ImageNet CLIP's names.
        retrieval:
            Images with captions to find each other, in the layouts of `data`.
        retrieval_images:
            Folder that names of images in `retrieval` are relative to.
        winoground:
            Folder of Winoground: examples.jsonl and images.
        mmvp:
            Folder of MMVP-VLM: Questions.csv and "MLLM_VLM Images".
        epochs:
            Passes over the training images, instead of the protocol's 10.
        lr:
            Learning rate, instead of the protocol's 0.001.
        pairs_per_batch:
            Pairs of all devices in a training step, instead of the protocol's 1024.

    Returns:
        A result per set, which is stored too. With training, the first one is of the
        held-out part of `data`.

    Raises:
        FileNotFoundError: If data or weights are not there.
        ValueError: If an option is impossible, or data or weights of another layout.
        RuntimeError: If training was interrupted, or too many images are unreadable.
    """
    tasks, pairs = results.required(check_align_text)
    if pairs is not None:
        feature = resolve_tokens(model, features)
        devices.say(f"The probe reads {feature} tokens.")
    tower = load_text_tower(text_model, text_weights).to(devices.device)
    cache = FeatureCache(model, devices, results.contents)
    found = []
    if pairs is None:
        trained = _stored_probe(model, results, Path(str(probe)), tower)
        results.announce(model, trained.protocol)
    else:
        protocol = results.protocol(
            model,
            ALIGN_TEXT,
            split=f"{pairs.name}, {len(pairs)} images: {ALIGN_TEXT.split}",
            networks=(f"text tower of {tower.name}, {tower.sha256[:16]}",),
            features=features,
            epochs=epochs,
            lrs=None if lr is None else (lr,),
            batch_sizes=(_fitting_batch(devices, pairs_per_batch, len(pairs)),),
        )
        results.announce(model, protocol)
        trained = train_probe(cache, results, tower, pairs, protocol, feature)
        found.append(_held_out(model, results, trained))
    return found + [_score(cache, results, trained, tower, task) for task in tasks]


def _fitting_batch(
    devices: Devices, pairs_per_batch: int | None, num_images: int
) -> int:
    """Pairs in a batch: as many as wanted, or as are left to train on."""
    wanted = pairs_per_batch or ALIGN_TEXT.batch_sizes[0]
    kept, _ = hold_out(torch.arange(num_images), MOST_HELD_OUT)
    return fitting_batch(devices, wanted, len(kept))


def _check_training(
    data: str | None, probe: str | None, options: dict[str, int | float | None]
) -> None:
    if (data is None) == (probe is None):
        raise ValueError(
            "Give data, images with captions to train on, or probe, the folder of a "
            "trained probe: one of the two."
        )
    for name, value in options.items():
        if value is not None and probe is not None:
            raise ValueError(f"{name} is for training: leave it out with probe.")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}.")


def _stored_probe(
    model: FrozenModel, results: Results, folder: Path, tower: TextTower
) -> TrainedProbe:
    """A trained probe, and that the options do not ask for another one."""
    trained = load_probe(model, folder, tower)
    for name, value in results.sizes.items():
        if value not in (None, getattr(trained.protocol, name)):
            raise ValueError(
                f"The probe in '{folder}' was trained with resize "
                f"{trained.protocol.resize} and crop {trained.protocol.crop}: leave "
                f"--{name} out."
            )
    return trained


def _held_out(model: FrozenModel, results: Results, trained: TrainedProbe) -> Result:
    """Recall of the held-out part of the training data, as it was measured there."""
    training = trained.config["training"]
    protocol = trained.protocol.replace(
        data=f"{training['data']} (held out)",
        rule="cosine similarity; all captions of an image",
    )
    scores = {**training["held_out"], "num_images": training["num_held_out"]}
    chance = scores.pop("chance")
    return _stored(model, results, trained, protocol, scores, {}, chance)


def _score(
    cache: FeatureCache,
    results: Results,
    trained: TrainedProbe,
    tower: TextTower,
    task: TextTask,
) -> Result:
    """Scores one set."""
    devices = cache.devices

    def embed(texts: Sequence[str]) -> Tensor:
        rows = embed_texts(devices, cache.folder, tower, texts)
        return torch.from_numpy(rows.copy()).to(devices.device)

    feature = trained.config["feature"]
    cached = cached_tokens(cache, task.files, trained.protocol, feature)
    embeddings = embed_images(devices, trained.module, cached)
    scores = task.score(embeddings, cached.readable, embed)
    protocol = trained.protocol.replace(
        data=task.name, rule=task.rule, limit=results.limit or trained.protocol.limit
    )
    values = {**scores.values, "num_images": scores.num}
    inputs = {"data": results.fingerprint(task.files, beside=task.texts)}
    counts = {
        "num_reused": cached.num_reused,
        "num_unreadable": cached.num_unreadable,
    }
    return _stored(
        cache.model, results, trained, protocol, values, inputs, scores.chance, **counts
    )


def _stored(
    model: FrozenModel,
    results: Results,
    trained: TrainedProbe,
    protocol: AlignTextProtocol,
    scores: dict[str, Any],
    inputs: dict[str, str],
    chance: dict[str, float],
    **provenance: Any,
) -> Result:
    result = results.result(
        model,
        TASK,
        protocol.data,
        protocol,
        scores,
        {"pairs": trained.config["pairs"], **inputs},
        chance,
        feature=trained.config["feature"],
        probe=str(trained.folder),
        training=trained.config["training"],
        text_sha256=trained.config["text"],
        **provenance,
    )
    results.save(result)
    return result
