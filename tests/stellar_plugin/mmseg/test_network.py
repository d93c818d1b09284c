"""Networks that are no ViT behind the probe's head: any stride, any width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from stellar_plugin.checkpoints import load_network
from stellar_plugin.encoder import Factorization
from stellar_plugin.mmseg import PretrainedNetwork, StellarViT
from stellar_plugin.mmseg.pretrained import _cut
from stellar_plugin.networks import Network
from stellar_plugin.networks.network import unlocalized
from tests.checkpoint_files import save, timm_vit
from tests.stellar_plugin.mmseg.mmseg_sets import VIT
from tests.stellar_plugin.mmseg.small_files import beit as write_beit


class Means(Network):
    """Mean colours of cells, by which grids and labels are told exactly."""

    embed_dim = 3

    def __init__(self, stride: int = 32) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Factorization:
        maps = F.avg_pool2d(self.norm(images) * self.scale, self.stride)
        return unlocalized(None, maps.flatten(2).mT, (maps.shape[2], maps.shape[3]))


class Latents(Means):
    """Tokens without places, as TiTok's."""

    num_queries = 4


def means(stride: int, **kwargs: Any) -> PretrainedNetwork:
    """A backbone of cells, adopted as in a test without the first file."""
    backbone = PretrainedNetwork(**kwargs)
    backbone.adopt({"network": "Means", "stride": stride})
    return backbone


def init_cfg(path: Path) -> dict[str, object]:
    return {"type": "Pretrained", "checkpoint": str(path)}


@pytest.fixture(scope="module")
def beit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beit(tmp_path_factory.mktemp("beit") / "beit.pth")


