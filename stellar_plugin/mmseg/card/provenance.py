"""Where the numbers of a run come from: weights, images, precision, versions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import mmseg
import torch
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn

from stellar_plugin.hashes import file_sha256, weights_sha256
from stellar_plugin.mmseg.card.built import optim_wrappers, trained_parameters
from stellar_plugin.mmseg.card.described import described
from stellar_plugin.mmseg.card.reading import Readings, read
from stellar_plugin.mmseg.classes import class_names
from stellar_plugin.mmseg.files import left_out
from stellar_plugin.mmseg.pretrained import PretrainedBackbone
from stellar_plugin.mmseg.weights import inner
from stellar_plugin.protocols import NOT_TOLD

RANDOM = "random weights"
UNKNOWN_WEIGHTS = {"checkpoint": NOT_TOLD, "sha256": NOT_TOLD}


def read_run(runner: Runner) -> Readings:
    """Reads what else a run's training comes from."""
    return read(
        {
            ("parameters", "trained_parameters"): lambda: parameters(runner),
            "seed": lambda: runner.seed,
            "precision": lambda: training_precision(runner),
            "num_train_images": lambda: len(runner.train_dataloader.dataset),
        }
    )


def read_images(runner: Runner, loop: Any, trained: str | None) -> Readings:
    """Reads which images are evaluated, how, and with which packages.

    Args:
        runner:
            Runner with the model.
        loop:
            Its loop of validation or test.
        trained:
            Precision of training, None where there was none.
    """
    return read(
        {
            ("mean", "std"): lambda: normalisation(runner),
            "classes": lambda: class_names(loop.dataloader.dataset),
            "num_images": lambda: len(loop.dataloader.dataset),
            "num_images_left_out": lambda: len(left_out(loop.dataloader.dataset)),
            "images_sha256": lambda: images_sha256(loop.dataloader.dataset),
            "precision": lambda: evaluation_precision(runner, loop, trained),
            "versions": versions,
        }
    )


def weights_origin(runner: Runner) -> dict[str, Any]:
    """Which weights training begins with, by name and hash.

    The hash is that of the file; of weights that no file here holds, "weights" and that
    of the backbone's values. `PretrainedBackbone` says how it read them.
    """
    backbone = inner(runner.model).backbone
    if runner._load_from:
        name = str(runner._load_from)
        sha256 = file_or_weights_sha256(Path(name), backbone)
        return {"checkpoint": name, "sha256": sha256}
    name = _pretrained(runner, backbone)
    if name == RANDOM:
        trained = trained_parameters(runner) & {id(p) for p in backbone.parameters()}
        name = f"trained from {name}" if trained else name
        return {"checkpoint": name, "sha256": None}
    path = Path(getattr(backbone, "weights_path", None) or name)
    origin = {"checkpoint": name, "sha256": file_or_weights_sha256(path, backbone)}
    facts = getattr(backbone, "weights_facts", None)
    return {**origin, "weights": facts} if facts else origin


def tested_weights(runner: Runner) -> dict[str, Any]:
    """Which weights are tested: those of a checkpoint, or those that are in memory."""
    trained = isinstance(runner._train_loop, BaseLoop)
    name = "weights in memory" if trained else str(runner._load_from)
    sha256 = file_or_weights_sha256(Path(name), inner(runner.model))
    return {"tested": name, "tested_sha256": sha256}


def file_or_weights_sha256(path: Path, module: nn.Module) -> str:
    """Hash of a file; where there is none, of what a module has loaded."""
    return file_sha256(path) if path.is_file() else f"weights {weights_sha256(module)}"


def parameters(runner: Runner) -> dict[str, int]:
    """Numbers of parameters: of all, and of those that are trained."""
    found = list(inner(runner.model).parameters())
    trained = trained_parameters(runner)
    return {
        "parameters": sum(p.numel() for p in found),
        "trained_parameters": sum(p.numel() for p in found if id(p) in trained),
    }


def training_precision(runner: Runner) -> str:
    """Precision of training, in the words of `stellar evaluate`."""
    names = set()
    for wrapper in optim_wrappers(runner):
        if isinstance(wrapper, AmpOptimWrapper):
            half = wrapper.cast_dtype in (None, torch.float16)
            names.add("16-mixed" if half else "bf16-mixed")
        elif type(wrapper).__name__ == "ApexOptimWrapper":
            names.add(described(wrapper.opt_level))
        else:
            names.add(parameter_precision(runner))
    return " and ".join(sorted(names))


def evaluation_precision(runner: Runner, loop: Any, trained: str | None) -> str:
    """Precision of validation or test, and of training where that was another."""
    tested = "16-mixed" if getattr(loop, "fp16", False) else parameter_precision(runner)
    return tested if trained in (tested, None) else f"{tested}, trained in {trained}"


def parameter_precision(runner: Runner) -> str:
    """Precision of the parameters."""
    bits = {p.dtype.itemsize * 8 for p in inner(runner.model).parameters()}
    return " and ".join(f"{n}-true" for n in sorted(bits))


def images_sha256(dataset: Any) -> str:
    """SHA-256 of the contents of the images and label files of a set, in its order."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        for name in ("img_path", "seg_map_path"):
            if info.get(name):
                digest.update(file_sha256(Path(info[name])).encode())
    return digest.hexdigest()


def normalisation(runner: Runner) -> dict[str, Any]:
    """Mean and standard deviation that images are normalised with, up to 255."""
    preprocessor = inner(runner.model).data_preprocessor
    return {n: getattr(preprocessor, n).flatten().tolist() for n in ("mean", "std")}


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    return {
        "torch": torch.__version__,
        "mmseg": mmseg.__version__,
        "mmengine": mmengine.__version__,
    }


def _pretrained(runner: Runner, backbone: Any) -> str:
    """Name of the checkpoint that the backbone is initialised with."""
    model = inner(runner.model)
    for init_cfg in (backbone.init_cfg, model.init_cfg):
        found = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or []
        for entry in found:
            if entry.get("type") == "Pretrained":
                return str(entry["checkpoint"])
    asked = runner.cfg["model"].get("module", runner.cfg["model"]).get("backbone", {})
    loaded = asked.get("pretrained") or asked.get("checkpoint_path")
    if loaded:
        return str(loaded)
    known = isinstance(backbone, PretrainedBackbone) or bool(backbone.init_cfg)
    return RANDOM if known else NOT_TOLD
