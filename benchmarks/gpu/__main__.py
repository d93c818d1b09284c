"""Runs the parts of the GPU benchmark, each in a process of its own.

    benchmarks/gpu.sh --output results                    on a GPU, under seven minutes
    benchmarks/gpu.sh --output results --tiny --device cpu     the same code, small

A part that crashes, lacks memory or takes too long does not end the others. Those that
compare, i and j, run only where --parts names them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.results import Report, Results, markdown_table, summary


class Part(NamedTuple):
    """A part: its module, what it measures, and the seconds it may take."""

    module: str
    title: str
    limit: float


# In the order of their worth.
PARTS = {
    "b": Part("step", "training step", 150),
    "a": Part("tests", "tests that need a GPU", 150),
    "c": Part("prototypes", "prototype losses", 40),
    "d": Part("colours", "colours on the device", 90),
    "e": Part("matching", "clustering and matching", 25),
    "f": Part("large", "ViT-L with checkpointing", 75),
    "g": Part("inference", "features and kNN", 50),
    "h": Part("training", "real training with its loader", 160),
    "i": Part("lightly", "lightly's DINO and CAPI beside STELLAR", 60),
    "j": Part("experiments", "trials of a faster step", 400),
}
# Beyond the seven minutes: --parts i or --parts j.
ON_REQUEST = "ij"


def main() -> None:
    """Runs the parts, or one part in this process."""
    arguments = _arguments()
    results = Results(arguments.output)
    if arguments.part:
        _run_here(arguments, results)
        return
    for path in (results.path, arguments.output / "gpu.md"):
        path.unlink(missing_ok=True)
    end = time.monotonic() + arguments.limit
    for letter in PARTS:
        if letter in arguments.parts.split(","):
            _run_apart(letter, arguments.device, results, end)
    content = results.read()
    print(f"\n{markdown_table(summary(content))}")
    parts = content["parts"].values()
    if any(p["status"] != "done" or p.get("failures") for p in parts):
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{k}: {p.title}, {p.limit} s" for k, p in PARTS.items()),
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parts = ",".join(letter for letter in PARTS if letter not in ON_REQUEST)
    parser.add_argument("--parts", default=parts, help=f"letters; without it, {parts}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--limit", type=float, default=420, help="seconds for all")
    parser.add_argument(
        "--photos", type=Path, help="folder to train on, instead of made-up photos"
    )
    parser.add_argument(
        "--seconds", type=float, default=90, help="of the real training"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"There is no part {', '.join(sorted(unknown))}.")
    arguments.output = arguments.output.resolve()
    return arguments


def _run_here(arguments: argparse.Namespace, results: Results) -> None:
    import torch

    cuda = arguments.device == "cuda"
    results.set_machine(
        device=torch.cuda.get_device_name() if cuda else "CPU",
        cores=f"{len(os.sched_getaffinity(0))} cores",
        torch=f"torch {torch.__version__}",
        date=time.strftime("%Y-%m-%d"),
    )
    # Matrix products in TF32, as `stellar pretrain` sets them.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if arguments.tiny:
        torch.set_num_threads(1)
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[arguments.part].module}")
    module.run(arguments, Report(results, arguments.part))


def _run_apart(letter: str, device: str, results: Results, end: float) -> None:
    """Runs a part in its own process group, and ends all of it at the limit."""
    part = PARTS[letter]
    # A CPU is shared, and slow at loading what a part needs.
    limit = part.limit * (3 if device == "cpu" else 1)
    limit = min(limit, end - time.monotonic())
    results.update(letter, title=part.title, limit=limit, status="running", values={})
    if limit < 5:
        results.update(letter, status="no time left", seconds=0.0)
        return
    print(f"\n# {letter}: {part.title}, at most {limit:.0f} s", flush=True)
    start = time.monotonic()
    # The last --part and --limit win.
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
    command += [f"--part={letter}", f"--limit={limit}"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        status = "done" if code == 0 else f"ended with code {code}"
    except subprocess.TimeoutExpired:
        status = "out of time"
    finally:
        # Whatever it leaves: workers of a loader, of a compiler.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = round(time.monotonic() - start, 1)
    results.update(letter, status=status, seconds=seconds)


if __name__ == "__main__":
    main()
