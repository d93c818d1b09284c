"""Which columns of a table hold the images, and their classes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lightly_ext.data.listing import printable

# Names of columns, and of fields in JSON, that hold the class of an image.
LABEL_NAMES = ("label", "labels", "class", "cls", "target")


def image_column(schema: Any, path: str) -> str:
    """Finds the column of images.

    That is the one that `datasets` noted as such, else the one that looks like its
    images, a struct of bytes and path, else the one of bytes.

    Args:
        schema:
            `pyarrow.Schema` of a file.
        path:
            The file, for messages.

    Returns:
        Its name.

    Raises:
        ValueError: If there is none, or more than one.
    """
    from pyarrow import types

    features = _features(schema)

    def is_bytes(kind: Any) -> bool:
        tests = (types.is_binary, types.is_large_binary, types.is_binary_view)
        return any(test(kind) for test in tests)

    def is_image(kind: Any) -> bool:
        if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            return False
        return is_bytes(kind.field("bytes").type)

    columns = {name: schema.field(name).type for name in schema.names}
    for found in (
        [n for n in columns if _type(features.get(n)) == "Image"],
        [n for n, kind in columns.items() if is_image(kind)],
        [n for n, kind in columns.items() if is_bytes(kind)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{printable(path)} has more than one column of images: "
                f"{', '.join(map(printable, found))}. Write it again with one of them,"
                f" by datasets' `remove_columns({found[1:]!r})`."
            )
    raise ValueError(
        f"{printable(path)} has no column of images: none is an Image of `datasets`, "
        "has bytes and path, or bytes. There are: "
        f"{', '.join(f'{printable(n)} ({k})' for n, k in columns.items())}."
    )


def label_column(schema: Any, path: str) -> tuple[str, list[str] | None]:
    """Finds the column of classes.

    That is the one that `datasets` noted as `ClassLabel`, else the one of whole numbers
    or texts that is named one of `LABEL_NAMES`. Of several the one named `label`.

    Args:
        schema:
            `pyarrow.Schema` of a file.
        path:
            The file, for messages.

    Returns:
        Its name, and the names of its numbers where `datasets` noted them.

    Raises:
        ValueError: If there is none, or more than one.
    """
    from pyarrow import types

    features = _features(schema)
    found = [n for n in schema.names if _type(features.get(n)) == "ClassLabel"]
    if not found:
        kinds = {name: schema.field(name).type for name in schema.names}
        tests = (types.is_integer, types.is_string, types.is_large_string)
        found = [
            n for n in LABEL_NAMES if n in kinds and any(t(kinds[n]) for t in tests)
        ]
    if len(found) > 1 and LABEL_NAMES[0] in found:
        found = [LABEL_NAMES[0]]
    if len(found) == 1:
        return found[0], features.get(found[0], {}).get("names")
    if found:
        raise ValueError(
            f"{printable(path)} has more than one column of classes: "
            f"{', '.join(map(printable, found))}. Name the right one "
            f"'{LABEL_NAMES[0]}', by datasets' `rename_column`."
        )
    raise ValueError(
        f"{printable(path)} has no column of classes: none is a ClassLabel of "
        f"`datasets`, or has numbers or texts and the name {' or '.join(LABEL_NAMES)}. "
        f"There are: {', '.join(map(printable, schema.names))}."
    )


def check_class_names(schemas: Iterable[tuple[str, Any]]) -> None:
    """Refuses files whose numbers of classes mean different ones.

    Args:
        schemas:
            Files, with their `pyarrow.Schema`.

    Raises:
        ValueError: If `datasets` noted other names of classes in one than in another.
    """
    first, expected = "", None
    for path, schema in schemas:
        features = _features(schema).items()
        found = {n: f["names"] for n, f in features if _type(f) == "ClassLabel"}
        if expected is None:
            first, expected = path, found
        if found != expected:
            raise ValueError(
                f"{printable(first)} and {printable(path)} do not name the same "
                "classes in the same order, so that a number means one in this file "
                "and another one in that. Write both again with one ClassLabel, by "
                "datasets' `cast_column`."
            )


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` noted of the columns."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return noted.get("info", {}).get("features", {})


def _type(feature: Any) -> str | None:
    """Name of what `datasets` noted a column as; lists and structs have none."""
    return feature.get("_type") if isinstance(feature, dict) else None
