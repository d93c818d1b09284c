"""Which files of an index are as they were when they were read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightly_ext.evaluate.fingerprints import (
    CHUNK,
    NUM_THREADS,
    Stamp,
    file_stamp,
    is_settled,
)
from lightly_ext.evaluate.images import EvaluationImages, ImageFiles, Sample
from lightly_ext.search.image_index import Content
from stellar_plugin.hashes import file_sha256

# No file has it, so its content is looked at again.
UNSETTLED: Stamp = (-1, -1, -1)
NO_HASH = bytes(hashlib.sha256().digest_size)


class Changes(NamedTuple):
    """What a folder has beside an index of it.

    Attributes:
        new: Numbers of images that the index does not have.
        changed: Numbers of images with another content than those of the index.
        touched: New stamps of files with the same content.
        gone: Names of images of the index that the folder does not have.
    """

    new: list[int]
    changed: list[int]
    touched: dict[str, Stamp]
    gone: list[str]


def find_changes(contents: Mapping[str, Content], files: ImageFiles) -> Changes:
    """Compares images with an index of them.

    A file is read only if its size is as it was and its times are not.

    Args:
        contents:
            Those of the index.
        files:
            The images.
    """
    changes = Changes([], [], {}, sorted(contents.keys() - {*files.names}))
    root = str(files.root)
    with ThreadPool(NUM_THREADS) as threads:
        look = partial(_look, root, contents)
        found = threads.imap(look, files.names, chunksize=CHUNK)
        for number, (name, stamp) in enumerate(zip(files.names, found, strict=True)):
            if name not in contents:
                changes.new.append(number)
            elif stamp is None:
                changes.changed.append(number)
            elif stamp != contents[name][0] and stamp != UNSETTLED:
                changes.touched[name] = stamp
    return changes


def _look(root: str, contents: Mapping[str, Content], name: str) -> Stamp | None:
    """The stamp of a file, None if the index does not have its content."""
    if name not in contents:
        return None
    known, sha256 = contents[name]
    path = os.path.join(root, name)
    try:
        stamp = file_stamp(path)
        if stamp == known:
            return stamp
        if known != UNSETTLED and stamp[0] != known[0]:
            return None
        found = _content(path)
    except OSError:
        return None
    return found[0] if found[1] == sha256 != NO_HASH else None


def _content(path: str) -> Content:
    """Stamp and hash of a file, as far as nobody writes it meanwhile.

    Raises:
        OSError: If it cannot be read.
    """
    stamp = file_stamp(path)
    settled = is_settled(stamp)  # before it is read
    sha256 = bytes.fromhex(file_sha256(Path(path)))
    if file_stamp(path) != stamp:
        return UNSETTLED, NO_HASH
    return stamp if settled else UNSETTLED, sha256


class IndexedSample(NamedTuple):
    """An image and what its file is, see `Entries`.

    Attributes:
        sample: The image.
        stamp: int64 with shape (3,).
        hash: uint8 with shape (32,).
    """

    sample: Sample
    stamp: Tensor
    hash: Tensor


class IndexedImages:
    """Images and what their files are.

    Args:
        images:
            The images.
    """

    def __init__(self, images: EvaluationImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> IndexedSample:
        """Reads an image, and its file before."""
        files = self._images.files
        path = os.path.join(files.root, files.names[index])
        stamp, sha256 = UNSETTLED, NO_HASH
        try:
            before = file_stamp(path)
            stamp, sha256 = _content(path)
            sample = self._images[index]
            if file_stamp(path) != before:
                stamp, sha256 = UNSETTLED, NO_HASH
        except OSError:  # not there, or no longer
            sample = self._images[index]
        digest = torch.frombuffer(bytearray(sha256), dtype=torch.uint8)
        return IndexedSample(sample, torch.tensor(stamp), digest)
