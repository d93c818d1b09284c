from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from lightly_ext.loss import (
    PrototypeTarget,
    assign_prototypes,
    contract_targets,
    prototype_cross_entropy,
    sinkhorn_knopp,
)
from tests import reference

# The package exports a function of the module's name.
module = sys.modules["lightly_ext.loss.prototype_cross_entropy"]


def plain_cross_entropy(
    x: Tensor, weight: Tensor, q: Tensor, temperature: float
) -> Tensor:
    return -(q * (x @ weight.mT / temperature).log_softmax(-1)).sum(-1)


def random_problem(rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    q = torch.rand(rows, 11, dtype=torch.float64)
    return x, weight, q / q.sum(1, keepdim=True)


class TestPrototypeCrossEntropy:
    @pytest.mark.parametrize("block_size", [1, 22, 2**24])
    @pytest.mark.parametrize("degenerate", [False, True])
    def test_prototype_cross_entropy__value_and_gradients_of_plain_form(
        self, block_size: int, degenerate: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BLOCK_SIZE", block_size)
        x, weight, q = random_problem()
        if degenerate:
            q[2] = 0.0
            q[3] *= 0.25
        ours = prototype_cross_entropy(x, weight, contract_targets(q, weight), 0.12)
        plain = plain_cross_entropy(x, weight, q, 0.12)
        torch.testing.assert_close(ours, plain)
        factors = torch.rand(7, dtype=torch.float64)
        for got, expected in zip(
            torch.autograd.grad((ours * factors).sum(), (x, weight)),
            torch.autograd.grad((plain * factors).sum(), (x, weight)),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("detached", [False, True])
    def test_prototype_cross_entropy__gradcheck(
        self, detached: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BLOCK_SIZE", 22)
        x, weight, q = random_problem()
        frozen = contract_targets(q, weight.detach())

        def loss(x: Tensor, weight: Tensor) -> Tensor:
            target = frozen if detached else contract_targets(q, weight)
            return prototype_cross_entropy(x, weight, target, 0.5)

        assert torch.autograd.gradcheck(loss, (x, weight))

    def test_prototype_cross_entropy__gathered_targets(self) -> None:
        x, weight, q = random_problem()
        index = torch.tensor([3, 3, 0, 6, 1, 1, 2])
        target = contract_targets(q, weight)
        gathered = PrototypeTarget(target.embedding[index], target.mass[index])
        torch.testing.assert_close(
            prototype_cross_entropy(x, weight, gathered, 0.12),
            plain_cross_entropy(x, weight, q[index], 0.12),
        )

    def test_prototype_cross_entropy__no_index_reference_numbers(self) -> None:
        # Identity prototypes: embeddings are the logits of the fixtures.
        fixtures = reference.load("ops")
        logits = fixtures["contrastive.logits"].requires_grad_()  # (2 * 2, 4, 20)
        target = contract_targets(fixtures["contrastive.targets"], torch.eye(20))
        views = PrototypeTarget(target.embedding[:, None], target.mass[:, None])
        loss = prototype_cross_entropy(
            logits.unflatten(0, (2, 2)), torch.eye(20), views
        ).mean()
        loss.backward()
        torch.testing.assert_close(loss, fixtures["contrastive.no_index.loss"])
        torch.testing.assert_close(
            logits.grad, fixtures["contrastive.no_index.grad"], rtol=0, atol=1e-6
        )

    def test_prototype_cross_entropy__with_index_reference_numbers(self) -> None:
        fixtures = reference.load("ops")
        logits = fixtures["contrastive.logits"].requires_grad_()
        image = torch.arange(4) // 2
        rows = fixtures["contrastive.targets"][
            image[:, None], fixtures["contrastive.index"]
        ]
        loss = prototype_cross_entropy(
            logits, torch.eye(20), contract_targets(rows, torch.eye(20))
        )
        loss.mean().backward()
        torch.testing.assert_close(loss.mean(), fixtures["contrastive.with_index.loss"])
        torch.testing.assert_close(
            logits.grad, fixtures["contrastive.with_index.grad"], rtol=0, atol=1e-6
        )

    def test_prototype_cross_entropy__float32_under_autocast(self) -> None:
        x, weight, q = (t.detach().float() for t in random_problem())
        expected = prototype_cross_entropy(x, weight, contract_targets(q, weight))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = prototype_cross_entropy(x, weight, contract_targets(q, weight))
        assert torch.equal(result, expected)

    def test_prototype_cross_entropy__large_logits(self) -> None:
        x = torch.tensor([[1e4, 0.0]], requires_grad=True)
        weight, q = torch.eye(2), torch.tensor([[1.0, 0.0]])
        loss = prototype_cross_entropy(x, weight, contract_targets(q, weight))
        loss.sum().backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-2)
        assert x.grad.isfinite().all()

    def test_prototype_cross_entropy__logits_are_not_kept(self) -> None:
        x = torch.randn(64, 4, requires_grad=True)
        weight = torch.randn(512, 4, requires_grad=True)
        target = PrototypeTarget(torch.zeros(64, 4), torch.ones(64))
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            prototype_cross_entropy(x, weight, target)
        assert max(sizes) == 512 * 4


class TestAssignPrototypes:
    def test_assign_prototypes__one_balance_over_all_images(self) -> None:
        torch.manual_seed(0)
        x, weight = torch.randn(3, 4, 5), torch.randn(8, 5)
        q = assign_prototypes(x, weight)
        expected = sinkhorn_knopp(x.flatten(0, 1) @ weight.T / 0.06)
        assert q.shape == (3, 4, 8)
        torch.testing.assert_close(q.flatten(0, 1), expected)

    def test_contract_targets__gradient_reaches_prototypes_only(self) -> None:
        q = torch.rand(3, 4, requires_grad=True)
        weight = torch.rand(4, 2, requires_grad=True)
        contract_targets(q, weight).embedding.sum().backward()
        assert q.grad is None
        torch.testing.assert_close(weight.grad, q.detach().sum(0)[:, None].expand(4, 2))
