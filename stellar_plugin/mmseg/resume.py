"""A resumed run follows its config, not that of its checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import _ParamScheduler
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from stellar_plugin.mmseg.weights import check_checkpoint, check_file, checkpoint_name

# Where a checkpoint keeps the options that it was trained with.
OPTIONS_KEY = "stellar_options"
OPTIONS = ("train_cfg", "optim_wrapper", "param_scheduler")
WAY_OUT = "Set it back, or start anew: load_from=CHECKPOINT, without --resume."
FIXED = ("train_cfg.type", "optim_wrapper.optimizer.type")


@HOOKS.register_module()
class ResumeByConfigHook(Hook):
    """Applies the length, the schedule and the optimiser's values of the config.

    mmengine loads the states of optimiser and schedulers, and with them the learning
    rate, the weight decay and the end of the schedule that the checkpoint was trained
    with: what the config says now is not applied. With this hook it is, from the
    resumed iteration on just as in a straight run of this config, and one line says
    what changed. Moments of the optimiser are the checkpoint's.
    """

    def before_run(self, runner: Runner) -> None:
        """Checks the file that is resumed from."""
        check_file(runner)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Writes the options beside the weights."""
        checkpoint["meta"][OPTIONS_KEY] = _options(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Puts this config's values into what mmengine is about to load.

        Raises:
            ValueError: If the checkpoint is of another model, optimiser or kind of
                loop, or further than the run is long.
        """
        if not runner._resume:
            return
        meta = checkpoint["meta"]
        known = OPTIONS_KEY in meta
        changed = _changed(meta[OPTIONS_KEY], _options(runner)) if known else {}
        _refuse(runner, checkpoint, changed)
        schedulers: list[_ParamScheduler] = runner.param_schedulers or []
        _advance(schedulers, meta["iter"], meta["epoch"])
        checkpoint["param_schedulers"] = [s.state_dict() for s in schedulers]
        if "optimizer" in checkpoint:
            saved = checkpoint["optimizer"]
            kept = {k: saved[k] for k in ("state", "loss_scaler") if k in saved}
            checkpoint["optimizer"] = {**runner.optim_wrapper.state_dict(), **kept}
        said = ", ".join(f"{k} {old} -> {new}" for k, (old, new) in changed.items())
        nothing = "nothing" if known else "unknown, the checkpoint has no options"
        runner.logger.info(
            f"Resumed at iteration {meta['iter']}; changed: {said or nothing}. From "
            "here on as in a straight run of this config."
        )


def _options(runner: Runner) -> dict[str, Any]:
    """The options that are compared, as plain values by their names."""
    options: dict[str, Any] = {}
    for name in OPTIONS:
        options |= _flat(name, runner.cfg.get(name))
    return options


def _flat(name: str, value: Any) -> dict[str, Any]:
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)) and any(map(_nested, value)):
        items = enumerate(value)
    else:
        return {name: list(value) if isinstance(value, tuple) else value}
    return {k: v for key, x in items for k, v in _flat(f"{name}.{key}", x).items()}


def _nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each option that differs."""
    pairs = {name: (old.get(name), new.get(name)) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _refuse(
    runner: Runner, checkpoint: dict[str, Any], changed: Mapping[str, Any]
) -> None:
    where = f"Cannot resume from '{checkpoint_name(runner)}'"
    for name in FIXED:
        if name in changed:
            old, new = changed[name]
            raise ValueError(
                f"{where}: {name} was {old!r} and is {new!r}, which a resumed run "
                f"cannot change. {WAY_OUT}"
            )
    check_checkpoint(runner, checkpoint)
    ours = runner.optim_wrapper.optimizer.param_groups
    theirs = checkpoint.get("optimizer", {}).get("param_groups", ours)
    if [len(g["params"]) for g in ours] != [len(g["params"]) for g in theirs]:
        raise ValueError(
            f"{where}: other parameters are trained (model.backbone.frozen), which a "
            f"resumed run cannot change. {WAY_OUT}"
        )
    meta, train_cfg = checkpoint["meta"], runner.cfg["train_cfg"]
    for done, name in ((meta["iter"], "max_iters"), (meta["epoch"], "max_epochs")):
        if name in train_cfg and done > train_cfg[name]:
            raise ValueError(
                f"{where}: it has done {done}, and train_cfg.{name} is "
                f"{train_cfg[name]}. Give at least {done}, or start anew."
            )


def _advance(schedulers: list[_ParamScheduler], iterations: int, epochs: int) -> None:
    """Steps fresh schedulers as a run does up to there."""
    per_epoch = iterations // epochs if epochs else iterations + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimiser does not step
        for iteration in range(1, iterations + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch or iteration % per_epoch == 0:
                    scheduler.step()
