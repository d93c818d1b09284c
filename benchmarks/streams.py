"""What does it cost to read an image out of a tar, parquet or arrow file?

Writes the same encoded images as files of a folder, tars, parquet and arrow files, and
prints a Markdown table of CPU microseconds per image: reading the encoded image in the
order of training, and counting at the start. Beside it stands the streaming of the
library `datasets`, which reads shards from their beginning to their end. Files are in
the page cache, ways are alternated in one process. Run with
`python benchmarks/streams.py`.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from lightly_ext.data import ImageDataset, ImageFolderDataset
from lightly_ext.data.streams import StreamDataset, find_source, open_shards

WAYS = ("count", "read", "datasets")
BUILDERS = {"tar": "webdataset", "parquet": "parquet", "arrow": "arrow"}
# As `datasets` writes images.
ROWS_OF_GROUP = 100


def write(folder: Path, images: list[bytes], num_shards: int) -> None:
    """Writes images in every way, into folders that are called like it."""
    for kind in ("folder", *BUILDERS):
        (folder / kind).mkdir()
    for number, data in enumerate(images):
        (folder / "folder" / f"{number:06}.jpg").write_bytes(data)
    for shard in range(num_shards):
        part = images[shard::num_shards]
        with tarfile.open(folder / "tar" / f"{shard:03}.tar", "w") as tar:
            for number, data in enumerate(part):
                member = tarfile.TarInfo(f"{number:06}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        table = pa.table({"image": [{"bytes": data, "path": ""} for data in part]})
        path = folder / "parquet" / f"{shard:03}.parquet"
        parquet.write_table(table, path, row_group_size=ROWS_OF_GROUP)
        path = folder / "arrow" / f"{shard:03}.arrow"
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, 1000)


def opened(folder: Path, kind: str) -> ImageDataset:
    """The images of one kind, looked into anew."""
    open_shards.cache_clear()
    source = find_source(folder / kind)
    if source is None:
        return ImageFolderDataset(folder / kind)
    return StreamDataset(source, shuffle_buffer=1024)


def read(images: ImageDataset) -> int:
    """Reads all encoded images as an epoch of training does; returns their bytes."""
    total = 0
    numbers = images.order(0, 0).tolist()
    ahead = images.read_ahead(numbers, 0, 0)
    for number, data in zip(numbers, ahead, strict=True):
        encoded = images.encoded(number) if data is None else data
        assert not isinstance(encoded, Exception)
        total += len(encoded if isinstance(encoded, bytes) else encoded.read_bytes())
    return total


def streamed(folder: Path, kind: str) -> Callable[[], int]:
    """Reads the same with `datasets`, in the order of the files."""
    import datasets

    files = sorted(map(str, (folder / kind).iterdir()))
    split = datasets.load_dataset(
        BUILDERS[kind], data_files=files, split="train", streaming=True
    )
    column = "jpg" if kind == "tar" else "image"
    split = split.cast_column(column, datasets.Image(decode=False))
    return lambda: sum(len(row[column]["bytes"]) for row in split)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Seconds of all threads of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """The fewest CPU seconds of every kind and way."""
    ways: dict[tuple[str, str], Callable[[], Any]] = {}
    for kind in ("folder", *BUILDERS):
        images = opened(folder, kind)
        ways[kind, "count"] = lambda kind=kind: opened(folder, kind)  # type: ignore
        ways[kind, "read"] = lambda images=images: read(images)  # type: ignore
        if kind in BUILDERS:
            ways[kind, "datasets"] = streamed(folder, kind)
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for (kind, way), function in ways.items():
            before = found.setdefault(kind, {}).get(way, float("inf"))
            found[kind][way] = min(before, cpu_seconds(function))
    return found


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4000, help="images")
    parser.add_argument("--bytes", type=int, default=110_000, help="of an image")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    images = [os.urandom(args.bytes) for _ in range(args.count)]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), images, args.shards)
        found = compare(Path(folder), args.rounds)
    print(
        f"{args.count} images of {args.bytes} bytes in {args.shards} shards, "
        f"{platform.machine()}, CPU microseconds per image"
    )
    print("\n|  | count | read | `datasets`, streaming |\n| --- | --- | --- | --- |")
    for kind, ways in found.items():
        cells = (
            f"{1e6 * ways[w] / args.count:.1f}" if w in ways else "-" for w in WAYS
        )
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
