from __future__ import annotations

import math

import pytest
import torch

from stellar_plugin import PixelDecoder, TokenDecoder
from stellar_plugin.decoder import FourierPositionEncoding, LatentDecoder
from tests import reference


class TestFourierPositionEncoding:
    def test_forward__brute_force_non_square(self) -> None:
        position = FourierPositionEncoding(6)
        code = position((2, 3))
        g = position.frequencies
        for row in range(2):
            for column in range(3):
                x, y = (column + 0.5) / 3, (row + 0.5) / 2
                for k in range(3):
                    v = (2 * x - 1) * g[0, k].item() + (2 * y - 1) * g[1, k].item()
                    v *= 2 * math.pi
                    expected = torch.tensor([math.sin(v), math.cos(v)])
                    actual = code[row * 3 + column, 2 * k : 2 * k + 2]
                    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    def test_forward__reference_numbers(self) -> None:
        expected = reference.load("forward")["mid.decoder_pos"]
        code = reference.stellar().decoder.position((4, 4))
        torch.testing.assert_close(code, expected.view_as(code), rtol=0, atol=2e-5)

    def test_init__odd_width(self) -> None:
        with pytest.raises(ValueError, match="even width, got 5"):
            FourierPositionEncoding(5)


class TestPixelDecoder:
    def test_forward__reference_numbers(self) -> None:
        expected = reference.load("forward")
        with torch.no_grad():
            decoded = reference.stellar().decode(expected["out.lowrank"], (4, 4))
        torch.testing.assert_close(decoded, expected["out.x_hat"], rtol=0, atol=2e-5)

    def test_forward__patch_goes_to_its_place(self) -> None:
        # Without blocks and positions the head sees one latent vector per patch.
        decoder = PixelDecoder(8, 4, decoder_dim=8, depth=0, num_heads=2)
        latent = torch.randn(1, 6, 8)
        image = decoder(latent, (2, 3))
        changed = latent.clone()
        changed[0, 4] += 1.0  # row 1, column 1
        difference = (decoder(changed, (2, 3)) - image).abs().sum(dim=(0, 1)) > 0
        expected = torch.zeros(8, 12, dtype=torch.bool)
        expected[4:8, 4:8] = True
        assert torch.equal(difference, expected)

    def test_forward__wrong_grid(self) -> None:
        decoder = PixelDecoder(8, 4, decoder_dim=8, depth=1, num_heads=2)
        with pytest.raises(ValueError, match=r"2 x 3 patches needs 6 .* got 5"):
            decoder(torch.randn(1, 5, 8), (2, 3))

    def test_init__heads_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="no multiple of num_heads 3"):
            PixelDecoder(8, 4, decoder_dim=8, num_heads=3)


class TestTokenDecoder:
    def test_forward__head_over_the_pixel_decoders_features(self) -> None:
        torch.manual_seed(0)
        pixels = reference.stellar().decoder
        data = reference.load("forward")
        sizes = {"decoder_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
        decoder = TokenDecoder(48, 20, **sizes)
        body = {k: v for k, v in pixels.state_dict().items() if k[:5] != "head."}
        assert decoder.load_state_dict(body, strict=False).missing_keys == [
            "head.weight",
            "head.bias",
        ]
        with torch.no_grad():
            logits = decoder(data["out.lowrank"], (4, 4))
            features = pixels.forward_features(data["out.lowrank"], (4, 4))
        expected = features @ decoder.head.weight.T + decoder.head.bias
        torch.testing.assert_close(logits, expected)
        assert logits.shape == (len(data["image"]), 16, 20)

    def test_init__small_logits(self) -> None:
        torch.manual_seed(0)
        decoder = TokenDecoder(8, decoder_dim=64, depth=0, num_heads=2)
        logits = decoder(torch.randn(1, 4, 8), (2, 2))
        assert logits.shape == (1, 4, 1024)
        assert logits.std().item() == pytest.approx(0.02 * 64**0.5, rel=0.1)

    @pytest.mark.parametrize("decoder", [TokenDecoder(64), PixelDecoder(64, 4)])
    def test_init__linear_layers(self, decoder: LatentDecoder) -> None:
        linear = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linear) == 1 + 6 * 4 + isinstance(decoder, TokenDecoder)
        for module in linear:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert not module.bias.any()
