"""Whether values can be the arguments of a model, wherever they come from."""

from __future__ import annotations

import difflib
import inspect
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stellar_plugin.state_dict import shown

# Smallest and largest value. Beyond lies a mistake that would be built for minutes, or
# end for lack of memory.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_queries", "reg_tokens", "num_classes"), (0, 2**14)),
    **dict.fromkeys(("embed_dim", "decoder_dim"), (1, 2**15)),
    "decoder_depth": (0, 2**9),
    "depth": (1, 2**9),
    **dict.fromkeys(("num_heads", "decoder_num_heads"), (1, 2**10)),
    **dict.fromkeys(("mlp_ratio", "decoder_mlp_ratio"), (0.01, 64)),
    **dict.fromkeys(("img_size", "patch_size", "grid_size"), (1, 2**14)),
    "in_chans": (3, 3),
    "norm_eps": (0, 1),
    "mean": (0, 1),
    "std": (1e-6, 1),
    "channels": (1, 2**13),
    **dict.fromkeys(("channel_multipliers", "num_blocks"), (1, 64)),
    **dict.fromkeys(("hidden_dim", "output_dim", "latent_dim"), (1, 2**16)),
    **dict.fromkeys(("num_codes", "num_prototypes"), (1, 2**22)),
    **dict.fromkeys(("sinkhorn_iterations", "matching_iterations"), (0, 1000)),
}
LENGTHS = {"mean": 3, "std": 3}


def check_arguments(
    values: Mapping[str, Any], *owners: type, taken: Sequence[str] = ()
) -> None:
    """Checks names, types and ranges by the annotations of constructors.

    Args:
        values:
            Arguments by name.
        owners:
            Classes that take them, the first that knows a name decides; or a TypedDict
            with the names and their types.
        taken:
            Names that are not for the caller to give.

    Raises:
        ValueError: If an argument is unknown, of another type, not finite or out of
            range; names all of them.
    """
    hints: dict[str, Any] = {}
    for owner in owners:
        hints = {**_hints(owner), **hints}
    hints = {name: hint for name, hint in hints.items() if name not in taken}
    problems = [_problem(name, value, hints) for name, value in values.items()]
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError(f"{shown(found)}.")


def _hints(owner: type) -> dict[str, Any]:
    if typing.is_typeddict(owner):
        return typing.get_type_hints(owner)
    constructor: Callable[..., None] = owner.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(constructor)
    return {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(constructor).parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }


def _problem(name: Any, value: Any, hints: Mapping[str, Any]) -> str:
    """What is wrong with one argument, "" if nothing is."""
    if name not in hints:
        close = difflib.get_close_matches(str(name), hints, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        return f"{reprlib.repr(name)} is no argument{hint}"
    if not _fits(value, hints[name]):
        return f"{name} must be {_words(hints[name])}, got {reprlib.repr(value)}"
    values = value if isinstance(value, (list, tuple)) else [value]
    low, high = RANGES.get(name, (-sys.float_info.max, sys.float_info.max))
    numbers = [v for v in values if isinstance(v, (int, float))]
    if not all(low <= number <= high for number in numbers):
        allowed = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        return f"{name} must be {allowed}, got {reprlib.repr(value)}"
    if len(values) != LENGTHS.get(name, len(values)):
        return f"{name} must have {LENGTHS[name]} values, got {reprlib.repr(value)}"
    return ""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, a list of JSON for a tuple, is of the type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value is part or value == part for part in parts)
    if origin is tuple and parts[-1] is not Ellipsis:
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(parts)
            and all(map(_fits, value, parts))
        )
    if origin in (tuple, list, Sequence):
        return isinstance(value, (list, tuple)) and all(
            _fits(item, parts[0]) for item in value
        )
    if origin is type:
        return isinstance(value, type)
    if hint in (Callable, typing.Callable) or origin is Callable:
        return callable(value)
    if isinstance(value, bool):  # is an int to Python
        return hint is bool
    return isinstance(value, (int, float) if hint is float else origin or hint)


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is typing.Literal:
        return ", ".join(map(repr, parts))
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"a list of {len(parts)} {_words(parts[0])}"
    if origin in (tuple, list, Sequence):
        return f"a list of {_words(parts[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    words |= {str: "a text", type(None): "None", dict: "a dictionary"}
    return words.get(origin or hint, str(hint))
