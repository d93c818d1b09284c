"""Names of tensors in files: without wrappers, and which do not fit a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

# Modules around others, wherever they stand: DistributedDataParallel, torch.compile,
# FullyShardedDataParallel and activation checkpointing.
WRAPPING = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
# An error with thousands of keys helps nobody.
MAX_KEYS_SHOWN = 8


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes the names of wrapping modules out of those of tensors.

    Raises:
        ValueError: If that gives two tensors the same name.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = ".".join(part for part in name.split(".") if part not in WRAPPING)
        if new in result:
            raise ValueError(
                f"Two tensors are called {new} without wrappers, one of them '{name}'; "
                "save one model alone."
            )
        result[new] = tensor
    return result


def shown(values: Sequence[object], most: int = MAX_KEYS_SHOWN) -> str:
    """The first values as text, and how many more there are."""
    more = len(values) - most
    text = ", ".join(map(str, values[:most]))
    return f"{text} and {more} more" if more > 0 else text


def misfits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Names the tensors that are missing, left over or of another shape.

    Args:
        expected:
            Tensors of the module.
        state:
            Tensors of the file.

    Returns:
        What does not fit, "" if all do.
    """
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{kind}: {shown(names)}" for kind, names in problems.items() if names
    )
