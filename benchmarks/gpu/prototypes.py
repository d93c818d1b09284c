"""The prototype loss: blocks of different sizes, the plain form, torch's own kernel."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.flops import TRAINED
from benchmarks.gpu.measure import extra_gib, median_ms, random_tokens
from benchmarks.gpu.results import Cell, Report, shown
from benchmarks.gpu.sizes import base
from lightly_ext.loss.prototype_cross_entropy import (
    PrototypeTarget,
    assign_prototypes,
    contract_targets,
    prototype_cross_entropy,
)

TEMPERATURE = 0.12
# The package's name of the function hides the module.
MODULE = importlib.import_module("lightly_ext.loss.prototype_cross_entropy")
BLOCKS = (2**22, 2**24, 2**25, 2**26, 2**28)
Loss = Callable[[], Tensor]


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Times the alignment loss of the masked views' tokens, forward and backward."""
    sizes, batch_sizes = base(arguments.tiny)
    device, images = arguments.device, batch_sizes[0]
    rows = images * sizes.views * sizes.queries
    weight = torch.randn(sizes.prototypes, sizes.embedding, device=device)
    weight.requires_grad_()
    x = random_tokens(rows, sizes.embedding, device=device).requires_grad_()
    sources = random_tokens(images * sizes.queries, sizes.embedding, device=device)
    q = assign_prototypes(sources, weight.detach())
    chosen = torch.randint(len(q), (rows,), device=device)
    losses = _losses(x, weight, q, chosen)
    expected = losses["plain"]().item()
    flops = TRAINED * 2 * rows * sizes.embedding * sizes.prototypes
    table: list[list[Cell]] = []
    for name, loss in losses.items():
        backward = partial(_backward, loss, x, weight)
        with report.section(name), _block_size(name):
            difference = abs(loss().item() - expected) / expected
            ms, gib = median_ms(backward, device, 5), extra_gib(backward, device)
            key = name.replace(" ", "_")
            report.values(**{f"{key}_ms": ms, f"{key}_gib": gib})
            table.append([name, ms, flops / ms * 1e-9, gib, difference])
    report.table(
        f"{rows} predictions, {sizes.prototypes} prototypes of {sizes.embedding} "
        f"numbers, forward and backward; {_why_no_kernel()}",
        ["form", "ms", "useful TFLOP/s", "extra GiB", "relative difference"],
        table,
    )
    known = report.known()
    ours = f"blocks_{MODULE.BLOCK_SIZE}"
    report.headline(
        f"plain {shown(known['plain_ms'])} ms and {shown(known['plain_gib'])} GiB; "
        f"ours {shown(known[f'{ours}_ms'])} ms and {shown(known[f'{ours}_gib'])} GiB"
    )


def _losses(x: Tensor, weight: Tensor, q: Tensor, chosen: Tensor) -> dict[str, Loss]:
    """The mean cross-entropy of x with q[chosen], in every form."""

    def plain() -> Tensor:
        log_p = (x @ weight.mT / TEMPERATURE).log_softmax(dim=1)
        return -(q[chosen] * log_p).sum(dim=1).mean()

    def target() -> PrototypeTarget:
        whole = contract_targets(q, weight)
        return PrototypeTarget(whole.embedding[chosen], whole.mass[chosen])

    def blocks() -> Tensor:
        return prototype_cross_entropy(x, weight, target(), TEMPERATURE).mean()

    def kernel() -> Tensor:
        """The logsumexp out of torch's loss: target 0 adds -<x, w_0> / t."""
        scaled = x / TEMPERATURE
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(scaled, weight, zeros, options=options)
        inner = (scaled * (weight[0] - target().embedding)).sum(dim=1)
        return loss + inner.mean()

    losses: dict[str, Loss] = {"plain": plain}
    losses.update({f"blocks {size}": blocks for size in BLOCKS})
    if _has_kernel():
        losses["linear_cross_entropy"] = kernel
    return losses


def _has_kernel() -> bool:
    return hasattr(torch.nn, "LinearCrossEntropyOptions")


def _why_no_kernel() -> str:
    if _has_kernel():
        return "linear_cross_entropy takes the rows of q to sum to one"
    return f"torch {torch.__version__} has no linear_cross_entropy"


def _block_size(name: str) -> mock._patch[int]:
    size = int(name.split()[1]) if name.startswith("blocks") else MODULE.BLOCK_SIZE
    return mock.patch.object(MODULE, "BLOCK_SIZE", size)


def _backward(loss: Loss, *leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss().backward()
