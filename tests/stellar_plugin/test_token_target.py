from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stellar_plugin import MaskGITVQGAN, Stellar
from tests import reference
from tests.tokenizer_weights import SIZES, reference_tokenizer


def tiny(**kwargs) -> Stellar:
    torch.manual_seed(0)
    settings = {
        "img_size": 32,
        "embed_dim": 48,
        "depth": 1,
        "num_queries": 2,
        "decoder_dim": 32,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "target": "tokens",
        "num_codes": 64,
    }
    return Stellar("stellar_vit_tiny_patch16_224", **{**settings, **kwargs}).eval()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin"
    torch.save(dict(reference_tokenizer().state_dict()), path)
    return path


@pytest.fixture
def model(tokenizer_file: Path) -> Stellar:
    model = tiny()
    model.load_tokenizer(tokenizer_file)
    return model


class TestDecode:
    def test_decode__images_of_the_most_probable_codes(self, model: Stellar) -> None:
        codes = reference.load("tokenizer_io")["nonsquare32x64.codes"]
        # Logits whose largest entries are the reference's codes.
        model.predict_codes = lambda *_: F.one_hot(codes, 64).float()
        decoded = model.decode(torch.zeros(1, 8, 48), (2, 4)).clamp(0, 1)
        expected = reference.load("tokenizer_io")["nonsquare32x64.decoded"]
        torch.testing.assert_close(decoded, expected, rtol=0, atol=5e-5)

    def test_decode__unclamped(self, model: Stellar) -> None:
        model.tokenizer.decoder.conv_out.bias.data += 1
        decoded = model.decode(torch.zeros(1, 4, 48), (2, 2))
        assert decoded.max() > 1.2

    def test_reconstruct__native_size_and_resized(self, tokenizer_file: Path) -> None:
        model = tiny(patch_size=14, img_size=28)
        model.load_tokenizer(tokenizer_file)
        images = torch.randn(2, 3, 28, 42)
        native = model.reconstruct(images)
        assert native.shape == (2, 3, 32, 48)
        resized = model.reconstruct(images, size=(28, 42))
        assert resized.shape == images.shape
        assert 0 <= native.min() <= native.max() <= 1
        assert 0 <= resized.min() <= resized.max() <= 1
        means = native.mean(dim=(2, 3)), resized.mean(dim=(2, 3))
        torch.testing.assert_close(*means, rtol=0, atol=0.02)

    def test_predict_codes__needs_no_tokenizer_and_has_gradients(self) -> None:
        model = tiny().train()
        result = model(torch.randn(2, 3, 32, 48))
        logits = model.predict_codes(result.lowrank, result.grid_size)
        assert logits.shape == (2, 6, 64)
        (logits.square().mean() + result.cls.square().mean()).backward()
        zero = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
        assert zero == []


class TestTargetCodes:
    def test_target_codes__reference_numbers(self, model: Stellar) -> None:
        data = reference.load("tokenizer_io")
        for case in ("square64", "nonsquare32x64"):
            codes = model.target_codes(data[f"{case}.image"])
            assert codes.equal(data[f"{case}.codes"])

    def test_target_codes__grid_of_the_patches(self, tokenizer_file: Path) -> None:
        model = tiny(patch_size=14, img_size=28)
        model.load_tokenizer(tokenizer_file)
        images = torch.rand(1, 3, 42, 70)
        codes = model.target_codes(images)
        resized = F.interpolate(
            images, size=(48, 80), mode="bicubic", align_corners=False, antialias=False
        )
        assert codes.equal(reference_tokenizer().encode(resized).flatten(1))
        assert codes.shape[1] == model(images).dense.shape[1]


class TestTokenizerInside:
    def test_round_trip__exact(self, model: Stellar, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        loaded = Stellar.from_pretrained(tmp_path)
        assert loaded.config == model.config
        images = torch.randn(1, 3, 32, 32)
        assert loaded.reconstruct(images).equal(model.reconstruct(images))
        assert not any(p.requires_grad for p in loaded.tokenizer.parameters())

    def test_round_trip__without_tokenizer(self, tmp_path: Path) -> None:
        model = tiny()
        model.save_pretrained(tmp_path)
        loaded = Stellar.from_pretrained(tmp_path)
        assert loaded.tokenizer is None
        latent = torch.randn(1, 4, 48)
        expected = model.predict_codes(latent, (2, 2))
        assert loaded.predict_codes(latent, (2, 2)).equal(expected)

    def test_from_pretrained__config_without_target_is_pixels(
        self, tmp_path: Path
    ) -> None:
        tiny(target="pixels").save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        for name in ("target", "num_codes", "tokenizer"):
            del config[name]
        path.write_text(json.dumps(config))
        assert Stellar.from_pretrained(tmp_path).target == "pixels"

    def test_train__leaves_the_tokenizer_frozen(self, model: Stellar) -> None:
        model.train()
        assert model.decoder.training and not model.tokenizer.training

    def test_decode__names_the_missing_file(self) -> None:
        model = tiny()
        message = r"load_tokenizer\('maskgit-vqgan-imagenet-f16-256\.bin'\)"
        with pytest.raises(ValueError, match=message):
            model.reconstruct(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match=message):
            model.target_codes(torch.rand(1, 3, 32, 32))

    def test_pixels__have_neither_codes_nor_tokenizer(
        self, tokenizer_file: Path
    ) -> None:
        model = tiny(target="pixels")
        with pytest.raises(ValueError, match="predict_codes needs target='tokens'"):
            model.predict_codes(torch.zeros(1, 4, 48), (2, 2))
        with pytest.raises(ValueError, match="'pixels' has no tokenizer"):
            model.target_codes(torch.rand(1, 3, 32, 32))
        with pytest.raises(ValueError, match="A tokenizer needs target='tokens'"):
            model.load_tokenizer(tokenizer_file)

    def test_load_tokenizer__other_codebook(self, tokenizer_file: Path) -> None:
        with pytest.raises(ValueError, match=r"has 64 codes.*set num_codes=64"):
            tiny(num_codes=1024).load_tokenizer(tokenizer_file)

    def test_init__sizes_of_the_tokenizer(self) -> None:
        model = tiny(tokenizer=SIZES)
        assert isinstance(model.tokenizer, MaskGITVQGAN)
        assert model.config["tokenizer"] == MaskGITVQGAN(**SIZES).config

    def test_init__unknown_target(self) -> None:
        with pytest.raises(ValueError, match="'pixels', 'tokens' or None, got 'vq'"):
            tiny(target="vq")
