"""Checkpoints of Lightning that are written in one step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor

from lightly_ext.durable import move, partial

# In the name of a file, and what takes its place: the first digits of the SHA-256 of
# its content, as in the names of torch.hub.
SHA256, NUM_DIGITS = "{sha256}", 16


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their place, flushes them to the disk, renames them.

    After a kill at any moment the file is whole, old or not there. `{sha256}` in its
    name becomes the first 16 digits of its SHA-256.

    Attributes:
        written:
            The file written last.
    """

    written: Path

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint:
                What Lightning collects of the run.
            path:
                The file, in a local folder.
            storage_options:
                Not used, as in Lightning's own.

        Raises:
            RuntimeError: If a weight or a moment of the optimiser is not finite.
            OSError: If the file cannot be written; the partial one is removed.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        for name in ("state_dict", "optimizer_states"):
            require_finite(checkpoint.get(name), name)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = partial(path)
        try:
            digest = _write(checkpoint, new)
            self.written = Path(str(path).replace(SHA256, digest[:NUM_DIGITS]))
            move(new, self.written)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def require_finite(state: Any, name: str) -> None:
    """Checks every floating-point tensor of a state.

    Args:
        state:
            Tensors in dictionaries and lists.
        name:
            What to call it.

    Raises:
        RuntimeError: If a value is not finite; names the tensor.
    """
    for where, tensor in _tensors(state, name):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RuntimeError(f"'{where}' is not finite")


class _Hashed:
    """A file of which the SHA-256 is known when it is written."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write(checkpoint: dict[str, Any], path: Path) -> str:
    """Writes a file, flushes it to the disk and returns its SHA-256."""
    with path.open("wb") as file:
        hashed: Any = _Hashed(file)
        try:
            torch.save(checkpoint, hashed)
            file.flush()
        except RuntimeError as error:
            # torch, closing its archive, hides why a write failed.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        os.fsync(file.fileno())
    return hashed.hash.hexdigest()


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dictionaries and lists, with where they are."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(item, f"{name}.{key}")
