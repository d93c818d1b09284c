"""Tensors from files, folders, the Hugging Face hub and timm, never by unpickling."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

# Version of config.json. Raise it when a key changes its meaning, and migrate older
# files in `read_config`.
SCHEMA_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
HEADS_NAME = "heads.safetensors"
PICKLE_NAME = "pytorch_model.bin"

OFFICIAL_REPO = "microsoft/STELLAR"
OFFICIAL_VARIANTS = ("b8", "b16", "b24", "l16", "h16")
TIMM_PREFIX = "timm:"
SOURCES = (
    "a file, a folder, "
    + ", ".join(f"'stellar-{name}'" for name in OFFICIAL_VARIANTS)
    + ", the name of a hub repository ('owner/name') or 'timm:NAME'"
)


@dataclass(frozen=True)
class RawCheckpoint:
    """What a source holds, as it is named there.

    Attributes:
        path:
            The weight file, or the name where there is none.
        content:
            Tensors by name, possibly inside dictionaries such as "model".
        metadata:
            Texts that a safetensors file carries beside its tensors.
        config:
            The config.json beside the file, or what timm knows of the model.
    """

    path: Path
    content: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def read_source(
    source: str | Path, variant: str | None = None, **hub_kwargs: Any
) -> RawCheckpoint:
    """Reads a checkpoint from wherever it is. An existing path wins.

    Args:
        source:
            File, folder, hub repository, short name of a released model, or timm model.
        variant:
            Which file of a hub repository, for example "b16" of "microsoft/STELLAR".
        hub_kwargs:
            revision, cache_dir, token, local_files_only, force_download.

    Raises:
        FileNotFoundError: If there is nothing of that name, or the hub cannot be
            reached.
        ValueError: If the file cannot be read, or `variant` does not exist.
    """
    path = Path(source)
    if path.is_dir():
        return _read_file(_weights_in(path))
    if path.is_file():
        return _read_file(path)
    name = str(source)
    if name.startswith(TIMM_PREFIX) or timm.is_model(name):
        return _read_timm(name.removeprefix(TIMM_PREFIX))
    if name.removeprefix("stellar-") in OFFICIAL_VARIANTS:
        name, variant = OFFICIAL_REPO, name
    if path.is_absolute() or path.suffix or name.count("/") != 1:
        raise FileNotFoundError(
            f"There is no checkpoint '{source}': it is neither a folder or weight file "
            f"here nor the name of a hub repository. Give {SOURCES}."
        )
    return _read_hub(name, variant, hub_kwargs)


def read_config(path: Path) -> dict[str, Any]:
    """Reads the arguments of `Stellar` from a config.json.

    Args:
        path:
            The file.

    Raises:
        ValueError: If it is no JSON or of a schema version that is not known.
    """
    return checked_config(_read_json(path), path)


def checked_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `Stellar` from the content of a config.json.

    Raises:
        ValueError: If the schema version is not known.
    """
    version = config.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"'{path}' has schema version {version}, this package reads "
            f"{SCHEMA_VERSION}; install the version of stellar-plugin that wrote it."
        )
    return {name: value for name, value in config.items() if name != "schema_version"}


def read_tensors(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Content of a weight file and, for safetensors, its metadata.

    Raises:
        ValueError: If the file is empty, cut short, of another format or a pickle with
            objects other than tensors and plain containers.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"'{path}' is empty; download or copy it again.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        # MAE and DINO save their arguments beside the weights; a Namespace is a plain
        # bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"'{path}' is damaged, or no file of tensors alone"
            + (f": it holds {found[1]}. " if found else ". ")
            + "Such objects are not unpickled, since that runs code; where you trust "
            "the file, save its state_dict as safetensors."
        ) from error
    except (RuntimeError, EOFError, BadZipFile, KeyError, ValueError) as error:
        raise ValueError(
            f"'{path}' cannot be read as a PyTorch file: {error}. It is damaged, cut "
            "short or of another format."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"'{path}' holds a {type(content).__name__} instead of named tensors; save "
            "a state_dict."
        )
    return content, {}


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            tensors: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' cannot be read, it is no safetensors file or cut short: {error}."
        ) from error


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.glob("*.safetensors") if p.name != HEADS_NAME)
    if len(found) == 1:
        return found[0]
    several = f" It holds {', '.join(p.name for p in found)}." if found else ""
    raise FileNotFoundError(
        f"No {WEIGHTS_NAME} in '{folder}'.{several} Give a folder that save_pretrained "
        f"wrote ({WEIGHTS_NAME} and {CONFIG_NAME}), or a weight file."
    )


def _read_file(path: Path) -> RawCheckpoint:
    content, metadata = read_tensors(path)
    config = path.parent / CONFIG_NAME
    return RawCheckpoint(
        path, content, metadata, _read_json(config) if config.is_file() else {}
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds no JSON object.")
    return content


def _read_hub(
    repo: str, variant: str | None, hub_kwargs: Mapping[str, Any]
) -> RawCheckpoint:
    def download(name: str) -> Path:
        return Path(hf_hub_download(repo, name, **hub_kwargs))

    try:
        if repo == OFFICIAL_REPO:
            return _read_file(download(_official_file(variant)))
        path = _download_first(download, variant)
        for name in (CONFIG_NAME, HEADS_NAME):
            try:
                download(name)
            except EntryNotFoundError:
                continue
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"'{repo}' is not here, and nothing came from the hub: {error} Download "
            "the file yourself and give its path."
        ) from error
    return _read_file(path)


def _download_first(download: Any, variant: str | None) -> Path:
    middle = f".{variant}" if variant else ""
    try:
        return download(f"model{middle}.safetensors")
    except EntryNotFoundError:
        return download(f"pytorch_model{middle}.bin")


def _official_file(variant: str | None) -> str:
    name = (variant or "").removeprefix("stellar-")
    if name not in OFFICIAL_VARIANTS:
        raise ValueError(
            f"variant of '{OFFICIAL_REPO}' must be one of {OFFICIAL_VARIANTS}, got "
            f"{variant!r}."
        )
    return f"stellar-{name}.safetensors"


def _read_timm(name: str) -> RawCheckpoint:
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"timm gives no weights for '{name}': {error} Download them yourself and "
            "give their path."
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"timm's '{name}' is a {type(model).__name__}; the encoder needs a plain "
            "VisionTransformer such as 'vit_base_patch16_224'."
        )
    block: Any = model.blocks[0]
    norm: Any = model.norm
    data = timm.data.resolve_data_config({}, model=model)
    config = {
        "num_heads": block.attn.num_heads,
        "activation": type(block.mlp.act).__name__,
        "norm_eps": norm.eps,
        "pos_antialias": True,
        "grid_size": tuple(model.patch_embed.grid_size),
        "mean": list(data["mean"]),
        "std": list(data["std"]),
    }
    return RawCheckpoint(Path(name), model.state_dict(), {}, config)
