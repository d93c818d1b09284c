from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from lightly.models.utils import get_2d_sine_cosine_positional_embedding

from lightly_ext.modules import MaskedAutoencoder
from tests.pretraining import TINY_MAE


def model(**kwargs: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(**{**TINY_MAE, **kwargs}).eval()


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(3, 3, 32, 32)
    return images, torch.stack([torch.randperm(16)[:4] for _ in range(3)])


class TestMaskedAutoencoder:
    @pytest.mark.parametrize("registers", [0, 2])
    def test_forward__encodes_as_lightly(self, registers: int) -> None:
        ours = model(reg_tokens=registers)
        images, keep = masks()
        theirs = MaskedVisionTransformerTIMM(
            ours.encoder.vit,
            weight_initialization="skip",
            pos_embed_initialization="skip",
        )
        prefix = torch.arange(1 + registers).expand(3, -1)
        index = torch.cat([prefix, keep + 1 + registers], dim=1)
        expected = theirs.encode(images, idx_keep=index)
        torch.testing.assert_close(ours(images, keep).tokens, expected)

    def test_forward__hidden_patches_are_not_seen(self) -> None:
        ours, (images, keep) = model(), masks()
        seen = torch.zeros(3, 16).scatter(1, keep, 1.0).view(3, 1, 4, 4)
        blanked = images * seen.repeat_interleave(8, 2).repeat_interleave(8, 3)
        torch.testing.assert_close(
            ours(blanked, keep).patches, ours(images, keep).patches
        )

    def test_forward__order_of_what_is_kept_does_not_matter(self) -> None:
        ours, (images, keep) = model(), masks()
        patches = ours(images, keep.flip(1)).patches
        torch.testing.assert_close(patches, ours(images, keep).patches)

    def test_init__fixed_sine_cosine_positions(self) -> None:
        table = model().encoder.vit.pos_embed
        expected = get_2d_sine_cosine_positional_embedding(24, 4, num_prefix_tokens=0)
        torch.testing.assert_close(table[0], torch.from_numpy(expected).float())
        assert not table.requires_grad

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"img_size": 36}, "img_size 36 x 36 with patches of 8 px"),
            ({"img_size": [32, 64]}, "square images of whole patches"),
            ({"embed_dim": 26}, "multiple of 4"),
            ({"decoder_dim": 18}, "decoder_dim 18 must be a multiple of 4"),
            ({"num_queries": 4}, "'num_queries' is no argument"),
            ({"dept": 4}, "did you mean 'depth'"),
        ],
    )
    def test_init__bad_input(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            model(**changes)
