"""Data sets of mmsegmentation inside their wrappers, and the steps of pipelines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mmseg.datasets.transforms import LoadAnnotations


def inner_sets(dataset: Any) -> list[Any]:
    """The sets directly inside ConcatDataset, RepeatDataset and the like."""
    inner = [dataset.dataset] if hasattr(dataset, "dataset") else []
    return list(getattr(dataset, "datasets", inner))


def parts_of(dataset: Any) -> list[Any]:
    """The sets inside of all wrappers, or the set itself."""
    inner = inner_sets(dataset)
    return [part for each in inner for part in parts_of(each)] or [dataset]


def flattened(steps: Iterable[Any]) -> Iterator[Any]:
    """Transforms, and those inside of others, such as RandomApply and TestTimeAug."""
    for step in steps:
        yield step
        for name in ("transforms", "subroutines"):
            inner = getattr(step, name, None)
            inner = getattr(inner, "transforms", inner)
            if isinstance(inner, (list, tuple)):
                yield from flattened(inner)


def first_step(dataset: Any, kind: type) -> Any:
    """The first transform of a class in the pipeline of a set, None without one."""
    steps = flattened([dataset.pipeline])
    return next((step for step in steps if isinstance(step, kind)), None)


def loader(dataset: Any) -> LoadAnnotations | None:
    """What loads label files in the pipeline of a set, if anything does."""
    step: LoadAnnotations | None = first_step(dataset, LoadAnnotations)
    return step
