from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stellar_plugin import Factorization, Stellar
from stellar_plugin.visual_tokens import visual_tokens

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def _model(**kwargs: object) -> Stellar:
    torch.manual_seed(0)
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return Stellar(num_queries=3, **decoder, **SIZES, **kwargs).eval()


def _result(localization: Tensor, grid_size: tuple[int, int]) -> Factorization:
    sparse = torch.randn(1, localization.shape[1], 4, dtype=localization.dtype)
    dense = torch.randn(1, localization.shape[0], 4)
    return Factorization(
        None, sparse, dense, grid_size, lambda d, s: localization[None]
    )


class TestVisualTokens:
    def test_visual_tokens__rectangles(self) -> None:
        # Grid of 2 rows and 4 columns: left half, the patch in the upper right corner,
        # what is left, and a token that is nowhere.
        grid = torch.tensor([[0, 0, 2, 1], [0, 0, 2, 2]]).flatten()
        maps = torch.nn.functional.one_hot(grid, 4).float()
        found = visual_tokens(_result(maps, (2, 4))).geometry[0]
        wanted = torch.tensor(
            [[4 / 8, 0.0, 0.0, 0.5, 1.0], [1 / 8, 0.75, 0.0, 1.0, 0.5]]
        )
        torch.testing.assert_close(found[:2], wanted)
        assert found[2, 0] == 3 / 8
        assert found[3].tolist() == [0.0] * 5

    def test_visual_tokens__mean_and_spread(self) -> None:
        # Weights 1/4 and 3/4 on two columns: mean 5/8, variance 3/64 + 1/48.
        maps = torch.tensor([[0.25], [0.75]], dtype=torch.float64)
        (mass, x0, y0, x1, y1) = visual_tokens(_result(maps, (1, 2))).geometry[0, 0]
        half = (3 * (3 / 64 + 1 / 48)) ** 0.5
        assert (mass, y0, y1) == (0.5, 0, 1)
        assert x0.item() == pytest.approx(5 / 8 - half)
        assert x1.item() == 1 == min(1, 5 / 8 + half)

    def test_visual_tokens__gradient(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

        def geometry(logits: Tensor) -> Tensor:
            return visual_tokens(_result(logits.softmax(dim=1), (2, 3))).geometry

        # Computed in float32, as the localization is.
        assert torch.autograd.gradcheck(geometry, logits, eps=1e-3, atol=1e-3)


class TestStellarVisualTokens:
    def test_visual_tokens__of_a_model(self) -> None:
        model, images = _model(), torch.randn(3, 3, 32, 48)
        visual, result = model.visual_tokens(images), model(images)
        assert visual.tokens.equal(result.sparse)
        masses = result.localization.mean(dim=1)
        torch.testing.assert_close(visual.geometry[..., 0], masses)
        assert visual.geometry.min() >= 0 and visual.geometry.max() <= 1
        assert (visual.geometry[..., 3:] > visual.geometry[..., 1:3]).all()
        order = [2, 0, 1]
        for a, b in zip(model.visual_tokens(images[order]), visual, strict=True):
            torch.testing.assert_close(a, b[order])
        (visual.tokens.sum() + visual.geometry.square().sum()).backward()
        assert model.encoder.vit.patch_embed.proj.weight.grad.abs().sum() > 0
        assert model.encoder.sparse_proj.weight.grad.abs().sum() > 0

    def test_visual_tokens__half_precision(self) -> None:
        model, images = _model(), torch.randn(2, 3, 32, 32)
        wanted = model.visual_tokens(images).geometry
        found = model.bfloat16().visual_tokens(images.bfloat16())
        assert found.geometry.dtype == torch.bfloat16 == found.tokens.dtype
        torch.testing.assert_close(found.geometry.float(), wanted, atol=0.05, rtol=0)

    def test_visual_tokens__no_localization(self) -> None:
        with pytest.raises(ValueError, match="has no localization"):
            _model(target=None).visual_tokens(torch.zeros(1, 3, 32, 32))
