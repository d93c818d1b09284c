from __future__ import annotations

import math

import pytest
import torch
from lightly.loss import KoLeoLoss

from lightly_ext.loss import SetKoLeoLoss
from tests import reference


class TestSetKoLeoLoss:
    @pytest.mark.parametrize(
        "case", ["normal", "identical_pair", "near_pair", "two_tokens"]
    )
    def test_forward__reference_numbers(self, case: str) -> None:
        fixtures = reference.load("ops")
        x = fixtures[f"koleo.{case}.x"].requires_grad_()
        loss = SetKoLeoLoss()(x)
        loss.backward()
        expected = fixtures[f"koleo.{case}.loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        gradient = fixtures[f"koleo.{case}.grad"]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(x.grad, gradient, rtol=0, atol=5e-5 * scale)

    def test_forward__closed_form(self) -> None:
        # Two orthogonal unit vectors are sqrt(2) apart.
        tokens = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])
        expected = -math.log(0.5 * math.sqrt(2))
        assert SetKoLeoLoss()(tokens).item() == pytest.approx(expected, rel=1e-6)

    def test_forward__is_lightlys_per_image_up_to_a_constant(self) -> None:
        # The factor 0.5 in the logarithm shifts the value by log 2.
        torch.manual_seed(0)
        tokens = torch.randn(3, 8, 16)
        expected = sum(KoLeoLoss()(image) for image in tokens) / 3 + math.log(2)
        torch.testing.assert_close(SetKoLeoLoss()(tokens), expected, rtol=1e-4, atol=0)

    def test_forward__images_do_not_see_each_other(self) -> None:
        torch.manual_seed(0)
        image = torch.randn(1, 4, 8)
        alone = SetKoLeoLoss()(image)
        torch.testing.assert_close(SetKoLeoLoss()(image.repeat(5, 1, 1)), alone)
        views = image.repeat(6, 1, 1).unflatten(0, (2, 3))
        torch.testing.assert_close(SetKoLeoLoss()(views), alone)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("copies", [2, 3, 8])
    def test_forward__identical_tokens_have_finite_gradient(
        self, copies: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(1, 8, 16).to(dtype)
        tokens[:, :copies] = tokens[:, :1]
        tokens.requires_grad_()
        SetKoLeoLoss()(tokens).backward()
        assert tokens.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_forward__zero_tokens_have_finite_gradient(
        self, dtype: torch.dtype
    ) -> None:
        tokens = torch.zeros(1, 4, 8, dtype=dtype, requires_grad=True)
        SetKoLeoLoss()(tokens).backward()
        assert tokens.grad.isfinite().all()

    def test_forward__gradcheck(self) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(SetKoLeoLoss(), (tokens,))

    def test_forward__float32_under_autocast(self) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(2, 4, 6).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = SetKoLeoLoss()(tokens)
        torch.testing.assert_close(loss, SetKoLeoLoss()(tokens.float()), rtol=0, atol=0)

    @pytest.mark.parametrize("shape", [(2, 1, 3), (2, 0, 3), (0, 2, 3)])
    def test_forward__too_few_tokens(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="at least two tokens"):
            SetKoLeoLoss()(torch.zeros(shape))
