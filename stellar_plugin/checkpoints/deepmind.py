"""DeepMind's checkpoints of BYOL: pickles of Haiku's dictionaries of arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stellar_plugin.plain_pickle import Array, Inert, as_mapping, read_pickle
from stellar_plugin.weight_files import PEEK, parsing

STATE = "experiment_state"
# What DeepMind's own evaluation reads, and what it leaves.
ONLINE, TARGET = "online_params", "target_params"
ONLINE_STATE = "online_state"
# The state is a named tuple; where its class is told by name alone, its fields are not.
STATE_CLASS = "byol.byol_experiment._ByolExperimentState"
FIELDS = (ONLINE, TARGET, ONLINE_STATE, "target_state", "opt_state")


def is_deepmind(path: Path) -> bool:
    """Whether a file begins as DeepMind's do: a pickle whose first name is `STATE`."""
    with path.open("rb") as file:
        start = file.read(PEEK)
    return start.startswith(b"\x80") and STATE.encode() in start


def read_deepmind(path: Path) -> dict[str, Any]:
    """Content of a file: the arrays of the online network by Haiku's names with dots.

    Nothing of the pickle is run, see `plain_pickle`.

    Raises:
        ValueError: If it is damaged, or holds something else.
    """
    with parsing(path, "a pickle of DeepMind's"):
        content = read_pickle(path)
    try:
        state = _state(content)
        tensors = dict(_tensors(state, ONLINE)) | dict(_tensors(state, ONLINE_STATE))
    except ValueError as error:
        raise ValueError(
            f"'{path}' is no checkpoint of BYOL that can be read: {error}. Classes of "
            "a pickle are not made, since that runs code; take DeepMind's own file, or "
            "convert it where you trust it, to torchvision's names, and read that with "
            """--model_kwargs '{"padding": "same"}'."""
        ) from error
    left = {str(name): None for name in content if name != STATE}
    return {ONLINE: tensors, TARGET: None, **left}


def _state(content: Any) -> Mapping[Any, Any]:
    value = content.get(STATE) if isinstance(content, Mapping) else content
    if isinstance(value, Inert) and value.origin == STATE_CLASS:
        return dict(zip(FIELDS, value.held, strict=False))
    state = as_mapping(value)
    if state is None:
        raise ValueError(f"its {STATE} is {_described(value)}")
    return state


def _tensors(state: Mapping[Any, Any], field: str) -> Iterator[tuple[str, Tensor]]:
    """Arrays of a dictionary of modules, all by their names."""
    modules = as_mapping(state.get(field))
    if modules is None:
        raise ValueError(f"its {field} are {_described(state.get(field))}")
    for module, value in modules.items():
        arrays = as_mapping(value)
        if arrays is None:
            raise ValueError(f"{field} of {module!s:.50} are {_described(value)}")
        for name, array in arrays.items():
            full = f"{module}.{name}".replace("/~/", ".").replace("/", ".")
            if not isinstance(array, Array):
                raise ValueError(f"{full:.80} is {_described(array)}, no array")
            yield full, array.tensor()


def _described(value: Any) -> str:
    return f"a {value.origin:.80}" if isinstance(value, Inert) else type(value).__name__
