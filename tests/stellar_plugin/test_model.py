from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stellar_plugin import Stellar
from stellar_plugin.model import resized
from tests import reference


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
    }
    return Stellar("stellar_vit_tiny_patch16_224", **{**settings, **kwargs}).eval()


class TestStellar:
    def test_reconstruct__reference_error(self) -> None:
        expected = reference.load("forward")
        images = expected["image"]
        with torch.no_grad():
            result = reference.stellar().reconstruct(reference.normalized(images))
        decoded = expected["out.x_hat"].clamp(0, 1)
        torch.testing.assert_close(result, decoded, rtol=0, atol=2e-5)

    def test_reconstruct__range_and_non_square(self) -> None:
        model = tiny()
        model.decoder.head.weight.data *= 100
        result = model.reconstruct(torch.randn(2, 3, 32, 64))
        assert result.shape == (2, 3, 32, 64)
        assert result.min() == 0 and result.max() == 1

    def test_init__no_query(self) -> None:
        with pytest.raises(ValueError, match="num_queries >= 1, got 0"):
            tiny(num_queries=0)

    def test_init__without_reconstruction(self, tmp_path: Path) -> None:
        model = tiny(target=None)
        assert not any("decoder" in n or "_proj" in n for n in model.state_dict())
        model.save_pretrained(tmp_path)
        loaded = Stellar.from_pretrained(tmp_path)
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(loaded(images).sparse, model(images).sparse)
        with pytest.raises(ValueError, match="no localization"):
            _ = loaded(images).localization
        with pytest.raises(ValueError, match="no decoder"):
            loaded.decode(torch.randn(1, 4, 48), (2, 2))

    def test_init__unknown_target(self) -> None:
        with pytest.raises(ValueError, match=r"target must be .*'codes'"):
            tiny(target="codes")

    def test_every_parameter_has_gradient(self) -> None:
        model = tiny().train()
        result = model(torch.randn(2, 3, 32, 32))
        decoded = model.decode(result.lowrank, result.grid_size)
        (decoded.square().mean() + result.cls.square().mean()).backward()
        zero = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
        assert zero == []


class TestPretrained:
    def test_round_trip__exact(self, tmp_path: Path) -> None:
        model = tiny(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5), pos_antialias=True)
        model.save_pretrained(tmp_path)
        images = torch.randn(2, 3, 48, 32)
        for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
            loaded = Stellar.from_pretrained(source)
            assert loaded.config == model.config
            assert (loaded.mean, loaded.std) == (model.mean, model.std)
            assert not loaded.training
            for name, tensor in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor), name
            assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))

    def test_from_pretrained__loaded_model_trains(self, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path)
        model = Stellar.from_pretrained(tmp_path).train()
        result = model(torch.randn(1, 3, 32, 32))
        result.lowrank.sum().backward()
        assert model.encoder.vit.reg_token.grad.abs().sum() > 0

    def test_from_pretrained__nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"No model\.safetensors"):
            Stellar.from_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="neither a folder"):
            Stellar.from_pretrained(tmp_path / "missing.safetensors")

    def test_from_pretrained__no_config(self, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"No config\.json"):
            Stellar.from_pretrained(tmp_path / "model.safetensors")

    def test_from_pretrained__truncated_file(self, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match="cannot be read"):
            Stellar.from_pretrained(tmp_path)

    def test_from_pretrained__weights_of_another_size(self, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["num_queries"] = 5
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"(?s)does not fit .*reg_token"):
            Stellar.from_pretrained(tmp_path)

    def test_from_pretrained__missing_tensor(self, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        state = safetensors.torch.load_file(weights)
        del state["encoder.vit.norm.weight"]
        safetensors.torch.save_file(state, weights)
        with pytest.raises(ValueError, match=r"missing: vit\.norm\.weight"):
            Stellar.from_pretrained(tmp_path)

    def test_from_pretrained__unknown_schema(self, tmp_path: Path) -> None:
        tiny().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["schema_version"] = 99
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="schema version 99"):
            Stellar.from_pretrained(tmp_path)


def test_resized__keeps_images_of_the_size() -> None:
    pictures = torch.rand(1, 3, 8, 8)
    assert resized(pictures, (8, 8)) is pictures
    flat = resized(torch.full((1, 3, 8, 8), 0.25), (5, 5))
    torch.testing.assert_close(flat, torch.full((1, 3, 5, 5), 0.25))
