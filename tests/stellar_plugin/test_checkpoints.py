from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from stellar_plugin import Stellar, StellarEncoder
from stellar_plugin.checkpoints import load_encoder_weights, read_checkpoint
from stellar_plugin.checkpoints.sizes import encoder_arguments

NAME = "stellar_vit_tiny_patch16_224"
VIT = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3}


def build(**kwargs: object) -> StellarEncoder:
    return StellarEncoder(NAME, **{"num_queries": 4, **VIT, **kwargs})


@pytest.fixture
def model(tmp_path: Path) -> Stellar:
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    model = Stellar(NAME, num_queries=4, **decoder, **VIT)
    model.save_pretrained(tmp_path)
    return model


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Replaces or, with None, removes encoder tensors of a saved model."""
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        key = "encoder." + name.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    safetensors.torch.save_file(state, path)


class TestReadCheckpoint:
    def test_state(self, model: Stellar, tmp_path: Path) -> None:
        checkpoint = read_checkpoint(tmp_path)
        expected = model.state_dict()
        assert checkpoint.layout == "stellar"
        assert checkpoint.state.keys() == expected.keys()
        assert all(checkpoint.state[k].equal(v) for k, v in expected.items())
        assert checkpoint.config["num_queries"] == 4

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("encoder.", "module.encoder."),
            ("encoder.", "module._orig_mod.module.encoder."),
            ("encoder.vit.", "encoder._fsdp_wrapped_module.vit._orig_mod."),
            (".attn.", "._checkpoint_wrapped_module.attn.module."),
        ],
    )
    def test_wrapped_modules(
        self, model: Stellar, tmp_path: Path, old: str, new: str
    ) -> None:
        path = tmp_path / "model.safetensors"
        state = safetensors.torch.load_file(path)
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
        assert not state.keys() <= model.state_dict().keys()
        safetensors.torch.save_file(state, path)
        loaded = Stellar.from_pretrained(tmp_path).state_dict()
        assert all(loaded[k].equal(v) for k, v in model.state_dict().items())

    def test_wrapped_and_bare(self, model: Stellar, tmp_path: Path) -> None:
        rewrite(tmp_path, vit__norm__module__bias=torch.zeros(24))
        with pytest.raises(ValueError, match=r"are called encoder\.vit\.norm\.bias"):
            read_checkpoint(tmp_path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*Give a fol"):
            read_checkpoint(tmp_path)

    def test_no_safetensors_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_text("not weights" * 9)
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            read_checkpoint(tmp_path)

    def test_no_encoder(self, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        safetensors.torch.save_file({"head.weight": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match=r"no known layout.*head\.weight.*timm"):
            read_checkpoint(path)


class TestEncoderArguments:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"target": None, "norm_eps": 1e-6},
            {"target": "tokens", "num_codes": 8, "pos_antialias": True},
            {"mean": (0.5,) * 3, "std": (0.5,) * 3, "reg_tokens": 2, "patch_size": 8},
        ],
    )
    def test_encoder_of_the_model(self, kwargs: dict[str, Any]) -> None:
        sizes = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
        model = Stellar(NAME, num_queries=4, **sizes, **VIT, **kwargs)
        of_vit = {k: v for k, v in kwargs.items() if k in ("reg_tokens", "patch_size")}
        assert encoder_arguments(model.config) == {
            "model_name": NAME,
            "num_queries": 4,
            "norm_eps": kwargs.get("norm_eps"),
            "pos_antialias": kwargs.get("pos_antialias", False),
            "localization": kwargs.get("target", "pixels") is not None,
            **VIT,
            **of_vit,
        }

    def test_config_without_target_is_pixels(self) -> None:
        assert encoder_arguments({"depth": 2}) == {"depth": 2, "localization": True}


class TestLoadEncoderWeights:
    @pytest.mark.parametrize("name", ["", "model.safetensors"])
    def test_exact(self, model: Stellar, tmp_path: Path, name: str) -> None:
        encoder = build()
        load_encoder_weights(encoder, tmp_path / name)
        images = torch.rand(2, 3, 64, 48)
        torch.testing.assert_close(
            encoder.eval()(images).lowrank,
            model.eval()(images).lowrank,
            rtol=0,
            atol=0,
        )

    def test_without_config(self, model: Stellar, tmp_path: Path) -> None:
        (tmp_path / "config.json").unlink()
        encoder = build()
        assert load_encoder_weights(encoder, tmp_path).config == {}
        assert encoder.vit.cls_token.equal(model.encoder.vit.cls_token)

    def test_missing_key(self, model: Stellar, tmp_path: Path) -> None:
        rewrite(tmp_path, dense_proj__bias=None)
        with pytest.raises(ValueError, match=r"missing: dense_proj\.bias\. Build"):
            load_encoder_weights(build(), tmp_path)

    def test_unexpected_key(self, model: Stellar, tmp_path: Path) -> None:
        rewrite(tmp_path, vit__extra=torch.zeros(1))
        with pytest.raises(ValueError, match=r"unexpected: vit\.extra\. Build"):
            load_encoder_weights(build(), tmp_path)

    def test_other_shape(self, model: Stellar, tmp_path: Path) -> None:
        rewrite(tmp_path, vit__cls_token=torch.zeros(1, 1, 7))
        with pytest.raises(
            ValueError, match=r"vit\.cls_token \(1, 1, 7\) instead of \(1, 1, 24\)"
        ):
            load_encoder_weights(build(), tmp_path)

    def test_many_keys__shortened(self, model: Stellar, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"missing: vit\.blocks\.2.* and 4 more"):
            load_encoder_weights(build(depth=3), tmp_path)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"num_heads": 4}, r"num_heads=4 \(checkpoint: 3\)"),
            ({"norm_eps": 1e-6}, r"norm_eps=1e-06 \(checkpoint: 1e-12\)"),
            ({"pos_antialias": True}, r"pos_antialias=True \(checkpoint: False\)"),
            ({"num_queries": 5}, r"num_queries=5 \(checkpoint: 4\)"),
            ({"patch_size": 8}, r"patch_size=8 \(checkpoint: 16\)"),
        ],
    )
    def test_other_settings(
        self, model: Stellar, tmp_path: Path, kwargs: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            load_encoder_weights(build(**kwargs), tmp_path)

    @pytest.mark.parametrize("with_config", [True, False])
    def test_other_image_size__as_resampled_on_the_fly(
        self,
        model: Stellar,
        tmp_path: Path,
        with_config: bool,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        if not with_config:
            (tmp_path / "config.json").unlink()
        encoder = build(img_size=(96, 48)).eval()
        with caplog.at_level(logging.WARNING, "stellar_plugin"):
            load_encoder_weights(encoder, tmp_path)
        assert "resampled (vit.pos_embed from 4 x 4 to 6 x 3 patches)" in caplog.text
        images = torch.rand(1, 3, 96, 48)
        torch.testing.assert_close(
            encoder(images).dense, model.eval().encoder(images).dense
        )

    def test_encoder_without_localization(self, model: Stellar, tmp_path: Path) -> None:
        encoder = build(localization=False).eval()
        load_encoder_weights(encoder, tmp_path)
        images = torch.rand(1, 3, 64, 64)
        expected = model.eval().encoder(images)
        assert torch.equal(encoder(images).sparse, expected.sparse)
        assert torch.equal(encoder(images).dense, expected.dense)

    def test_unchanged_after_an_error(self, model: Stellar, tmp_path: Path) -> None:
        rewrite(tmp_path, dense_proj__bias=None)
        encoder = build()
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        with pytest.raises(ValueError, match=r"dense_proj\.bias"):
            load_encoder_weights(encoder, tmp_path)
        assert all(v.equal(before[k]) for k, v in encoder.state_dict().items())
