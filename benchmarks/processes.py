"""How much longer is a step of one process, where another trains with it?

A real training on a CPU, with one thread and a core for each process, in turn:

- alone: one process, the other core idle;
- apart: two processes that train for themselves, so that they share memory and caches;
- together: two gloo processes of one run, which exchange gradients and Sinkhorn's sums.

Together over apart is what the exchange costs.

    python -m benchmarks.processes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback

from benchmarks.launch import train_apart, train_together, write_noise

ARMS = ("alone", "apart", "together")
WARM_UP = 2
RESULT = "seconds.json"


class Seconds(NamedTuple):
    """What a step of the first process takes.

    Attributes:
        wall: Seconds by the clock.
        cpu: Seconds of the processor.
    """

    wall: float
    cpu: float


class Watch(Callback):
    """Notes when steps begin, and writes the differences at the end."""

    def __init__(self) -> None:
        self._starts: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Notes both clocks."""
        self._starts.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Writes the seconds of the steps behind the warm-up."""
        if trainer.is_global_zero:
            starts = self._starts[WARM_UP:]
            steps = [
                (after[0] - before[0], after[1] - before[1])
                for before, after in pairwise(starts)
            ]
            path = Path(trainer.default_root_dir) / RESULT
            path.write_text(json.dumps(steps))


def measure(
    folder: Path, model: Sequence[str], batch_size: int, steps: int, rounds: int
) -> dict[str, Seconds]:
    """Trains in all three ways, and returns the medians of the steps.

    Args:
        folder: Empty folder, for images and runs.
        model: Options of `stellar pretrain` that make it.
        batch_size: Images of each process in a step.
        steps: Steps that are measured in each round.
        rounds: Number of times that each way has its turn.

    Raises:
        RuntimeError: If there are fewer than two cores, or a training fails.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise RuntimeError("This takes two CPU cores, this process may use one.")
    total = WARM_UP + steps + 1
    images = write_noise(folder / "images", 2 * batch_size * total, 256)
    options = (
        *(f"--data.path={images}", f"--data.batch_size={batch_size}"),
        *("--data.num_workers=0", "--trainer.accelerator=cpu"),
        *(*model, f"--trainer.max_steps={total}"),
        *("--trainer.log_every_n_steps=50", "--trainer.enable_progress_bar=false"),
        f"--trainer.callbacks=[{__name__}.Watch]",
    )
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS:
            output = folder / f"{arm}_{number}"
            run = [*options, f"--output={output}"]
            if arm == "alone":
                train_apart([run], cores=cores)
            elif arm == "apart":
                train_apart([run, [*options, f"--output={output}_2"]], cores=cores)
            else:
                train_together(run, 2, cores)
            found[arm] += json.loads((output / RESULT).read_text())
    return {
        arm: Seconds(*map(statistics.median, zip(*seconds, strict=True)))
        for arm, seconds in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="stellar_vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = vars(arguments)
        model = f"--model.model.model_name={given.pop('model')}"
        found = measure(Path(folder), [model], **given)
    print("| | step, s | CPU, s | over alone | over apart |\n|" + 5 * " --- |")
    for arm, seconds in found.items():
        ratios = [seconds.wall / found[other].wall for other in ("alone", "apart")]
        numbers = [f"{x:.3f}" for x in (*seconds, *ratios)]
        print(f"| {arm} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
