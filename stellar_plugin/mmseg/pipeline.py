"""Pipelines of mmsegmentation whose errors name the files."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from mmengine.dataset import BaseDataset, Compose
from mmengine.logging import print_log
from mmseg.datasets.transforms import LoadAnnotations

from stellar_plugin.mmseg.datasets import flattened, parts_of
from stellar_plugin.mmseg.label_files import check_depth


class NamingCompose(Compose):
    """A pipeline whose errors name the files, and that cuts off no values of labels.

    Readers of images do not name files, and mmsegmentation keeps 8 bits of a value.
    """

    def __call__(self, data: dict) -> dict | None:
        """Applies the transforms.

        Raises:
            Exception: Of the type that one of them raises.
            ValueError: If a label file has values that would be cut off.
        """
        names = [data[k] for k in ("img_path", "seg_map_path") if data.get(k)]
        try:
            self._check_depth(data.get("seg_map_path"))
            return super().__call__(data)
        except Exception as error:  # what it is depends on the reader
            files = " or ".join(f"'{name}'" for name in names)
            reason = " ".join(str(error).split())
            message = (
                f"{files} cannot be used: {type(error).__name__}: {reason} Mend the "
                "file, or take image and label map out of the data set."
            )
            # Data sets may skip what raises errors of some type.
            named = _of_type(error, message)
            if named is None:
                print_log(message, "current", logging.ERROR)
                raise
            raise named from error

    def _check_depth(self, path: str | None) -> None:
        for step in flattened(self.transforms):
            if path and isinstance(step, LoadAnnotations):
                check_depth(path, step, f"'{path}'")


def name_files(datasets: Iterable[BaseDataset]) -> None:
    """Makes errors of pipelines name the files.

    Args:
        datasets:
            Data sets of mmsegmentation, changed in place.
    """
    for dataset in datasets:
        for part in parts_of(dataset):
            if type(getattr(part, "pipeline", None)) is Compose:
                part.pipeline = NamingCompose(part.pipeline.transforms)


def _of_type(error: Exception, message: str) -> Any:
    """An error of the same type, None where its type takes more than a message."""
    try:
        return type(error)(message)
    except Exception:
        return None
