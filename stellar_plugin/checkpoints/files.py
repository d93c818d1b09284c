"""Checkpoints from files, folders, the Hugging Face hub and timm."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import (
    _CACHED_NO_EXIST,
    constants,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from stellar_plugin.checkpoints.deepmind import is_deepmind, read_deepmind
from stellar_plugin.checkpoints.timm_models import (
    architecture,
    settings_of,
    weights_of,
)
from stellar_plugin.encoder import NEEDED_KIND, StellarEncoder, is_plain
from stellar_plugin.hub_files import without_transformers
from stellar_plugin.weight_files import (
    CONFIG_NAME,
    check_intact,
    read_json,
    read_tensors,
    write_tensors,
)

# Version of config.json. Raise it when a key changes its meaning, and migrate older
# files in `checked_config`.
SCHEMA_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
HEADS_NAME = "heads.safetensors"
PICKLE_NAME = "pytorch_model.bin"
# Where a pretraining run has its model.
EXPORT_FOLDER = "model"
# What changes the outputs of a model and the shape of no tensor.
NEEDED = ("model_name", "num_queries", "norm_eps", "pos_antialias", "mean", "std")

OFFICIAL_REPO = "microsoft/STELLAR"
OFFICIAL_VARIANTS = ("b8", "b16", "b24", "l16", "h16")
# Where weights lie in our guide and in mmseg's.
LOCAL_FOLDERS = ("checkpoints", "runs", "work_dirs")
WEIGHT_SUFFIXES = (
    *(".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz", ".pkl"),
)
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
    # Of os.path: not raised for texts that are no path at all.
    if os.path.isdir(path):
        return _read_file(_weights_in(path))
    if os.path.isfile(path):
        return _read_file(path)
    name = str(source)
    if name.startswith(TIMM_PREFIX) or timm.is_model(name):
        return _read_timm(name.removeprefix(TIMM_PREFIX))
    if name.removeprefix("stellar-") in OFFICIAL_VARIANTS:
        name, variant = OFFICIAL_REPO, name
    elif is_path(name):
        raise FileNotFoundError(
            f"There is no checkpoint '{source}': it is neither a folder or weight file "
            f"here nor the name of a hub repository.{_beside(path)} Give {SOURCES}."
        )
    return _read_hub(name, variant, hub_kwargs)


def is_path(name: str) -> bool:
    """Whether a name is that of a file or folder, and the hub need not be asked."""
    return (
        name.startswith((".", "~"))
        or name.endswith(WEIGHT_SUFFIXES)
        or name.count("/") != 1
        or name.split("/")[0] in LOCAL_FOLDERS
        or (name != OFFICIAL_REPO and os.path.isdir(name.split("/")[0]))
    )


def _beside(path: Path) -> str:
    """What a name that is not there may have meant."""
    folder = path.parent
    if not os.path.isdir(folder):
        return f" There is no folder '{folder}' either."
    alike = difflib.get_close_matches(path.name, os.listdir(folder), n=1)
    return f" Did you mean '{folder / alike[0]}'?" if alike else ""


def checked_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `Stellar` from the content of a config.json.

    Raises:
        ValueError: If the schema version is not known, or an argument is missing that
            no tensor shows.
    """
    ours = without_transformers(config)
    version = ours.get("schema_version")
    if version is True or version != SCHEMA_VERSION:
        raise ValueError(
            f"'{path}' has schema version {reprlib.repr(version)}, this package reads "
            f"{SCHEMA_VERSION}; install the version of stellar-plugin that wrote it."
        )
    missing = [name for name in NEEDED if name not in ours]
    if missing:
        raise ValueError(
            f"'{path}' has no {', '.join(missing)}, which the weights do not show; "
            "take the file that save_pretrained wrote."
        )
    return {k: v for k, v in ours.items() if k != "schema_version"}


def write_own(
    state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> None:
    """Writes weights by the names of `Stellar`, and its arguments, into a folder."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    write_tensors(state, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def save_encoder(
    encoder: StellarEncoder, config: Mapping[str, Any], method: str, folder: str | Path
) -> None:
    """Writes an encoder that another method has trained, for `read_checkpoint`.

    Args:
        encoder:
            The encoder, without queries.
        config:
            Its arguments and, by the names of `Stellar`, mean and std: all that
            `NEEDED` names but the number of queries.
        method:
            Name of the method, as in `methods.METHODS`.
        folder:
            Where to write; made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    head = {"schema_version": SCHEMA_VERSION, "method": method, "num_queries": 0}
    write_own(state, {**head, **config}, folder)


def _weights_in(folder: Path) -> Path:
    for name in (WEIGHTS_NAME, PICKLE_NAME):
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.glob("*.safetensors") if p.name != HEADS_NAME)
    if len(found) == 1:
        return found[0]
    several = f" It holds {', '.join(p.name for p in found)}." if found else ""
    if (folder / EXPORT_FOLDER / WEIGHTS_NAME).is_file():
        several += f" The model of this run is '{folder / EXPORT_FOLDER}'."
    raise FileNotFoundError(
        f"No {WEIGHTS_NAME} in '{folder}'.{several} Give a folder that save_pretrained "
        f"wrote ({WEIGHTS_NAME} and {CONFIG_NAME}), or a weight file."
    )


