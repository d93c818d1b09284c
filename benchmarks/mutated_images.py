"""Does any broken image end, hang or bloat the reading of a folder?

Makes images of many formats, breaks them (flipped bits, truncation, lost and repeated
pieces, extremes in headers, concatenations, wrong suffixes) and reads each through
`ImageFolderDataset` with the views of pretraining, in a process that may crash. Right
is an image that is read, or skipped with a warning that names it. Prints a Markdown
table per format, the slowest and the largest. The same count and seed make the same
files. Run with `python benchmarks/mutated_images.py --count 10000 --seed 0`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.mutations import mutated, originals
from lightly_ext.data import ImageFolderDataset
from lightly_ext.transforms import STELLARTransform

SECONDS = 60.0
MEGABYTES = 3000.0  # an image of 178 million pixels and what is made of it


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        number: Number of the file.
        format: Format that was broken.
        result: "read", an exception's name if it was skipped, or "WRONG: ...".
        seconds: How long it took.
        megabytes: How much memory it took beyond what the process has.
    """

    number: int
    format: str
    result: str
    seconds: float
    megabytes: float

    @property
    def right(self) -> bool:
        """Whether it was read or skipped as promised."""
        return not self.result.startswith("WRONG")


def read_all(seed: int, count: int) -> Iterator[Outcome]:
    """Reads mutated images, in a process that may crash or hang."""
    files = originals()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        worker, pipe = _start(context, Path(folder))
        for number in range(count):
            name, suffix, data = mutated(files, seed, number)
            start = time.perf_counter()
            pipe.send((suffix, data))
            try:
                if not pipe.poll(SECONDS):
                    raise TimeoutError
                result, megabytes = pipe.recv()
            except (EOFError, TimeoutError) as error:
                worker.kill()
                worker.join()
                hung = isinstance(error, TimeoutError)
                ended = f"no end in {SECONDS} s" if hung else f"exit {worker.exitcode}"
                result, megabytes = f"WRONG: {ended}", 0.0
                worker, pipe = _start(context, Path(folder))
            if megabytes > MEGABYTES:
                result = f"WRONG: took {megabytes:.0f} MB"
            yield Outcome(number, name, result, time.perf_counter() - start, megabytes)
        pipe.send(None)
        worker.join()


def _start(context: Any, folder: Path) -> tuple[Any, Connection]:
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs, folder), daemon=True)
    worker.start()
    theirs.close()
    return worker, ours


def _work(pipe: Connection, folder: Path) -> None:
    torch.set_num_threads(1)
    transform = STELLARTransform()
    while (job := pipe.recv()) is not None:
        for path in folder.iterdir():
            path.unlink()
        suffix, data = job
        (folder / f"a.{suffix}").write_bytes(data)
        Image.new("RGB", (8, 8)).save(folder / "good.png")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = _peak_megabytes()
        result = _read(ImageFolderDataset(folder, transform))
        pipe.send((result, _peak_megabytes() - before))


def _read(dataset: ImageFolderDataset) -> str:
    with warnings.catch_warnings(record=True) as record:
        try:
            views, index = dataset[0]
        except BaseException as error:
            return f"WRONG: raised {type(error).__name__}: {error}"
    if {view.dtype for view in views} != {torch.uint8} or len(views) != 16:
        return "WRONG: no views"
    said = [str(w.message) for w in record]
    if index == 0:
        return f"WRONG: said {said[0]}" if said else "read"
    found = re.fullmatch(
        rf"Skipping unreadable image {dataset.file(0)} \((\w+): .*\)\.", said[0]
    )
    return found[1] if found and len(said) == 1 else f"WRONG: said {said}"


def _peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def table(outcomes: list[Outcome]) -> str:
    """Markdown of what became of all of them."""
    groups = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.format].append(outcome)
    lines = [
        "| format | tried | right | read | slowest (s) | largest (MB) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in [*groups.items(), ("all", outcomes)]:
        right, read = (
            sum(o.right for o in group),
            sum(o.result == "read" for o in group),
        )
        slowest, largest = (
            max(o.seconds for o in group),
            max(o.megabytes for o in group),
        )
        cells = (name, len(group), right, read, f"{slowest:.2f}", f"{largest:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    results = Counter(o.result for o in outcomes if o.right)
    lines += ["", ", ".join(f"{n} {result}" for result, n in results.most_common())]
    for what, key in (("Slowest", "seconds"), ("Largest", "megabytes")):
        last = sorted(outcomes, key=lambda o: -getattr(o, key))[:3]
        lines += [f"{what}: {o}" for o in last]
    return "\n".join([*lines, *(f"Not right: {o}" for o in outcomes if not o.right)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes = []
    for outcome in read_all(arguments.seed, arguments.count):
        outcomes.append(outcome)
        if not outcome.right:
            print(outcome, file=sys.stderr, flush=True)
    print(table(outcomes))
    sys.exit(not all(outcome.right for outcome in outcomes))


if __name__ == "__main__":
    main()
