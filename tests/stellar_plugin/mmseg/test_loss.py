from __future__ import annotations

import pytest
import torch
from mmseg.models.losses import DiceLoss
from mmseg.registry import MODELS


def build(**kwargs: object) -> torch.nn.Module:
    return MODELS.build({"type": "LabelledDiceLoss", **kwargs})


class TestLabelledDiceLoss:
    def test_forward__closed_form(self) -> None:
        # One cell, two classes, probability p of the right one:
        # 2 p / (p^2 + (1 - p)^2 + 1).
        p = 0.8
        logits = torch.tensor([p / (1 - p), 1.0]).log().view(1, 2, 1, 1)
        expected = 1 - 2 * p / (p**2 + (1 - p) ** 2 + 1)
        loss = build(eps=0.0)(logits, torch.zeros(1, 1, 1, dtype=torch.int64))
        assert loss.item() == pytest.approx(expected, rel=1e-6)

    def test_forward__brute_force(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(3, 4, 5, 6)
        target = torch.randint(0, 4, (3, 5, 6))
        target[torch.rand(target.shape) < 0.3] = 255
        losses = []
        for image, labels in zip(logits.double(), target, strict=True):
            overlap, predicted, labelled = 0.0, 1e-3, 1e-3
            for row in range(5):
                for column in range(6):
                    label = int(labels[row, column])
                    if label == 255:
                        continue
                    p = image[:, row, column].softmax(0)
                    overlap += p[label].item()
                    predicted += p.square().sum().item()
                    labelled += 1.0
            losses.append(1 - 2 * overlap / (predicted + labelled))
        expected = sum(losses) / len(losses)
        assert build()(logits, target).item() == pytest.approx(expected, rel=1e-5)
        assert build(loss_weight=3.0)(logits, target).item() == pytest.approx(
            3 * expected, rel=1e-5
        )

    def test_forward__everything_labelled_is_mmsegs_own(self) -> None:
        logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
        theirs = DiceLoss(use_sigmoid=False)(logits, target)
        torch.testing.assert_close(build()(logits, target), theirs)

    def test_forward__ignored_cells_have_no_gradient(self) -> None:
        logits = torch.randn(1, 3, 2, 2, requires_grad=True)
        target = torch.tensor([[[0, 255], [2, 255]]])
        build()(logits, target).backward()
        assert (logits.grad[..., 1] == 0).all()
        assert (logits.grad[..., 0] != 0).all()

    def test_forward__nothing_labelled_is_finite(self) -> None:
        logits = torch.randn(1, 3, 2, 2, requires_grad=True)
        loss = build()(logits, torch.full((1, 2, 2), 255))
        loss.backward()
        assert loss.item() == pytest.approx(1.0)
        assert (logits.grad == 0).all()

    def test_forward__half_precision_sums_in_float32(self) -> None:
        logits = torch.randn(1, 2, 64, 64)
        target = torch.randint(0, 2, (1, 64, 64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = build()(logits.bfloat16(), target)
        expected = build()(logits.bfloat16().float(), target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)

    def test_forward__weights_of_cells(self) -> None:
        logits, target = torch.randn(1, 2, 2, 2), torch.zeros(1, 2, 2).long()
        with pytest.raises(ValueError, match="no weights of single cells"):
            build()(logits, target, weight=torch.ones(1, 2, 2))
