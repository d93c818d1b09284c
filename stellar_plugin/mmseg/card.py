"""The protocol card of a run: what the config says, in the words of the protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stellar_plugin.protocols import SegmentationProtocol, segmentation

LOSS_NAMES = {"CrossEntropyLoss": "cross-entropy", "LabelledDiceLoss": "Dice"}
# Fields that training decides on; a test takes them from the checkpoint.
TRAINING_FIELDS = (
    "train_views",
    "train_scale",
    "train_ratio",
    "head",
    "backbone",
    "loss",
    "optimizer",
    "lrs",
    "batch_sizes",
    "weight_decay",
    "clip",
    "epochs",
    "iterations",
    "warmup",
    "schedule",
)


def run_protocol(
    cfg: Mapping[str, Any], part: str = "val", world_size: int = 1
) -> SegmentationProtocol:
    """The protocol that a config follows, with the numbers that it really has.

    Args:
        cfg:
            Config with `evaluation = dict(model=..., data=..., protocol=NAME)`, NAME
            being a constant of `stellar_plugin.protocols.segmentation`, and possibly
            `changes=dict(...)`, fields of the protocol that the config cannot tell.
        part:
            "val" or "test", what is evaluated.
        world_size:
            Number of processes.

    Raises:
        ValueError: If there is no such protocol, or model or data have no name.
    """
    evaluation = cfg["evaluation"]
    if not evaluation.get("data") or not evaluation.get("model"):
        raise ValueError(
            "Name model and data of the result in the config: evaluation = "
            "dict(model='STELLAR ViT-B', data='My set')."
        )
    named = getattr(segmentation, evaluation["protocol"], None)
    if not isinstance(named, SegmentationProtocol):
        raise ValueError(
            f"evaluation.protocol is '{evaluation['protocol']}', which is no protocol "
            "of stellar_plugin.protocols.segmentation."
        )
    train, test = cfg["train_dataloader"], cfg[f"{part}_dataloader"]
    fields = {
        "data": evaluation["data"],
        "limit": smallest(_limit(train["dataset"]), _limit(test["dataset"])),
        **_views(_pipeline(train["dataset"]), _pipeline(test["dataset"])),
        **_model(cfg["model"]),
        **_training(cfg, world_size),
        "evaluation_batch": _evaluation_batch(cfg[f"{part}_evaluator"]),
        **evaluation.get("changes", {}),
    }
    return named.replace(**fields)


def smallest(*limits: int | None) -> int | None:
    """The smallest number of images, None where none is limited."""
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(dataset: Mapping[str, Any]) -> int | None:
    indices: int | Sequence[int] | None = dataset.get("indices")
    return len(indices) if isinstance(indices, Sequence) else indices


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    backbone, head, test = (
        model[name] for name in ("backbone", "decode_head", "test_cfg")
    )
    fields = {
        "features": backbone.get("feature", "dense"),
        "backbone": "frozen" if backbone.get("frozen", True) else "trained",
        "num_classes": head["num_classes"],
        "loss": _loss(head["loss_decode"]),
    }
    if head["type"] != "LinearProbeHead":
        fields["head"] = head["type"]
    if test["mode"] == "slide":
        window = {"crop": test["crop_size"][0], "stride": test["stride"][0]}
        return {**fields, **window, "inference": "sliding window"}
    if model["type"] == "PatchGridSegmentor":
        return fields
    return {**fields, "inference": "whole image", "stride": None}


def _loss(losses: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    parts = [losses] if isinstance(losses, Mapping) else losses
    text = " + ".join(LOSS_NAMES.get(part["type"], part["type"]) for part in parts)
    if len(parts) == 1:
        return text
    weights = " and ".join(f"{part.get('loss_weight', 1.0):g}" for part in parts)
    return f"{text}, weights {weights}"


def _training(cfg: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    wrapper, loader, loop = (
        cfg[name] for name in ("optim_wrapper", "train_dataloader", "train_cfg")
    )
    batch = loader["batch_size"] * world_size * wrapper.get("accumulative_counts", 1)
    schedulers = cfg.get("param_scheduler") or ()
    fractions = [s["fraction"] for s in schedulers if "fraction" in s]
    iterations = loop.get("max_iters")
    return {
        "optimizer": wrapper["optimizer"]["type"],
        "lrs": (wrapper["optimizer"]["lr"],),
        "weight_decay": wrapper["optimizer"].get("weight_decay"),
        "clip": wrapper.get("clip_grad", {}).get("max_norm"),
        "batch_sizes": (batch,),
        "iterations": iterations,
        "epochs": loop.get("max_epochs"),
        "warmup": round(fractions[0] * iterations) if fractions else None,
    }


def _pipeline(dataset: Mapping[str, Any]) -> Sequence[Mapping]:
    """The pipeline of a set, or of the first of several in a wrapper."""
    inner = dataset.get("dataset") or next(iter(dataset.get("datasets", ())), None)
    return _pipeline(inner) if inner else dataset.get("pipeline", ())


def _views(train: Sequence[Mapping], test: Sequence[Mapping]) -> dict[str, Any]:
    """Sizes of both pipelines, by the transforms that have them."""
    crops, cuts = _steps(train), _steps(test)
    resize = cuts.get("Resize", {})
    scale = resize.get("scale", ())
    crop_size = crops.get("RandomCrop", {}).get("crop_size", (None,))
    return {
        "resize": min(scale, default=resize.get("size")),
        "longest": max(scale, default=None),
        "crop": cuts.get("CenterCrop", {}).get("size", crop_size[0]),
        "train_scale": crops.get("RandomResizedCrop", {}).get("scale"),
        "train_ratio": crops.get("RandomResize", {}).get("ratio_range"),
    }


def _steps(pipeline: Sequence[Mapping]) -> dict[str, Mapping[str, Any]]:
    """Transforms by name; of `TorchvisionTransform` by the name of what it applies."""
    return {step.get("name", step["type"]): step for step in pipeline}


def _evaluation_batch(evaluator: Mapping | Sequence[Mapping]) -> int | None:
    metrics = [evaluator] if isinstance(evaluator, Mapping) else evaluator
    return next((m["batch_size"] for m in metrics if "batch_size" in m), None)
