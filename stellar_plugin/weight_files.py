"""Files of tensors and settings: read without running what is in them, or refused."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stellar_plugin.state_dict import shown

CONFIG_NAME = "config.json"  # beside a weight file
# Where our timm exports say what their tensors do not.
METADATA_KEY = "stellar_plugin"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_REASON = 300
PEEK = 64  # bytes that tell what a file is not; weights have more


@contextlib.contextmanager
def parsing(path: Path, what: str) -> Iterator[None]:
    """Makes one error of all that parsers raise where the bytes are not what they read.

    Args:
        path:
            The file, for the error.
        what:
            What it is read as.

    Raises:
        ValueError: If something is raised inside, other than for lack of permission.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found and found[1].startswith("mmengine."):
            raise ValueError(
                f"'{path}' is the checkpoint of a run of mmengine: test it by mim test "
                "--checkpoint, or go on from it by --cfg-options load_from=PATH. What "
                "is asked for here are the weights that it began with; its own would "
                "be those under 'backbone.' in its state_dict, saved as safetensors."
            ) from error
        raise ValueError(
            f"'{path}' is damaged, or no file of tensors alone"
            + (f": it holds {found[1]}. " if found else ". ")
            + "Such objects are not unpickled, since that runs code; where you trust "
            "the file, save its state_dict as safetensors."
        ) from error
    except Exception as error:  # what it is depends on the bytes
        reason = f"{error}"[:MAX_REASON] or type(error).__name__
        raise ValueError(
            f"'{path}' cannot be read as {what}: {reason}. It is damaged, cut short or "
            "of another format; copy or download it again."
        ) from error


def read_tensors(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Content of a weight file and, for safetensors, its metadata.

    Raises:
        ValueError: If the file is empty, cut short, of another format or a pickle with
            objects other than tensors and plain containers.
    """
    check_intact(path)
    if path.suffix == ".safetensors":
        with parsing(path, "safetensors"), safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    with (
        parsing(path, "a PyTorch file"),
        torch.serialization.safe_globals(_harmless(path)),
    ):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"'{path}' holds a {type(content).__name__} instead of named tensors; save "
            "a state_dict."
        )
    return content, {}


class _Nothing:
    """In the place of an object of a file that is not made: takes all, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _harmless(path: Path) -> list[Any]:
    """Types of a PyTorch file that may stand beside its tensors.

    MAE and DINO save their arguments; a Namespace is a plain bag of values.
    lightly-train saves the model as an object, too, of which nothing is made.
    """
    types: list[Any] = [argparse.Namespace]
    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if any(name.startswith("lightly_train.") for name in names):
            types += [(_Nothing, name) for name in names]
    return types


def told_settings(path: Path) -> dict[str, Any]:
    """What a weight file, or the config.json beside it, tells of its model.

    Raises:
        ValueError: If one of them is not what its name says.
    """
    check_intact(path)
    config = path.parent / CONFIG_NAME
    told = read_json(config) if config.is_file() else {}
    if path.suffix == ".safetensors":
        with parsing(path, "safetensors"), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        with parsing(path, "safetensors"):
            told |= json.loads(metadata.get(METADATA_KEY, "{}"))
    return told


def check_intact(path: Path) -> None:
    """Refuses what lies in the place of weights when copying them went wrong.

    Raises:
        ValueError: If the file is empty, a few bytes, a web page, a pointer of git-lfs
            or cut short.
    """
    with path.open("rb") as file:
        start = file.read(PEEK)
    text = start.lstrip().lower()
    again = "download or copy it again"
    if text.startswith(b"version https://git-lfs"):
        problem = "is a pointer of git-lfs, not the file: get that by `git lfs pull`"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = "is a web page, not weights: download it from the file's own address"
    elif len(start) < PEEK:
        problem = f"has {len(start)} bytes: {again}" if start else f"is empty: {again}"
    elif start.startswith(b"PK") and not zipfile.is_zipfile(path):
        problem = f"is cut short: {again}"
    else:
        return
    raise ValueError(f"'{path}' {problem}.")


def write_tensors(
    state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file that others may read as any other file of the user.

    Args:
        state:
            Contiguous tensors by name.
        path:
            The file.
        metadata:
            Texts beside the tensors.
    """
    save_file(dict(state), path, {"format": "pt", **(metadata or {})})
    # safetensors makes a file for the user alone.
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file with a JSON object.

    Raises:
        ValueError: If it is no JSON, or no object.
    """
    with parsing(path, "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(
            f"'{path}' holds no JSON object, but {type(content).__name__}."
        )
    return content


def usable(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, if a model can compute with them.

    Args:
        state:
            Tensors by name.
        path:
            The file that they are from, for the error.

    Raises:
        ValueError: If one is not of real numbers, empty or not finite.
    """
    reasons = {name: _unusable(tensor) for name, tensor in state.items()}
    wrong = [f"{name} {reason}" for name, reason in reasons.items() if reason]
    if wrong:
        raise ValueError(
            f"'{path}' holds tensors that no model can use: {shown(wrong)}. Take an "
            "earlier checkpoint, or save the weights again as float32."
        )
    result = {}
    storages = set()
    for name, tensor in state.items():
        own = tensor.detach().contiguous()
        if own.untyped_storage().data_ptr() in storages:
            own = own.clone()  # else training changes two parameters at once
        storages.add(own.untyped_storage().data_ptr())
        result[name] = own
    return result


def _unusable(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return "is sparse or without values"
    if tensor.dtype not in FLOATS:
        return f"is {str(tensor.dtype).removeprefix('torch.')}"
    if not tensor.numel():
        return f"is empty, {tuple(tensor.shape)}"
    return "" if tensor.isfinite().all() else "is not finite"
