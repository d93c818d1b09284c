from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

EPS = 1e-8
# The exponentials start at exp(50) in every column, which keeps EPS far below the
# sums that it protects.
OFFSET = 50.0


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, iterations: int = 3, gather_distributed: bool = False
) -> Tensor:
    """Balanced assignment of samples to prototypes, as in STELLAR [0].

    Alternately divides each prototype's column and each sample's row by its sum. One
    balance is made over all rows, and over the rows of all processes if
    `gather_distributed` is True.

    The matrix is exponentiated once; an iteration reads it for the sums and writes it
    once, because the columns' divisors are kept apart as a scale.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (section 3.4)

    Args:
        logits:
            Similarities divided by the temperature, with shape
            (num_samples, num_prototypes).
        iterations:
            Number of iterations.
        gather_distributed:
            If True, column maxima and sums run over the rows of all processes.

    Returns:
        Tensor with shape (num_samples, num_prototypes), at least float32, whose rows
        are distributions. A row of which all weights underflow is zero.

    Raises:
        ValueError: If `logits` is no non-empty matrix or `iterations` is less than 1.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(
            "logits must have shape (num_samples, num_prototypes) without a zero, got "
            f"{tuple(logits.shape)}."
        )
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(dtype)
        column_max = logits.amax(dim=0)
        if gather_distributed:
            dist.all_reduce(column_max, dist.ReduceOp.MAX)
        kernel = (logits - (column_max - OFFSET)).exp_()  # (N, K)
        columns = kernel.new_ones(kernel.shape[1])  # the matrix is kernel * columns
        for _ in range(iterations):
            column_sum = columns * kernel.sum(dim=0)
            if gather_distributed:
                dist.all_reduce(column_sum)
            columns = columns / (column_sum + EPS)
            # Without moving the common scale into the rows, the two would drift apart
            # by num_samples / num_prototypes in every iteration.
            scale = columns.amax()
            kernel.mul_((scale / (kernel @ columns + EPS))[:, None])
            columns = columns / scale
        return kernel.mul_(columns)
