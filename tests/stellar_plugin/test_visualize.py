from __future__ import annotations

import numpy as np
import pytest
import torch

from stellar_plugin import Stellar
from stellar_plugin.encoder import Factorization
from stellar_plugin.pca import pca_pictures, principal_components
from stellar_plugin.visualize import (
    denormalize,
    highlight,
    overlay,
    overlay_localization,
    overlay_token,
    reconstruction_rows,
    scale_maps,
    strongest_token,
    threshold_maps,
    tile_pictures,
    to_pictures,
    token_leads,
    token_maps,
    token_palette,
)
from tests.tokenizer_weights import SIZES


@pytest.fixture(scope="module")
def model() -> Stellar:
    torch.manual_seed(0)
    return Stellar(
        "stellar_vit_tiny_patch16_224",
        img_size=(16, 24),
        patch_size=8,
        embed_dim=12,
        depth=1,
        num_heads=2,
        num_queries=3,
        decoder_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ).eval()


def _localization(num_patches: int = 6, num_tokens: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, num_patches, num_tokens, generator=generator).softmax(dim=-1)


class TestTokenPalette:
    def test_token_palette__distinct(self) -> None:
        palette = token_palette(16).astype(int)
        assert palette.shape == (16, 3)
        distance = np.abs(palette[:, None] - palette[None]).max(axis=-1)
        assert distance[~np.eye(16, dtype=bool)].min() > 20

    def test_token_palette__prefix(self) -> None:
        np.testing.assert_array_equal(token_palette(8)[:5], token_palette(5))

    def test_token_palette__empty(self) -> None:
        with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
            token_palette(0)


class TestToPictures:
    def test_to_pictures__values(self) -> None:
        images = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 5)
        pictures = to_pictures(images.expand(1, 3, 1, 5))
        assert pictures.dtype == np.uint8
        assert pictures[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]

    def test_denormalize__round_trip(self, model: Stellar) -> None:
        rng = np.random.default_rng(0)
        pictures = rng.integers(256, size=(2, 4, 5, 3), dtype=np.uint8)
        unit = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
        restored = denormalize((unit - mean) / std, model.mean, model.std)
        np.testing.assert_array_equal(restored, pictures)


class TestTokenMaps:
    def test_token_maps__nearest_shows_patches(self) -> None:
        localization = _localization()
        maps = token_maps(localization, (2, 3), (16, 24))
        assert maps.shape == (2, 3, 16, 24)
        for row in range(16):
            for column in range(24):
                patch = localization[:, 3 * (row // 8) + column // 8]
                torch.testing.assert_close(maps[:, :, row, column], patch)

    def test_token_maps__bilinear_sums_to_one(self) -> None:
        maps = token_maps(_localization(), (2, 3), (10, 15), mode="bilinear")
        torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 10, 15))

    def test_token_maps__wrong_grid(self) -> None:
        with pytest.raises(ValueError, match=r"grid_size \(2, 2\) has 4 patches.*6"):
            token_maps(_localization(), (2, 2), (16, 16))


class TestStrongestToken:
    def test_strongest_token__one_hot_of_argmax(self) -> None:
        localization = _localization()
        hard = strongest_token(localization)
        torch.testing.assert_close(hard.sum(dim=-1), torch.ones(2, 6))
        torch.testing.assert_close(
            (hard * localization).sum(dim=-1), localization.amax(dim=-1)
        )


class TestTokenLeads:
    def test_token_leads__known_values(self) -> None:
        localization = torch.tensor(
            [[0.5, 0.5, 0.0], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0], [0.4, 0.4, 0.2]]
        )
        leads = token_leads(localization)
        torch.testing.assert_close(leads, torch.tensor([0.0, 0.75, 1.0, 0.0]))
        assert token_leads(torch.ones(2, 5, 1)).tolist() == [[1.0] * 5] * 2


