"""Clustering and matching of sparse tokens, beside the exact matching on the host."""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu.measure import extra_gib, median_ms
from benchmarks.gpu.results import Cell, Report
from benchmarks.gpu.sizes import base
from lightly_ext.evaluate.efficiency_parts import hungarian_match
from lightly_ext.loss import match_tokens, sinkhorn_knopp


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Times both at 64 images with 8 views each, the batch of the paper's Table 10."""
    sizes, _ = base(arguments.tiny)
    device, images = arguments.device, 4 if arguments.tiny else 64
    views, queries = sizes.views, sizes.queries
    tokens = torch.randn(images, views, queries, sizes.width, device=device)
    targets = torch.randn_like(tokens[:, :1])
    logits = torch.randn(images * queries, sizes.prototypes, device=device) / 0.06
    functions = {
        "clustering": lambda: sinkhorn_knopp(logits),
        "matching": lambda: match_tokens(tokens, targets),
        "hungarian": lambda: hungarian_match(tokens, targets),
    }
    rows: list[list[Cell]] = []
    for name, function in functions.items():
        with report.section(name):
            ms, gib = median_ms(function, device, 10), extra_gib(function, device)
            report.values(**{f"{name}_ms": ms, f"{name}_gib": gib})
            rows.append([name, ms, gib])
    report.table(
        f"{images} images, {views} views, {queries} tokens of {sizes.width}, "
        f"{sizes.prototypes} prototypes",
        ["what", "ms", "extra GiB"],
        rows,
    )
    known, step = report.known(), report.results.values("b")
    text = f"clustering {known['clustering_ms']:.3f} ms, matching "
    text += f"{known['matching_ms']:.3f} ms, Hungarian {known['hungarian_ms']:.3f} ms"
    if "plain_ms" in step:
        both = known["clustering_ms"] + known["matching_ms"]
        ms = step["plain_ms"] * images / step["batch_size"]
        report.values(percent_of_plain_step=100 * both / ms)
        text += f"; the first two {100 * both / ms:.1f} % of the plain step"
    report.headline(text)
