"""How long does the grid of a linear probe take, beside one head after the other?

Prints a Markdown table of the seconds that one epoch takes: the whole grid of learning
rates and batch sizes in one pass over the features, and every head alone, as
`torch.nn` and `torch.optim` train it. Run with `python benchmarks/linear.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.evaluate.classification.probe_heads import HeadOptions, ProbeHeads
from stellar_plugin.protocols import LINEAR


def protocol_grid(num_images: int) -> list[HeadOptions]:
    """Returns the heads of the protocol whose batches can be filled."""
    sizes = [size for size in LINEAR.batch_sizes if size <= num_images]
    return [HeadOptions(size, lr) for size in sizes for lr in LINEAR.lrs]


def one_pass(grid: list[HeadOptions], data: tuple[Tensor, Tensor], block: int) -> float:
    """Returns the seconds of an epoch of all heads together."""
    features, labels = data
    heads = ProbeHeads(
        grid,
        features.shape[1],
        int(labels.max()) + 1,
        LINEAR.weight_decay,
        LINEAR.clip,
        device=features.device,
    )

    def epoch() -> None:
        order = torch.randperm(len(labels), device=labels.device)
        for rows in order.split(block):
            heads.train_block(features[rows], labels[rows])

    return seconds(epoch)


def one_by_one(grid: list[HeadOptions], data: tuple[Tensor, Tensor]) -> float:
    """Returns the seconds of an epoch of every head, one head after the other."""
    return sum(seconds(partial(alone, options, data)) for options in grid)


def alone(options: HeadOptions, data: tuple[Tensor, Tensor]) -> None:
    features, labels = data
    dim = features.shape[1]
    head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, int(labels.max()) + 1))
    head.to(features.device)
    optimizer = torch.optim.AdamW(
        head.parameters(), options.lr, weight_decay=LINEAR.weight_decay
    )
    order = torch.randperm(len(labels), device=labels.device)
    for rows in order[: len(order) // options.batch_size * options.batch_size].split(
        options.batch_size
    ):
        optimizer.zero_grad()
        F.cross_entropy(head(features[rows]), labels[rows]).backward()
        nn.utils.clip_grad_norm_(head.parameters(), LINEAR.clip)
        optimizer.step()


def seconds(function: Callable[[], None]) -> float:
    """Returns how long a function takes, on the device too."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    grid = protocol_grid(arguments.images)
    print(
        f"{len(grid)} heads, {arguments.images} features of {arguments.dim} numbers, "
        f"fastest of {arguments.rounds} rounds, {arguments.threads} thread(s), "
        f"{arguments.device}, torch {torch.__version__}.\n"
    )
    print("| classes | one pass, s | one by one, s | ratio |")
    print("|---|---|---|---|")
    for classes in arguments.classes:
        data = (
            torch.randn(arguments.images, arguments.dim, device=arguments.device),
            torch.arange(arguments.images, device=arguments.device) % classes,
        )
        times = [
            (one_pass(grid, data, grid[-1].batch_size), one_by_one(grid, data))
            for _ in range(arguments.rounds)
        ]
        ours, theirs = (min(column) for column in zip(*times, strict=True))
        print(f"| {classes} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
