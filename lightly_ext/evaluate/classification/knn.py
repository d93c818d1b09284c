"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from lightly_ext.evaluate.classification.guesses import collect_guesses
from lightly_ext.evaluate.classification.split import label_chance
from lightly_ext.evaluate.datasets import ClassificationSet, find_classification_set
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import POOLED, FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel, check_feature_name
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.metrics import Voters, check_knn_options
from stellar_plugin.protocols import KNN


def check_knn(
    results: Results, data: str, features: str, neighbours: int, temperature: float
) -> ClassificationSet:
    """Finds the data set; see `Results.required`."""
    check_feature_name(features)
    found = find_classification_set(data).limited(results.limit)
    check_knn_options(neighbours, temperature, len(found.train))
    return found


@evaluation
def run_knn(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    features: str = "auto",
    neighbours: int = KNN.neighbours,
    temperature: float = KNN.temperature,
) -> Result:
    """Accuracy of k nearest neighbours: nothing is trained.

    Of equally similar training images the first in the list vote, of classes with equal
    votes the first one wins.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder with `train` and `val` or `test`, each with a folder of images per
            class, or of labelled tars or parquet; hf:NAME of the hub; or the NAME of a
            known set in data/NAME, or NAME:FOLDER: imagenet, pets, food101, glas,
            places365, places365-large.
        features:
            "auto", where the objective of the method acts, or one of sparse, dense,
            cls, cls+dense and lowrank.
        neighbours:
            Number of training images that vote.
        temperature:
            Temperature of the votes.

    Returns:
        The result, which is stored too.

    Raises:
        ValueError: If an option or the data set is impossible.
        RuntimeError: If too many images are unreadable, or features are not finite.
    """
    data_set = results.required(check_knn)
    train, test = data_set.train, data_set.test
    protocol = results.protocol(
        model,
        KNN,
        data=data_set.name,
        features=features,
        neighbours=neighbours,
        temperature=temperature,
    )
    feature = model.resolve_feature(features)
    devices.say(
        f"{data_set.name}: {len(train)} training images, {len(test)} test images, "
        f"{len(train.classes)} classes; {feature} features."
    )
    results.announce(model, protocol)
    cache = FeatureCache(model, devices, results.contents)
    voting = cache.pooled(train, protocol, feature)
    asked = cache.pooled(test, protocol, feature)
    bank, queries = voting.rows(POOLED), asked.rows(POOLED)
    check_knn_options(neighbours, temperature, len(bank))  # of the readable ones
    bank_labels = train.label_tensor[voting.readable]
    device = devices.device
    voters = Voters(bank.to(device), bank_labels.to(device), neighbours, temperature)
    rows = voters.rows_at_once
    blocks = list(zip(asked.readable.split(rows), queries.split(rows), strict=True))
    share = blocks[devices.rank :: devices.world_size]
    shown = devices.progress(share, "neighbours", len(share))
    found = ((numbers, voters.classes(block)[:, None]) for numbers, block in shown)
    guesses = collect_guesses(devices, test, found, num_guesses=1)
    chance = label_chance(bank_labels, guesses.labels, len(train.classes))
    result = results.result(
        model,
        "knn",
        data_set.name,
        protocol,
        {**guesses.scores, "num_test": len(guesses.labels)},
        {"data": results.fingerprint(train, test)},
        {"accuracy": chance["accuracy"]},
        feature=feature,
        num_train=len(bank),
        num_reused=voting.num_reused + asked.num_reused,
        unreadable={"train": voting.num_unreadable, "test": asked.num_unreadable},
    )
    if devices.rank == 0:
        guesses.save(results.folder(result))
    results.save(result)
    return result
