"""Cross-entropy against prototypes without the matrix of logits.

For a target `q` over prototypes `W`,
`CE(q, softmax(W x / t)) = sum(q) logsumexp(W x / t) - <x, W^T q> / t`.
`W^T q` is computed once per target and shared by all predictions matched with it, and
the logsumexp is computed block by block and again in the backward pass, so that nothing
as large as (predictions x prototypes) is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightly_ext.loss.sinkhorn import sinkhorn_knopp

# Logits that exist at one time: 128 MiB in float32. Larger blocks are hardly faster.
BLOCK_SIZE = 2**25


class PrototypeTarget(NamedTuple):
    """Distributions over prototypes, contracted with the prototypes.

    Attributes:
        embedding:
            `W^T q` with shape (..., dim).
        mass:
            Sum of q with shape (...): 1, or 0 for a degenerate row.
    """

    embedding: Tensor
    mass: Tensor

    def select(self, indices: Tensor) -> PrototypeTarget:
        """Target of each prediction.

        Args:
            indices:
                Numbers of targets, int64 with shape (..., num_predictions); leading
                dimensions broadcast against those of the targets.
        """
        embedding = self.embedding.expand(*indices.shape[:-1], -1, -1)
        mass = self.mass.expand(*indices.shape[:-1], -1)
        wide = indices[..., None].expand(*indices.shape, embedding.shape[-1])
        return PrototypeTarget(embedding.gather(-2, wide), mass.gather(-1, indices))


@torch.no_grad()
def assign_prototypes(
    embeddings: Tensor,
    prototypes: Tensor,
    temperature: float = 0.06,
    iterations: int = 3,
    gather_distributed: bool = False,
) -> Tensor:
    """Balanced assignment of embeddings to prototypes, without gradient.

    Args:
        embeddings:
            Unit vectors with shape (..., dim).
        prototypes:
            Tensor with shape (num_prototypes, dim).
        temperature:
            Temperature of the assignment.
        iterations:
            Number of Sinkhorn iterations.
        gather_distributed:
            If True, the balance runs over all processes.

    Returns:
        Tensor with shape (..., num_prototypes); rows are distributions.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings, prototypes = _widen(embeddings, prototypes)
        logits = embeddings.flatten(0, -2) @ prototypes.mT / temperature
    q = sinkhorn_knopp(logits, iterations, gather_distributed)
    return q.unflatten(0, embeddings.shape[:-1])


def contract_targets(assignments: Tensor, prototypes: Tensor) -> PrototypeTarget:
    """Contracts assignments (..., num_prototypes) with the prototypes.

    Gradient reaches the prototypes, as in the plain cross-entropy, and not the
    assignments.
    """
    q = assignments.detach()
    with torch.autocast(q.device.type, enabled=False):
        return PrototypeTarget(q @ prototypes.to(q.dtype), q.sum(dim=-1))


def prototype_cross_entropy(
    embeddings: Tensor,
    prototypes: Tensor,
    target: PrototypeTarget,
    temperature: float = 0.12,
) -> Tensor:
    """Cross-entropy of predictions with targets over prototypes.

    Args:
        embeddings:
            Predictions with shape (..., dim).
        prototypes:
            Tensor with shape (num_prototypes, dim).
        target:
            Contracted targets; leading dimensions broadcast against the predictions.
        temperature:
            Temperature of the prediction.

    Returns:
        Cross-entropy of each prediction in nats with shape (...), at least float32.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        x, weight = _widen(embeddings, prototypes)
        x = x / temperature
        lse: Tensor = _LogSumExp.apply(x.flatten(0, -2), weight)
        inner = (x * target.embedding).sum(dim=-1)
        return target.mass * lse.view(x.shape[:-1]) - inner


class _LogSumExp(torch.autograd.Function):
    """`logsumexp(W x)` over prototypes, (N, D) and (K, D) -> (N,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        blocks = x.split(_rows_per_block(weight))
        lse = torch.cat([(block @ weight.mT).logsumexp(1) for block in blocks])
        ctx.save_for_backward(x, weight, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, lse = ctx.saved_tensors
        rows = _rows_per_block(weight)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        # The small matrices take the incoming gradient: every pass over p counts.
        scaled = x * grad[:, None]
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), rows):
                block = slice(start, start + rows)
                p = (x[block] @ weight.mT).sub_(lse[block, None]).exp_()
                torch.mm(p, weight, out=grad_x[block])
                grad_weight.addmm_(p.mT, scaled[block])
        return grad_x.mul_(grad[:, None]), grad_weight


def _rows_per_block(weight: Tensor) -> int:
    return max(1, BLOCK_SIZE // weight.shape[0])


def _widen(embeddings: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 at least: logits are divided by temperatures near 0.1."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return embeddings.to(dtype), prototypes.to(dtype)
