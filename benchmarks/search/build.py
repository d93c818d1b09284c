"""Is an index built as fast as its encoder runs?

A STELLAR model of a size of timm's, with random weights, over the first photos of a
folder. In turn, in one process:

- encoder: its forward passes alone, over batches that are in memory
- index: `stellar index` into a new folder: reading, encoding, writing

Of each the seconds of the clock, and those of all processors, which other processes on
the machine hardly change. Then what the index takes on disk.

    python -m benchmarks.search build --data FOLDER --images 512
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.images import EvaluationImages, folder_images
from lightly_ext.search import TokenIndex
from lightly_ext.search.encoding import ImageEncoder
from lightly_ext.search.index import update_index
from stellar_plugin import StellarEncoder

Seconds = tuple[float, float]


def timed(function: Callable[[], object]) -> Seconds:
    """Seconds of the clock, and of all processors."""
    clock, processors = time.perf_counter(), _processors()
    function()
    return time.perf_counter() - clock, _processors() - processors


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of photos")
    parser.add_argument("--model", default="stellar_vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    devices = Devices()
    backbone = StellarEncoder(arguments.model, num_queries=16)
    model = FrozenModel(backbone, Origin(arguments.model, "STELLAR", "random"))
    encoder = ImageEncoder.of(model, devices)
    files = folder_images(arguments.data)
    files = files.limited(arguments.images)
    images = EvaluationImages(files, encoder.transform)
    batches = [batch.image for batch in devices.loader(images)]
    times: dict[str, list[Seconds]] = {"encoder": [], "index": []}
    with tempfile.TemporaryDirectory() as folder:
        card = encoder.card(files.root, {})
        for number in range(arguments.rounds):
            index = TokenIndex.create(Path(folder, str(number)), replace(card))
            times["encoder"].append(timed(lambda: [encoder(b) for b in batches]))
            times["index"].append(
                timed(lambda i=index: update_index(i, encoder, files, None))  # type: ignore[misc]
            )
        size = index.num_bytes / len(index)
    print("| what | images/s | processor-ms per image |\n|---|---|---|")
    for name, values in times.items():
        clock, processors = (statistics.median(v) for v in zip(*values, strict=True))
        speed, cost = len(files) / clock, 1000 * processors / len(files)
        print(f"| {name} | {speed:.2f} | {cost:.0f} |")
    ratios = [
        statistics.median(a[i] / b[i] for a, b in zip(*times.values(), strict=True))
        for i in (0, 1)
    ]
    print(
        f"\nThe index is built at {ratios[0]:.0%} of the encoder's own speed (by "
        f"processor time {ratios[1]:.0%}), {torch.get_num_threads()} threads, "
        f"{devices.num_workers} readers. {size / 1000:.1f} kB per image."
    )


def _processors() -> float:
    """Seconds of this process and its children, of those that have ended too.

    Linux tells.
    """
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if os.getpid() in (int(path.parent.name), int(fields[1])):
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
