"""Does a run that is ended anywhere and resumed equal one that was never ended?

A tiny pretraining runs straight, once per kind of run. Then, again and again, the same
command is ended at a random moment, several times, and continued with `--resume` until
it is through. Every logged loss and learning rate and every number in the last
checkpoint (weights, moments of AdamW, teacher) must equal the straight run's, bit for
bit, and so must the exported model.

    python benchmarks/killed_runs.py --trials 200
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from stellar_cli.__main__ import main as stellar

NUM_IMAGES = 20
# Sizes at which a step takes milliseconds.
OPTIONS = [
    "--trainer.accelerator=cpu",
    "--trainer.precision=32",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--save_every_steps=3",
    "--data.batch_size=4",
    "--data.num_workers=0",
    "--model.model.img_size=32",
    "--model.model.model_name=stellar_vit_tiny_patch16_224",
    "--model.model.patch_size=8",
    "--model.model.embed_dim=24",
    "--model.model.depth=1",
    "--model.model.num_heads=2",
    "--model.model.decoder_dim=16",
    "--model.model.decoder_depth=1",
    "--model.model.decoder_num_heads=2",
    "--model.lr=1e-2",
]
OF_STELLAR = [
    "--model.model.num_queries=3",
    "--model.head={hidden_dim: 16, output_dim: 8, num_prototypes: 12}",
    "--model.augment={kernel_size: 3}",
    "--data.transform=STELLARTransform",
    "--data.transform.num_global_views=2",
    "--data.transform.num_local_views=2",
    "--data.transform.global_crop_size=32",
    "--data.transform.local_crop_size=16",
]
OF_MAE = ["--method=mae", "--data.transform.global_crop_size=32"]
# Kinds of runs; five batches are an epoch, so that 13 steps end within the third.
KINDS = {
    "plain": ["--trainer.max_epochs=3"],
    "workers": ["--trainer.max_epochs=3", "--data.num_workers=2"],
    "steps": ["--trainer.max_epochs=-1", "--trainer.max_steps=13"],
    "teacher": ["--trainer.max_epochs=3", "--model.teacher_momentum=0.9"],
    "accumulation": ["--trainer.max_epochs=4", "--trainer.accumulate_grad_batches=2"],
    "knn": ["--trainer.max_epochs=3"],
    "mae": ["--trainer.max_epochs=3"],
}
ENDS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "disk full")
LOGGED = ("loss", "train/", "lr-")


def write_images(folder: Path, count: int) -> None:
    """Small photographs of noise, for `--data.path`."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"{number:03}.png")


def arguments(kind: str, data: Path, output: Path) -> list[str]:
    """What a user types for a run of a kind."""
    knn = [f"--data.knn_{part}={data / part}" for part in ("train", "val")]
    return [
        f"--output={output}",
        f"--data.path={data / 'images'}",
        *OPTIONS,
        *(OF_MAE if kind == "mae" else OF_STELLAR),
        *KINDS[kind],
        *(knn if kind == "knn" else []),
    ]


class Run:
    """A pretraining in a process of its own, forked from this one.

    Attributes:
        process:
            The process; its exit code is that of `stellar pretrain`.
    """

    def __init__(self, argv: Sequence[str], log: Path, file_size: int | None) -> None:
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_child, args=(argv, log, file_size))
        self.process.start()

    def wait(self, seconds: float) -> bool:
        """Waits for the end; whether it came."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def end(self, name: str) -> None:
        """Sends a signal to the process, not to its data loaders."""
        pid = self.process.pid
        assert pid is not None
        if self.process.is_alive():
            os.kill(pid, getattr(signal, name))


def _child(argv: Sequence[str], log: Path, file_size: int | None) -> None:
    """Runs `stellar pretrain` as the command line does, output into a file."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    if file_size is not None:  # a full disk: no file grows beyond
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    print("\n$ stellar pretrain", *argv, flush=True)
    stellar(["pretrain", *argv])


