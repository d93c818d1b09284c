from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from stellar_plugin import Stellar, StellarEncoder
from stellar_plugin.checkpoints import (
    create_encoder,
    load_encoder_weights,
    read_checkpoint,
    save_heads,
)
from stellar_plugin.checkpoints.export import timm_call, to_timm
from stellar_plugin.convert_cli import main
from tests import reference
from tests.checkpoint_files import assert_same_tokens, write_hub_cache

HEADS = ["--num-heads", "3", "--decoder-num-heads", "4"]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    path = tmp_path / "official.safetensors"
    save_file(reference.weights(), path)
    return path


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


class TestConvert:
    def test_timms_weights_from_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vit = timm.create_model("test_vit")
        write_hub_cache("test_vit", vit.state_dict(), tmp_path / "hub", monkeypatch)
        output = tmp_path / "timm.safetensors"
        convert("timm:test_vit", output, "--to", "timm")
        images = torch.randn(1, 3, 160, 160)
        assert_same_tokens(create_encoder(output), vit.eval(), images)

    def test_official_to_stellar_and_back(self, official: Path, tmp_path: Path) -> None:
        convert(official, tmp_path / "ours", "--to", "stellar", *HEADS)
        model = Stellar.from_pretrained(tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "back.safetensors", "--to", "official")
        back = Stellar.from_pretrained(
            tmp_path / "back.safetensors", num_heads=3, decoder_num_heads=4
        )
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(
            back.reconstruct(images), model.reconstruct(images), rtol=0, atol=1e-6
        )
        written, original = (
            load_file(tmp_path / "back.safetensors"),
            load_file(official),
        )
        assert written.keys() == original.keys()
        for name in original:
            if name.startswith(("clustering_head", "cls_cluster_head")):
                assert written[name].equal(original[name])

    def test_stellar_to_timm(
        self, official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "folder" / "timm.safetensors"
        convert(official, output, "--to", "timm", *HEADS)
        call = capsys.readouterr().out.split("loaded by ")[1]
        vit = eval(
            call, {"timm": timm, "partial": partial, "LayerNorm": torch.nn.LayerNorm}
        ).eval()
        vit.load_state_dict(load_file(output), strict=True)
        expected = reference.load("forward")
        with torch.no_grad():
            tokens = vit.forward_features(reference.normalized(expected["image"]))
        wanted = [expected[f"out.{name}"] for name in ("cls", "sparse", "dense")]
        torch.testing.assert_close(tokens, torch.cat(wanted, 1), rtol=0, atol=2e-5)

    def test_timm_file_keeps_its_queries(self, official: Path, tmp_path: Path) -> None:
        output = tmp_path / "timm.safetensors"
        convert(official, output, "--to", "timm", *HEADS)
        encoder = create_encoder(output)
        assert (encoder.num_queries, encoder.vit.num_reg_tokens) == (4, 4)
        assert encoder.vit.norm.eps == 1e-12
        assert encoder.vit.blocks[0].attn.num_heads == 3

    def test_timm__registers_are_no_queries(self, tmp_path: Path) -> None:
        # Two registers and two queries fit where four queries are, but mean another.
        sizes = {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 3}
        name = "vit_tiny_patch16_224"
        encoder = StellarEncoder(name, num_queries=2, reg_tokens=2, **sizes)
        state, metadata = to_timm(encoder)
        path = tmp_path / "timm.safetensors"
        save_file(state, path, metadata)
        other = StellarEncoder(name, num_queries=4, **sizes)
        with pytest.raises(ValueError, match=r"num_queries=4 \(checkpoint: 2\)"):
            load_encoder_weights(other, path)
        again = StellarEncoder(name, num_queries=2, reg_tokens=2, **sizes)
        load_encoder_weights(again, path)
        assert again.vit.reg_token.equal(encoder.vit.reg_token)

    @pytest.mark.parametrize("antialias", [True, False])
    def test_prior_to_timm(
        self, tmp_path: Path, antialias: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
        torch.save({"model": vit.state_dict()}, tmp_path / "a.pth")
        options = () if antialias else ("--model-kwargs", '{"pos_antialias": false}')
        output = tmp_path / "out.safetensors"
        convert(tmp_path / "a.pth", output, "--to", "timm", *options)
        assert (
            f"Not told by the source: pos_antialias={antialias}, activation=GELU, "
            in (capsys.readouterr().out)
        )
        encoder = create_encoder(output)
        assert encoder.pos_antialias == antialias
        images = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(
            encoder.forward_features(images), vit.eval().forward_features(images)
        )

    @pytest.mark.parametrize(
        ("output", "layout", "message"),
        [
            ("a.pth", "official", "must end in .safetensors"),
            ("a.safetensors", "stellar", "must be a folder"),
            ("official.safetensors", "timm", "exists already"),
            ("new.safetensors", "official", "Pass num_heads"),
        ],
    )
    def test_bad_arguments(
        self, official: Path, tmp_path: Path, output: str, layout: str, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            convert(official, tmp_path / output, "--to", layout)

    def test_prior_is_no_stellar_model(self, tmp_path: Path) -> None:
        vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
        torch.save(vit.state_dict(), tmp_path / "vit.pth")
        with pytest.raises(ValueError, match="without latent queries"):
            convert(tmp_path / "vit.pth", tmp_path / "ours", "--to", "stellar")


class TestToTimm:
    def test_documented_call__full_size(self) -> None:
        with torch.device("meta"):
            model = Stellar("stellar_vit_base_patch16_224")
            vit = timm.create_model(
                "vit_base_patch16_224",
                reg_tokens=16,
                no_embed_class=True,
                num_classes=0,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-12),
            )
        assert timm_call(model.encoder) == (
            "timm.create_model('vit_base_patch16_224', reg_tokens=16, "
            "no_embed_class=True, num_classes=0, "
            "norm_layer=partial(LayerNorm, eps=1e-12))"
        )
        state, _ = to_timm(model.encoder)
        expected = {name: tensor.shape for name, tensor in vit.state_dict().items()}
        assert {name: tensor.shape for name, tensor in state.items()} == expected


def test_save_heads__none(tmp_path: Path) -> None:
    save_heads({}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_own_checkpoint_without_heads(tmp_path: Path) -> None:
    Stellar(**reference.model_arguments()).save_pretrained(tmp_path)
    assert read_checkpoint(tmp_path).heads == {}
