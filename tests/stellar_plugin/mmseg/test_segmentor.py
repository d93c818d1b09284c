"""Backbone and head inside mmseg's own segmentor."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

import stellar_plugin.mmseg  # noqa: F401
from tests.stellar_plugin.mmseg.mmseg_sets import MODEL_NAME, NUM_QUERIES, VIT


def build(test_cfg: dict[str, object], **backbone: object) -> nn.Module:
    torch.manual_seed(0)
    vit = {"type": "StellarViT", "model_name": MODEL_NAME, "num_queries": NUM_QUERIES}
    head = {
        "type": "LinearProbeHead",
        "in_channels": VIT["embed_dim"],
        "num_classes": 5,
        "norm_cfg": {"type": "BN"},
    }
    cfg = {
        "type": "EncoderDecoder",
        "backbone": {**vit, **VIT, **backbone},
        "decode_head": head,
        "train_cfg": {},
        "test_cfg": test_cfg,
    }
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(ConfigDict(cfg))


def sample(size: tuple[int, int], label: int = 0) -> SegDataSample:
    shapes = {"ori_shape": size, "img_shape": size, "pad_shape": size}
    labels = PixelData(data=torch.full((1, *size), label))
    return SegDataSample(gt_sem_seg=labels, metainfo=shapes)


class TestSegmentor:
    @pytest.mark.parametrize("size", [(64, 64), (50, 97), (33, 40)])
    def test_predict__whole_and_slide(self, size: tuple[int, int]) -> None:
        images = torch.randn(1, 3, *size)
        slide = {"mode": "slide", "crop_size": (48, 48), "stride": (32, 32)}
        for test_cfg in ({"mode": "whole"}, slide):
            with torch.no_grad():
                (result,) = build(test_cfg).eval().predict(images, [sample(size)])
            assert result.seg_logits.data.shape == (5, *size)
            assert result.seg_logits.data.isfinite().all()

    def test_predict__one_crop_is_the_whole(self) -> None:
        size = (41, 59)
        images = torch.randn(1, 3, *size)
        slide = {"mode": "slide", "crop_size": (64, 64), "stride": (32, 32)}
        logits = [
            build(cfg).eval().predict(images, [sample(size)])[0].seg_logits.data
            for cfg in ({"mode": "whole"}, slide)
        ]
        torch.testing.assert_close(*logits)

    def test_loss__trains_the_head_and_nothing_else(self) -> None:
        model = build({"mode": "whole"}).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        images = torch.randn(2, 3, 64, 48)
        losses = model.loss(images, [sample((64, 48), label) for label in (0, 3)])
        losses["decode.loss_ce"].backward()
        optimizer.step()
        changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
        assert changed == {
            "decode_head.conv_seg.weight",
            "decode_head.conv_seg.bias",
            "decode_head.norm.weight",
            "decode_head.norm.bias",
            "decode_head.norm.running_mean",
            "decode_head.norm.running_var",
            "decode_head.norm.num_batches_tracked",
        }

    def test_multi_level_neck(self) -> None:
        neck = {
            "type": "MultiLevelNeck",
            "in_channels": [VIT["embed_dim"]] * 2,
            "out_channels": 8,
            "scales": [2, 1],
        }
        model = build({"mode": "whole"}, out_indices=(0, 1)).backbone.eval()
        with DefaultScope.overwrite_default_scope("mmseg"):
            levels = MODELS.build(neck)(model(torch.randn(1, 3, 48, 64)))
        assert [tuple(level.shape) for level in levels] == [(1, 8, 6, 8), (1, 8, 3, 4)]

    def test_distributed__norm_is_synchronised(self) -> None:
        model = convert_sync_batchnorm(build({"mode": "whole"}), "torch")
        assert isinstance(model.decode_head.norm, nn.SyncBatchNorm)
