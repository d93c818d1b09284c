"""What a segmentor consists of, and what of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mmengine.model import BaseDataPreprocessor
from mmengine.runner import Runner
from mmseg.models.losses import CrossEntropyLoss
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stellar_plugin.mmseg.backbone import StellarViT
from stellar_plugin.mmseg.card.built import heads, trained_parameters
from stellar_plugin.mmseg.card.described import (
    UNSAID,
    described,
    is_like,
    joined,
    texts,
)
from stellar_plugin.mmseg.head import LinearProbeHead
from stellar_plugin.mmseg.loss import LabelledDiceLoss
from stellar_plugin.mmseg.segmentor import PatchGridSegmentor
from stellar_plugin.mmseg.weights import WAY_OUT, inner
from stellar_plugin.state_dict import shown

# Settings of a head that other fields say, or that follow from the features.
HEAD_UNSAID = {
    *("in_channels", "num_classes", "out_channels", "in_index", "input_transform"),
    *("conv_seg", "dropout"),
}
# Settings of a head and a preprocessor that a test may have its own of: how images and
# labels are padded, what only training does, and norms, whose tensors are compared.
OWN_OF_A_TEST = {
    *("size", "size_divisor", "pad_val", "seg_pad_val", "batch_augments", "test_cfg"),
    *("pad_value", "pad_size_divisor"),
    *("dropout_ratio", "ignore_index", "sampler", "norm_cfg"),
}


def settings_of(model: Any) -> dict[str, str]:
    """All that preprocessor and decode heads are set to, as text by name."""
    preprocessor, usual = model.data_preprocessor, vars(BaseDataPreprocessor())
    own = {k: v for k, v in vars(preprocessor).items() if k not in usual}
    buffers = preprocessor.named_buffers()  # mean and std, in no checkpoint
    own |= {name: values.flatten().float() for name, values in buffers}
    public = SimpleNamespace(**{k.removeprefix("_"): v for k, v in own.items()})
    found = {f"data_preprocessor.{k}": v for k, v in texts(public).items()}
    for number, head in enumerate(heads(model)):
        name = "decode_head" if model.decode_head is head else f"decode_head.{number}"
        found |= {f"{name}.{k}": v for k, v in texts(head, UNSAID).items()}
    return found


def check_settings(path: str, model: Any, trained: Mapping[str, str]) -> None:
    """Compares preprocessor and decode heads with those that were trained.

    Args:
        path:
            The checkpoint, for the error.
        model:
            The segmentor that is about to load it.
        trained:
            `settings_of` the one that was trained, empty where it is not told.

    Raises:
        ValueError: If a setting that changes the output is another.
    """
    here = settings_of(model)
    changed = [
        f"{name} is {here.get(name)}, was {trained.get(name)}"
        for name in sorted({*here, *trained} if trained else ())
        if name.rpartition(".")[2] not in OWN_OF_A_TEST
        if here.get(name) != trained.get(name)
    ]
    if changed:
        raise ValueError(f"'{path}' is not of this model; {shown(changed)}. {WAY_OUT}")


def features_of(model: Any) -> str:
    """Which maps of the backbone the last head reads."""
    head, backbone = heads(model)[-1], model.backbone
    feature = getattr(backbone, "feature", "maps")
    if getattr(backbone, "has_last_map_alone", False):
        return str(feature)
    blocks = tuple(getattr(backbone, "out_indices", ()))
    one = isinstance(head.in_index, int)
    index = [head.in_index] if one else head.in_index
    direct = blocks and getattr(model, "neck", None) is None
    chosen = [blocks[i] for i in index] if direct else index
    how = f", {head.input_transform}" if head.input_transform else ""
    return f"{feature} {joined(chosen)}{how}"


def head_of(model: Any) -> str:
    """Neck and decode heads in words."""
    neck = [described(model.neck)] if getattr(model, "neck", None) is not None else []
    return ", ".join([*neck, *map(_one_head, heads(model))])


def _one_head(head: Any) -> str:
    sampler = getattr(head, "sampler", None)
    if not isinstance(head, LinearProbeHead) or sampler is not None:
        return described(head, HEAD_UNSAID | {n for n, _ in _loss_parts(head)})
    norm = type(head.norm).__name__
    norm = "BatchNorm" if isinstance(head.norm, _BatchNorm) else norm
    first = [] if norm == "Identity" else [norm]
    dropout = [f"dropout {head.dropout_ratio:g}"] if head.dropout_ratio else []
    one = [f"one logit, threshold {head.threshold:g}"] if head.threshold else []
    return ", ".join([*first, *dropout, "1 x 1 convolution", *one])


def _loss_parts(head: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in head.named_children() if n.startswith("loss")]


def losses_of(model: Any) -> str:
    """Losses of all heads, auxiliary ones by their name."""
    texts = [_loss(model, head) for head in heads(model)]
    auxiliary = getattr(model, "auxiliary_head", None)
    if auxiliary is not None and not isinstance(model, PatchGridSegmentor):
        parts = auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
        texts += [f"auxiliary {type(h).__name__}: {_loss(model, h)}" for h in parts]
    return "; ".join(texts)


def _loss(model: nn.Module, head: nn.Module) -> str:
    modules = [m for _, m in _loss_parts(head)]
    parts = [
        part
        for module in modules
        for part in (module if isinstance(module, nn.ModuleList) else [module])
    ]
    if not parts:
        raise AttributeError(f"{type(head).__name__} has no module named loss...")
    # The paper's family averages over labelled patches.
    labelled = isinstance(model, PatchGridSegmentor)
    text = " + ".join(_one_loss(part, labelled) for part in parts)
    weights = [float(getattr(part, "loss_weight", 1.0)) for part in parts]
    word = "weights" if len(parts) > 1 else "weight"
    return text if weights == [1.0] else f"{text}, {word} {joined(weights)}"


def _one_loss(loss: nn.Module, labelled: bool) -> str:
    for kind, usual, name in (
        (CrossEntropyLoss, {"avg_non_ignore": labelled}, "cross-entropy"),
        (LabelledDiceLoss, {}, "Dice"),
    ):
        if is_like(loss, kind, "loss_weight", **usual):
            return name
    return described(loss, {"loss_weight"})


def backbone_of(runner: Runner) -> str:
    """What of everything but the decode heads is trained."""
    model, trained = inner(runner.model), trained_parameters(runner)
    backbone = model.backbone
    used = [id(p) for p in backbone.parameters()]
    if trained.isdisjoint(used):
        backbone.train()  # as training is about to
        moving = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
        if any(m.training and m.track_running_stats for m in moving):
            return "frozen but for the statistics of BatchNorm"
        return "frozen"
    frozen = [name for name in _frozen(backbone, trained) if name not in _unread(model)]
    return f"trained but for {', '.join(frozen)}" if frozen else "trained"


def _unread(model: Any) -> set[str]:
    """Parts of a STELLAR encoder that its features do not depend on."""
    backbone = model.backbone
    if not isinstance(backbone, StellarViT):
        return set()
    depth, last = len(backbone.encoder.vit.blocks), backbone.out_indices[-1]
    blocks = {f"encoder.vit.blocks.{i}" for i in range(last + 1, depth)}
    heads = {"encoder.dense_proj", "encoder.sparse_proj"}
    return blocks | heads if backbone.feature == "dense" else blocks


def _frozen(module: nn.Module, trained: set[int], prefix: str = "") -> list[str]:
    """The largest parts of a module that are not trained."""
    own = dict(module.named_parameters(prefix.rstrip("."), recurse=False))
    names = [name for name, p in own.items() if id(p) not in trained]
    for name, child in module.named_children():
        parameters = {id(p) for p in child.parameters()}
        if parameters and parameters.isdisjoint(trained):
            names.append(f"{prefix}{name}")
        else:
            names += _frozen(child, trained, f"{prefix}{name}.")
    return names
