from __future__ import annotations

import pytest
import torch
from lightly.loss import capi_loss
from torch import Tensor

from lightly_ext.loss import sinkhorn_knopp
from tests import reference

CASES = ("normal", "large", "single_row", "outlier_rows", "tall")


def plain_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """The definition, in float64 and with the whole matrix."""
    logits = logits.double()
    q = (logits - logits.amax(0) + 50).exp()
    for _ in range(iterations):
        q = q / (q.sum(0, keepdim=True) + 1e-8)
        q = q / (q.sum(1, keepdim=True) + 1e-8)
    return q


class TestSinkhornKnopp:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("iterations", [1, 3, 10])
    def test_sinkhorn_knopp__reference_numbers(
        self, case: str, iterations: int
    ) -> None:
        fixtures = reference.load("ops")
        logits = fixtures[f"sinkhorn.{case}.logits"]
        result = sinkhorn_knopp(logits, iterations)
        expected = fixtures[f"sinkhorn.{case}.scale1.0.it{iterations}"]
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
    def test_sinkhorn_knopp__definition_in_float64(self, scale: float) -> None:
        torch.manual_seed(0)
        logits = scale * torch.randn(64, 33)
        expected = plain_sinkhorn(logits, 3)
        result = sinkhorn_knopp(logits, 3)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)

    def test_sinkhorn_knopp__lightlys_per_position_form(self) -> None:
        # lightly balances (N, 1, K) without an offset; in float64 and for moderate
        # logits the epsilons do not matter.
        torch.manual_seed(0)
        logits = torch.randn(32, 16, dtype=torch.float64)
        expected = capi_loss.sinkhorn_knopp(logits[:, None], iterations=3)[:, 0]
        result = sinkhorn_knopp(logits, 3)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)

    def test_sinkhorn_knopp__balanced_after_many_iterations(self) -> None:
        torch.manual_seed(0)
        q = sinkhorn_knopp(torch.randn(60, 20, dtype=torch.float64), 200)
        torch.testing.assert_close(q.sum(1), torch.ones(60, dtype=torch.float64))
        torch.testing.assert_close(
            q.sum(0), torch.full((20,), 3.0, dtype=torch.float64)
        )

    def test_sinkhorn_knopp__column_offsets_do_not_matter(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(20, 8)
        shifted = logits + 100 * torch.randn(8)
        torch.testing.assert_close(
            sinkhorn_knopp(shifted), sinkhorn_knopp(logits), rtol=0, atol=1e-4
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sinkhorn_knopp__half_precision_is_widened(
        self, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        logits = (10 * torch.randn(20, 8)).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = sinkhorn_knopp(logits)
        assert torch.equal(result, sinkhorn_knopp(logits.float()))

    def test_sinkhorn_knopp__input_is_kept(self) -> None:
        logits = torch.randn(4, 4)
        before = logits.clone()
        sinkhorn_knopp(logits)
        assert torch.equal(logits, before)

    def test_sinkhorn_knopp__row_without_mass_stays_zero(self) -> None:
        logits = torch.zeros(4, 3)
        logits[2] = -400.0
        q = sinkhorn_knopp(logits, 50)
        assert q[2].sum() == 0 and q.isfinite().all()

    def test_sinkhorn_knopp__bad_input(self) -> None:
        with pytest.raises(ValueError, match="shape"):
            sinkhorn_knopp(torch.zeros(0, 3))
        with pytest.raises(ValueError, match="iterations"):
            sinkhorn_knopp(torch.zeros(2, 3), iterations=0)
