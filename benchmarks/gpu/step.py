"""The training step: time, utilisation, memory, parts, kernels, waits of the host."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.gpu.flops import block_flops_of_step, mfu, step_flops, total_flops
from benchmarks.gpu.measure import (
    copy_rate,
    host_syncs,
    median_ms,
    peak_gib,
    product_rate,
    synchronize,
)
from benchmarks.gpu.profile import parts_of_step, profile_step
from benchmarks.gpu.results import Report
from benchmarks.gpu.sizes import base
from benchmarks.step import BareBlocks, Sizes, Step
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain.compilation import compile_blocks


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Measures the step plain, then with compiled blocks, beside the bare blocks."""
    device = arguments.device
    sizes, batch_sizes = base(arguments.tiny)
    rounds = 2 if arguments.tiny else 10
    step = fitting_step(sizes, batch_sizes, device)
    batch_size = step.batch_size
    flops = step_flops(sizes, batch_size)
    report.values(batch_size=batch_size, step_tflop=sum(flops.values()) / 1e12)
    report.table(
        f"Useful operations of a step at batch {batch_size}, TFLOP, as counted in "
        "benchmarks/gpu/flops.py; MFU is their sum / time / 989 TFLOP/s",
        ["part", "TFLOP"],
        [[name, value / 1e12] for name, value in flops.items()],
    )
    with report.section("ceilings"):
        report.values(
            copy_gb_per_s=copy_rate(device, arguments.tiny),
            product_tflop_per_s=product_rate(device, arguments.tiny),
        )
    with report.section("plain"):
        measure_step(step, report, "plain", rounds)
    with report.section("syncs"):
        _report_syncs(step, report)
    with report.section("parts"):
        _report_parts(step, report, "plain", rounds)
    with report.section("optimiser"):
        _report_optimiser(step, report, rounds)
    with report.section("profile"):
        _report_profile(step, report, "plain")
    with report.section("bare"):
        measure_bare(
            BareBlocks(sizes, device, True), batch_size, report, "plain", rounds
        )
    with report.section("compiled"):
        _measure_compiled(step, report, rounds)
    del step
    with report.section("bare compiled"):
        bare = BareBlocks(sizes, device, True)
        compiled(bare, lambda: bare.step(batch_size), device)
        measure_bare(bare, batch_size, report, "compiled", rounds)
    with report.section("teacher"):
        _report_teacher(sizes, device, report, rounds)
    report.headline(_headline(report))


def fitting_step(
    sizes: Sizes, batch_sizes: tuple[int, ...], device: str, **options: Any
) -> Step:
    """A step in bf16 that has run once, at the first batch size that fits."""
    for batch_size in batch_sizes:
        try:
            step = Step(sizes, batch_size, device, bf16=True, **options)
            step()
            synchronize(device)
            return step
        except torch.OutOfMemoryError:
            print(f"Batch {batch_size} does not fit.", flush=True)
        step = None  # type: ignore[assignment] # gives its memory back
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError(f"None of the batch sizes {batch_sizes} fits.")


def compiled(
    module: nn.Module, function: Callable[[], object], device: str
) -> dict[str, float]:
    """Compiles blocks and colours as training does, and says what that took."""
    torch.compiler.reset()
    counters.clear()
    # A CPU tries out the graphs alone: its C++ compiler takes minutes.
    backend = "inductor" if device == "cuda" else "eager"
    compile_blocks(module, backend)
    if isinstance(module, StellarPretraining):
        module.augment.compile(backend=backend)
    start = time.perf_counter()
    function()
    synchronize(device)
    return {
        "compile_s": time.perf_counter() - start,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def measure_step(step: Step, report: Report, name: str, rounds: int) -> None:
    """Reports milliseconds, images per second, MFU and peak memory of a step."""
    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, step.device, rounds)
    values = {
        f"{name}_ms": ms,
        f"{name}_images_per_s": 1000 * step.batch_size / ms,
        f"{name}_mfu_percent": mfu(total_flops(step.sizes, step.batch_size), ms),
        f"{name}_peak_gib": peak_gib(),
    }
    report.values(**values)