class TestOverlay:
    def test_overlay__values(self) -> None:
        pictures = np.full((1, 2, 2, 3), 100, dtype=np.uint8)
        colours = np.full((1, 2, 2, 3), 200, dtype=np.uint8)
        assert (overlay(pictures, colours, 0.25) == 125).all()
        np.testing.assert_array_equal(overlay(pictures, colours, 0.0), pictures)
        np.testing.assert_array_equal(overlay(pictures, colours, 1.0), colours)

    def test_overlay__bad_input(self) -> None:
        pictures = np.zeros((1, 2, 2, 3), dtype=np.uint8)
        with pytest.raises(ValueError, match="differ in shape"):
            overlay(pictures, pictures[:, :1])
        with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\], got 2"):
            overlay(pictures, pictures, opacity=2)
        with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\]"):
            overlay(pictures, pictures, np.array([0.5, -0.1, 0.5], dtype=np.float32))

    def test_overlay_localization__black_picture(self) -> None:
        pictures = np.zeros((2, 4, 6, 3), dtype=np.uint8)
        hard = strongest_token(_localization())
        result = overlay_localization(pictures, hard, (2, 3))
        winner = int(hard[0, 0].argmax())
        expected = (0.55 * token_palette(3)[winner].astype(float)).round()
        assert result[0, 0, 0].tolist() == expected.tolist()

    def test_overlay_localization__as_opaque_as_a_token_leads(self) -> None:
        # Level; a lead of 0.64, so 0.8 of the opacity; alone; and the darker token.
        rows = [[0.5, 0.5, 0.0], [1 / 1.36, 0.36 / 1.36, 0.0], [0.0, 1.0, 0.0]]
        localization = torch.tensor([[*rows, [0.1, 0.2, 0.7]]])
        grey = np.full((1, 4, 6, 3), 100, dtype=np.uint8)
        shown = overlay_localization(grey, localization, (2, 2))[0]
        palette = token_palette(3).astype(float)
        assert (shown[:2, :3] == 100).all()
        for patch, colour, lead in (
            (shown[:2, 3:], palette[0], 0.64),
            (shown[2:, :3], palette[1], 1.0),
            (shown[2:, 3:], palette[2], 5 / 7),
        ):
            opacity = 0.55 * lead**0.5
            expected = (1 - opacity) * 100 + opacity * colour
            np.testing.assert_allclose(patch - expected, 0, atol=0.51)

    @pytest.mark.parametrize("num_tokens", [1, 64])
    def test_overlay_localization__any_number_of_tokens(self, num_tokens: int) -> None:
        # A uniform localization says nothing: the photo alone, but for a single token.
        localization = torch.full((1, 6, num_tokens), 1 / num_tokens)
        grey = np.full((1, 4, 6, 3), 100, dtype=np.uint8)
        shown = overlay_localization(grey, localization, (2, 3))
        alone = (0.45 * 100 + 0.55 * token_palette(1)[0].astype(float)).round()
        assert (shown == (alone if num_tokens == 1 else 100)).all()

    def test_overlay_token__tokens_add_up(self, model: Stellar) -> None:
        # The halves of the picture add up to r / 2 pictures, the rest to the maps in
        # parts of their maxima, of the tokens that are present.
        images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            result = model(images)
        black = np.zeros((1, 16, 24, 3), dtype=np.uint8)
        parts = [overlay_token(black, result, i).astype(int) for i in range(3)]
        maps = token_maps(result.localization, result.grid_size, (16, 24))
        present = result.localization.sum(dim=1)[0] >= 0.5  # of a patch
        assert 0 < present.sum() < 3
        scaled = (
            maps[0] / maps[0].amax(dim=(1, 2), keepdim=True) * present[:, None, None]
        )
        soft = np.einsum("rhw,rc->hwc", scaled.numpy(), token_palette(3))
        np.testing.assert_allclose(sum(parts)[0], 0.5 * soft, atol=2)
        with pytest.raises(ValueError, match="token must be in 0 to 2, got 3"):
            overlay_token(black, result, 3)

    def test_overlay_token__full_colour_at_its_own_maximum(self) -> None:
        # The token has at most 0.2 of a patch, far from one, and nothing of another.
        localization = torch.tensor([[[0.2, 0.8], [0.1, 0.9], [0.0, 1.0], [0.2, 0.8]]])
        nothing = torch.zeros(1, 0, 1)
        result = Factorization(None, nothing, nothing, (2, 2), lambda *_: localization)
        grey = np.full((1, 2, 2, 3), 100, dtype=np.uint8)
        shown = overlay_token(grey, result, 0)[0].reshape(4, 3)
        colour = token_palette(2)[0].astype(float)
        expected = [(50 + 0.5 * part * colour).round() for part in (1, 0.5, 0, 1)]
        np.testing.assert_array_equal(shown, expected)

    @pytest.mark.parametrize("threshold", [None, 0.5])
    def test_overlay_token__known_places(self, threshold: float | None) -> None:
        # Token 0 has the upper right patch, token 2 the others; token 1, with 0.0004 of
        # a patch, is nowhere.
        localization = torch.zeros(1, 6, 3)
        localization[0, 2, 0] = 1
        localization[0, :, 2] = 1 - localization[0, :, 0]
        localization[0, 4, 1:] = torch.tensor([0.0004, 0.9996])
        nothing = torch.zeros(1, 0, 1)
        result = Factorization(None, nothing, nothing, (2, 3), lambda *_: localization)
        grey = np.full((1, 4, 6, 3), 100, dtype=np.uint8)
        palette = token_palette(3)
        shown = [overlay_token(grey, result, i, threshold)[0] for i in range(3)]
        first = np.full((4, 6), 50)[..., None] + np.zeros(3)
        first[:2, 4:] = (50 + 0.5 * palette[0]).round()
        np.testing.assert_array_equal(shown[0], first)
        assert (shown[1] == 50).all()
        assert (shown[2][:2, 4:] == 50).all()
        tinted = (50 + 0.5 * palette[2]).round()
        assert (shown[2][2:, :2] == tinted).all()

    def test_overlay_token__threshold(self, model: Stellar) -> None:
        images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            result = model(images)
        grey = np.full((2, 16, 24, 3), 100, dtype=np.uint8)
        shown = overlay_token(grey, result, 1, threshold=0.9)
        maps = token_maps(result.localization, result.grid_size, (16, 24))[:, 1]
        inside = (maps >= 0.9 * maps.amax(dim=(1, 2), keepdim=True)).numpy()
        assert inside.any(axis=(1, 2)).all()
        assert not inside.all()
        tinted = (50 + 0.5 * token_palette(3)[1]).round().astype(np.uint8)
        expected = np.where(inside[..., None], tinted, np.uint8(50))
        np.testing.assert_array_equal(shown, expected)


