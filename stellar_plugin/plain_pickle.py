"""Pickles read as plain data: no class of theirs is imported, no function is called."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMBERS = re.compile(r"[fiu][1248]|b1")


class Inert:
    """In the place of an object of a file: keeps what it would be made of.

    Attributes:
        origin: Name of its class or function in the file.
        fields: Names of what it holds, if it is a named tuple whose class tells them.
        held: Arguments of its constructor, then what its state would be.
    """

    origin = "an object"
    fields: tuple[str, ...] = ()
    held: tuple[Any, ...]

    def __new__(cls, *held: Any, **named: Any) -> Inert:
        """Keeps the arguments."""
        self = object.__new__(cls)
        self.held = (*held, named) if named else held
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.held = (*self.held, state)


class Array(Inert):
    """An array of numpy, of which nothing is made yet."""

    origin = "numpy.ndarray"

    def tensor(self) -> Tensor:
        """Makes a tensor of it.

        Raises:
            ValueError: If it does not hold plain numbers, as many as its shape says.
        """
        state = self.held[-1] if self.held else None
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array has no content")
        _, shape, dtype, columns_first, data = state
        if not isinstance(dtype, DType) or not isinstance(data, bytes):
            raise ValueError("an array does not hold plain numbers")
        if not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
            raise ValueError(f"an array has the shape {shape!r:.50}")
        flat = np.frombuffer(data, dtype.numbers())
        if any(n < 0 for n in shape) or flat.size != np.prod(shape, dtype=object):
            raise ValueError(f"an array of shape {shape!r:.50} has {flat.size} numbers")
        array = flat.reshape(shape, order="F" if columns_first else "C")
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(array, native, order="C"))


class DType(Inert):
    """A type of numpy's numbers."""

    origin = "numpy.dtype"

    def numbers(self) -> np.dtype[Any]:
        """The type.

        Raises:
            ValueError: If it is none of plain numbers.
        """
        name = self.held[0] if self.held else None
        if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
            raise ValueError(f"an array holds {name!r:.50}, no plain numbers")
        state = self.held[-1]
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"numbers have the byte order {order!r:.50}")
        return np.dtype(f"{order}{name}")


def read_pickle(path: Path) -> Any:
    """Content of a pickle: containers, numbers, texts, and `Inert` for all else.

    Raises:
        Exception: What `pickle` raises where the bytes are no pickle.
    """
    with path.open("rb") as file:
        return _Unpickler(file).load()


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """A dictionary, what a mapping class was made of, or a named tuple by its fields.

    Args:
        value:
            Of a file that `read_pickle` has read.

    Returns:
        The values by their names, None if it is nothing like that.
    """
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, Inert):
        return None
    if value.fields and len(value.fields) == len(value.held):
        return dict(zip(value.fields, value.held, strict=True))
    mappings = [held for held in value.held if isinstance(held, Mapping)]
    return mappings[0] if len(mappings) == 1 else None


class _Bytes(Inert):
    """What protocol 2 writes bytes as: a text in latin1."""

    def __new__(cls, text: Any, encoding: Any = "") -> Any:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("bytes are not written as latin1")
        return text.encode("latin1")


class _NamedTuple(Inert):
    """What dill writes in the place of the class of a named tuple."""

    def __new__(cls, name: Any, fields: Any, *_: Any) -> Any:
        if not isinstance(fields, tuple) or not all(isinstance(f, str) for f in fields):
            raise pickle.UnpicklingError("a named tuple has no names")
        return _inert(f"{name!s:.50}", fields)


_PLAIN: dict[str, type[Inert]] = {
    "_codecs.encode": _Bytes,
    "dill._dill._create_namedtuple": _NamedTuple,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy.dtype": DType,
}


def _inert(origin: str, fields: tuple[str, ...] = ()) -> type[Inert]:
    return type("Inert", (Inert,), {"origin": origin, "fields": fields})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Inert]:
        """Of whatever a file names, a class of ours: what it makes does nothing."""
        origin = f"{module}.{name}"
        return _PLAIN.get(origin) or _inert(origin)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of the file")
