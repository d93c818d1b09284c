"""Runs a function in several gloo processes and collects what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forks of one that has imported these: that takes most of their time.
FORKSERVER = mp.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "pytest",
        "lightly_ext.pretrain.cli",
        "lightly_ext.evaluate.cli",
        "mmseg.apis",
        "stellar_plugin.mmseg",
    ]
)


def run(function: Callable[..., Any], folder: Path, world_size: int = 2) -> list[Any]:
    """Calls `function(rank, world_size)` in each process.

    Args:
        function:
            Importable by name; returns tensors and plain containers. It sees the
            environment of the first call.
        folder:
            Empty folder for the meeting point and the results.
        world_size:
            Number of processes.
    """
    arguments = (function, folder, world_size)
    mp.start_processes(_worker, arguments, world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def say_as_torchrun(rank: int, world_size: int) -> None:
    """Sets what torchrun tells the processes that it starts, for Lightning to see."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    names |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="localhost")


def _worker(
    rank: int, function: Callable[..., Any], folder: Path, world_size: int
) -> None:
    torch.set_num_threads(1)
    store = (folder / "meet").as_uri()
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size)
    torch.save(function(rank, world_size), folder / f"{rank}.pt")
    dist.destroy_process_group()
