"""Errors in pipelines that say at which image."""

from __future__ import annotations

from collections.abc import Iterable

from mmengine.dataset import BaseDataset, Compose

from stellar_plugin.mmseg.labels import parts_of


class NamingCompose(Compose):
    """A pipeline whose errors name the files: readers of images do not."""

    def __call__(self, data: dict) -> dict | None:
        """Applies the transforms.

        Raises:
            ValueError: If one of them raises.
        """
        names = [data[k] for k in ("img_path", "seg_map_path") if data.get(k)]
        try:
            return super().__call__(data)
        except Exception as error:  # what it is depends on the reader
            files = " or ".join(f"'{name}'" for name in names)
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{files} cannot be used: {type(error).__name__}: {reason} Mend the "
                "file, or take image and label map out of the data set."
            ) from error


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
