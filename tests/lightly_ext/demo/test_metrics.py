from __future__ import annotations

import numpy as np
import pytest
import torch

from lightly_ext.demo.boards import BoardSets
from lightly_ext.demo.features import (
    BATCH_SIZE,
    model_features,
    pooled_patches,
    raw_patches,
    reconstructions,
    to_unit_range,
)
from lightly_ext.demo.metrics import (
    mean_psnr,
    model_free_scores,
    model_scores,
    patch_miou,
    patches_won,
)
from lightly_ext.demo.table import METRICS
from lightly_ext.evaluate.probing.localization import parts_iou
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin import Stellar


@pytest.fixture(scope="module")
def model() -> Stellar:
    torch.manual_seed(0)
    return Stellar(
        "stellar_vit_tiny_patch16_224",
        img_size=60,
        patch_size=12,
        embed_dim=24,
        depth=1,
        num_heads=2,
        num_queries=4,
        decoder_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ).eval()


class TestFeatures:
    def test_raw_patches__brute_force(self, sets: BoardSets) -> None:
        patches = raw_patches(sets.test.images)
        assert patches.shape == (60, 25, 432)
        for board, cell in ((0, 0), (7, 13), (59, 24)):
            top, left = 12 * (cell // 5), 12 * (cell % 5)
            patch = sets.test.images[board, top : top + 12, left : left + 12] / 255
            np.testing.assert_allclose(
                patches[board, cell], patch.ravel(), rtol=0, atol=1e-6
            )

    def test_pooled_patches__does_not_depend_on_place(self, sets: BoardSets) -> None:
        # The same cells in another order.
        images = sets.test.images
        moved = np.concatenate([images[:, 24:], images[:, :24]], axis=1)
        np.testing.assert_allclose(
            pooled_patches(images), pooled_patches(moved), atol=1e-6
        )

    def test_model_features__batches_as_one(
        self, model: Stellar, sets: BoardSets
    ) -> None:
        images = np.concatenate([sets.train.images] * 3)
        assert len(images) > BATCH_SIZE
        features = model_features(model, images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
        with torch.no_grad():
            direct = model((to_unit_range(images[-5:]) - mean) / std)
        assert len(features.sparse) == len(images)
        for name in ("sparse", "dense", "lowrank", "localization"):
            torch.testing.assert_close(
                getattr(features, name)[-5:], getattr(direct, name)
            )

    def test_reconstructions__in_range(self, model: Stellar, sets: BoardSets) -> None:
        images = reconstructions(model, sets.test.images)
        assert images.shape == (60, 3, 60, 60)
        assert 0 <= images.min() <= images.max() <= 1


class TestMeanPSNR:
    def test_mean_psnr__closed_form(self) -> None:
        targets = torch.zeros(2, 3, 4, 4)
        images = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
        # 20 dB and 40 dB
        assert mean_psnr(images, targets) == pytest.approx(30.0, abs=1e-4)


class TestPatchMIoU:
    def test_patch_miou__labels_as_features(self, sets: BoardSets) -> None:
        train, test = (
            np.eye(11, dtype=np.float32)[boards.cell_labels]
            for boards in (sets.train, sets.test)
        )
        assert patch_miou(train, test, sets) == 1.0


class TestScores:
    @pytest.mark.slow
    def test_model_scores__all_rows_of_the_table(
        self, model: Stellar, sets: BoardSets
    ) -> None:
        head = STELLARProjectionHead(24, 32, 16, 20)
        scores = model_scores(model, head, sets)
        assert {*scores, "mmseg_miou"} == {metric.key for metric in METRICS}
        assert all(0 <= v <= 1 for k, v in scores.items() if k != "psnr")
        assert scores == model_scores(model, head, sets)

    @pytest.mark.slow
    def test_model_free_scores__closed_forms(self, sets: BoardSets) -> None:
        scores = model_free_scores(sets)
        filled = (sets.test.cells >= 0).mean()
        assert scores["foreground_iou"] == pytest.approx(filled)
        mean = (sets.train.images / 255).mean(axis=0)
        error = ((sets.test.images / 255 - mean) ** 2).mean(axis=(1, 2, 3))
        assert scores["psnr"] == pytest.approx((-10 * np.log10(error)).mean(), abs=1e-3)
        assert scores["knn_sparse"] > 0.5


class TestPatchesWon:
    def test_patches_won__counts_of_each_query(self) -> None:
        winners = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 1]])
        localization = torch.nn.functional.one_hot(winners, 4).float()
        foreground = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).bool()
        hits, misses = patches_won(localization, foreground)
        assert hits.tolist() == [2, 1, 1, 0] and misses.tolist() == [1, 2, 1, 0]

    def test_patches_won__iou_of_the_patches_of_chosen_queries(self) -> None:
        generator = torch.Generator().manual_seed(0)
        localization = torch.rand(10, 25, 8, generator=generator).softmax(dim=-1)
        foreground = torch.rand(10, 25, generator=generator) < 0.4
        chosen = torch.rand(8, generator=generator) < 0.5
        predicted = chosen[localization.argmax(dim=-1)]
        both, either = predicted & foreground, predicted | foreground
        iou = parts_iou(*patches_won(localization, foreground), chosen)
        assert iou == int(both.sum()) / int(either.sum())
        assert 0 < iou < 1
