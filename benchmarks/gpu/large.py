"""ViT-L with activation checkpointing."""

from __future__ import annotations

import argparse

from benchmarks.gpu.flops import total_flops
from benchmarks.gpu.results import Report, shown
from benchmarks.gpu.sizes import large
from benchmarks.gpu.step import compiled, fitting_step, measure_step


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Measures the step, plain and with compiled blocks."""
    sizes, batch_sizes = large(arguments.tiny)
    rounds = 2 if arguments.tiny else 4
    step = fitting_step(sizes, batch_sizes, arguments.device, checkpointing=True)
    batch_size = step.batch_size
    report.values(
        batch_size=batch_size, step_tflop=total_flops(sizes, batch_size) / 1e12
    )
    measure_step(step, report, "plain", rounds)
    with report.section("compiled"):
        report.values(**compiled(step.module, step, step.device))
        measure_step(step, report, "compiled", rounds)
    known = report.known()
    report.headline(
        f"batch {batch_size}; plain {known['plain_ms']:.0f} ms, MFU "
        f"{known['plain_mfu_percent']:.1f} %; compiled "
        f"{known.get('compiled_ms', float('nan')):.0f} ms, MFU "
        f"{known.get('compiled_mfu_percent', float('nan')):.1f} %; peak "
        f"{shown(known['plain_peak_gib'])} GiB"
    )
