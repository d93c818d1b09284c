"""Trials of what could raise the utilisation of the compiled step.

Each is the step in bf16 with one thing changed, beside the step as `stellar pretrain`
compiles it:

- bf16 stream: tokens between blocks are bf16 instead of float32, which changes numbers;
- whole passes: encoder passes and decoder are compiled instead of their blocks;
- more images: one and a half times the batch, which needs more than 78 GiB;
- small: a ViT-Ti that launches bind, plain, compiled, and with CUDA graphs.

Inductor's autotuning of matrix products is none of them: it takes 17 s for each of some
forty shapes, and of the large ones cuBLAS's kernels were the fastest (H100).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.gpu.flops import mfu, total_flops
from benchmarks.gpu.measure import median_ms, peak_gib, synchronize
from benchmarks.gpu.results import Cell, Report
from benchmarks.gpu.sizes import TINY, base
from benchmarks.gpu.step import fitting_step
from benchmarks.step import Sizes, Step
from lightly_ext.pretrain.compilation import compile_blocks

SMALL = Sizes(
    "stellar_vit_tiny_patch16_224",
    width=192,
    heads=3,
    queries=8,
    image=96,
    local_image=48,
    decoder_width=192,
    decoder_depth=2,
    decoder_heads=3,
    hidden=512,
    embedding=128,
    prototypes=1024,
)
TINY_TRIALS = ("as trained", "bf16 stream", "whole passes")
HEAD = (
    *("trial", "batch", "ms", "images/s", "MFU %", "peak GiB", "first step, s"),
    *("graphs", "breaks", "relative difference of the loss"),
)
Change = Callable[[Step, str], None]


class ToBF16(nn.Module):
    """Makes the residual stream bf16 from here on."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, rounded."""
        return x.bfloat16()


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Measures every trial, the quick ones first; each is reported at once."""
    sizes, batch_sizes = base(arguments.tiny)
    small = TINY if arguments.tiny else SMALL
    more = (batch_sizes[0] * 3 // 2,)
    trials: dict[str, tuple[Sizes, tuple[int, ...], Change]] = {
        "as trained": (sizes, batch_sizes, _blocks),
        "bf16 stream": (sizes, batch_sizes, _bf16_stream),
        "small, plain": (small, (64,), lambda *_: None),
        "small, as trained": (small, (64,), _blocks),
        "whole passes": (sizes, batch_sizes, _passes),
        "small, CUDA graphs": (small, (64,), _graphs),
        "more images": (sizes, more, _bf16_stream),
    }
    if arguments.tiny:
        trials = {name: trials[name] for name in TINY_TRIALS}
    rows: list[list[Cell]] = []
    for name, (of, batches, change) in trials.items():
        with report.section(name):
            rows.append([name, *_measure(name, of, batches, change, arguments, report)])
    report.table(
        "Trials in bf16; the loss with the same weights, colours and masks, beside the "
        "plain step's",
        HEAD,
        rows,
    )
    report.headline(", ".join(f"{row[0]} {row[2]:.0f} ms" for row in rows))


def _measure(
    name: str,
    sizes: Sizes,
    batch_sizes: tuple[int, ...],
    change: Change,
    arguments: argparse.Namespace,
    report: Report,
) -> list[Cell]:
    """The cells behind the name; also reported as values."""
    device = arguments.device
    torch.compiler.reset()
    counters.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    step = fitting_step(sizes, batch_sizes, device)
    expected = _loss(step)
    # A CPU tries out the graphs alone: its C++ compiler takes minutes.
    change(step, "inductor" if device == "cuda" else "eager")
    start = time.perf_counter()
    step.loss().backward()
    synchronize(device)
    seconds = time.perf_counter() - start
    difference = abs(_loss(step) - expected) / abs(expected)
    ms = median_ms(step, device, 2 if arguments.tiny else 8)
    cells: list[Cell] = [
        *(step.batch_size, ms, 1000 * step.batch_size / ms),
        *(mfu(total_flops(sizes, step.batch_size), ms), peak_gib(), seconds),
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        difference,
    ]
    key = name.replace(",", "").replace(" ", "_")
    found = {"ms": ms, "peak_gib": cells[4], "first_s": seconds}
    found["loss_difference"] = difference
    report.values(**{f"{key}_{what}": value for what, value in found.items()})
    return cells


def _loss(step: Step) -> float:
    """The loss with always the same colours and masks, weights as they are."""
    torch.manual_seed(0)
    return step.loss().item()


def _blocks(step: Step, backend: str) -> None:
    """As `stellar pretrain` compiles."""
    compile_blocks(step.module, backend)
    step.module.augment.compile(backend=backend)


def _bf16_stream(step: Step, backend: str) -> None:
    _round_stream(step)
    _blocks(step, backend)


def _passes(step: Step, backend: str, **options: Any) -> None:
    """One graph for each encoder pass and the decoder; colours as trained."""
    model: Any = step.module.model
    for part in (model.encoder, model.decoder):
        options = {"backend": backend, "dynamic": False, **options}
        part.forward_features = torch.compile(part.forward_features, **options)
    step.module.augment.compile(backend=backend)


def _graphs(step: Step, backend: str) -> None:
    """CUDA graphs of the passes; a CPU has none."""
    if step.device == "cuda":
        _passes(step, backend, options={"triton.cudagraphs": True})
    else:
        _passes(step, backend)


def _round_stream(step: Step) -> None:
    """Rounds what enters the first block of encoder and decoder."""
    model: Any = step.module.model
    model.encoder.vit.norm_pre = ToBF16()
    model.decoder.blocks.insert(0, ToBF16())