class TestPretrainedNetwork:
    def test_forward__is_the_last_map_of_the_file(self, beit: Path) -> None:
        backbone = PretrainedNetwork(init_cfg=init_cfg(beit)).train()
        backbone.init_weights()
        images = torch.randn(2, 3, 64, 64)
        (maps,) = backbone(images)
        expected = load_network(beit)[0](images).dense.detach()
        assert maps.shape == (2, 48, 4, 4)
        for row in range(4):
            for column in range(4):
                assert maps[:, :, row, column].equal(expected[:, 4 * row + column])
        assert not maps.requires_grad
        assert backbone.weights_path == beit
        facts = backbone.weights_facts
        assert facts["read as"].startswith("BEiT")
        assert facts["maps"] == "48 channels, cells of 16 px"
        assert facts["made for"] == "images of 64 x 64 px"

    @pytest.mark.parametrize("stride", [32, 14])
    @pytest.mark.parametrize("size", [(64, 96), (50, 33), (1, 29), (224, 224)])
    def test_forward__spans_the_image(self, stride: int, size: tuple[int, int]) -> None:
        backbone = means(stride).eval()
        images = torch.randn(1, 3, *size)
        rows, columns = -(-size[0] // stride), -(-size[1] // stride)
        whole = torch.zeros(1, 3, rows * stride, columns * stride)
        whole[:, :, : size[0], : size[1]] = images
        cells = F.avg_pool2d(backbone.network.norm(whole), stride)
        (maps,) = backbone(images)
        height, width = size[0] / whole.shape[2], size[1] / whole.shape[3]
        assert maps.shape == (1, 3, rows, columns)
        torch.testing.assert_close(maps, _cut(cells, height, width))
        if whole.shape == images.shape:
            assert maps.equal(cells)

    def test_train__frozen_statistics_do_not_move(self) -> None:
        backbone = means(32).train()
        before = backbone.network.norm.running_mean.clone()
        backbone(torch.randn(2, 3, 64, 64) + 5)
        assert backbone.training
        assert not any(m.training for m in backbone.network.modules())
        assert backbone.network.norm.running_mean.equal(before)
        assert not any(p.requires_grad for p in backbone.parameters())

    def test_train__not_frozen(self, beit: Path) -> None:
        backbone = means(32, frozen=False).train()
        (maps,) = backbone(torch.randn(2, 3, 64, 64) + 5)
        assert backbone.network.norm.running_mean.min() > 0.1
        assert maps.requires_grad
        trained = PretrainedNetwork(frozen=False, init_cfg=init_cfg(beit)).train()
        trained.init_weights()
        trained(torch.randn(1, 3, 64, 64))[0].square().sum().backward()
        assert [n for n, p in trained.named_parameters() if p.grad is None] == []

    def test_test__the_first_file_is_gone(self, beit: Path, tmp_path: Path) -> None:
        trained = PretrainedNetwork(init_cfg=init_cfg(beit))
        trained.init_weights()
        tested = PretrainedNetwork(init_cfg=init_cfg(tmp_path / "nowhere")).train()
        tested.load_state_dict(trained.state_dict())
        images = torch.randn(1, 3, 64, 64)
        assert tested(images)[0].equal(trained(images)[0])
        assert not tested.network.training
        assert tested.settings() == trained.settings()
        assert tested.settings()["network"] == "BEiT"

    def test_test__of_another_network(self, beit: Path, tmp_path: Path) -> None:
        trained = PretrainedNetwork(init_cfg=init_cfg(beit))
        trained.init_weights()
        deeper = write_beit(tmp_path / "deeper.pth", depth=3)
        with pytest.raises(ValueError, match=r"blocks\.2.*depth is 3, was 2.*load_fr"):
            PretrainedNetwork(init_cfg=init_cfg(deeper)).load_state_dict(
                trained.state_dict()
            )
        with pytest.raises(ValueError, match="network is BEiT, was Means"):
            PretrainedNetwork(init_cfg=init_cfg(beit)).load_state_dict(
                means(32).state_dict()
            )
        vit = StellarViT("vit_tiny_patch16_224", num_queries=0, **VIT)
        with pytest.raises(ValueError, match=r"unexpected: encoder\.vit\."):
            PretrainedNetwork().load_state_dict(vit.state_dict())
        with pytest.raises(ValueError, match=r"missing: encoder\.vit\."):
            StellarViT(**VIT).load_state_dict(trained.state_dict())

    def test_bad_files(self, beit: Path, tmp_path: Path) -> None:
        vit = save(timm_vit().state_dict(), tmp_path / "vit.pth")
        with pytest.raises(ValueError, match=r"vit\.pth' .* a ViT: type='StellarViT'"):
            PretrainedNetwork(init_cfg=init_cfg(vit)).init_weights()
        with pytest.raises(ValueError, match=r"a BEiT, .*type='PretrainedNetwork'"):
            StellarViT(init_cfg=init_cfg(beit), **VIT).init_weights()
        with pytest.raises(FileNotFoundError, match=r"nowhere.*init_cfg\.checkpoint="):
            PretrainedNetwork(init_cfg=init_cfg(tmp_path / "nowhere")).init_weights()

    def test_nothing_tells_the_network(self) -> None:
        with pytest.raises(ValueError, match=r"Nothing tells .*init_cfg=dict\(type="):
            PretrainedNetwork().init_weights()
        with pytest.raises(ValueError, match=r"no network 'Other'.*another version"):
            PretrainedNetwork().adopt({"network": "Other"})

    def test_no_map(self) -> None:
        with pytest.raises(ValueError, match=r"A Latents .* 4 tokens .*has no map"):
            PretrainedNetwork().adopt({"network": "Latents"})

    def test_bad_arguments(self, beit: Path) -> None:
        with pytest.raises(ValueError, match="strid"):
            PretrainedNetwork(init_cfg=init_cfg(beit), strid=3)
        with pytest.raises(ValueError, match="takes no 'pretrained'"):
            PretrainedNetwork(pretrained="a.pth")


class TestPatchGrid:
    @pytest.mark.parametrize(("stride", "cells"), [(32, 7), (14, 16), (16, 14)])
    def test_labels_and_logits_meet(self, stride: int, cells: int) -> None:
        """Of 224 px, by the first pixel of every cell."""
        model = MODELS.build(
            {
                "type": "PatchGridSegmentor",
                "backbone": {"type": "PretrainedNetwork"},
                "decode_head": {
                    "type": "LinearProbeHead",
                    "in_channels": 3,
                    "num_classes": 3,
                    "norm_cfg": None,
                },
                "test_cfg": {"mode": "whole"},
            }
        )
        model.backbone.adopt({"network": "Means", "stride": stride})
        conv = model.decode_head.conv_seg
        nn.init.eye_(conv.weight.data.view(3, 3))
        nn.init.zeros_(conv.bias)
        images = torch.randn(2, 3, 224, 224)
        labels = torch.randint(0, 3, (2, 224, 224))
        samples = [SegDataSample(gt_sem_seg=PixelData(data=y[None])) for y in labels]
        with torch.no_grad():
            results = model.eval().predict(images, samples)
        for image, y, result in zip(images, labels, results, strict=True):
            assert result.gt_sem_seg.shape == (cells, cells)
            for row in range(cells):
                for column in range(cells):
                    top, left = row * stride, column * stride
                    cell = image[:, top : top + stride, left : left + stride]
                    strongest = cell.mean(dim=(1, 2)).argmax()
                    assert result.pred_sem_seg.data[0, row, column] == strongest
                    assert result.gt_sem_seg.data[0, row, column] == y[top, left]
