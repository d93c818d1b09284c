"""Colour augmentation on the device, beside the step and what memory allows."""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu.measure import copy_rate, extra_gib, median_ms
from benchmarks.gpu.profile import profile_step
from benchmarks.gpu.results import Report
from benchmarks.gpu.sizes import base
from lightly_ext.transforms import STELLARColorAugment


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Times the colours of a batch of views."""
    sizes, batch_sizes = base(arguments.tiny)
    device = arguments.device
    step = report.results.values("b")
    batch_size = step.get("batch_size", batch_sizes[0])
    views = [
        torch.randint(
            256,
            (batch_size, sizes.views, 3, side, side),
            dtype=torch.uint8,
            device=device,
        )
        for side in (sizes.image, sizes.local_image)
    ]
    augment = STELLARColorAugment().to(device)
    ms = median_ms(lambda: augment(*views), device, 10)
    # Each view is read as bytes and written as float32 at least once.
    gigabytes = sum(v.numel() for v in views) * 5 / 1e9
    report.values(
        colours_ms=ms,
        ms_per_image=ms / batch_size,
        extra_gib=extra_gib(lambda: augment(*views), device),
        views_gb=gigabytes,
        gb_per_s=1000 * gigabytes / ms,
        copy_gb_per_s=copy_rate(device, arguments.tiny),
    )
    if "plain_ms" in step:
        report.values(percent_of_plain_step=100 * ms / step["plain_ms"])
    with report.section("profile"):
        seen = profile_step(lambda: augment(*views), device)
        report.values(busy_ms=seen.busy_ms, kernels=seen.kernels)
        report.table(
            "Longest kernels of the colours",
            ["kernel", "ms", "number"],
            [[kernel[:110].replace("|", "/"), ms, n] for kernel, ms, n in seen.top],
        )
    with report.section("compiled"):
        # A CPU tries out the graphs alone: its C++ compiler takes a minute.
        augment.compile(backend="inductor" if device == "cuda" else "eager")
        compiled_ms = median_ms(lambda: augment(*views), device, 10)
        report.values(compiled_colours_ms=compiled_ms)
        if "compiled_ms" in step:
            share = 100 * compiled_ms / step["compiled_ms"]
            report.values(percent_of_compiled_step=share)
    known = report.known()
    texts = [f"{ms:.2f} ms for {batch_size} images"]
    if "percent_of_plain_step" in known:
        texts.append(f"{known['percent_of_plain_step']:.1f} % of the plain step")
    if "compiled_colours_ms" in known:
        texts.append(f"compiled {known['compiled_colours_ms']:.2f} ms")
    report.headline(", ".join(texts))
