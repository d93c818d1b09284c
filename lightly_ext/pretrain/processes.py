"""What the processes of a run have in common, on one machine or on several."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.durable import replace_text
from lightly_ext.pretrain.provenance import versions
from lightly_ext.pretrain.resume import options

# Names what torchrun has started a run, in the run's folder.
LAUNCH = ".launch"
# What a launcher, or a user, says to a process of a run on several machines.
RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK")
SHOWN = 3


def gathered(value: Any) -> list[Any]:
    """What every process says, by their ranks; all have to call it.

    Args:
        value:
            Anything that can be pickled.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_machines(num_nodes: int) -> None:
    """Checks that a process knows which of several machines it is on, before others.

    Args:
        num_nodes:
            Number of machines.

    Raises:
        ValueError: If it does not: all would wait for each other.
    """
    if num_nodes > 1 and not any(name in os.environ for name in RANKS):
        raise ValueError(
            f"--trainer.num_nodes {num_nodes}: nothing says which machine this is. "
            "Start the command on all of them with torchrun or srun, or set NODE_RANK "
            "and MASTER_ADDR."
        )
    if int(os.environ.get("NODE_RANK") or 0) > 0 and "RANK" not in os.environ:
        # Lightning takes the first process of each machine for the first of all.
        cast(Any, rank_zero_only).rank = int(os.environ["NODE_RANK"])


def check_alike(trainer: Any) -> None:
    """Checks that all processes train the same: options, images, start, versions.

    Args:
        trainer:
            Trainer of a `Pretraining`, in its setup.

    Raises:
        ValueError: If something differs, with its name, values and machines.
    """
    start = trainer.ckpt_path and Path(trainer.ckpt_path).name
    mine = {**options(trainer), **versions(), "checkpoint to go on from": start}
    mine.pop("data.path", None)  # it may have another name on each machine
    all_hosts, everywhere = zip(*gathered((platform.node(), mine)), strict=True)
    different = [
        _difference(name, [each.get(name) for each in everywhere], all_hosts)
        for name in mine
        if any(each.get(name) != mine[name] for each in everywhere)
    ]
    if different:
        raise ValueError(
            f"The processes of the run differ: {'; '.join(different[:SHOWN])}. All "
            "need the same command, images, output folder and versions."
        )


def _difference(name: str, values: Sequence[Any], hosts: Sequence[str]) -> str:
    one = values[0]
    rank = next(i for i, value in enumerate(values) if value != one)
    return (
        f"{name} is {one} in process 0 on {hosts[0]}, {values[rank]} in process {rank} "
        f"on {hosts[rank]}"
    )


def note_launch(output: Path) -> None:
    """Lets a run that torchrun starts again know itself; all processes call it.

    Args:
        output:
            Folder of the run.
    """
    launches = gathered(_launch())
    lines = dict.fromkeys(filter(None, launches))
    if lines:
        rank_zero_only(replace_text)(output / LAUNCH, "\n".join(lines) + "\n")


def was_relaunched(output: Path) -> bool:
    """Whether the torchrun that starts this process has begun the run in a folder.

    torchrun starts all processes again where one has failed (`--max-restarts`); its
    own count of that is another one on each machine.

    Args:
        output:
            Folder of the run.
    """
    try:
        return _launch() in (output / LAUNCH).read_text().splitlines()
    except FileNotFoundError:
        return False


def _launch() -> str | None:
    """The torchrun that has started this process, and may start others later."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {platform.node()} {os.getppid()}"


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Says in plain words that another process is gone.

    Raises:
        RuntimeError: In place of what torch raises then.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]
        rank = cast(Any, rank_zero_only).rank
        told = RuntimeError(
            f"Process {rank} has lost another process of the run, which has ended or "
            f"does not answer ({reason}). Look for its last words: further up, or in "
            "the output of the other machines (killed for memory, a full disk, a "
            "network that is gone)."
        )
        vars(told).update(vars(error))  # its notes say how to go on
        raise told from error
