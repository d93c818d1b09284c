"""What is in files, as hashes: tells data sets apart, wherever they lie.

Every file is read once as a whole. Its hash is remembered in the cache together with
size and times of change, so that a file that has not changed is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
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
    devices: Devices, cache: Path, root: Path, names: Sequence[str]
) -> NDArray[np.bytes_]:
    """SHA-256 of files; the first process reads them, all receive the hashes.

    Args:
        devices:
            The processes.
        cache:
            Folder for what is computed once.
        root:
            Folder of the files.
        names:
            Paths relative to it.

    Returns:
        Hexadecimal hashes with shape (len(names),), empty for files that cannot be
        opened.
    """
    found = devices.of_first(lambda: _hashes(devices, cache, root, names))
    return np.array(found, dtype="S64")


def fingerprint(
    devices: Devices, cache: Path, *parts: ImageFiles, beside: Any = None
) -> str:
    """SHA-256 of names, labels and contents of images, in their order.

    Absolute paths are no part of it: a folder that moves keeps its fingerprint.

    Args:
        devices:
            The processes, which all receive it.
        cache:
            Folder for what is computed once.
        parts:
            The images, or several parts of a data set.
        beside:
            What else decides, such as captions: values that JSON knows.
    """
    digest = hashlib.sha256(json.dumps(beside).encode())
    for files in parts:
        hashes = content_hashes(devices, cache, files.root, files.names).tolist()
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


def _hashes(
    devices: Devices, cache: Path, root: Path, names: Sequence[str]
) -> list[bytes]:
    folder = str(root.resolve())
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    memo = cache / FOLDER / f"{place}.npz"
    known = _load(memo)
    found: list[Known] = []
    try:
        with ThreadPool(NUM_THREADS) as threads:
            looked = threads.imap(partial(_look, folder, known), names, chunksize=CHUNK)
            found += devices.progress(looked, "contents of files", len(names))
    finally:
        new = {name: e for name, e in zip(names, found, strict=False) if e[0]}
        if any(known.get(name) != entry for name, entry in new.items()):
            try:
                _store(memo, {**known, **new})
            except OSError as error:  # nothing needs it
                text = f"cannot be written: {error.strerror}. The files of '{root}'"
                devices.say(f"'{memo}' {text} will be read again.")
    return [sha256 for _, sha256 in found]


def _look(folder: str, known: Mapping[str, Known], name: str) -> Known:
    path = os.path.join(folder, name)
    try:
        stamp = file_stamp(path)
        found = known.get(name)
        if found is not None and found[0] == stamp:
            return found
        sha256 = file_sha256(Path(path)).encode()
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
