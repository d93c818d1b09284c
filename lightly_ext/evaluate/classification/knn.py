"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from typing import Any

import torch

from lightly_ext.evaluate.datasets import find_classification_set
from lightly_ext.evaluate.features import pooled_features
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.session import Session
from lightly_ext.metrics import Voters, check_knn_options
from stellar_plugin.protocols import KNN, NEIGHBOURS, VOTE_TEMPERATURE


def run_knn(
    session: Session,
    data: str,
    features: str = "auto",
    neighbours: int = NEIGHBOURS,
    temperature: float = VOTE_TEMPERATURE,
) -> Result:
    """Accuracy of k nearest neighbours: nothing is trained.

    Args:
        session:
            Gives the model.
        data:
            Folder with `train` and `val` or `test`, each with a folder of images per
            class; or the NAME of a known set in data/NAME, or NAME:FOLDER: imagenet,
            pets, food101, glas, places365, places365-large.
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
    found = find_classification_set(data)
    train, test = (p.limited(session.limit) for p in (found.train, found.test))
    check_knn_options(neighbours, temperature, len(train))
    protocol = session.protocol(
        KNN,
        data=found.name,
        features=features,
        neighbours=neighbours,
        temperature=temperature,
    )
    feature = session.model.resolve_feature(features)
    session.say(
        f"{found.name}: {len(train)} training images, {len(test)} test images, "
        f"{len(train.classes)} classes; {feature} features."
    )
    session.announce(protocol)
    bank, bank_labels, lost_train = pooled_features(session, train, protocol, feature)
    queries, labels, lost_test = pooled_features(session, test, protocol, feature)
    if not (bank.isfinite().all() and queries.isfinite().all()):
        raise RuntimeError(
            f"Features of '{session.name}' are not finite at precision "
            f"{session.precision}: use --precision 32-true."
        )
    device = session.fabric.device
    voters = Voters(bank.to(device), bank_labels.to(device), neighbours, temperature)
    # Every process cuts the same blocks: others would round differently.
    share = voters.blocks(queries, labels)[session.rank :: session.world_size]
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for block in session.progress(share, "neighbours", len(share)):
        correct += voters.num_correct(*block)
    total: Any = session.fabric.all_reduce(correct, reduce_op="sum")
    result = session.result(
        "knn",
        found.name,
        protocol,
        {"accuracy": int(total) / len(labels), "num_test": len(labels)},
        feature=feature,
        num_train=len(bank),
        unreadable={"train": lost_train, "test": lost_test},
    )
    session.save(result)
    return result
