from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightly_ext.loss import TokenMatching, match_tokens
from lightly_ext.loss.set_matching import matching_statistics
from tests import reference


def plain_plan(predictions: Tensor, targets: Tensor, epsilon: float = 0.1) -> Tensor:
    """The definition for one set, in float64 and with loops."""
    cost = torch.tensor(
        [[torch.dist(p, t).item() for t in targets] for p in predictions],
        dtype=torch.float64,
    )
    u, v = torch.zeros(len(predictions)).double(), torch.zeros(len(targets)).double()
    for _ in range(5):
        for i in range(len(u)):
            u[i] = -epsilon * (((v - cost[i]) / epsilon).exp().sum()).log()
        for j in range(len(v)):
            v[j] = -epsilon * (((u - cost[:, j]) / epsilon).exp().sum()).log()
    return ((u[:, None] + v - cost) / epsilon).exp()


class TestMatchTokens:
    @pytest.mark.parametrize("case", ["soft", "far", "collision", "rect"])
    def test_match_tokens__reference_numbers(self, case: str) -> None:
        fixtures = reference.load("ops")
        result = match_tokens(
            fixtures[f"match.{case}.preds"], fixtures[f"match.{case}.targets"]
        )
        assert torch.equal(result.indices, fixtures[f"match.{case}.index"])
        expected = fixtures[f"match.{case}.P"]
        torch.testing.assert_close(result.plan, expected, rtol=0, atol=2e-5)

    def test_match_tokens__definition(self) -> None:
        torch.manual_seed(0)
        predictions, targets = torch.randn(5, 3), torch.randn(4, 3)
        result = match_tokens(0.2 * predictions, 0.2 * targets)
        expected = plain_plan(0.2 * predictions, 0.2 * targets)
        torch.testing.assert_close(result.plan.double(), expected, rtol=0, atol=1e-5)
        assert torch.equal(result.indices, expected.argmax(1))

    def test_match_tokens__planted_permutation(self) -> None:
        torch.manual_seed(0)
        targets = torch.randn(3, 8, 16)
        order = torch.stack([torch.randperm(8) for _ in range(3)])
        noisy = targets.gather(1, order[..., None].expand(-1, -1, 16))
        noisy = noisy + 0.05 * torch.randn_like(noisy)
        assert torch.equal(match_tokens(noisy, targets).indices, order)

    def test_match_tokens__agrees_with_hungarian_when_clear(self) -> None:
        torch.manual_seed(0)
        for _ in range(20):
            targets = torch.randn(6, 32)
            predictions = targets[torch.randperm(6)] + 0.3 * torch.randn(6, 32)
            result = match_tokens(predictions, targets)
            cost = torch.cdist(predictions, targets).numpy()
            assert result.indices.tolist() == linear_sum_assignment(cost)[1].tolist()

    def test_match_tokens__collision_is_allowed(self) -> None:
        targets = torch.tensor([[0.0], [0.1], [50.0]])
        predictions = torch.tensor([[0.0], [50.0], [50.1]])
        indices = match_tokens(predictions, targets).indices.tolist()
        assert indices[1:] == [2, 2]

    def test_match_tokens__views_against_one_target(self) -> None:
        torch.manual_seed(0)
        views, targets = torch.randn(2, 3, 4, 8), torch.randn(2, 4, 8)
        together = match_tokens(views, targets[:, None])
        assert together.indices.shape == (2, 3, 4)
        for view in range(3):
            alone = match_tokens(views[:, view], targets)
            assert torch.equal(together.indices[:, view], alone.indices)
            torch.testing.assert_close(together.plan[:, view], alone.plan)

    def test_match_tokens__half_precision_and_no_gradient(self) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = match_tokens(tokens, tokens.flip(1))
        assert result.indices.tolist() == [[3, 2, 1, 0]] * 2
        assert result.plan.dtype == torch.float32 and not result.plan.requires_grad

    def test_match_tokens__bad_input(self) -> None:
        with pytest.raises(ValueError, match="at least one target"):
            match_tokens(torch.zeros(1, 2, 3), torch.zeros(1, 0, 3))
        with pytest.raises(ValueError, match="epsilon"):
            match_tokens(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), epsilon=0)


class TestMatchingStatistics:
    def test_matching_statistics__closed_forms(self) -> None:
        # Of targets 0 to 2, 0 is matched twice and 2 not at all.
        plan = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.0, 1.0, 0.0]])
        found = matching_statistics(TokenMatching(torch.tensor([0, 0, 1]), plan))
        assert found["non_identity_matches"] == pytest.approx(2 / 3)
        assert found["matching_collisions"] == pytest.approx(2 / 3)
        entropies = [
            -sum(p * math.log(p) for p in row) for row in [(0.9, 0.1), (0.6, 0.4)]
        ]
        assert found["matching_entropy"] == pytest.approx(sum(entropies) / 3)

    def test_matching_statistics__a_permutation_has_no_collisions(self) -> None:
        torch.manual_seed(0)
        tokens = 10 * torch.randn(2, 5, 8)
        order = torch.tensor([1, 0, 2, 4, 3])
        found = matching_statistics(match_tokens(tokens[:, order], tokens))
        assert found["matching_collisions"] == 0
        assert found["non_identity_matches"] == pytest.approx(0.8)

    def test_matching_statistics__a_row_that_underflows(self) -> None:
        plan = torch.tensor([[0.0, 0.0], [0.5, 0.5]])
        found = matching_statistics(TokenMatching(torch.tensor([0, 0]), plan))
        assert found["matching_entropy"] == pytest.approx(math.log(2) / 2)
