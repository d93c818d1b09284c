"""What a run was made with: versions, revision, machine, images."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightly_ext.data import JPEG_DECODER, ImageDataset, jpeg_decoder

PACKAGES = (
    *("stellar-plugin", "torch", "torchvision", "timm"),
    *("lightly", "pytorch-lightning"),
)


def versions() -> dict[str, str]:
    """Versions of Python and of what decides on a training, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {JPEG_DECODER: str(jpeg_decoder())}


def git_revision(folder: Path) -> str | None:
    """The commit of the checkout that a package is in.

    Args:
        folder:
            Folder of the package.

    Returns:
        Full hash, with "-dirty" behind it if files differ from the commit. None if git
        does not know the package.
    """
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        # An environment may lie in the checkout of something else.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, *describe).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """Name of a device, of its kind for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def fingerprint(images: ImageDataset) -> dict[str, Any]:
    """Number of images, bytes of their files, and a digest of names and sizes.

    Contents are not read. A file that is gone has the size -1.
    """
    digest, total = hashlib.sha256(), 0
    for name, size in images.files():
        total += max(size, 0)
        digest.update(name + f"\0{size}\0".encode())
    return {
        "path": images.location,
        "images": len(images),
        "bytes": total,
        "digest": digest.hexdigest(),
    }


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, check=True, text=True, timeout=30
    ).stdout
