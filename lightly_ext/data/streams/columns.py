"""Which column of a table holds the images."""

from __future__ import annotations

import json
from typing import Any

from lightly_ext.data.listing import printable


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

    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_image(kind: Any) -> bool:
        if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            return False
        return is_bytes(kind.field("bytes").type)

    columns = {name: schema.field(name).type for name in schema.names}
    for found in (
        [n for n in columns if features.get(n, {}).get("_type") == "Image"],
        [n for n, kind in columns.items() if is_image(kind)],
        [n for n, kind in columns.items() if is_bytes(kind)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{printable(path)} has more than one column of images: "
                f"{', '.join(map(printable, found))}. Write it again with one of them,"
                f" by datasets' `select_columns({found[0]!r})`."
            )
    raise ValueError(
        f"{printable(path)} has no column of images: none is an Image of `datasets`, "
        "has bytes and path, or bytes. There are: "
        f"{', '.join(f'{printable(n)} ({k})' for n, k in columns.items())}."
    )
