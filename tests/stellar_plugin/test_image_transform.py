"""From a photo to the input of a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stellar_plugin import Stellar
from stellar_plugin.image_transform import ImageTransform
from stellar_plugin.visualize import overlay_localization, overlay_tokens, to_pictures

NEUTRAL = [0.0] * 3, [1.0] * 3


@pytest.fixture(scope="module")
def model() -> Stellar:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return Stellar(
        "stellar_vit_tiny_patch16_224", patch_size=8, num_queries=3, **sizes, **decoder
    ).eval()


class TestImageTransform:
    def test_forward__photo_of_its_size_is_only_normalised(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
        mean, std = [0.5, 0.25, 0.0], [0.5, 1.0, 2.0]
        made = ImageTransform((24, 16), mean, std)(Image.fromarray(pixels))
        expected = (pixels / 255 - mean) / std
        assert made.dtype == torch.float32
        np.testing.assert_allclose(made.permute(1, 2, 0), expected, atol=1e-6)

    @pytest.mark.parametrize(
        ("size", "photo_size"), [((16, 16), (64, 32)), ((8, 24), (90, 90))]
    )
    def test_forward__covers_and_cuts_the_middle(
        self, size: tuple[int, int], photo_size: tuple[int, int]
    ) -> None:
        # The middle is grey, all that is cut off is white.
        width, height = photo_size
        scale = max(size[0] / height, size[1] / width)
        pixels = np.full((height, width, 3), 255, np.uint8)
        cut = [
            round((a - b / scale) / 2)
            for a, b in zip((height, width), size, strict=True)
        ]
        pixels[cut[0] : height - cut[0], cut[1] : width - cut[1]] = 100
        made = ImageTransform(size, *NEUTRAL)(Image.fromarray(pixels))
        assert made.shape == (3, *size)
        inner = made[:, 2:-2, 2:-2]
        torch.testing.assert_close(inner, torch.full_like(inner, 100 / 255))

    def test_forward__turns_as_exif_says(self) -> None:
        photo = Image.new("RGB", (8, 8), "black")
        photo.paste("white", (0, 0, 8, 4))  # above
        photo.getexif()[0x0112] = 3  # upside down
        made = ImageTransform((8, 8), *NEUTRAL)(photo)
        assert made[:, :4].max() == 0 and made[:, 4:].min() == 1

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
    def test_forward__modes(self, mode: str) -> None:
        photo = Image.new(mode, (40, 30))
        assert ImageTransform((16, 16), *NEUTRAL)(photo).shape == (3, 16, 16)

    def test_forward__very_long(self) -> None:
        made = ImageTransform((16, 16), *NEUTRAL)(Image.new("L", (1, 20000), 51))
        torch.testing.assert_close(made, torch.full_like(made, 0.2))


class TestTransform:
    def test_transform__size_mean_and_std_of_the_model(self, model: Stellar) -> None:
        made = model.transform()(Image.new("RGB", (50, 40), (255, 0, 0)))
        assert made.shape == (3, 32, 32)
        for channel, value in enumerate((1.0, 0.0, 0.0)):
            expected = (value - model.mean[channel]) / model.std[channel]
            assert made[channel].unique().item() == pytest.approx(expected, rel=1e-5)
        assert model.transform(64)(Image.new("L", (9, 9))).shape == (3, 64, 64)
        assert model.transform((16, 40))(Image.new("L", (9, 9))).shape == (3, 16, 40)

    @pytest.mark.parametrize("size", [30, 0, -8, (32, 12)])
    def test_transform__wrong_size(self, model: Stellar, size: int) -> None:
        with pytest.raises(ValueError, match="multiple of the patch size 8"):
            model.transform(size)

    def test_overlay_tokens__is_that_of_its_localization(self, model: Stellar) -> None:
        photo = Image.effect_noise((40, 32), 80).convert("RGB")
        images = model.transform()(photo).unsqueeze(0)
        mean, std = (torch.tensor(x)[:, None, None] for x in (model.mean, model.std))
        pictures, result = to_pictures(images * std + mean), model(images)
        expected = overlay_localization(pictures, result.localization, result.grid_size)
        np.testing.assert_array_equal(overlay_tokens(model, images), expected)
