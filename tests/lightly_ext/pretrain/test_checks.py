from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lightly_ext.data import StellarDataModule
from lightly_ext.transforms import STELLARTransform
from tests.pretraining import tiny


def _set_up(module: Any, **views: Any) -> None:
    """What Lightning does before it makes optimisers and loaders."""
    sizes = {"global_crop_size": 32, "local_crop_size": 16}
    transform = STELLARTransform(**{**sizes, **views})
    module.trainer = Mock(datamodule=StellarDataModule("photos", transform=transform))
    module.setup("fit")


class TestCheckViews:
    def test_check_views__draws_nothing(self) -> None:
        module = tiny(teacher_momentum=0.9)
        before = torch.get_rng_state()
        _set_up(module, num_global_views=2)
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
            _set_up(tiny(**model), **views)

    def test_check_views__no_local_views(self) -> None:
        _set_up(tiny(), num_local_views=0, local_crop_size=12)

    def test_init__teacher_without_clustering(self) -> None:
        loss = {"clustering_weight": 0.0, "alignment_weight": 0.0}
        with pytest.raises(ValueError, match="targets for sparse tokens"):
            tiny(teacher_momentum=0.9, loss=loss)
