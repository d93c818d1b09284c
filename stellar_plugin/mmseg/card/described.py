"""Objects of a config in words: the class and what it is set to."""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Where files are, what is counted while it runs, what other settings say again.
UNSAID = {
    *("file_client_args", "backend_args", "training", "resize", "aug", "keymap_back"),
    *("_scope_", "_dataset_meta", "collect_device", "collect_dir", "results"),
    *("output_dir", "format_only", "prefix", "init_cfg"),
}
DEPTH = 6  # of settings in settings
MOST_VALUES = 64  # of an array that is written out


def described(thing: Any, without: Set[str] = frozenset()) -> str:
    """An object as text: the name of its class, and its settings that are not None.

    The same settings give the same text, in every process and at every time.

    Args:
        thing:
            Transform, loss, head, metric, scheduler, sampler, ...
        without:
            Names of settings that are said elsewhere.
    """
    return _described(thing, UNSAID | without, DEPTH)


def settings(thing: Any) -> dict[str, Any]:
    """What an object is set to, by name: its attributes.

    A module's without tensors; its parts only where nothing else says what it is.
    """
    if isinstance(thing, nn.Module):
        public = {k: v for k, v in vars(thing).items() if not k.startswith("_")}
        return public if public.keys() - UNSAID else dict(thing.named_children())
    return dict(getattr(thing, "__dict__", {}))


def texts(
    thing: Any, without: Set[str] = frozenset(), depth: int = DEPTH
) -> dict[str, str]:
    """The settings of an object that are not None, each as text.

    Args:
        thing:
            Transform, loss, head, preprocessor, ...
        without:
            Names of settings that are said elsewhere.
        depth:
            Of settings in settings.
    """
    found = {
        key: value
        for key, value in sorted(settings(thing).items())
        if key not in without and value is not None
    }
    return {k: _value(v, without, depth - 1) for k, v in found.items()}


def is_like(thing: Any, kind: type, *unsaid: str, **values: Any) -> bool:
    """Whether an object is of this class and set to these values, else as by default.

    Args:
        thing:
            Transform, loss, ...
        kind:
            The class; subclasses do not count.
        unsaid:
            Names of settings that are not compared.
        values:
            Arguments of the class.
    """
    if type(thing) is not kind:
        return False
    mine, usual = settings(thing), settings(kind(**values))
    return all(mine[k] == usual[k] for k in mine.keys() - UNSAID - {*unsaid})


def joined(items: Sequence[Any]) -> str:
    """Texts or numbers as "a, b and c"."""
    texts = [f"{x:g}" if isinstance(x, float) else str(x) for x in items]
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def plain(value: Any) -> Any:
    """Mappings and sequences of a config as plain ones."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _described(thing: Any, without: Set[str], depth: int) -> str:
    name = type(thing).__name__
    if depth == 0:
        return name
    parts = [f"{k}={v}" for k, v in texts(thing, without, depth).items()]
    return f"{name}({', '.join(parts)})" if parts else name


def _value(value: Any, without: Set[str], depth: int) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, (bool, int, str, bytes, type(None), Path, torch.dtype)):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _array(np.asarray(torch.as_tensor(value).cpu()))
    if isinstance(value, Mapping):
        items = [(k, v) for k, v in value.items() if k not in without]
        pairs = [f"{k}: {_value(v, without, depth)}" for k, v in items]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_value(v, without, depth) for v in value)})"
    if isinstance(value, Set):
        return f"({', '.join(sorted(_value(v, without, depth) for v in value))})"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return _described(value, without, depth)


def _array(values: np.ndarray) -> str:
    if values.size <= MOST_VALUES:
        return str(values.tolist())
    digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:8]
    return f"array of shape {values.shape}, {digest}"