class TestThresholdMaps:
    def test_threshold_maps__relative_to_each_maximum(self) -> None:
        maps = torch.tensor(
            [[[0.8, 0.4, 0.3]], [[0.08, 0.04, 0.03]], [[0.0, 0.0, 0.0]]]
        )
        result = threshold_maps(maps, 0.5)
        assert result.tolist() == [[[1, 1, 0]], [[1, 1, 0]], [[0, 0, 0]]]
        assert threshold_maps(maps, 1.0).sum(dim=-1).tolist() == [[1], [1], [0]]
        assert threshold_maps(maps, 0.0).sum(dim=-1).tolist() == [[3], [3], [0]]

    def test_scale_maps__each_by_its_own_maximum(self) -> None:
        maps = torch.tensor([[[0.8, 0.4, 0.2]], [[0.08, 0.0, 0.02]], [[0.0, 0.0, 0.0]]])
        expected = [[[1.0, 0.5, 0.25]], [[1.0, 0.0, 0.25]], [[0.0, 0.0, 0.0]]]
        torch.testing.assert_close(scale_maps(maps), torch.tensor(expected))

    @pytest.mark.parametrize("threshold", [-0.1, 1.5])
    def test_threshold_maps__outside(self, threshold: float) -> None:
        with pytest.raises(ValueError, match=rf"in \[0, 1\], got {threshold}"):
            threshold_maps(torch.ones(1, 2, 2), threshold)

    def test_highlight__half_picture_half_colour(self) -> None:
        pictures = np.full((1, 1, 3, 3), 200, dtype=np.uint8)
        weights = torch.tensor([[[0.0, 0.5, 1.0]]])
        colour = np.array([255, 0, 100], dtype=np.uint8)
        shown = highlight(pictures, weights, colour)[0, 0]
        assert shown.tolist() == [[100, 100, 100], [164, 100, 125], [228, 100, 150]]


