"""Which files data sets of mmsegmentation read, lack, leave out and share."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset

from stellar_plugin.mmseg.datasets import first_step, loader, parts_of
from stellar_plugin.state_dict import shown


def called(dataset: BaseDataset) -> str:
    """What errors call a set."""
    return f"{type(dataset).__name__} in '{getattr(dataset, 'data_root', None)}'"


def check_files(dataset: BaseDataset, labelled: bool = True) -> None:
    """Checks that the files of every image exist, by their names.

    Args:
        dataset:
            Segmentation set inside of all wrappers.
        labelled:
            Whether label files are needed.

    Raises:
        ValueError: If the set names no label files.
        FileNotFoundError: If an image or a label file does not exist.
    """
    infos = _infos(dataset)
    step = first_step(dataset, LoadImageFromFile)
    if type(step) is LoadImageFromFile and not step.backend_args:
        absent = _missing(info["img_path"] for info in infos if info.get("img_path"))
        if absent:
            raise FileNotFoundError(
                f"There is no image '{absent[0]}' of {called(dataset)}{_more(absent)}. "
                "Check data_prefix.img_path; ann_file "
                f"('{getattr(dataset, 'ann_file', '')}') has one name a line, without "
                f"img_suffix ('{getattr(dataset, 'img_suffix', None)}') and without "
                "blank lines."
            )
    load = loader(dataset)
    if load is None or not labelled:
        return
    paths: dict[Any, Any] = {i.get("seg_map_path"): i.get("img_path") for i in infos}
    if None in paths:
        raise ValueError(
            f"{called(dataset)} names no label files; set data_prefix=dict(img_path="
            "..., seg_map_path=...)."
        )
    absent = [] if load.backend_args else _missing(paths)
    if absent:
        folder = Path(absent[0]).parent
        names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
        found = f"; there are {shown(names, 3)}" if names else ""
        raise FileNotFoundError(
            f"There is no label file '{absent[0]}' for the image '{paths[absent[0]]}' "
            f"of {called(dataset)}{_more(absent)}{found}. Check "
            "data_prefix.seg_map_path, img_suffix and seg_map_suffix "
            f"('{getattr(dataset, 'seg_map_suffix', None)}')."
        )


def left_out(dataset: Any) -> list[str]:
    """Images in the folders of a set that it does not read, for their suffix.

    Sets that list their images (ann_file) leave others out because they are told to.

    Args:
        dataset:
            Data set of mmsegmentation, in whatever wrappers.
    """
    found = []
    for part in parts_of(dataset):
        prefix, suffix = (
            getattr(part, name, None) for name in ("data_prefix", "img_suffix")
        )
        folder = (prefix or {}).get("img_path")
        if not (folder and suffix) or os.path.isfile(getattr(part, "ann_file", "")):
            continue
        labels = {info.get("seg_map_path") for info in _infos(part)}
        for root, _, names in os.walk(folder):
            paths = [os.path.join(root, n) for n in names if not n.endswith(suffix)]
            found += [p for p in paths if _is_image(p) and p not in labels]
    return sorted(found)


def shared(dataset: Any, trained: Any) -> list[str]:
    """Images of a set that another has too, by their paths.

    Args:
        dataset:
            Data set of mmsegmentation, in whatever wrappers.
        trained:
            The other one.
    """
    ours, theirs = (
        {
            os.path.realpath(info["img_path"])
            for part in parts_of(each)
            for info in _infos(part)
            if info.get("img_path")
        }
        for each in (dataset, trained)
    )
    return sorted(ours & theirs)


def _infos(dataset: BaseDataset) -> list[dict[str, Any]]:
    return [dataset.get_data_info(index) for index in range(len(dataset))]


def _is_image(path: str) -> bool:
    return (mimetypes.guess_type(path)[0] or "").startswith("image/")


def _missing(paths: Iterable[str]) -> list[str]:
    """Those that are no files; each folder is listed once."""
    there: dict[str, set[str]] = {}
    absent = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in there:
            is_folder = os.path.isdir(folder)
            there[folder] = set(os.listdir(folder or ".")) if is_folder else set()
        # Addresses have no folder, and file systems may not tell A from a.
        known = name in there[folder] or "://" in path or os.path.exists(path)
        absent += [] if known else [path]
    return absent


def _more(absent: list[str]) -> str:
    return f", and {len(absent) - 1} more are missing" if len(absent) > 1 else ""
