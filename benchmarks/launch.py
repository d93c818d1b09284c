"""`stellar pretrain` in processes that are started here, as torchrun would."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torchvision.io import write_jpeg

from lightly_ext.pretrain.cli import main as pretrain


def write_noise(folder: Path, number: int, side: int) -> Path:
    """Writes square JPEG images of noise into a new folder, and returns it."""
    folder.mkdir()
    for index in range(number):
        pixels = torch.randint(256, (3, side, side), dtype=torch.uint8)
        write_jpeg(pixels, str(folder / f"{index}.jpg"))
    return folder


def train_together(
    options: Sequence[str], num_processes: int, cores: Sequence[int] = ()
) -> None:
    """Runs one training in processes with one thread each, over gloo.

    Args:
        options: Of `stellar pretrain`.
        num_processes: How many.
        cores: CPU core of each process; none leaves it to the system.

    Raises:
        RuntimeError: If one fails.
    """
    train_apart([options] * num_processes, num_processes, cores)


def train_apart(
    runs: Sequence[Sequence[str]], num_processes: int = 1, cores: Sequence[int] = ()
) -> None:
    """Runs a process for each list of options at the same time; see `train_together`.

    Args:
        runs: Options of each process.
        num_processes: Of the run that each belongs to: 1, or all.
        cores: CPU core of each process; none leaves it to the system.

    Raises:
        RuntimeError: If one fails.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for number, options in enumerate(runs):
        rank = number if num_processes > 1 else 0
        core = cores[number] if cores else None
        arguments = (options, rank, num_processes, port, core)
        started.append(get_context("spawn").Process(target=_train, args=arguments))
    for process in started:
        process.start()
    for process in started:
        process.join()
    codes = [process.exitcode for process in started]
    if any(codes):
        raise RuntimeError(f"A training failed: exit codes {codes}.")


def _train(
    options: Sequence[str], rank: int, num_processes: int, port: int, core: int | None
) -> None:
    if num_processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        names |= {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"TORCHELASTIC_RUN_ID": "benchmark", "MASTER_PORT": str(port)}
        os.environ |= {"MASTER_ADDR": "localhost"}
        setattr(rank_zero_only, "rank", rank)  # noqa: B010 # before it was imported
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    pretrain([*options, f"--trainer.devices={num_processes}"])