def measure_bare(
    bare: BareBlocks, batch_size: int, report: Report, name: str, rounds: int
) -> None:
    """Reports the bare blocks, and the step as a multiple of them."""
    ms = median_ms(lambda: bare.step(batch_size), bare.device, rounds)
    flops = block_flops_of_step(bare.sizes, batch_size)
    known = report.known()
    values = {f"bare_{name}_ms": ms, f"bare_{name}_mfu_percent": mfu(flops, ms)}
    if f"{name}_ms" in known:
        values[f"{name}_x_bare"] = known[f"{name}_ms"] / ms
    report.values(**values)


def _measure_compiled(step: Step, report: Report, rounds: int) -> None:
    expected = _loss(step)
    first = compiled(step.module, lambda: step.loss().backward(), step.device)
    report.values(**first)
    report.values(compiled_loss_difference=abs(_loss(step) - expected) / expected)
    measure_step(step, report, "compiled", rounds)
    _report_parts(step, report, "compiled", rounds)
    _report_profile(step, report, "compiled")


def _loss(step: Step) -> float:
    """The loss with always the same colours and masks."""
    torch.manual_seed(0)
    return step.loss().item()


def _report_syncs(step: Step, report: Report) -> None:
    step()
    with host_syncs(step.device) as found:
        step()
    report.values(host_syncs=found.total())
    report.table(
        "What makes the host wait in a step (warnings of "
        "torch.cuda.set_sync_debug_mode; on a CPU, operations that would)",
        ["line", "times"],
        [[line, count] for line, count in found.most_common()],
    )


def _report_parts(step: Step, report: Report, name: str, rounds: int) -> None:
    parts = parts_of_step(step, rounds)
    total = sum(parts.values())
    report.values(
        **{
            f"{name}_{k.replace(' ', '_')}_ms": v
            for k, v in parts.items()
            if "," not in k
        }
    )
    report.table(
        f"Parts of the {name} step, sum {total:.1f} ms",
        ["part", "ms", "%"],
        [[part, ms, 100 * ms / total] for part, ms in parts.items()],
    )


def _report_optimiser(step: Step, report: Report, rounds: int) -> None:
    for name in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(
            step.parameters, 0.0, foreach=name == "foreach", fused=name == "fused"
        )
        ms = median_ms(optimizer.step, step.device, rounds)
        report.values(**{f"adamw_{name}_ms": ms})


def _report_profile(step: Step, report: Report, name: str) -> None:
    seen = profile_step(step, step.device)
    report.values(
        **{
            f"{name}_busy_ms": seen.busy_ms,
            f"{name}_kernels": seen.kernels,
            f"{name}_runtime_waits": sum(seen.waits.values()),
        }
    )
    report.table(
        f"The {name} step by kind of kernel, {seen.busy_ms:.1f} ms in "
        f"{seen.kernels:.0f} kernels; runtime calls that wait: {seen.waits or 'none'}",
        ["kind", "ms", "%"],
        [[k, ms, 100 * ms / seen.busy_ms] for k, ms in seen.kinds.items()],
    )
    report.table(
        f"Longest kernels of the {name} step",
        ["kernel", "ms", "number"],
        [[kernel[:110].replace("|", "/"), ms, n] for kernel, ms, n in seen.top],
    )


def _report_teacher(sizes: Sizes, device: str, report: Report, rounds: int) -> None:
    """The momentum teacher's update, which STELLAR-B from MAE does without."""
    module = StellarPretraining(**sizes.recipe, teacher_momentum=0.99).to(device)
    report.values(teacher_ema_ms=median_ms(module._update_teacher, device, rounds))


def _headline(report: Report) -> str:
    known = report.known()
    texts = [f"batch {known['batch_size']}"]
    for name in ("plain", "compiled"):
        if f"{name}_ms" in known:
            texts.append(
                f"{name} {known[f'{name}_ms']:.0f} ms, MFU "
                f"{known[f'{name}_mfu_percent']:.1f} %, x bare "
                f"{known.get(f'{name}_x_bare', float('nan')):.2f}"
            )
    texts.append(f"{known.get('host_syncs', '?')} host syncs")
    return "; ".join(texts)