class TestPCAPictures:
    def test_principal_components__agree_with_svd(self) -> None:
        rng = np.random.default_rng(0)
        features = rng.normal(size=(50, 7)) * np.arange(1, 8) + 5
        found = principal_components(torch.from_numpy(features)).numpy()
        _, _, expected = np.linalg.svd(features - features.mean(axis=0))
        for mine, theirs in zip(found, expected[:3], strict=True):
            assert mine[np.abs(mine).argmax()] > 0
            sign = np.sign(mine @ theirs)
            np.testing.assert_allclose(mine, sign * theirs, atol=1e-10)
        # The sign is that of the direction, whatever the order of the features is.
        again = principal_components(torch.from_numpy(features[::-1].copy()))
        np.testing.assert_allclose(found, again, atol=1e-10)

    def test_pca_pictures__line_through_two_images(self) -> None:
        # One direction alone: red is the place on the line over both images together,
        # 1 % of the range is clipped at each end; green and blue are grey.
        place = torch.arange(200.0).view(2, 100)
        direction = torch.tensor([0.0, 0.6, 0.8, 0.0])
        pictures = pca_pictures(place[..., None] * direction + 3, (10, 10), (20, 20))
        assert pictures.shape == (2, 20, 20, 3)
        low, high = np.percentile(place, [1, 99])
        expected = ((place.numpy() - low) / (high - low)).clip(0, 1) * 255
        red = pictures[:, ::2, ::2, 0].reshape(2, 100)
        np.testing.assert_allclose(red, expected, atol=0.51)
        assert (pictures[..., 1:] == 128).all()

    def test_pca_pictures__constant_is_grey(self) -> None:
        features = torch.full((2, 4, 5), 0.3)
        assert (pca_pictures(features, (2, 2), (4, 4)) == 128).all()

    def test_pca_pictures__too_few_dimensions(self) -> None:
        with pytest.raises(ValueError, match=r"3 principal components.*these have 2"):
            pca_pictures(torch.rand(1, 4, 2), (2, 2), (4, 4))


class TestReconstructionRows:
    def test_reconstruction_rows__agree_with_model(self, model: Stellar) -> None:
        images = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(0))
        inputs, decoded, tokens = reconstruction_rows(model, images)
        np.testing.assert_array_equal(
            inputs, denormalize(images, model.mean, model.std)
        )
        with torch.no_grad():
            expected = to_pictures(model.reconstruct(images))
        np.testing.assert_array_equal(decoded, expected)
        with torch.no_grad():
            result = model(images)
        strongest = strongest_token(result.localization)
        expected = overlay_localization(inputs, strongest, result.grid_size)
        np.testing.assert_array_equal(tokens, expected)

    def test_reconstruction_rows__codes_have_another_size(self) -> None:
        torch.manual_seed(0)
        model = Stellar(
            "stellar_vit_tiny_patch16_224",
            **{"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 1},
            **{"num_heads": 2, "num_queries": 2, "decoder_dim": 16},
            **{"decoder_depth": 1, "decoder_num_heads": 2, "target": "tokens"},
            **{"num_codes": 64, "tokenizer": SIZES},
        ).eval()
        images = torch.randn(1, 3, 28, 42)
        inputs, decoded, _ = reconstruction_rows(model, images)
        assert decoded.shape == inputs.shape
        expected = to_pictures(model.reconstruct(images, size=(28, 42)))
        np.testing.assert_array_equal(decoded, expected)


class TestTilePictures:
    def test_tile_pictures__places(self) -> None:
        rng = np.random.default_rng(0)
        rows = list(rng.integers(256, size=(2, 3, 4, 5, 3), dtype=np.uint8))
        picture = tile_pictures(rows, gap=2, background=7)
        assert picture.shape == (2 + 2 * 6, 2 + 3 * 7, 3)
        for i in range(2):
            for j in range(3):
                top, left = 2 + 6 * i, 2 + 7 * j
                tile = picture[top : top + 4, left : left + 5]
                np.testing.assert_array_equal(tile, rows[i][j])
        assert (picture[:2] == 7).all()
        assert (picture[:, -2:] == 7).all()

    def test_tile_pictures__different_shapes(self) -> None:
        rows = [np.zeros((2, 4, 4, 3), np.uint8), np.zeros((3, 4, 4, 3), np.uint8)]
        with pytest.raises(ValueError, match="one shape"):
            tile_pictures(rows)