def _read_file(path: Path, config: Path | None = None) -> RawCheckpoint:
    config = config or path.parent / CONFIG_NAME
    if is_deepmind(path):
        return RawCheckpoint(path, read_deepmind(path))
    content, metadata = read_tensors(path)
    return RawCheckpoint(
        path, content, metadata, read_json(config) if config.is_file() else {}
    )


def _read_hub(
    repo: str, variant: str | None, hub_kwargs: Mapping[str, Any]
) -> RawCheckpoint:
    with _from_hub(repo):
        if repo == OFFICIAL_REPO:
            names = [_official_file(variant)]
        else:
            middle = f".{variant}" if variant else ""
            names = [f"model{middle}.safetensors", f"pytorch_model{middle}.bin"]
        found = (_download(repo, name, hub_kwargs) for name in names)
        path = next(filter(None, found), None)
        if path is None:
            raise EntryNotFoundError(f"{' and '.join(names)} not found.")
        if repo == OFFICIAL_REPO:
            return _read_file(path)
        config = _download(repo, CONFIG_NAME, hub_kwargs)
        if config and "schema_version" in read_json(config):
            _download(repo, HEADS_NAME, hub_kwargs)
    return _read_file(path, config)


def _download(repo: str, name: str, hub_kwargs: Mapping[str, Any]) -> Path | None:
    """A file of a repository, None where the hub says or said that there is none.

    A lost connection is raised: it does not say that there is none.
    """
    try:
        return Path(hf_hub_download(repo, name, **hub_kwargs))
    except EntryNotFoundError as error:
        unknown = isinstance(error, LocalEntryNotFoundError)
        if unknown and not _known_absent(repo, name, hub_kwargs):
            raise
        return None


def _known_absent(repo: str, name: str, hub_kwargs: Mapping[str, Any]) -> bool:
    """Whether the hub said at an earlier time that a repository has no such file."""
    where = {k: v for k, v in hub_kwargs.items() if k in ("cache_dir", "revision")}
    return try_to_load_from_cache(repo, name, **where) is _CACHED_NO_EXIST


@contextlib.contextmanager
def _from_hub(repo: str) -> Iterator[None]:
    """Makes one error of all that keeps a file from coming, which says what it is.

    Raises:
        FileNotFoundError: If something is raised inside, other than a ValueError.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # those of the network are of several libraries
        raise FileNotFoundError(
            f"'{repo}' is not here, and nothing came from the hub: {error} "
            f"{_remedy(repo, error)}, or download the file yourself and give its path."
        ) from error


def _remedy(repo: str, error: Exception) -> str:
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, GatedRepoError):
        return f"'{repo}' is gated: accept its terms at {page} and `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no {page}, or it is private: check the name, `hf auth login`"
    if isinstance(error, HfHubHTTPError):
        return f"The hub refused ({error.response.status_code}): try again later"
    if isinstance(error, EntryNotFoundError) and not isinstance(
        error, LocalEntryNotFoundError
    ):
        return "Name another variant or repository"
    return (
        "Whether the hub has the file is not known: try again with a connection, "
        f"`hf download {repo}` where there is one and copy what it puts into "
        f"'{constants.HF_HUB_CACHE}' (HF_HUB_CACHE)"
    )


def _official_file(variant: str | None) -> str:
    name = (variant or "").removeprefix("stellar-")
    if name not in OFFICIAL_VARIANTS:
        raise ValueError(
            f"variant of '{OFFICIAL_REPO}' must be one of {OFFICIAL_VARIANTS}, got "
            f"{variant!r}."
        )
    return f"stellar-{name}.safetensors"


def timm_model(name: str) -> nn.Module:
    """A model of timm with timm's weights, without classifier.

    A file in the cache of the hub is taken without asking the hub.

    Args:
        name:
            Its name, with or without the tag of its weights.

    Raises:
        FileNotFoundError: If timm has no such model or no weights of it, or they do not
            come from the hub.
        ValueError: If the file is damaged.
    """
    cfg = weights_of(name)
    overlay: dict[str, Any] = {}
    if cfg.hf_hub_id and not cfg.hf_hub_filename:
        # timm takes a lost connection for a file that is not there, and asks for the
        # next one, each for half a minute.
        cached = try_to_load_from_cache(cfg.hf_hub_id, WEIGHTS_NAME)
        path = Path(cached) if isinstance(cached, str) else None
        if path is None:
            with _from_hub(cfg.hf_hub_id):
                path = _download(cfg.hf_hub_id, WEIGHTS_NAME, {})
        if path is not None:
            check_intact(path)
            overlay = {"file": str(path), "custom_load": False}
    try:
        # With the classifier: timm lets tensors be missing where it is dropped at once.
        model: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay
        )
    except (RuntimeError, HfHubHTTPError, OSError, SafetensorError) as error:
        if overlay:
            raise ValueError(
                f"'{overlay['file']}' does not hold timm's '{name}': {error} Remove it "
                "to have it downloaded again."
            ) from error
        raise FileNotFoundError(
            f"timm gives no weights for '{name}': {error} Download them yourself and "
            "give their path."
        ) from error
    model.reset_classifier(0)
    return model


def _read_timm(name: str) -> RawCheckpoint:
    model = architecture(name)
    if not is_plain(model):  # known before anything is downloaded
        raise ValueError(
            f"timm's '{name}' is a {type(model).__name__}; the encoder needs "
            f"{NEEDED_KIND}."
        )
    model = timm_model(name)
    return RawCheckpoint(Path(name), model.state_dict(), {}, settings_of(model, name))
