"""How a model is trained: optimiser, schedule, length, averages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook
from mmengine.optim import LinearLR, PolyLR
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from stellar_plugin.mmseg.card.built import accumulative_counts, heads, optim_wrappers
from stellar_plugin.mmseg.card.described import described, joined, plain

# Settings of an optimiser that change its speed only.
SPEED = {"foreach", "fused", "capturable", "differentiable"}


def optimizer_of(runner: Runner) -> str:
    """The optimiser and its unusual settings."""
    texts = [_one_optimizer(wrapper.optimizer) for wrapper in optim_wrappers(runner)]
    asked = runner.cfg.get("optim_wrapper") or {}
    rules = {k: asked[k] for k in ("constructor", "paramwise_cfg") if asked.get(k)}
    text = " and ".join(dict.fromkeys(texts))
    return f"{text}, by parameter {plain(rules)}" if rules else text


def _one_optimizer(optimizer: torch.optim.Optimizer) -> str:
    usual = inspect.signature(type(optimizer)).parameters
    changed = [
        f"{name} {joined(v) if isinstance(v, (list, tuple)) else v}"
        for name, v in optimizer.defaults.items()
        if name not in {"lr", "weight_decay", *SPEED}
        if name in usual and v != usual[name].default
    ]
    return ", ".join([type(optimizer).__name__, *changed])


def _groups(runner: Runner) -> list[dict[str, Any]]:
    """Groups of the optimiser with something that is trained."""
    groups = [
        group for wrapper in optim_wrappers(runner) for group in wrapper.param_groups
    ]
    return [g for g in groups if any(p.requires_grad for p in g["params"])]


def rates_of(runner: Runner) -> dict[str, Any]:
    """Learning rates and weight decay of the groups that are trained."""
    groups = _groups(runner)
    # Schedulers keep the rate that they scale.
    lrs = [float(f"{g.get('initial_lr', g['lr']):.6g}") for g in groups]
    decays = sorted({g.get("weight_decay", 0.0) for g in groups})
    return {
        "lrs": tuple(sorted(set(lrs), reverse=True)),
        "weight_decay": decays[0] if len(decays) == 1 else f"{joined(decays)}",
    }


def batch_size_of(runner: Runner) -> int:
    """Images of a step of the optimiser, of all processes."""
    loader = runner.train_loop.dataloader
    size = loader.batch_size or loader.batch_sampler.batch_size
    return int(size * get_world_size() * accumulative_counts(runner))


def clip_of(runner: Runner) -> float | str | None:
    """Largest norm of a gradient, other ways of clipping in words."""
    found = [w.clip_grad_kwargs for w in optim_wrappers(runner)]
    kwargs = found[0] if all(kwargs == found[0] for kwargs in found) else found
    if not kwargs:
        return None
    norm = optim_wrappers(runner)[0].grad_name == "grad_norm"
    if norm and isinstance(kwargs, Mapping) and kwargs.keys() == {"max_norm"}:
        return float(kwargs["max_norm"])
    return f"{plain(kwargs)}" if norm else f"by value: {plain(kwargs)}"


def length_of(runner: Runner) -> dict[str, Any]:
    """Epochs, or steps of the optimiser."""
    loop = runner.train_loop
    if isinstance(loop, EpochBasedTrainLoop):
        return {"epochs": loop.max_epochs}
    return {"iterations": -(-loop.max_iters // accumulative_counts(runner))}


def schedule_of(runner: Runner) -> dict[str, Any]:
    """The schedulers in words, and the optimiser's steps of linear warm-up."""
    found = runner.param_schedulers or []
    if isinstance(found, Mapping):
        found = [scheduler for part in found.values() for scheduler in part]
    warm_ups = [s for s in found if isinstance(s, LinearLR) and _is_warm_up(s)]
    texts = [_decay(runner, s) for s in found if s not in warm_ups]
    text = ", ".join(texts) or "constant"
    if not warm_ups:
        return {"schedule": text, "warmup": None}
    first = warm_ups[0]
    low = [] if first.start_factor in (1e-6, 1.0) else [f"from {first.start_factor:g}"]
    # WarmUpLR sets 1 where there would be less than two steps.
    steps = _in_iterations(runner, first, first.end) if first.start_factor < 1 else 0
    warmed = " ".join([f"{text}, after linear warm-up", *low])
    more = [described(s, {"optimizer"}) for s in warm_ups[1:]]
    return {
        "schedule": ", ".join([warmed, *more]),
        "warmup": round(steps / accumulative_counts(runner)),
    }


def _is_warm_up(scheduler: LinearLR) -> bool:
    return bool(scheduler.begin == 0 and scheduler.end_factor == 1.0)


def _in_iterations(runner: Runner, scheduler: Any, step: int) -> int:
    unit = len(runner.train_loop.dataloader) if scheduler.by_epoch else 1
    return int(step * unit)


def _decay(runner: Runner, scheduler: Any) -> str:
    whole = runner.max_epochs if scheduler.by_epoch else runner.max_iters
    if type(scheduler) is not PolyLR or scheduler.end < whole:
        changing = {"optimizer", "last_step", "_global_step", "base_values", "verbose"}
        return described(scheduler, changing | {"_last_value"})
    power = f"polynomial (power {scheduler.power:g})"
    text = "linear" if scheduler.power == 1 else power
    begin = _in_iterations(runner, scheduler, scheduler.begin)
    start = f" from iteration {begin}" if begin else ""
    return f"{text} to {scheduler.eta_min:g}{start}"


def rule_of(runner: Runner) -> str | None:
    """What else decides on the weights."""
    found = []
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            begin = {"begin_iter": hook.begin_iter, "begin_epoch": hook.begin_epoch}
            values = {**hook.ema_cfg, **{k: v for k, v in begin.items() if v}}
            found.append(f"averaged weights {plain(values)}")
    sampler = runner.train_loop.dataloader.sampler
    if getattr(sampler, "shuffle", None) is not True:
        found.append(
            f"training images by {described(sampler, {'dataset', '_dataset'})}"
        )
    norms = {type(m) for m in heads(runner.model)[-1].modules()}
    if get_world_size() > 1 and nn.BatchNorm2d in norms:
        found.append("BatchNorm of each process alone")
    return ", ".join(found) or None
