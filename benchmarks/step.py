"""What does one training step cost beyond the transformer passes in it?

Times a whole step of STELLAR (colours, masks, encoder passes, decoder, heads, loss,
backward, AdamW) beside the bare timm transformer blocks of the same token counts,
forward and backward, in turn in one process. Peak memory is that of a process of its
own for each batch size.

    python benchmarks/step.py --batch-sizes 2 4 8
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lightly_ext.modules import random_focal_mask
from lightly_ext.pretrain import StellarPretraining

VIEWS = 8
QUERIES = 16
GRID, LOCAL_GRID = 14, 6
KEPT = int(GRID**2 * 0.2)
PREFIX = 1 + QUERIES


class BareBlocks(nn.Module):
    """The transformer blocks of a step, fed with random tokens."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.encoder = _blocks(768, 12, 12).to(device)
        self.decoder = _blocks(512, 6, 8).to(device)
        self.device = device

    def step(self, batch_size: int) -> None:
        """Forward and backward of every pass."""
        for images, tokens in (
            (batch_size, PREFIX + GRID**2),
            (batch_size * VIEWS, PREFIX + KEPT),
            (batch_size * VIEWS, PREFIX + LOCAL_GRID**2),
        ):
            x = torch.randn(images, tokens, 768, device=self.device)
            self.encoder(x).float().square().mean().backward()
        x = torch.randn(batch_size, GRID**2, 512, device=self.device)
        self.decoder(x).float().square().mean().backward()


class Step:
    """A training step on random views."""

    def __init__(self, batch_size: int, device: str) -> None:
        self.module = StellarPretraining(
            model={"model_name": "stellar_vit_base_patch16_224"}
        ).to(device)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters)
        self.views = tuple(
            torch.randint(256, (batch_size, VIEWS, 3, size, size)).to(
                device, torch.uint8
            )
            for size in (224, 96)
        )

    def __call__(self) -> Tensor:
        """Runs the step and returns the loss."""
        views = self.module.augment(*self.views)
        batch_size = len(views.target)
        keep = random_focal_mask(
            batch_size * VIEWS, (GRID, GRID), device=views.target.device
        )
        terms, _ = self.module.loss_terms(views, keep.unflatten(0, (-1, VIEWS)))
        self.optimizer.zero_grad()
        terms.total.backward()
        self.optimizer.step()
        return terms.total


def _blocks(width: int, depth: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(
        *[Block(width, num_heads, qkv_bias=True) for _ in range(depth)]
    )


def _seconds(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(batch_size: int, device: str, precision: str, rounds: int) -> list[str]:
    """One row of the table: times, ratio and peak memory."""
    torch.manual_seed(0)
    step = Step(batch_size, device)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        step()
        # Peak of the step alone: the bare blocks come later.
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        bare = BareBlocks(device)
        bare.step(batch_size)
        pairs = [
            (_seconds(step, device), _seconds(lambda: bare.step(batch_size), device))
            for _ in range(rounds)
        ]
    ours, blocks = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return [
        str(batch_size),
        f"{ours:.2f}",
        f"{ours / batch_size:.2f}",
        f"{blocks:.2f}",
        f"{ratio:.2f}",
        f"{peak:.1f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| batch | step, s | s per image | blocks, s | step / blocks | peak, GiB |")
    print("|---|---|---|---|---|---|")
    for batch_size in arguments.batch_sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            settings = (batch_size, device, arguments.precision, arguments.rounds)
            print(f"| {' | '.join(pool.apply(measure, settings))} |", flush=True)


if __name__ == "__main__":
    main()
