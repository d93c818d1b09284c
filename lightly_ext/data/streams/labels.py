"""Classes of the images in shards: in files beside them, columns, or folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightly_ext.data.listing import printable
from lightly_ext.data.streams.columns import LABEL_NAMES, label_column
from lightly_ext.data.streams.shards import (
    CLASS_SUFFIXES,
    ArrowShard,
    Shard,
    TarShard,
    sample_key,
)

CLASS, JSON = CLASS_SUFFIXES


class Labels(NamedTuple):
    """Classes of images.

    Attributes:
        numbers: Class of each image.
        classes: Sorted names of the classes, each of which has an image.
    """

    numbers: list[int]
    classes: tuple[str, ...]


def read_labels(shards: Sequence[Shard], shown: Callable[[int], str]) -> Labels:
    """Reads the classes of all images.

    In a tar they are in a file `KEY.cls` beside `KEY.jpg`, a whole number or a text,
    else in `KEY.json` by one of `LABEL_NAMES`; where no image has either, the first
    folder of its name is its class, as in a folder of images. Of tables see
    :func:`label_column`.

    Args:
        shards:
            Tars, or arrow files.
        shown:
            Name of an image by its number, for messages.

    Raises:
        ValueError: If an image has no class, or columns are ambiguous.
        OSError: If a shard cannot be read.
    """
    tars = [shard for shard in shards if isinstance(shard, TarShard)]
    values = _of_tars(tars) if tars else _of_tables(shards)
    names = [_name(value) for value in values]
    if None in names:
        index = names.index(None)
        got = values[index]
        raise ValueError(
            f"{printable(shown(index))} has no class, got {printable(repr(got))}: "
            "expected a whole number from 0, or a text. Of a tar that is KEY.cls "
            f"beside KEY.jpg, KEY.json with {' or '.join(LABEL_NAMES)}, or else all "
            "images lie in the folders of their classes. Test parts often keep their "
            "labels back: take a labelled part."
        )
    classes = sorted(set(filter(None, names)))  # as text, like the names of folders
    numbers = {name: number for number, name in enumerate(classes)}
    return Labels([numbers[str(name)] for name in names], tuple(classes))


def _name(value: Any) -> str | None:
    """Name of a class; None for what is none, as -1 where labels are kept back."""
    text = str(value).strip() if isinstance(value, int | str) else ""
    is_negative = text[:1] == "-" and text[1:].isdecimal()
    return None if is_negative or not text else text


def _of_tars(shards: Sequence[TarShard]) -> list[Any]:
    said = [_said(shard) for shard in shards]
    names = [[shard.name(i) for i in range(len(shard))] for shard in shards]
    for suffix in (CLASS, JSON):
        found = [
            files.get(sample_key(name) + suffix)
            for files, of_shard in zip(said, names, strict=True)
            for name in of_shard
        ]
        if suffix == JSON:
            found = _fields(found)
        if any(value is not None for value in found):
            return found
    folders = [name.rpartition("/")[0] for of_shard in names for name in of_shard]
    return [folder.removeprefix("./").split("/")[0] for folder in folders]


def _said(shard: TarShard) -> dict[str, Any]:
    """What is in the files of classes of a tar, by their names."""
    said: dict[str, Any] = {}
    with open(shard.path, "rb") as tar:
        for file in shard.listing.classes:
            tar.seek(file.start)
            text = tar.read(file.num_bytes).decode(errors="backslashreplace")
            key = sample_key(file.name)
            name = key + file.name[len(key) :].lower()
            if said.setdefault(name, text) != text:
                raise ValueError(
                    f"{printable(shard.path)} has {printable(file.name)} more than "
                    "once, with different contents: give every sample a name of its "
                    "own."
                )
    return said


def _fields(texts: Sequence[str | None]) -> list[Any]:
    """The field of records that tells the class, None where there is none."""
    records = [{} if text is None else _record(text) for text in texts]
    known = {name for record in records for name in record}
    found = [name for name in LABEL_NAMES if name in known]
    if len(found) > 1:
        raise ValueError(
            f"The classes may be in {', '.join(found)} of the files {JSON}: leave one "
            f"of them, or write files {CLASS}, which go first."
        )
    return [record.get(found[0]) if found else None for record in records]


def _record(text: str) -> Mapping[str, Any]:
    """What is in a JSON file; nothing in one that is broken."""
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _of_tables(shards: Sequence[Shard]) -> list[Any]:
    values: list[Any] = []
    kinds = dict[bool, str]()
    for shard in shards:
        assert isinstance(shard, ArrowShard), "parquet is read through arrow files"
        column, classes = label_column(shard.table.schema, shard.path)
        kinds.setdefault(classes is None, shard.path)
        if len(kinds) > 1:
            raise ValueError(
                f"{printable(kinds[False])} names its classes, by a ClassLabel of "
                f"`datasets`, and {printable(kinds[True])} does not: write both alike."
            )
        known = dict(enumerate(classes or ()))
        # What is no class of theirs, -1 or None, stays as it is.
        values += [known.get(v, v) for v in shard.table[column].to_pylist()]
    return values
