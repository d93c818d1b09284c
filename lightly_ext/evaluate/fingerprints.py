"""What is in files, as hashes: tells data sets apart, wherever they lie.

Every file is read once as a whole. Its hash is remembered in the cache together with
size and times of change, so that a file that has not changed is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightly_ext.durable import replacing
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.images import ImageFiles
from stellar_plugin.hashes import file_sha256

FOLDER = "contents"
COLUMNS = ("names", "stamps", "hashes")
NUM_THREADS = 16
CHUNK = 64
# A file that changes twice within a tick of the clock looks unchanged. Times of 2 s are
# the coarsest; what is younger is read again.
SETTLED_NS = 2 * 10**9


# Size of a file, and the times in ns when content and inode changed last; None where
# another content could have the same.
Stamp = tuple[int, int, int]
# Stamp and hash; plain tuples, as there may be millions.
Known = tuple[Stamp | None, bytes]


def content_hashes(
    devices: Devices, cache: Path, files: ImageFiles
) -> NDArray[np.bytes_]:
    """SHA-256 of image files; the first process reads them, all receive the hashes.

    An image of a table has the hash that it would have as a file.

    Args:
        devices:
            The processes.
        cache:
            Folder for what is computed once.
        files:
            The images.

    Returns:
        Hexadecimal hashes with shape (len(files),), empty for files that cannot be
        opened.
    """
    found = devices.of_first(lambda: _hashes(devices, cache, files))
    return np.array(found, dtype="S64")


class Contents:
    """Contents of image files as one run sees them: each list of files is hashed once.

    What changes later is another run's. So features, and what tells their result apart,
    are of the same contents.

    Args:
        devices:
            The processes.
        cache:
            Folder for what is computed once.
    """

    def __init__(self, devices: Devices, cache: Path) -> None:
        self.devices = devices
        self.cache = cache
        self._seen: list[tuple[ImageFiles, NDArray[np.bytes_]]] = []

    def hashes(self, files: ImageFiles) -> NDArray[np.bytes_]:
        """As by `content_hashes`, at the first call with these files."""
        for seen, hashes in self._seen:
            if seen is files:
                return hashes
        hashes = content_hashes(self.devices, self.cache, files)
        self._seen.append((files, hashes))
        return hashes

    def fingerprint(self, *parts: ImageFiles, beside: Any = None) -> str:
        """SHA-256 of names, labels and contents of images, in their order.

        Absolute paths are no part of it: a folder that moves keeps its fingerprint.

        Args:
            parts:
                The images, or several parts of a data set.
            beside:
                What else decides, such as captions: values that JSON knows.

        Returns:
            It, in all processes.
        """
        digest = hashlib.sha256(json.dumps(beside).encode())
        for files in parts:
            hashes = self.hashes(files).tolist()
            digest.update(f"\n{len(files)} images\n".encode())
            labels: Any = files.labels or [None] * len(files)
            for name, label, sha256 in zip(files.names, labels, hashes, strict=True):
                line = f"{name}\0{label}\0{sha256.decode()}\n"
                digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


def file_stamp(path: str | Path) -> Stamp:
    """What changes when a file changes, without reading it."""
    stat = os.stat(path)
    # The last one changes with every replacement, also where the other is put back.
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_settled(stamp: Stamp) -> bool:
    """Whether a file that changes from now on gets another stamp."""
    return time.time_ns() - max(stamp[1:]) > SETTLED_NS


def _hashes(devices: Devices, cache: Path, files: ImageFiles) -> list[bytes]:
    memo = cache / FOLDER / f"{_place(files)}.npz"
    known, names = _load(memo), files.names
    stamp = _table_stamp(files)
    look = partial(_look, files, stamp, known)
    found: list[Known] = []
    try:
        with ThreadPool(NUM_THREADS) as threads:
            looked = threads.imap(look, range(len(files)), chunksize=CHUNK)
            found += devices.progress(looked, "contents of files", len(files))
    finally:
        new = {name: e for name, e in zip(names, found, strict=False) if e[0]}
        changed = _table_stamp(files) != stamp
        if not changed and any(known.get(name) != e for name, e in new.items()):
            try:
                _store(memo, {**known, **new})
            except OSError as error:  # nothing needs it
                text = f"cannot be written: {error.strerror}. The files of"
                devices.say(f"'{memo}' {text} '{files.root}' will be read again.")
    return [sha256 for _, sha256 in found]


def _place(files: ImageFiles) -> str:
    """Tells folders, and the files of tables, from one another."""
    paths = [files.root] if files.rows is None else files.rows.table.files
    resolved = b"\0".join(os.fsencode(path.resolve()) for path in paths)
    return hashlib.sha256(resolved).hexdigest()[:16]


def _table_stamp(files: ImageFiles) -> Stamp | None:
    """Size of all files of a table, and the latest of their times; else None."""
    if files.rows is None:
        return None
    sizes, *times = zip(*map(file_stamp, files.rows.table.files), strict=True)
    stamp = sum(sizes), max(times[0]), max(times[1])
    return stamp if is_settled(stamp) else None


def _look(
    files: ImageFiles,
    table_stamp: Stamp | None,
    known: Mapping[str, Known],
    index: int,
) -> Known:
    found = known.get(files.names[index])
    try:
        if files.rows is not None:
            if found is not None and found[0] == table_stamp:
                return found
            source = files.source(index)
            if isinstance(source, bytes):
                return table_stamp, hashlib.sha256(source).hexdigest().encode()
            return None, file_sha256(source).encode()  # a file beside the table
        path = files.root / files.names[index]
        stamp = file_stamp(path)
        if found is not None and found[0] == stamp:
            return found
        sha256 = file_sha256(path).encode()
        settled = is_settled(stamp) and file_stamp(path) == stamp
        return stamp if settled else None, sha256
    except OSError:
        return None, b""


def _load(memo: Path) -> dict[str, Known]:
    """What is remembered; nothing of a broken file, which its checksums tell."""
    if not memo.exists():
        return {}
    try:
        with np.load(memo, allow_pickle=False) as arrays:
            names, stamps, hashes = (arrays[name].tolist() for name in COLUMNS)
        entries = zip(map(tuple, stamps), hashes, strict=True)
        return dict(zip(map(os.fsdecode, names), entries, strict=True))
    except Exception:  # numpy and zipfile raise anything on broken files
        return {}


def _store(memo: Path, known: Mapping[str, Known]) -> None:
    names = [os.fsencode(name) for name in known]
    stamps, hashes = zip(*known.values(), strict=True)
    memo.parent.mkdir(parents=True, exist_ok=True)
    with replacing(memo) as new, new.open("wb") as file:
        np.savez(file, names=names, stamps=stamps, hashes=hashes)
