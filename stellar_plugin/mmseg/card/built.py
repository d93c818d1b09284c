"""What mmengine built of a config, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from torch import nn

from stellar_plugin.mmseg.weights import inner


def heads(model: Any) -> list[Any]:
    """Decode heads of a segmentor; those of a cascade in their order."""
    head = inner(model).decode_head
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def num_classes(model: Any) -> int:
    """Classes of the last decode head."""
    return int(heads(model)[-1].num_classes)


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
