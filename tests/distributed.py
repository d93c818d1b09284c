"""Functions, commands and scripts in processes that need not import anything anew."""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning_fabric.utilities.rank_zero import rank_zero_only

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


def run_as_torchrun(
    main: Callable[[list[str]], Any], arguments: Sequence[str], folder: Path
) -> tuple[str, str]:
    """Runs a command in two processes, as torchrun does.

    Args:
        main:
            The command, importable by name.
        arguments:
            What it is given.
        folder:
            Where what they print is stored.

    Returns:
        Standard output and standard error of both.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    work = (main, list(arguments), folder, port)
    mp.start_processes(_command, work, 2, start_method="forkserver")
    output, errors = (
        "".join((folder / f"{rank}.{name}").read_text() for rank in range(2))
        for name in ("out", "err")
    )
    return output, errors


def run_script(
    script: Path, arguments: Sequence[str], folder: Path, **environment: str
) -> str:
    """Runs a script as `python SCRIPT` does.

    Args:
        script:
            The script.
        arguments:
            What it is given.
        folder:
            Where it runs.
        environment:
            Added to the environment.

    Returns:
        All that it printed.
    """
    log = folder / f"{script.stem}.log"
    log.unlink(missing_ok=True)
    work = (script, list(arguments), folder, log, environment)
    process = FORKSERVER.Process(target=_script, args=work)
    process.start()
    process.join()
    said = log.read_text()
    assert process.exitcode == 0, said[-6000:]
    return said


def print_to(*paths: Path) -> None:
    """Standard output and standard error go into files, also those of libraries.

    Args:
        paths:
            The file of each, maybe the same.
    """
    for stream, path in zip((sys.stdout, sys.stderr), paths, strict=True):
        with path.open("a") as file:
            os.dup2(file.fileno(), stream.fileno())


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


def _command(
    rank: int,
    main: Callable[[list[str]], Any],
    arguments: list[str],
    folder: Path,
    port: int,
) -> None:
    torch.set_num_threads(1)
    say_as_torchrun(rank, 2)
    os.environ["MASTER_PORT"] = str(port)
    rank_zero_only.rank = rank  # which Lightning reads when it is imported
    print_to(folder / f"{rank}.out", folder / f"{rank}.err")
    main(arguments)


def _script(
    script: Path,
    arguments: list[str],
    folder: Path,
    log: Path,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    print_to(log, log)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
