from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample


def build(**kwargs: object) -> torch.nn.Module:
    torch.manual_seed(0)
    cfg = {"in_channels": 6, "num_classes": 4, "norm_cfg": {"type": "BN"}}
    return MODELS.build({"type": "LinearProbeHead", **cfg, **kwargs})


class TestLinearProbeHead:
    def test_forward__batch_norm_then_linear(self) -> None:
        head = build().train()
        features = 3 * torch.randn(5, 6, 4, 3) + 1
        mean = features.mean((0, 2, 3), keepdim=True)
        variance = features.var((0, 2, 3), keepdim=True, correction=0)
        normed = (features - mean) / (variance + 1e-5).sqrt()
        weight = head.conv_seg.weight[:, :, 0, 0]
        expected = torch.einsum("bchw,kc->bkhw", normed, weight)
        expected = expected + head.conv_seg.bias[:, None, None]
        torch.testing.assert_close(head([features]), expected)

    def test_forward__eval_uses_running_statistics(self) -> None:
        head = build().eval()
        head.norm.running_mean.fill_(2.0)
        head.norm.running_var.fill_(4.0)
        features = torch.randn(1, 6, 2, 2)
        normed = (features - 2) / (4 + 1e-5) ** 0.5
        expected = F.conv2d(normed, head.conv_seg.weight, head.conv_seg.bias)
        torch.testing.assert_close(head([features]), expected)

    def test_forward__reads_in_index(self) -> None:
        head = build(in_index=0, norm_cfg=None)
        first, second = torch.randn(2, 1, 6, 2, 2)
        expected = F.conv2d(first, head.conv_seg.weight, head.conv_seg.bias)
        torch.testing.assert_close(head([first, second]), expected)

    def test_forward__concatenates_levels(self) -> None:
        head = build(
            in_channels=[2, 4],
            in_index=[0, 1],
            input_transform="resize_concat",
            norm_cfg=None,
        )
        levels = [torch.randn(1, 2, 4, 4), torch.randn(1, 4, 2, 2)]
        small = F.interpolate(levels[1], size=(4, 4), mode="bilinear")
        expected = F.conv2d(
            torch.cat([levels[0], small], 1), head.conv_seg.weight, head.conv_seg.bias
        )
        torch.testing.assert_close(head(levels), expected)

    def test_loss__cross_entropy_at_full_resolution(self) -> None:
        head = build(norm_cfg=None)
        features = torch.randn(1, 6, 2, 3)
        labels = torch.randint(0, 4, (1, 8, 12))
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        logits = F.interpolate(head([features]), size=(8, 12), mode="bilinear")
        expected = F.cross_entropy(logits, labels)
        loss = head.loss([features], [sample], {})["loss_ce"]
        torch.testing.assert_close(loss, expected)

    def test_parameters__norm_and_one_convolution(self) -> None:
        shapes = {name: tuple(p.shape) for name, p in build().named_parameters()}
        assert shapes == {
            "conv_seg.weight": (4, 6, 1, 1),
            "conv_seg.bias": (4,),
            "norm.weight": (6,),
            "norm.bias": (6,),
        }

    def test_wrong_channels(self) -> None:
        with pytest.raises(ValueError, match=r"in_channels is 6, .* gives 5 channels"):
            build()([torch.randn(2, 5, 2, 2)])

    def test_multiple_select(self) -> None:
        with pytest.raises(ValueError, match="reads one feature map"):
            build(
                in_channels=[6, 6], in_index=[0, 1], input_transform="multiple_select"
            )

    def test_one_class(self) -> None:
        with pytest.raises(ValueError, match="at least 2, got 1"):
            build(num_classes=1)
