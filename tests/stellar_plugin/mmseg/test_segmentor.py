"""Backbone and head inside mmseg's own segmentor."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from tests.stellar_plugin.mmseg.mmseg_sets import MODEL_NAME, NUM_QUERIES, VIT


def build(
    test_cfg: dict[str, object], kind: str = "EncoderDecoder", **backbone: object
) -> nn.Module:
    torch.manual_seed(0)
    vit = {"type": "StellarViT", "model_name": MODEL_NAME, "num_queries": NUM_QUERIES}
    head = {
        "type": "LinearProbeHead",
        "in_channels": VIT["embed_dim"],
        "num_classes": 5,
        "norm_cfg": {"type": "BN"},
    }
    cfg = {
        "type": kind,
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


def starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows: every stride, the last one ends with the image."""
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def bilinear(maps: torch.Tensor, row: float, column: float) -> torch.Tensor:
    """Value of maps (channels, height, width) between cells; the border goes on."""
    height, width = maps.shape[1:]
    row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    top, left = min(int(row), height - 2), min(int(column), width - 2)
    y, x = row - top, column - left
    upper = (1 - x) * maps[:, top, left] + x * maps[:, top, left + 1]
    lower = (1 - x) * maps[:, top + 1, left] + x * maps[:, top + 1, left + 1]
    return (1 - y) * upper + y * lower


class TestSegmentor:
    @pytest.mark.parametrize("size", [(64, 64), (50, 97), (33, 40), (113, 48)])
    def test_predict__slide_is_the_mean_over_windows(
        self, size: tuple[int, int]
    ) -> None:
        crop, stride = 48, 32
        model = build(
            {"mode": "slide", "crop_size": (crop,) * 2, "stride": (stride,) * 2}
        ).eval()
        image = torch.randn(1, 3, *size)
        total = torch.zeros(5, *size, dtype=torch.float64)
        windows = torch.zeros(size)
        with torch.no_grad():
            for top in starts(size[0], crop, stride):
                for left in starts(size[1], crop, stride):
                    part = (slice(top, top + crop), slice(left, left + crop))
                    window = image[:, :, part[0], part[1]]
                    logits = F.interpolate(
                        model.decode_head(model.backbone(window)),
                        size=window.shape[2:],
                        mode="bilinear",
                    )
                    total[:, part[0], part[1]] += logits[0]
                    windows[part] += 1
            (result,) = model.predict(image, [sample(size)])
        assert windows.min() >= 1
        expected = (total / windows).float()
        torch.testing.assert_close(result.seg_logits.data, expected)

    def test_predict__whole_of_odd_size(self) -> None:
        # Padded to 48 x 64, of whose map the upper left 41/48 x 59/64 are the image.
        size, padded = (41, 59), (48, 64)
        model = build({"mode": "whole"}).eval()
        image = torch.randn(1, 3, *size)
        filled = torch.zeros(1, 3, *padded)
        filled[:, :, : size[0], : size[1]] = image
        with torch.no_grad():
            cells = model.backbone(filled)[0][0]  # (channels, 3, 4)
            cut = torch.stack(
                [
                    bilinear(
                        cells, (i + 0.5) * 41 / 48 - 0.5, (j + 0.5) * 59 / 64 - 0.5
                    )
                    for i in range(3)
                    for j in range(4)
                ],
                dim=1,
            )
            logits = model.decode_head([cut.view(1, -1, 3, 4)])
            (result,) = model.predict(image, [sample(size)])
        for row, column in ((0, 0), (20, 31), (40, 58), (7, 50)):
            expected = bilinear(
                logits[0], (row + 0.5) * 3 / 41 - 0.5, (column + 0.5) * 4 / 59 - 0.5
            )
            torch.testing.assert_close(
                result.seg_logits.data[:, row, column], expected, rtol=1e-3, atol=1e-5
            )

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


class TestPatchGridSegmentor:
    def build(self, **backbone: object) -> nn.Module:
        return build({"mode": "whole"}, "PatchGridSegmentor", **backbone)

    def labels(self, *size: int) -> torch.Tensor:
        labels = torch.randint(0, 5, size, generator=torch.manual_seed(1))
        labels[torch.rand(size) < 0.2] = 255
        return labels

    def samples(self, labels: torch.Tensor) -> list[SegDataSample]:
        return [SegDataSample(gt_sem_seg=PixelData(data=y[None])) for y in labels]

    def test_loss__on_the_patch_grid(self) -> None:
        model = self.build().train()
        images, labels = torch.randn(2, 3, 64, 48), self.labels(2, 64, 48)
        losses = model.loss(images, self.samples(labels))
        logits = model.decode_head(model.backbone(images))
        # Nearest: the first pixel of each patch of 16 px.
        expected = F.cross_entropy(
            logits, labels[:, ::16, ::16], ignore_index=255, reduction="sum"
        )
        torch.testing.assert_close(losses["decode.loss_ce"], expected / (2 * 4 * 3))

    @pytest.mark.parametrize(("patch", "grid"), [(16, (4, 3)), (8, (8, 6))])
    def test_predict__classes_of_patches(
        self, patch: int, grid: tuple[int, int]
    ) -> None:
        model = self.build(patch_size=patch).eval()
        images, labels = torch.randn(2, 3, 64, 48), self.labels(2, 64, 48)
        with torch.no_grad():
            results = model.predict(images, self.samples(labels))
            logits = model.decode_head(model.backbone(images))
        for result, image_logits, y in zip(results, logits, labels, strict=True):
            assert result.pred_sem_seg.shape == result.gt_sem_seg.shape == grid
            assert result.pred_sem_seg.data[0].equal(image_logits.argmax(0))
            assert result.gt_sem_seg.data[0].equal(y[::patch, ::patch])
            torch.testing.assert_close(result.seg_logits.data, image_logits)

    def test_predict__without_labels(self) -> None:
        with torch.no_grad():
            (result,) = self.build().eval().predict(torch.randn(1, 3, 32, 32))
        assert result.pred_sem_seg.shape == (2, 2)
        assert "gt_sem_seg" not in result

    def test_predict__flipped(self) -> None:
        image, same = torch.randn(1, 3, 32, 32), SegDataSample(metainfo={"flip": False})
        flipped = SegDataSample(metainfo={"flip": True, "flip_direction": "vertical"})
        model = self.build().eval()
        model.predict(image, [same])
        with pytest.raises(ValueError, match="take RandomFlip out of the pipeline"):
            model.predict(image, [flipped])

    def test_predict__two_classes_by_one_logit(self) -> None:
        model = self.build()
        head = {"in_channels": VIT["embed_dim"], "num_classes": 2, "out_channels": 1}
        head = {"type": "LinearProbeHead", "threshold": 0.4, **head}
        model.decode_head = MODELS.build(head)
        nn.init.normal_(model.decode_head.conv_seg.weight)
        with torch.no_grad():
            (result,) = model.eval().predict(torch.randn(1, 3, 64, 64))
        expected = result.seg_logits.data > math.log(0.4 / 0.6)
        assert 0 < expected.sum() < 16
        assert result.pred_sem_seg.data.equal(expected.long())
