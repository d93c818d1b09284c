from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.pretrain.checks import check_views
from lightly_ext.transforms import STELLARTransform
from tests.exact_resume import images
from tests.pretraining import loader, tiny, trainer


def _check(module: Any, **views: Any) -> None:
    sizes = {"global_crop_size": 32, "local_crop_size": 16}
    check_views(module, STELLARTransform(**{**sizes, **views}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be above 0, got -1.0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"min_lr": -1e-6}, "min_lr must be from 0 to lr (0.00015), got -1e-06"),
        ({"lr": 0.1, "min_lr": 0.2}, "min_lr must be from 0 to lr (0.1), got 0.2"),
        ({"warmup_fraction": 1.5}, "warmup_fraction must be from 0 to 1, got 1.5"),
        ({"warmup_fraction": -0.1}, "warmup_fraction must be from 0 to 1, got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"betas": (0.9, 1.0)}, "betas must be in [0, 1), got (0.9, 1.0)"),
    ],
)
def test_check_optimization(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(**options)


def test_check_optimization__limits() -> None:
    tiny(lr=0.1, min_lr=0.1, warmup_fraction=1.0, weight_decay=0.0, betas=(0.0, 0.0))
    tiny(min_lr=0.0, warmup_fraction=0.0)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_epochs", 0, "0 leaves nothing to train"),
        ("max_steps", 0, "0 leaves nothing to train"),
        ("limit_train_batches", 0, "0 leaves nothing to train"),
        ("limit_train_batches", 0.0, "0 leaves nothing to train"),
        ("accumulate_grad_batches", 0, "must be 1 or more, got 0"),
        ("gradient_clip_val", -1.0, "must be 0 or more, got -1.0"),
    ],
)
def test_check_trainer(option: str, value: float, message: str, tmp_path: Path) -> None:
    fit = trainer(tmp_path, **{option: value})
    with pytest.raises(ValueError, match=f"--trainer.{option} {message}"):
        fit.fit(tiny(), loader())


class TestCheckViews:
    def test_check_views__another_size_than_the_model_is_said(self) -> None:
        with pytest.warns(match="global_crop_size is 48, the model's img_size 32"):
            _check(tiny(), global_crop_size=48)

    def test_check_views__draws_nothing(self) -> None:
        module = tiny(teacher_momentum=0.9)
        before = torch.get_rng_state()
        _check(module, num_global_views=2)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("model", "views", "message"),
        [
            ({}, {"global_crop_size": 30}, "global_crop_size 30 .*patch_size 8"),
            ({}, {"local_crop_size": 12}, "local_crop_size 12 .*patch_size 8"),
            (
                {"augment": {"kernel_size": 33}},
                {},
                "local_crop_size 16 .*kernel_size 33.*to 31 or less",
            ),
            ({"mask_ratio": 0.95}, {}, "keeps none of the 4 x 4 patches"),
            ({"teacher_momentum": 0.9}, {"num_global_views": 1}, "2 or more"),
        ],
    )
    def test_check_views__what_does_not_fit(
        self, model: dict[str, Any], views: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            _check(tiny(**model), **views)

    def test_fit__checks_views(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="keeps none of the 4 x 4 patches"):
            trainer(tmp_path).fit(tiny(mask_ratio=0.95), images(tmp_path / "images"))

    def test_check_views__no_local_views(self) -> None:
        _check(tiny(), num_local_views=0, local_crop_size=12)

    def test_init__teacher_without_clustering(self) -> None:
        loss = {"clustering_weight": 0.0, "alignment_weight": 0.0}
        with pytest.raises(ValueError, match="targets for sparse tokens"):
            tiny(teacher_momentum=0.9, loss=loss)
