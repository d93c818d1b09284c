from __future__ import annotations

import hashlib
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from lightly_ext.data import ImageFolderDataset
from lightly_ext.pretrain.provenance import (
    device_name,
    fingerprint,
    git_revision,
    versions,
)


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *identity, *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_git_revision(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_revision(package) is None
    git(tmp_path, "init")
    # An environment in the checkout of something else.
    assert git_revision(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    revision = git_revision(package)
    assert revision is not None and len(revision) == 40
    (package / "__init__.py").write_text("changed")
    assert git_revision(package) == f"{revision}-dirty"


def test_fingerprint__names_and_sizes(tmp_path: Path) -> None:
    names = [b"a/0.png", "a/\u00e9\n.png".encode(), b"b/\xff.png"]
    for size, name in enumerate(names):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * (10 + size))
    images = ImageFolderDataset(tmp_path)
    found = fingerprint(images)
    assert (found["images"], found["bytes"]) == (3, 10 + 11 + 12)
    expected = b"".join(
        name + f"\0{10 + size}\0".encode() for size, name in enumerate(names)
    )
    assert found["digest"] == hashlib.sha256(expected).hexdigest()
    images.file(0).unlink()
    assert fingerprint(images)["bytes"] == 11 + 12


def test_versions_and_device() -> None:
    assert versions()["torch"] == version("torch")
    assert device_name(torch.device("cpu")).startswith("cpu (")
