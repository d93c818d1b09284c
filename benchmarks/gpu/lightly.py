"""A step of lightly's DINO and CAPI beside one of STELLAR."""

from __future__ import annotations

import argparse
import gc

import torch

from benchmarks.gpu.measure import median_ms, peak_gib
from benchmarks.gpu.results import Cell, Report
from benchmarks.gpu.sizes import base
from benchmarks.lightly_steps import METHODS, Row, make_step, method_tokens


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Times the steps in bf16, plain, one method after the other."""
    sizes, _ = base(arguments.tiny)
    device, batch_size = arguments.device, 4 if arguments.tiny else 64
    rounds = 2 if arguments.tiny else 8
    rows: list[Row] = []
    for name in METHODS:
        with report.section(name):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step = make_step(name, sizes, batch_size, device, bf16=True)
            ms = median_ms(step, device, rounds) / batch_size
            tokens = method_tokens(name, sizes)
            rows.append(Row(name, tokens, ms, peak_gib() or 0.0))
            report.values(**{f"{name.lower()}_ms_per_image": ms})
        step = None  # type: ignore[assignment] # gives its memory back
        gc.collect()
    table: list[list[Cell]] = [
        [r.method, r.tokens.trained, r.tokens.forward, r.ms, r.us_per_token, r.gib]
        for r in rows
    ]
    head = ["method", "tokens with gradient", "of a teacher", "ms per image"]
    report.table(
        f"A step at batch {batch_size}, bf16, not compiled",
        [*head, "us per token", "peak GiB"],
        table,
    )
    report.headline(
        ", ".join(f"{r.method} {1000 * r.us_per_token:.0f} ns a token" for r in rows)
    )
