from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import mmengine.runner.checkpoint
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch.serialization import get_safe_globals

from stellar_plugin.mmseg import compat
from tests.stellar_plugin.mmseg.mmseg_sets import REPOSITORY


class TestPointSample:
    def test_bilinear__brute_force(self) -> None:
        torch.manual_seed(0)
        features = torch.randn(2, 3, 5, 7, dtype=torch.float64)
        points = torch.rand(2, 11, 2, dtype=torch.float64) * 0.7 + 0.15
        sampled = compat.point_sample(features, points)
        assert sampled.shape == (2, 3, 11)
        for b in range(2):
            for i in range(11):
                x, y = points[b, i, 0] * 7 - 0.5, points[b, i, 1] * 5 - 0.5
                left, top = int(x.floor()), int(y.floor())
                dx, dy = x - left, y - top
                square = features[b, :, top : top + 2, left : left + 2]
                rows = square[..., 0] * (1 - dx) + square[..., 1] * dx
                expected = rows[:, 0] * (1 - dy) + rows[:, 1] * dy
                torch.testing.assert_close(sampled[b, :, i], expected)

    def test_grid_of_points__as_a_list_of_points(self) -> None:
        features = torch.randn(1, 2, 4, 4)
        points = torch.rand(1, 3, 5, 2)
        torch.testing.assert_close(
            compat.point_sample(features, points).flatten(2),
            compat.point_sample(features, points.flatten(1, 2)),
        )


class TestSigmoidFocalLoss:
    def test_value__slow_loop(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(6, 3, dtype=torch.float64)
        target = torch.tensor([0, 1, 2, 3, 0, 3])  # 3 is background
        loss = compat.sigmoid_focal_loss(logits, target, 1.5, 0.3, None, "none")
        for n in range(6):
            for c in range(3):
                p = logits[n, c].sigmoid()
                if target[n] == c:
                    expected = -0.3 * (1 - p) ** 1.5 * p.log()
                else:
                    expected = -0.7 * p**1.5 * (1 - p).log()
                torch.testing.assert_close(loss[n, c], expected)

    def test_reduction__mean_is_over_samples(self) -> None:
        logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        each = compat.sigmoid_focal_loss(logits, target, reduction="none")
        total = compat.sigmoid_focal_loss(logits, target, reduction="sum")
        mean = compat.sigmoid_focal_loss(logits, target, reduction="mean")
        torch.testing.assert_close(total, each.sum())
        torch.testing.assert_close(mean, each.sum() / 4)

    def test_weight__of_the_target_class(self) -> None:
        logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        plain = compat.sigmoid_focal_loss(logits, target, reduction="none")
        weight = torch.tensor([1.0, 2.0, 5.0])
        weighted = compat.sigmoid_focal_loss(
            logits, target, weight=weight, reduction="none"
        )
        factor = torch.tensor([1.0, 2.0, 5.0, 1.0])[:, None]
        torch.testing.assert_close(weighted, plain * factor)

    def test_gradient(self) -> None:
        logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        target = torch.tensor([0, 1, 3, 0])
        assert torch.autograd.gradcheck(
            lambda x: compat.sigmoid_focal_loss(x, target), (logits,)
        )


class TestMmcvOps:
    def test_can_be_imported(self) -> None:
        from mmcv.ops import point_sample, sigmoid_focal_loss

        assert callable(point_sample) and callable(sigmoid_focal_loss)
        # A class, or None for "not installed"; mmseg imports both.
        assert {"CrissCrossAttention", "PSAMask"} <= vars(
            sys.modules["mmcv.ops"]
        ).keys()

    def test_real_ops__untouched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = ModuleType("mmcv.ops")
        monkeypatch.setitem(sys.modules, "mmcv.ops", real)
        compat.apply()
        assert sys.modules["mmcv.ops"] is real


class TestCheckpoints:
    """As on stock mmengine, which leaves `torch.load` to us."""

    @pytest.fixture(autouse=True)
    def stock(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        module = mmengine.runner.checkpoint
        monkeypatch.delattr(module, "get_torch_safe_globals", raising=False)
        before = get_safe_globals()
        torch.serialization.clear_safe_globals()
        compat.apply()
        yield
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)

    def test_what_mmengine_logs__round_trip(self, tmp_path: Path) -> None:
        history = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 2])
        torch.save({"history": history, "value": np.float64(3)}, tmp_path / "x.pth")
        loaded = torch.load(tmp_path / "x.pth", weights_only=True)
        assert loaded["value"] == 3.0
        assert loaded["history"].mean() == history.mean() == 7 / 4
        assert loaded["history"].statistics("max") == 4.0

    def test_other_objects__refused(self, tmp_path: Path) -> None:
        torch.save({"path": Path("x")}, tmp_path / "x.pth")
        with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
            torch.load(tmp_path / "x.pth", weights_only=True)

    @pytest.mark.parametrize(
        ("owner", "name"), [(HistoryBuffer, "__init__"), (np.ndarray, "tofile")]
    )
    def test_getattr_of_anything_else__refused(
        self, tmp_path: Path, owner: type, name: str
    ) -> None:
        class Foreign:
            def __reduce__(self) -> tuple[object, ...]:
                return getattr, (owner, name)

        torch.save({"x": Foreign()}, tmp_path / "x.pth")
        with pytest.raises(pickle.UnpicklingError, match="nothing that mmengine"):
            torch.load(tmp_path / "x.pth", weights_only=True)


class TestZoo:
    @pytest.mark.slow
    def test_upernet__builds_and_trains_one_step(self, tmp_path: Path) -> None:
        file = tmp_path / "upernet.py"
        file.write_text(
            "_base_ = ['mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py']\n"
        )
        cfg = Config.fromfile(file).model
        cfg.pretrained = None  # no download
        # Plain BatchNorm: the synchronised one needs a GPU.
        cfg.backbone.norm_cfg = {"type": "BN", "requires_grad": True}
        cfg.decode_head.norm_cfg = cfg.auxiliary_head.norm_cfg = cfg.backbone.norm_cfg
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope("mmseg"):
            model = MODELS.build(cfg).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        images = torch.randn(2, 3, 64, 64)
        losses = model.loss(images, samples(64))
        sum(v for k, v in losses.items() if "loss" in k).backward()
        before = model.backbone.stem[0].weight.clone()
        optimizer.step()
        assert losses["decode.loss_ce"].isfinite()
        assert not model.backbone.stem[0].weight.equal(before)


class TestBlocked:
    """Without OpenMMLab, and without lightly, the core works and says what to do."""

    CODE = """
import sys
for name in ("mmseg", "mmcv", "mmengine", "lightly", "pytorch_lightning"):
    sys.modules[name] = None
import stellar_plugin, stellar_plugin.checkpoints
print("imported")
try:
    import stellar_plugin.mmseg
except ModuleNotFoundError as error:
    print(error)
"""

    @pytest.mark.slow
    def test_imports(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", self.CODE],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        core, mmseg_part = done.stdout.splitlines()
        assert core == "imported"
        assert "pip install 'stellar-plugin[mmseg]'" in mmseg_part


def samples(size: int) -> list[SegDataSample]:
    """Two random label maps of 19 classes."""
    return [
        SegDataSample(
            gt_sem_seg=PixelData(data=torch.randint(0, 19, (1, size, size))),
            metainfo={"img_shape": (size, size)},
        )
        for _ in range(2)
    ]
