"""What mmengine built of a config, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import nn

from stellar_plugin.mmseg.metric import BatchJaccard
from stellar_plugin.mmseg.segmentor import PatchGridSegmentor
from stellar_plugin.mmseg.weights import inner


def heads(model: Any) -> list[Any]:
    """Decode heads of a segmentor; those of a cascade in their order."""
    head = inner(model).decode_head
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def num_classes(model: Any) -> int:
    """Classes of the last decode head."""
    return int(heads(model)[-1].num_classes)


def other_heads(model: Any) -> list[Any]:
    """Heads beside the last that training compares with the labels as they are."""
    auxiliary = getattr(inner(model), "auxiliary_head", None) or []
    found = [*heads(model)[:-1]]
    if not isinstance(inner(model), PatchGridSegmentor):  # which does not use them
        found += auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
    stock = BaseDecodeHead.loss_by_feat
    return [head for head in found if getattr(type(head), "loss_by_feat", 0) is stock]


def num_label_classes(head: Any) -> int:
    """Classes of a head's labels: two where one channel and a threshold tell them."""
    return 2 if getattr(head, "out_channels", None) == 1 else int(head.num_classes)


def unscored(runner: Runner) -> set[str]:
    """Splits of which predictions are only written."""
    loops = {"val": runner._val_loop, "test": runner._test_loop}
    return {
        name
        for name, loop in loops.items()
        if isinstance(loop, BaseLoop)
        if all(getattr(m, "format_only", False) for m in loop.evaluator.metrics)
    }


def compared_with_original(runner: Runner, split: str) -> bool:
    """Whether labels are compared with predictions as large as the original image.

    mmsegmentation's models give such, and its metric compares pixel by pixel.
    """
    loop = {"val": runner._val_loop, "test": runner._test_loop}.get(split)
    kind = type(inner(runner.model))
    return (
        isinstance(loop, BaseLoop)
        and getattr(kind, "predict", None) is EncoderDecoder.predict
        and kind.postprocess_result is EncoderDecoder.postprocess_result
        and any(isinstance(m, IoUMetric | BatchJaccard) for m in loop.evaluator.metrics)
    )


def built_datasets(runner: Runner) -> dict[str, Any]:
    """Data sets of the loops that are built, by the name of the split."""
    loops = {n: getattr(runner, f"_{n}_loop") for n in ("train", "val", "test")}
    return {
        name: loop.dataloader.dataset
        for name, loop in loops.items()
        if isinstance(loop, BaseLoop)
    }


def optim_wrappers(runner: Runner) -> list[OptimWrapper]:
    """The wrappers of the optimisers, mostly one."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return list(wrapper.values())
    return [wrapper]


def accumulative_counts(runner: Runner) -> int:
    """Iterations of a step of the optimiser."""
    return int(only([w._accumulative_counts for w in optim_wrappers(runner)]))


def only(values: Sequence[Any]) -> Any:
    """The value that all have.

    Raises:
        ValueError: If there are several.
    """
    (value,) = dict.fromkeys(values)
    return value


def trained_parameters(runner: Runner) -> set[int]:
    """Identities of the parameters that training changes.

    They require a gradient and are in a group of the optimiser whose learning rate is
    not 0.
    """
    return {
        id(parameter)
        for wrapper in optim_wrappers(runner)
        for group in wrapper.param_groups
        if group.get("initial_lr", group["lr"])
        for parameter in group["params"]
        if parameter.requires_grad
    }