def losses(output: Path) -> dict[int, dict[str, str]]:
    """What every step logged, as the CSV files print it.

    A step that was done again, behind the last checkpoint, must log the same again.
    """
    logged: dict[int, dict[str, str]] = {}
    parts = (output / "csv").glob("version_*/metrics.csv")
    for path in sorted(parts, key=lambda path: int(path.parent.name[8:])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                step = logged.setdefault(int(row["step"]), {})
                for name, value in row.items():
                    if name.startswith(LOGGED) and value:
                        before = step.get(name, value)
                        step[name] = value if value == before else f"{before}, {value}"
    return {step: values for step, values in logged.items() if values}


def numbers(output: Path) -> dict[str, Tensor]:
    """Weights and moments in the last checkpoint, and the exported weights."""
    path = output / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    result = dict(_tensors("state_dict", checkpoint["state_dict"]))
    result |= _tensors("optimizer", checkpoint["optimizer_states"])
    result["step"] = torch.tensor(checkpoint["global_step"])
    best = output / "checkpoints" / "best.ckpt"
    if best.exists():
        step = torch.load(best, weights_only=False)["global_step"]
        result["best step"] = torch.tensor(step)
    for file in sorted((output / "model").glob("*.safetensors")):
        result |= _tensors(file.stem, load_file(file))
    return result


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(f"{name}.{index}", part)
    elif isinstance(value, (Tensor, int, float)):
        yield name, torch.as_tensor(value)


def differences(output: Path, straight: Path) -> list[str]:
    """What of a run is not equal to the straight one's, in words."""
    found = []
    ours, theirs = losses(output), losses(straight)
    for step in sorted(ours.keys() | theirs.keys()):
        if ours.get(step) != theirs.get(step):
            found.append(f"step {step}: {ours.get(step)} is not {theirs.get(step)}")
    one, other = numbers(output), numbers(straight)
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            found.append(f"{name} is missing")
        elif not torch.equal(one[name], other[name]):
            found.append(f"{name} differs")
    return found


def trial(
    kind: str, data: Path, folder: Path, straight: Path, seconds: float, seed: int
) -> tuple[list[str], list[str]]:
    """Ends a run up to three times at random moments, resumes it, compares.

    Args:
        kind:
            One of `KINDS`.
        data:
            Folder with the images.
        folder:
            Empty folder to work in.
        straight:
            Output of the straight run.
        seconds:
            How long that took.
        seed:
            Decides on number, kinds and moments of the ends.

    Returns:
        The ends, and what went wrong.
    """
    rng = random.Random(seed)
    output, log = folder / "run", folder / "log.txt"
    argv = arguments(kind, data, output)
    ends: list[str] = []
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(ENDS)
        full = name == "disk full"
        limit = rng.randint(1_000, 400_000) if full else None
        run = Run(_resumed(argv, output), log, limit)
        if not run.wait(seconds * 2 if full else rng.uniform(0, 1.1) * seconds):
            run.end("SIGKILL" if full else name)
        if not run.wait(seconds * 3 + 30):
            run.end("SIGKILL")
            return ends, [f"{name} does not end the run"]
        ends.append(name)
        if run.process.exitcode == 0 and not _is_through(output, straight):
            return ends, [f"exit status 0 after {name}, before the end"]
    run = Run(_resumed(argv, output), log, None)
    if not run.wait(seconds * 4 + 60):
        run.end("SIGKILL")
        return ends, ["the resumed run does not end"]
    if run.process.exitcode != 0:
        return ends, [f"the resumed run ends with {run.process.exitcode}"]
    return ends, differences(output, straight)


def _resumed(argv: list[str], output: Path) -> list[str]:
    """The command, with `--resume` where the folder holds a run."""
    return [*argv, "--resume"] if (output / "config.yaml").exists() else argv


def _is_through(output: Path, straight: Path) -> bool:
    last = "checkpoints/last.ckpt"
    return (output / last).exists() and (
        torch.load(output / last, weights_only=False)["global_step"]
        == torch.load(straight / last, weights_only=False)["global_step"]
    )


def run_trials(
    kinds: Sequence[str],
    trials: int,
    seed: int,
    folder: Path,
    report: Callable[[str], None] = print,
) -> Counter[str]:
    """Runs trials in turn over the kinds of runs.

    Args:
        kinds:
            Names in `KINDS`.
        trials:
            How many in all.
        seed:
            That of the first trial; the next ones count up.
        folder:
            Empty folder; folders of trials that went wrong stay in it.
        report:
            Is told of every trial.

    Returns:
        Number of trials "tried" and "right", of "ends", and of each kind of end.
    """
    importlib.import_module("lightly_ext.pretrain.cli")  # once, not in every fork
    write_images(folder / "data" / "images", NUM_IMAGES)
    for part in ("train", "val"):
        for label in ("a", "b"):
            write_images(folder / "data" / part / label, 12)
    seconds, count = {}, Counter[str]()
    for kind in kinds:
        output = folder / kind / "straight"
        start = time.monotonic()
        run = Run(arguments(kind, folder / "data", output), folder / "log.txt", None)
        run.process.join()
        if run.process.exitcode != 0:
            raise RuntimeError(f"The straight run failed: see {folder / 'log.txt'}.")
        seconds[kind] = time.monotonic() - start
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        place = folder / kind / str(number)
        place.mkdir()
        straight = folder / kind / "straight"
        ends, wrong = trial(
            kind, folder / "data", place, straight, seconds[kind], seed + number
        )
        count.update(["tried", *(["ends"] * len(ends)), *ends])
        count["right"] += not wrong
        report(f"{number} {kind}, {', '.join(ends)}: {'; '.join(wrong[:3]) or 'equal'}")
        if not wrong:
            shutil.rmtree(place)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="work here and keep it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # a process with more threads must not fork
    folder = args.folder or Path(tempfile.mkdtemp())
    count = run_trials(args.kinds, args.trials, args.seed, folder)
    print(", ".join(f"{name}: {number}" for name, number in count.items()))
    if args.folder is None:
        shutil.rmtree(folder)
    sys.exit(count["right"] != count["tried"])


if __name__ == "__main__":
    main()
