"""Imagenette, ten classes of ImageNet at 160 px, from its own server or a cache."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from torchvision.datasets import Imagenette

URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
NUM_PHOTOS = {"train": 9469, "val": 3925}
# Seconds in which the server answers, or is not reached.
PATIENCE = 10.0


def cache_folder() -> Path:
    """Where Imagenette is kept: `imagenette` beside the models of torch's hub."""
    return Path(torch.hub.get_dir()).parent / "imagenette"


def download_imagenette(root: Path) -> tuple[Path, dict[str, str]]:
    """Downloads Imagenette, once, and verifies it.

    torchvision compares the archive with its MD5 sum; whether it was unpacked to the
    end is told by the number of photos, and if not it is unpacked again.

    Args:
        root:
            Folder for archive and photos. An archive that lies there is not downloaded
            again.

    Returns:
        Folder with `train` and `val`, and the names of its class folders in words.

    Raises:
        RuntimeError: If it is not there and cannot be downloaded, or is not complete.
    """
    archive = root / Path(URL).name
    folder = root / archive.stem
    if not _is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if not archive.is_file():
            _check_server(root)
        try:
            with _patient():
                Imagenette(root, "train", size="160px", download=True)
        except (OSError, RuntimeError) as error:
            raise _unavailable(root, str(error)) from error
        if not _is_complete(folder):
            raise RuntimeError(
                f"'{folder}' has not the {sum(NUM_PHOTOS.values())} photos of "
                f"Imagenette: remove '{root}' and run the demo again."
            )
    words = Imagenette(root, "train", size="160px")
    return folder, {n: c[0] for n, c in zip(words.wnids, words.classes, strict=True)}


def _is_complete(folder: Path) -> bool:
    return all(
        sum(1 for _ in (folder / part).glob("*/*.JPEG")) == number
        for part, number in NUM_PHOTOS.items()
    )


def _check_server(root: Path) -> None:
    """Raises an error in time, where name servers and routers take minutes."""
    answers = ["it does not answer"]

    def ask() -> None:
        request = urllib.request.Request(URL, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE):
                answers.append("")
        except OSError as error:
            answers.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if answers[-1]:
        raise _unavailable(root, answers[-1])


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """A connection that has gone silent ends."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _unavailable(root: Path, reason: str) -> RuntimeError:
    return RuntimeError(
        f"Imagenette cannot be downloaded from {URL} ({reason}): put that file (94 MB) "
        f"into '{root}', or take photos of your own, `stellar try FOLDER`; without "
        "options the demo needs no network."
    )
