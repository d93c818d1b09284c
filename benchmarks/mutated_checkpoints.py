"""Does every damaged or mistaken file of weights or settings load, or say what it is?

Small files of each layout are changed at random: bytes, tensors, values of settings.
Right is a load of just what the file holds, or one of the documented errors with the
name of the file, within a time and a memory that suit the file. Every trial is a
process of its own.

    python -m benchmarks.mutated_checkpoints --count 2000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

from benchmarks.checkpoint_files import LAYOUTS
from benchmarks.checkpoint_mutations import mutate
from stellar_cli.errors import OptionError

SECONDS = 10
MEMORY = 2 * 2**30
DOCUMENTED = (ValueError, FileNotFoundError, OptionError)


def write_originals(folder: Path) -> None:
    for name, layout in LAYOUTS.items():
        (folder / name).mkdir(parents=True)
        layout.write(folder / name)
        layout.load(folder / name / layout.source)


def outcome(path: Path, layout: str) -> str:
    """Loads the file; "" if that went right, else what went wrong."""
    try:
        LAYOUTS[layout].load(path)
    except DOCUMENTED as error:
        if type(error) not in DOCUMENTED:
            return f"bare {type(error).__name__}: {error}"[:300]
        folder = str(path if path.is_dir() else path.parent)
        if folder not in str(error) and layout != "recipe":
            return f"names no file: {_where(error)}: {error}"[:300]
        # What is said of recipes is shortened where it is shown.
        if len(str(error)) > 4000 and layout != "recipe":
            return f"{len(str(error))} letters: {str(error)[:200]}"
        return ""
    except SystemExit as end:
        # What the parser of options refuses.
        return "" if layout == "recipe" and end.code == 2 else f"ends with {end.code}"
    except BaseException as error:
        return f"{type(error).__name__} {_where(error)}: {error}"[:300]
    return ""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/site-packages/" not in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[:-3:-1])


def trial(
    originals: Path, number: int, seed: int, scratch: Path, names: list[str]
) -> tuple[str, ...]:
    """Layout, kind of change, what was changed, and what went wrong ("" if nothing)."""
    rng = random.Random(f"{seed} {number}")
    # Building a trainer takes longer than reading a file.
    weights = [0.5 if name == "recipe" else 1.0 for name in names]
    layout = rng.choices(names, weights)[0]
    folder = scratch / str(number)
    shutil.copytree(originals / layout, folder)
    others = sorted(p for p in originals.rglob("*") if p.is_file())
    kind, change = mutate(folder, others, rng)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _run_child(folder / LAYOUTS[layout].source, layout, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        found = f"more than {SECONDS} s" if name == "SIGALRM" else f"killed by {name}"
    shutil.rmtree(folder)
    return layout, kind, change, found


def _run_child(path: Path, layout: str, writer: int) -> None:
    signal.alarm(SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY,) * 2)
    os.chdir(path if path.is_dir() else path.parent)
    with (
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        found = outcome(path, layout)
    os.write(writer, found.encode("utf-8", "replace"))
    os._exit(0)


def main() -> None:
    """Prints n tried and n right by layout and by kind of change, and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="only this one")
    arguments = parser.parse_args()
    layouts = [arguments.layout] if arguments.layout else sorted(LAYOUTS)
    torch.set_num_threads(1)  # threads do not survive a fork
    logging.disable()
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    tried: collections.Counter[str] = collections.Counter()
    right: collections.Counter[str] = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_originals(scratch / "originals")
        for number in range(arguments.count):
            start = time.perf_counter()
            layout, kind, change, found = trial(
                scratch / "originals", number, arguments.seed, scratch, layouts
            )
            seconds = time.perf_counter() - start
            for key in ("all", layout, kind):
                tried[key] += 1
                right[key] += not found
            if found:
                wrong.append(f"{number} [{layout}] {kind} {change} ({seconds:.1f} s)")
                wrong[-1] += f"\n    {found}"
    print("\n".join(wrong))
    print("| files or change | tried | right |\n|---|---|---|")
    for key, count in tried.items():
        print(f"| {key} | {count} | {right[key]} |")
    sys.exit(right["all"] < tried["all"])


if __name__ == "__main__":
    main()
