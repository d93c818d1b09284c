"""A frozen text tower of open_clip, and embeddings of texts that are computed once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.numerics import numerics_folder, versions
from lightly_ext.evaluate.resumable import DONE, Filled, ResumableArrays
from stellar_plugin.hashes import weights_sha256

EMBEDDINGS = "embeddings"
KNOWN_TEXTS = ("a photo", "Two dogs, one of them asleep, beside a red bicycle.")
PACKAGES = ("stellar-plugin", "torch", "open_clip_torch")
# Texts that are embedded at once.
CHUNK = 512
# Of a CLIP model, but not of the embedding.
NO_PART = ("logit_scale", "logit_bias")
# They name a folder or a hub repository that holds the weights too.
SCHEMAS = ("local-dir:", "hf-hub:")


class TextTower(nn.Module):
    """The text half of a CLIP model, in evaluation mode and without gradients.

    Attributes:
        name:
            Name of the model.
        sha256:
            Hash of the weights of the text half, the same for every file they come in.
        dim:
            Size of the embeddings.
    """

    def __init__(self, name: str, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.name = name
        if hasattr(model, "visual"):
            del model.visual
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.sha256 = weights_sha256(model, without=NO_PART)
        self.dim = int(self(KNOWN_TEXTS).shape[1])

    def train(self, mode: bool = True) -> TextTower:
        """Stays in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts; what is too long for the tower is cut off.

        Args:
            texts:
                The texts.

        Returns:
            Unit vectors, float32 with shape (len(texts), dim).
        """
        device = next(self.model.parameters()).device
        tokens = self.tokenizer(list(texts)).to(device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def load_text_tower(name: str, weights: str | None) -> TextTower:
    """Loads the text half of a CLIP model.

    Args:
        name:
            Name of a model of open_clip; or "local-dir:FOLDER" or "hf-hub:REPOSITORY"
            in open_clip's layout.
        weights:
            Weight file, or open_clip's name of the weights. Not used with a folder or
            a hub repository, which hold their own.

    Raises:
        FileNotFoundError: If the weights are not there or not reachable.
        ValueError: If open_clip has no such model, or the weights are of another one.
    """
    tag = check_text_tower(name, weights)
    if name.startswith(SCHEMAS):
        weights = None
    try:
        model = open_clip.create_model(
            name,
            pretrained=weights,
            require_pretrained=True,
            # open_clip only warns if the activation is not the one of the weights.
            force_quick_gelu=bool(tag.get("quick_gelu")),
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError, UnpicklingError) as error:
        if tag or name.startswith(SCHEMAS[1]):
            raise FileNotFoundError(_unreachable(name, weights, tag, error)) from error
        raise ValueError(
            f"The weights '{weights or name}' cannot be read as those of {name}: "
            f"{error} Needed is a state dict of open_clip's model of that name "
            "(.safetensors, or .pt without foreign objects; of a TorchScript archive "
            "save torch.jit.load(FILE).state_dict())."
        ) from error
    return TextTower(_shown_name(name, tag), model, tokenizer)


def embed_texts(
    devices: Devices, cache: Path, tower: TextTower, texts: Sequence[str]
) -> NDArray[np.float32]:
    """Embeds texts once; continues where an earlier run ended.

    Every process embeds a share; all of them read the same file afterwards.

    Args:
        devices:
            Where it runs.
        cache:
            Folder for what is computed once.
        tower:
            The text tower.
        texts:
            The texts.

    Returns:
        Memory-mapped unit vectors, float32 with shape (len(texts), tower.dim).
    """
    known = {EMBEDDINGS: tower(KNOWN_TEXTS).cpu().numpy()}
    identity = {"text": tower.sha256, "precision": "32-true"}
    place = numerics_folder(cache, devices, identity, known, versions(PACKAGES))
    folder = place / _digest(texts)
    arrays = {EMBEDDINGS: (np.dtype(np.float32), (len(texts), tower.dim))}
    num_chunks = math.ceil(len(texts) / CHUNK)
    stored = ResumableArrays(devices, folder, arrays, num_chunks)
    share = stored.share(stored.todo())
    todo = devices.progress(share, "text embeddings", len(share))

    def steps() -> Iterator[Filled]:
        for i in todo:
            rows = slice(i * CHUNK, (i + 1) * CHUNK)
            values = {EMBEDDINGS: tower(texts[rows]).cpu().numpy()}
            yield Filled(np.array([i]), DONE, rows, values)

    stored.fill(steps())
    devices.fabric.barrier()
    return np.load(folder / f"{EMBEDDINGS}.npy", mmap_mode="r")


def check_text_tower(name: str, weights: str | None) -> dict[str, Any]:
    """What open_clip knows about weights, empty for those of a file or folder.

    Args:
        name:
            As for `load_text_tower`.
        weights:
            As for `load_text_tower`.

    Raises:
        FileNotFoundError: If there is no such file, folder or name of weights.
        ValueError: If open_clip has no such model.
    """
    if name.startswith(SCHEMAS):
        folder = name.removeprefix(SCHEMAS[0])
        if name.startswith(SCHEMAS[0]) and not Path(folder).is_dir():
            raise FileNotFoundError(f"There is no folder '{folder}' for --text_model.")
        return {}
    if name not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no model '{name}'; open_clip.list_models() has all of them."
        )
    tag = get_pretrained_cfg(name, weights) if weights else {}
    if not tag and not (weights and Path(weights).is_file()):
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise FileNotFoundError(
            f"There is no weight file '{weights}' for {name}, and open_clip knows no "
            f"weights of that name; it knows {tags}. Give --text_weights FILE."
        )
    return tag


def _shown_name(name: str, tag: dict[str, Any]) -> str:
    """Name for cards: the same for a file as for its name, without local folders."""
    if name.startswith(SCHEMAS):
        return Path(name.partition(":")[2]).name
    quick = f"{name}-quickgelu"
    return quick if tag.get("quick_gelu") and quick in open_clip.list_models() else name


def _unreachable(
    name: str, weights: str | None, tag: dict[str, Any], error: Exception
) -> str:
    repository = (tag.get("hf_hub") or name.removeprefix(SCHEMAS[1])).strip("/")
    option = f"--text_model {_shown_name(name, tag)} --text_weights FILE"
    if not tag:
        option = "--text_model local-dir:FOLDER, together with open_clip_config.json"
    return (
        f"The weights '{weights or name}' are not reachable: {error} Without a "
        "network, download open_clip_model.safetensors of the hub repository "
        f"'{repository}' elsewhere, copy it here and give {option}."
    )


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"\0{text}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
