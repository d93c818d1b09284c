"""Two gloo processes compute together what one process computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_ext.loss import CLSViews, SparseViews, STELLARLoss, sinkhorn_knopp
from tests import distributed

SPLIT = (slice(0, 3), slice(3, 5))  # of five images, unevenly


def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 20 * torch.randn(5 * 4, 10, generator=generator)


def loss_and_gradients(images: slice, gather: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, views = draw(5, 4, 8)[images], draw(5, 2, 4, 8)[images]
    embeddings, view_embeddings = draw(5, 4, 6)[images], draw(5, 2, 4, 6)[images]
    cls, view_cls = draw(5, 6)[images], draw(5, 2, 6)[images]
    prototypes, cls_prototypes = (draw(10, 6).requires_grad_() for _ in range(2))
    criterion = STELLARLoss(reconstruction_weight=0, gather_distributed=gather)
    terms = criterion.terms(
        SparseViews(tokens, views, embeddings, view_embeddings, prototypes),
        CLSViews(cls, view_cls, None, cls_prototypes),
    )
    terms.total.backward()
    return {
        "total": terms.total.detach(),
        "prototypes": prototypes.grad,
        "cls_prototypes": cls_prototypes.grad,
    }


def work(rank: int, world_size: int) -> dict[str, Any]:
    rows = slice(SPLIT[rank].start * 4, SPLIT[rank].stop * 4)
    poisoned = logits()
    poisoned[-1, 3] = torch.nan  # of the last process
    return {
        "sinkhorn": sinkhorn_knopp(logits()[rows], gather_distributed=True),
        "poisoned": sinkhorn_knopp(poisoned[rows], gather_distributed=True),
        "loss": loss_and_gradients(SPLIT[rank], gather=True),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return distributed.run(work, tmp_path_factory.mktemp("gloo"))


@pytest.mark.slow
class TestTwoProcesses:
    def test_sinkhorn_knopp__balances_over_processes(
        self, results: list[dict[str, Any]]
    ) -> None:
        together = torch.cat([part["sinkhorn"] for part in results])
        alone = sinkhorn_knopp(logits())
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
        # It matters: without gathering the result is another one.
        apart = torch.cat(
            [sinkhorn_knopp(logits()[:12]), sinkhorn_knopp(logits()[12:])]
        )
        assert (apart - alone).abs().max() > 0.05

    def test_sinkhorn_knopp__not_finite_is_seen_everywhere(
        self, results: list[dict[str, Any]]
    ) -> None:
        for part in results:
            assert not part["poisoned"].isfinite().all(dim=1).any()

    def test_stellar_loss__value_and_gradients(
        self, results: list[dict[str, Any]]
    ) -> None:
        alone = loss_and_gradients(slice(0, 5), gather=False)
        for name, expected in alone.items():
            # Every process averages over its own images: three of five and two of five.
            parts = [part["loss"][name] for part in results]
            together = 0.6 * parts[0] + 0.4 * parts[1]
            torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
