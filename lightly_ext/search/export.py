"""`stellar export`: the tokens of an index as a table that other tools read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from lightly_ext.durable import replacing
from lightly_ext.evaluate.command_line import command_parser, parse
from lightly_ext.evaluate.options import check_new_file
from lightly_ext.search.entries import Entries
from lightly_ext.search.image_index import ImageIndex
from lightly_ext.search.places import open_index
from lightly_ext.search.regions import crop_place, pixel_boxes
from lightly_ext.search.store import import_lancedb
from stellar_plugin.visualize import ABSENT_PATCHES
from stellar_plugin.wording import counted

# Says in a file who wrote it, and what made its vectors: the card of the index.
CARD = b"stellar_index"
ROWS_AT_ONCE = 8192


def main(argv: Sequence[str]) -> None:
    """Runs `stellar export`.

    Args:
        argv:
            Its arguments.

    Raises:
        OptionError: If there is no such option, or its value is of another kind.
    """
    parser = command_parser(
        "stellar export", "Writes the tokens of an index as a table: a row per token."
    )
    parser.add_argument("index", help="Folder of the index; with --server its name.")
    parser.add_function_arguments(run_export, skip={"index"})
    run_export(**parse(parser, argv, run_export))


def run_export(
    index: str,
    output: str,
    to: Literal["parquet"] = "parquet",
    server: str | None = None,
) -> None:
    """Writes the tokens of an index as a table, as a whole or not at all.

    A row is a token of an image: image (its file, relative to the folder of the
    images), label (the first folder of that, null without), token (its number), mass
    (its share of the patches), absent (whether that is less than half a patch), x0, y0,
    x1, y1 (edges of the box around the patches that have at least half of its maximum,
    px of the file as it is seen; null if it is nowhere), width and height of the image
    (px), vector (float32, of unit length). Parts without a vector, of images that have
    fewer clusters than others, have no row.

    Args:
        index:
            Folder of the index; with --server its name.
        output:
            File for the table. An earlier export is replaced, any other file is not.
        to:
            Format of the table.
        server:
            URL of the Qdrant server that has the index.

    Raises:
        FileNotFoundError: If there is no such index, or no folder for the file.
        FileExistsError: If there is another file.
        ValueError: If the index is empty or cannot be read.
        OSError: If the file cannot be written.
    """
    import_lancedb()
    path = Path(output)
    _check_output(path)
    opened = open_index(index, server)
    if not len(opened):
        raise ValueError(
            f"The index in '{opened.place}' has no image: `stellar index` puts images "
            "there."
        )
    rows = write_parquet(opened, path)
    size = path.stat().st_size
    what = f"{counted(rows, 'token')} of {counted(len(opened), 'image')}"
    text = f"{output}: {what}, {size / 1e6:.1f} MB."
    left_out = len(opened) * opened.card.num_tokens - rows
    if left_out:
        text += f" {counted(left_out, 'part')} that images do not have: left out."
    print(text)


def write_parquet(index: ImageIndex, path: Path) -> int:
    """Writes all tokens of an index, see `run_export`; memory holds some of them.

    Args:
        index:
            The index.
        path:
            The file.

    Returns:
        The number of rows.
    """
    import pyarrow.parquet

    schema, rows = _schema(index), 0
    images_at_once = max(1, ROWS_AT_ONCE // index.card.num_tokens)
    with replacing(path) as new, pyarrow.parquet.ParquetWriter(new, schema) as writer:
        for entries in index.blocks(images_at_once):
            table = pyarrow.Table.from_pydict(_columns(index, entries), schema)
            writer.write_table(table)
            rows += len(table)
    return rows


def _schema(index: ImageIndex) -> Any:
    import pyarrow as pa

    numbers = ("x0", "y0", "x1", "y1", "width", "height")
    return pa.schema(
        {
            "image": pa.string(),
            "label": pa.string(),
            "token": pa.int32(),
            "mass": pa.float32(),
            "absent": pa.bool_(),
            **dict.fromkeys(numbers, pa.int32()),
            "vector": pa.list_(pa.float32(), index.card.dim),
        },
        metadata={CARD: index.card.to_json()},
    )


def _columns(index: ImageIndex, entries: Entries) -> dict[str, Any]:
    import pyarrow as pa

    card = index.card
    maps = entries.maps.unflatten(2, card.grid_size)
    boxes = torch.stack(
        [
            pixel_boxes(image, crop_place(card, size), size)
            for image, size in zip(maps, entries.sizes, strict=True)
        ]
    )
    image, token = entries.tokens.any(dim=2).nonzero(as_tuple=True)
    names = [_text(entries.files[i]) for i in image.tolist()]
    mass, box = entries.masses[image, token], boxes[image, token]
    nowhere = ~box.any(dim=1).numpy()
    vectors = entries.tokens[image, token].flatten().numpy()
    height, width = entries.sizes[image].unbind(dim=1)
    return {
        "image": names,
        "label": [_label(name) for name in names],
        "token": token.int().numpy(),
        "mass": mass.numpy(),
        "absent": (mass * entries.maps.shape[2] < ABSENT_PATCHES).numpy(),
        **{
            name: pa.array(edge.int().numpy(), mask=nowhere)
            for name, edge in zip(("x0", "y0", "x1", "y1"), box.unbind(1), strict=True)
        },
        "width": width.int().numpy(),
        "height": height.int().numpy(),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), card.dim),
    }


def _text(file: str) -> str:
    """The name of a file; bytes that are no text are escaped."""
    return os.fsencode(file).decode(errors="backslashreplace")


def _label(name: str) -> str | None:
    first, *others = PurePosixPath(name).parts
    return first if others else None


def _check_output(path: Path) -> None:
    """Checks that a file can be written, and that nothing else is lost by it."""
    import pyarrow.parquet

    check_new_file("--output", str(path))
    if not path.exists():
        return
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (OSError, ValueError):  # not of this format
        metadata = {}
    if CARD not in metadata:
        raise FileExistsError(
            f"'{path}' is there and no export of an index, so it stays: name another "
            "file with --output."
        )
