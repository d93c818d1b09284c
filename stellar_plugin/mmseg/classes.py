"""Names of classes: of all sets of a run the same, and those that were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from stellar_plugin.mmseg.datasets import parts_of

WAY_OUT = (
    "Labels and predictions are numbers, which must mean the same class: bring names "
    "and labels into one order, or where only the names differ give the data set the "
    "others by metainfo=dict(classes=[...])."
)


def class_names(dataset: Any) -> list[str] | None:
    """Names of the classes of a set, None where it has none."""
    names = parts_of(dataset)[0].metainfo.get("classes")
    return None if names is None else list(map(str, names))


def check_names(datasets: Mapping[str, Any]) -> None:
    """Compares the names of the classes of a run's data sets.

    Args:
        datasets:
            Data sets of mmsegmentation by the name of their split.

    Raises:
        ValueError: If they are one text, if a name is there twice, or if two sets have
            different names or another order.
    """
    first: tuple[str, list[str]] | None = None
    for split, dataset in datasets.items():
        for part in parts_of(dataset):
            names = part.metainfo.get("classes")
            if names is None:
                continue
            if isinstance(names, str):
                raise ValueError(
                    f"The classes of {split} are the text '{names}', whose letters "
                    "would be the names: give a list, metainfo=dict(classes=[...])."
                )
            names = list(map(str, names))
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            if twice:
                raise ValueError(
                    f"The classes of {split} hold '{twice[0]}' more than once: name "
                    "each class once, in metainfo=dict(classes=[...])."
                )
            if first is None:
                first = split, names
            _compare(names, split, first[1], f"in {first[0]}")


def check_trained_names(
    path: str, meta: Mapping[str, Any], datasets: Mapping[str, Any]
) -> None:
    """Compares the names of the classes with those that a checkpoint was trained on.

    Args:
        path:
            The checkpoint, for the error.
        meta:
            What mmengine wrote beside its weights.
        datasets:
            Data sets of mmsegmentation by the name of their split.

    Raises:
        ValueError: If a name or the order is another.
    """
    trained = meta.get("dataset_meta", {}).get("classes", meta.get("CLASSES"))
    for split, dataset in datasets.items():
        names = class_names(dataset)
        if trained is not None and names is not None:
            _compare(names, split, list(map(str, trained)), f"in '{path}'")


def _compare(
    names: Sequence[str], split: str, others: Sequence[str], where: str
) -> None:
    for number, (name, other) in enumerate(zip_longest(names, others)):
        if name != other:
            raise ValueError(
                f"Class {number} is {_quoted(name)} in {split} and {_quoted(other)} "
                f"{where}. {WAY_OUT}"
            )


def _quoted(name: str | None) -> str:
    return "missing" if name is None else f"'{name}'"
