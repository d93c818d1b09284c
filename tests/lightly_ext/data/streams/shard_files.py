"""Shards for tests, in the layouts that others write."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded_images(count: int, size: tuple[int, int] = (48, 40)) -> list[bytes]:
    """PNGs of noise, all different."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        file = io.BytesIO()
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "png")
        found.append(file.getvalue())
    return found


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def image_table(
    images: Sequence[bytes | None],
    paths: Sequence[str] | None = None,
    noted: Mapping[str, Any] | None = None,
    **columns: list[Any],
) -> Any:
    """As `datasets` writes a column of images, and others beside it.

    Args:
        images:
            What is in their files.
        paths:
            Names of the images.
        noted:
            What `datasets` notes of other columns.
        columns:
            Those.
    """
    import pyarrow as pa

    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = paths or [None] * len(images)
    rows = [{"bytes": b, "path": p} for b, p in zip(images, names, strict=True)]
    features = {"image": {"_type": "Image"}, **(noted or {})}
    info = json.dumps({"info": {"features": features}})
    table = pa.table({"image": pa.array(rows, struct), **columns})
    return table.replace_schema_metadata({"huggingface": info})


def write_parquet(path: Path, images: Sequence[bytes | None], group: int = 3) -> Path:
    return write_table(path, image_table(images, label=list(range(len(images)))), group)


def write_arrow(
    path: Path, images: Sequence[bytes | None], batch: int = 3, **columns: Any
) -> Path:
    return write_table(path, image_table(images, **columns), batch)


def write_table(path: Path, table: Any, rows: int = 3) -> Path:
    """Writes a parquet or an arrow file, in groups of rows."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=rows)
        return path
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, rows)
    return path


def write_shards(folder: Path, kind: str, shards: Sequence[Sequence[bytes]]) -> str:
    """Writes shards of one kind; returns a pattern for them."""
    for number, images in enumerate(shards):
        path = folder / f"{number:03}.{kind}"
        if kind == "tar":
            write_tar(path, {f"{i:03}.png": data for i, data in enumerate(images)})
        elif kind == "parquet":
            write_parquet(path, images)
        else:
            write_arrow(path, images)
    return f"{folder}/*.{kind}"
