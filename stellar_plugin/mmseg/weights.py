"""Whether a checkpoint holds all of a segmentor, and what becomes of the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule, BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint
from torch import Tensor, nn

from stellar_plugin.checkpoints.names import State, part
from stellar_plugin.state_dict import misfits, shown, unwrapped
from stellar_plugin.weight_files import check_intact

# Where the metadata of a state_dict keep the settings of a module, and its arguments.
SETTINGS_KEY, ARGUMENTS_KEY = "settings", "arguments"
WAY_OUT = (
    "Tests and resumed runs take all weights or none: use the config that they were "
    "trained with, or train by load_from, which takes what fits."
)


class WholeModule(BaseModule):
    """A module that is tested with all of its weights, or not at all.

    mmengine loads what fits and only logs the rest, so that a test of another model's
    checkpoint scores random weights. A module that `init_weights` has seen is about to
    be trained and may start from a part of a checkpoint; any other, as `mim test` and
    mmseg's inference API make them, must find all of its tensors there, and the
    settings that they were trained with.
    """

    def settings(self) -> dict[str, Any]:
        """Arguments that change the output and the shape of no tensor."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """What `adopt` needs."""
        return {}

    def adopt(self, arguments: Mapping[str, Any]) -> None:
        """Follows the arguments of a checkpoint where the config leaves them open."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy is loaded by who made it: EMAHook, which averages what is trained.
        self._is_init = True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep)
        # As torch keeps the version of a module there, beside the tensors.
        metadata = getattr(destination, "_metadata", {})
        of_this = metadata.setdefault(prefix[:-1], {})
        of_this[SETTINGS_KEY] = self.settings()
        of_this[ARGUMENTS_KEY] = self.arguments()

    def _load_from_state_dict(
        self, state: State, prefix: str, metadata: Mapping[str, Any], *args: Any
    ) -> None:
        if not self.is_init:
            self.adopt(metadata.get(ARGUMENTS_KEY, {}))
        found = problems(self, part(state, prefix), {"": metadata})
        if not self.is_init:
            _check_finite("The checkpoint", part(state, prefix))
        if found and not self.is_init:
            raise ValueError(
                f"The checkpoint does not fit this {type(self).__name__}; {found}. "
                f"{WAY_OUT}"
            )
        super()._load_from_state_dict(state, prefix, metadata, *args)


def check_file(runner: Runner) -> None:
    """Says of a checkpoint file that is none what it is, before anything is loaded.

    A run that resumes takes its last checkpoint from its own work directory, also where
    that was moved or copied.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not what a run wrote.
    """
    if runner._resume and runner._load_from is None:
        _take_latest(runner)
    name = runner._load_from
    if name is None or "://" in name:
        return
    if not Path(name).is_file():
        what = "is a folder" if Path(name).is_dir() else "does not exist"
        raise FileNotFoundError(
            f"The checkpoint '{name}' {what}; give the file that a run of this config "
            "wrote, such as work_dirs/CONFIG/iter_40000.pth."
        )
    check_intact(Path(name))


def _take_latest(runner: Runner) -> None:
    folder = Path(runner.work_dir)
    named = find_latest_checkpoint(str(folder))
    if named is None or "://" in named:
        return
    beside = folder / Path(named).name
    if beside.is_file() and beside.resolve() != Path(named).resolve():
        runner.logger.warning(
            f"'{folder / 'last_checkpoint'}' names '{named}', of another work "
            f"directory: '{beside}' is taken."
        )
        runner._load_from = str(beside)
    elif Path(named).is_file():
        runner._load_from = named
    else:
        raise FileNotFoundError(
            f"'{folder / 'last_checkpoint'}' names the checkpoint '{named}', which "
            "does not exist: write the path of another one into it, or delete it and "
            "start anew."
        )


def check_checkpoint(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Compares a checkpoint with the model that is about to load it.

    Names of wrappers are taken out of the checkpoint's names.

    Args:
        runner:
            A run that trains, resumes or tests.
        checkpoint:
            Content of the file, changed in place.

    Raises:
        ValueError: If something is missing, left over, of another shape or trained with
            other settings and the run tests or resumes; if nothing fits at all, or if
            a value is not finite.
    """
    path = checkpoint_name(runner)
    model = inner(runner.model)
    state, metadata = _take_state(checkpoint)
    for name, module in model.named_modules():
        if isinstance(module, WholeModule) and not module.is_init:
            module.adopt(metadata.get(name, {}).get(ARGUMENTS_KEY, {}))
    ours = model.state_dict()
    fits = [n for n in ours if n in state and state[n].shape == ours[n].shape]
    if not fits:
        raise ValueError(
            f"'{path}' holds nothing of this model: its tensors are called "
            f"{shown(list(state)) or 'nothing, it has none'}. Give the checkpoint of a "
            "segmentor, such as work_dirs/CONFIG/iter_40000.pth; weights of a backbone "
            "alone belong to --cfg-options model.backbone.init_cfg.checkpoint=PATH."
        )
    # A head for training alone may be left out of a test.
    parts = dict(model.named_children())
    state = {k: v for k, v in state.items() if k.split(".")[0] in parts}
    _check_finite(f"'{path}'", state)
    found = problems(model, state, metadata)
    training = isinstance(runner._train_loop, BaseLoop) and not runner._resume
    if found and not training:
        raise ValueError(f"'{path}' is not of this model; {found}. {WAY_OUT}")
    if found:
        runner.logger.warning(
            f"'{path}' gives {len(fits)} of the {len(ours)} tensors of this model, the "
            f"others stay as initialised; {found}."
        )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with NaN or infinity."""
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def _check_finite(what: str, state: State) -> None:
    if wrong := not_finite(state):
        raise ValueError(
            f"{what} holds values that are not finite, in {shown(wrong)}: its training "
            "diverged. Take an earlier one, or train with a lower learning rate."
        )


def checkpoint_name(runner: Runner) -> str:
    """The checkpoint that a run loads: the one it names, or its own latest."""
    return str(runner._load_from or find_latest_checkpoint(runner.work_dir))


def inner(model: Any) -> Any:
    """The segmentor inside the wrappers of distributed and of augmented tests."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _take_state(checkpoint: dict[str, Any]) -> tuple[State, Mapping[str, Any]]:
    """Tensors and their metadata, which mmengine gets without names of wrappers."""
    content = checkpoint.get("state_dict", checkpoint)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    state: Any = OrderedDict(unwrapped(tensors))
    state._metadata = getattr(content, "_metadata", OrderedDict())
    checkpoint["state_dict"] = state
    return state, state._metadata


def problems(
    module: nn.Module, state: State, metadata: Mapping[str, Mapping[str, Any]]
) -> str:
    """Which tensors and settings do not fit a module, in words.

    Args:
        module:
            The module.
        state:
            Tensors by its names.
        metadata:
            Metadata of the state_dict, by the names of submodules.

    Returns:
        What does not fit, "" if all does.
    """
    # Older norms do not count, and mmengine does not miss it.
    expected = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name in state or not name.endswith("num_batches_tracked")
    }
    found = [misfits(expected, state)]
    for name, child in module.named_modules():
        if isinstance(child, WholeModule):
            theirs = metadata.get(name, {}).get(SETTINGS_KEY, {})
            found += [
                f"{name}.{key}".lstrip(".") + f" is {value}, was {theirs[key]}"
                for key, value in child.settings().items()
                if theirs.get(key, value) != value
            ]
    return "; ".join(filter(None, found))
