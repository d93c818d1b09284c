"""Trains the heads of a linear probe, epoch by epoch, with a checkpoint after each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightly_ext.durable import move, partial, replace_text, sync
from lightly_ext.evaluate.classification.probe_data import Block, FeatureRows
from lightly_ext.evaluate.classification.probe_heads import ProbeHeads
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.reduction import reduce_sum

LOG_NAME = "epochs.jsonl"


class ProbeTraining:
    """Trains heads; writes a log and a checkpoint after every epoch.

    An interrupted run continues behind its last whole epoch, on any number of
    processes. Order and views follow from seed and epoch, so that no random state has
    to be kept.

    Args:
        devices:
            Where it runs.
        heads:
            The heads, of which each process trains a share.
        folder:
            Folder of the result, which all processes share.
    """

    def __init__(
        self,
        devices: Devices,
        heads: ProbeHeads,
        folder: Path,
    ) -> None:
        self.devices = devices
        self.heads = heads
        self.folder = folder
        self._history: list[dict[str, Any]] = []

    def run(
        self,
        blocks: Callable[[int], Iterable[Block]],
        blocks_per_epoch: int,
        held_out: FeatureRows,
        epochs: int,
    ) -> list[dict[str, Any]]:
        """Trains what is left of the epochs.

        Args:
            blocks:
                Gives the blocks of an epoch.
            blocks_per_epoch:
                How many these are at most.
            held_out:
                Images that the heads are compared on after every epoch.
            epochs:
                Number of epochs, those before an interruption included.

        Returns:
            For each epoch its number "epoch", from 1; "num_images" that it saw; and
            "held_out", the accuracy of every head.
        """
        self._restore()
        todo = range(len(self._history), epochs)
        text = f"training {len(self.heads.grid)} heads"
        total = len(todo) * (blocks_per_epoch + 1)
        num_images = 0
        for block in self.devices.progress(_steps(blocks, todo), text, total):
            if block is not None:
                self._train(*block)
                num_images += len(block[1])
                continue
            accuracy = grid_accuracy(self.devices, self.heads, held_out)
            self._history.append(
                {
                    "epoch": len(self._history) + 1,
                    "num_images": num_images,
                    "held_out": accuracy.tolist(),
                }
            )
            num_images = 0
            self._save()
        return self._history

    def finish(self) -> None:
        """Removes the checkpoints, when the result is stored."""
        self.devices.fabric.barrier()  # others may read them
        if self.devices.rank == 0:
            for path in self._checkpoints():
                _remove(path)

    def _train(self, features: Tensor, labels: Tensor) -> None:
        self.heads.train_block(features, labels)

    def _save(self) -> None:
        """Every process writes its heads; the folder gets its name when all have."""
        new, rank = partial(self.folder / "checkpoint"), self.devices.rank
        if rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        self.devices.fabric.barrier()
        state = {
            "history": self._history,
            "heads": self.heads.state(),
        }
        torch.save(state, new / f"{rank}.pt")
        sync(new / f"{rank}.pt")
        self.devices.fabric.barrier()
        if rank == 0:
            old = self._checkpoints()
            move(new, self.folder / f"checkpoint-{len(self._history)}")
            for path in old:
                _remove(path)
            lines = [f"{json.dumps(entry)}\n" for entry in self._history]
            replace_text(self.folder / LOG_NAME, "".join(lines))

    def _restore(self) -> None:
        paths = self._checkpoints()
        self.devices.fabric.barrier()  # nobody writes before everybody has looked
        if not paths:
            return
        files = sorted(paths[-1].glob("*.pt"))
        states = [torch.load(file, map_location="cpu") for file in files]
        self.heads.load_state({k: v for s in states for k, v in s["heads"].items()})
        self._history = states[0]["history"]
        self.devices.say(
            f"Continues the training in {self.folder}, behind epoch "
            f"{len(self._history)}."
        )

    def _checkpoints(self) -> list[Path]:
        paths = self.folder.glob("checkpoint-*")
        return sorted(paths, key=lambda path: int(path.name.split("-")[1]))


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: a kill leaves no part under it."""
    hidden = partial(checkpoint)
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def grid_accuracy(devices: Devices, heads: ProbeHeads, rows: FeatureRows) -> Tensor:
    """Accuracy of every head of all processes, float64 with shape (num_heads,)."""
    counts = torch.stack([heads.count_correct(*block) for block in rows.blocks()])
    return reduce_sum(devices, counts.sum(dim=0)).double() / len(rows)


def _steps(
    blocks: Callable[[int], Iterable[Block]], epochs: Iterable[int]
) -> Iterator[Block | None]:
    """The blocks of all epochs, with None behind each epoch."""
    for epoch in epochs:
        yield from blocks(epoch)
        yield None
