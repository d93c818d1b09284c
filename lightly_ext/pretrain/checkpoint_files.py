"""Checkpoint files of a run: checked by themselves, found again."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from lightly_ext.durable import finish_replacing
from lightly_ext.pretrain.processes import was_relaunched
from lightly_ext.pretrain.signals import was_requeued

CHECKPOINT = re.compile(r"step_(\d{8,})-([0-9a-f]{16})\.ckpt")
LAST, BEST = "last.ckpt", "best.ckpt"
CHUNK = 1 << 22
ANOTHER = "Choose the --output of a run."

say = rank_zero_only(print)


def checkpoint_to_start_from(
    output: Path, resume: bool, method: str = "stellar"
) -> Path | None:
    """Where a run in a folder starts: a checkpoint, or None for step 0.

    A `model/` that a kill left between two renames is put back.

    Args:
        output:
            Folder of the run.
        resume:
            Whether to continue the run in it. A job that Slurm runs again, and what
            torchrun starts again, continue it without being asked, if there is one.
        method:
            Name of the method that is to be trained.

    Raises:
        FileExistsError: If the folder holds a run that is not to be continued.
        FileNotFoundError: If there is none to continue.
        ValueError: If the checkpoints are damaged, of another program or method.
    """
    names = ("config.yaml", "checkpoints", "model")
    found = [name for name in names if (output / name).exists()]
    again = was_requeued() or was_relaunched(output)
    resume = resume or (bool(found) and again)
    if not resume and found:
        raise FileExistsError(
            f"'{output}' holds a run already ({', '.join(found)}); continue it with "
            "--resume or choose another --output."
        )
    if not resume:
        return None
    rank_zero_only(finish_replacing)(output / "model")
    checkpoint = newest_complete(output / "checkpoints")
    if checkpoint is not None:
        _require_method(checkpoint, method)
    elif "config.yaml" in found and not (output / "model").exists():
        say(f"The run in '{output}' has no checkpoint yet: it starts at step 0.")
    else:
        raise FileNotFoundError(
            f"Nothing to resume: there is no checkpoint in '{output / 'checkpoints'}'. "
            "Start without --resume, into a folder without a run."
        )
    return checkpoint


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint that last.ckpt names, the newest complete one if it is damaged.

    Says so where it is not the first; the checksums decide.

    Args:
        folder:
            Folder of checkpoints.

    Returns:
        The file, None if there is no checkpoint at all.

    Raises:
        ValueError: If all are damaged.
    """
    last = folder / LAST
    paths = [last] if os.path.lexists(last) else []
    named = last.resolve()
    paths += [path for path in step_checkpoints(folder) if path.resolve() != named]
    damaged: list[str] = []
    for path in paths:
        if (damage := damage_of(path)) is None:
            if path != last:
                trouble = "; ".join(damaged) or f"there is no '{last}'"
                say(f"Resumes from '{path}', the newest complete one: {trouble}.")
            return path.resolve()
        link = f", a link to '{os.readlink(path)}'," if path.is_symlink() else ""
        damaged.append(f"'{path}'{link} {damage}")
    if damaged:
        raise ValueError(
            f"No checkpoint is complete: {'; '.join(damaged)}. Copy a file back from "
            "elsewhere, or start from the exported weights with another --output and "
            f"--model.weights={folder.parent / 'model'}."
        )
    return None


def step_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with step and checksum in their name, newest first."""
    found = [path for path in folder.glob("*.ckpt") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime))[::-1]


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is.

    Its content is compared with the checksum in its name, and where there is none, with
    the checksums that its zip records carry.
    """
    if not path.exists():
        return "does not exist"
    match = CHECKPOINT.fullmatch(path.resolve().name)
    if match is not None:
        same = _sha256(path).startswith(match[2])
        return None if same else f"is damaged (its SHA-256 does not start {match[2]})"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return f"cannot be read ({error})"
    return None if damaged is None else f"is damaged (checksum of {damaged})"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _require_method(path: Path, method: str) -> None:
    """Checks that a complete checkpoint is one of `stellar pretrain`, of a method."""
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=True)
        names = set(content["hyper_parameters"])
    except Exception as error:  # of any unpickling, and of any other content
        raise ValueError(
            f"'{path}' is whole, but no checkpoint of `stellar pretrain` "
            f"({type(error).__name__}). {ANOTHER}"
        ) from error
    # Those without the name of a method are STELLAR's.
    theirs = content.get("method", "stellar")
    if "method" not in content and not {"model", "head", "loss"} <= names:
        raise ValueError(
            f"'{path}' is whole, but of another program: its hyper-parameters are "
            f"{sorted(names)}. {ANOTHER}"
        )
    if theirs != method:
        raise ValueError(
            f"The run in '{path.parent.parent}' trains by the method '{theirs}' and "
            f"cannot go on with '{method}'. Resume it with its own config.yaml, or "
            "start a new run with another --output."
        )
