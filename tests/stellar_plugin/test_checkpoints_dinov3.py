"""Weights of DINOv3: timm's files, Meta's, and ours made of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from lightly_ext.evaluate.loading import load_frozen_model
from stellar_plugin import Stellar, StellarEncoder, convert_cli
from stellar_plugin.checkpoints import (
    create_encoder,
    encoder_config,
    load_encoder,
    load_encoder_weights,
    methods,
    read_checkpoint,
)
from stellar_plugin.checkpoints.export import timm_call, to_timm
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.load import LICENSE
from stellar_plugin.checkpoints.recognise import parse
from stellar_plugin.checkpoints.sizes import encoder_state
from stellar_plugin.state_dict import misfits
from tests.checkpoint_files import save, write_hub_cache

State = dict[str, Tensor]
SMALL_DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
NAME = "vit_tiny_patch16_dinov3_qkvb"  # the narrowest
PLUS = pytest.param("vit_small_plus_patch16_dinov3", marks=pytest.mark.slow)
# Width, depth, heads, hidden width of MLPs and whether they are gated, by Meta's names.
PUBLISHED = {
    "vits16": ("vit_small", 384, 12, 6, 1536, False),
    "vits16plus": ("vit_small_plus", 384, 12, 6, 1536, True),
    "vitb16": ("vit_base", 768, 12, 12, 3072, False),
    "vitl16": ("vit_large", 1024, 24, 16, 4096, False),
    "vith16plus": ("vit_huge_plus", 1280, 32, 20, 5120, True),
    "vit7b16": ("vit_7b", 4096, 40, 32, 8192, True),
}


def dinov3(name: str = NAME, **kwargs: Any) -> Any:
    """A model of timm of two blocks with random numbers everywhere."""
    torch.manual_seed(0)
    vit = timm.create_model(name, depth=2, num_classes=0, global_pool="", **kwargs)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return vit.eval()


def metas(vit: Any) -> State:
    """Its state as Meta publishes it."""
    state = vit.state_dict()
    names = {
        "reg_token": "storage_tokens",
        "gamma_1": "ls1.gamma",
        "gamma_2": "ls2.gamma",
        "fc1_g": "w1",
        "fc1_x": "w2",
        "mlp.fc2": "mlp.w3" if hasattr(vit.blocks[0].mlp, "fc1_g") else "mlp.fc2",
    }
    result = {}
    for name, tensor in state.items():
        new = name
        for old, theirs in names.items():
            new = new.replace(old, theirs)
        if not name.endswith(("q_bias", "v_bias")):
            result[new] = tensor
    width = vit.embed_dim
    for i in range(len(vit.blocks)):
        zeros = torch.zeros(width)
        query = state.get(f"blocks.{i}.attn.q_bias", zeros)
        value = state.get(f"blocks.{i}.attn.v_bias", zeros)
        # What the mask hides is not zero.
        bias = torch.cat([query, torch.full((width,), 7.0), value])
        result[f"blocks.{i}.attn.qkv.bias"] = bias
        mask = torch.cat([zeros + 1, zeros, zeros + 1])
        result[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    result["mask_token"] = torch.ones(1, width)
    result["rope_embed.periods"] = vit.rope.periods.bfloat16()
    result["local_cls_norm.weight"] = torch.ones(width)
    result["local_cls_norm.bias"] = torch.ones(width)
    return result


def published(sizes: tuple[Any, ...]) -> State:
    """Names and shapes of Meta's file, zeros without memory."""
    _, width, depth, num_heads, hidden, gated = sizes

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(()).expand(shape)

    mlp = {"w1": (hidden, width), "w2": (hidden, width), "w3": (width, hidden)}
    if not gated:
        mlp = {"fc1": (hidden, width), "fc2": (width, hidden)}
    linear = {f"mlp.{name}": shape for name, shape in mlp.items()}
    linear |= {"attn.proj": (width, width)}
    block = {"ls1.gamma": zeros(width), "ls2.gamma": zeros(width)}
    for norm in ("norm1", "norm2"):
        block |= {f"{norm}.weight": zeros(width), f"{norm}.bias": zeros(width)}
    for name, shape in linear.items():
        block |= {f"{name}.weight": zeros(*shape), f"{name}.bias": zeros(shape[0])}
    block["attn.qkv.weight"] = zeros(3 * width, width)
    if width < 4096:  # the largest has none
        block["attn.qkv.bias"] = zeros(3 * width)
        block["attn.qkv.bias_mask"] = zeros(3 * width)
    state = {f"blocks.{i}.{k}": v for i in range(depth) for k, v in block.items()}
    quarter = width // num_heads // 4
    return state | {
        "cls_token": zeros(1, 1, width),
        "storage_tokens": zeros(1, 4, width),
        "mask_token": zeros(1, width),
        "patch_embed.proj.weight": zeros(width, 3, 16, 16),
        "patch_embed.proj.bias": zeros(width),
        "rope_embed.periods": 100 ** (torch.arange(quarter) / quarter),
        "norm.weight": zeros(width),
        "norm.bias": zeros(width),
    }


def assert_same(encoder: StellarEncoder, vit: Any) -> None:
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        ours, theirs = (m.forward_features(images) for m in (encoder, vit))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


class TestFiles:
    @pytest.mark.parametrize("name", [NAME, PLUS])
    def test_timms_file(self, name: str, tmp_path: Path) -> None:
        vit = dinov3(name)
        path = save(vit.state_dict(), tmp_path / "a.safetensors")
        checkpoint = read_checkpoint(path)
        assert checkpoint.method is not None
        assert checkpoint.method.name == "DINOv3"
        assert checkpoint.method.license.startswith("DINOv3 License, https://")
        assert (checkpoint.unexpected, checkpoint.ignored) == ((), ())
        assert_same(create_encoder(checkpoint), vit)

    @pytest.mark.parametrize("name", [NAME, PLUS])
    def test_metas_file(self, name: str, tmp_path: Path) -> None:
        vit = dinov3(name)
        state = metas(vit)
        checkpoint = read_checkpoint(save(state, tmp_path / "dinov3_vit.pth"))
        assert checkpoint.method is not None
        assert checkpoint.method.name == "DINOv3"
        assert checkpoint.unexpected == ()
        assert set(checkpoint.ignored) == {
            *("mask_token", "rope_embed.periods"),
            *("local_cls_norm.weight", "local_cls_norm.bias"),
        }
        encoder = create_encoder(checkpoint)
        assert_same(encoder, vit)
        theirs = dinov3(name)
        theirs.load_state_dict(checkpoint_filter_fn(state, theirs))
        assert_same(encoder, theirs)

    def test_metas_file__biases_of_zero_are_none(self, tmp_path: Path) -> None:
        vit = dinov3(NAME, qkv_bias=False)
        checkpoint = read_checkpoint(save(metas(vit), tmp_path / "a.pth"))
        encoder = create_encoder(checkpoint)
        assert encoder.vit.blocks[0].attn.q_bias is None
        assert_same(encoder, vit)

    @pytest.mark.parametrize(
        "name",
        [
            "vits16plus",
            *(
                pytest.param(name, marks=pytest.mark.slow)
                for name in PUBLISHED
                if name != "vits16plus"
            ),
        ],
    )
    def test_published_names_and_shapes_fit(self, name: str) -> None:
        sizes = PUBLISHED[name]
        checkpoint = parse(RawCheckpoint(Path("a.pth"), published(sizes)))
        config = encoder_config(checkpoint)
        kind, width, depth, num_heads, *_ = sizes
        assert config["model_name"] == f"{kind}_patch16_dinov3"
        assert config["num_heads"] == num_heads
        assert (config["embed_dim"], config["depth"]) == (width, depth)
        with torch.device("meta"):
            encoder = StellarEncoder(**config)
        assert misfits(encoder.state_dict(), encoder_state(checkpoint)[0]) == ""
        assert checkpoint.unexpected == ()

    @pytest.mark.parametrize(
        "change, match",
        [
            ({"blocks.0.attn.qkv.bias_mask": torch.ones(576)}, "bias of keys"),
            ({"rope_embed.periods": torch.ones(16)}, "periods"),
            ({"rope_embed.periods": torch.ones(8)}, "periods"),
            ({"cls_norm.weight": torch.ones(192)}, "cls_norm.weight"),
            ({"norm.weight": torch.ones(100)}, "100 wide"),
        ],
    )
    def test_metas_file__other_than_timms(
        self, change: State, match: str, tmp_path: Path
    ) -> None:
        path = save(metas(dinov3()) | change, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=match):
            create_encoder(path)

    def test_transformers_file__refused(self, tmp_path: Path) -> None:
        state = {
            "embeddings.cls_token": torch.ones(1, 1, 192),
            "embeddings.register_tokens": torch.ones(1, 4, 192),
            "layer.0.norm1.weight": torch.ones(192),
        }
        path = save(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="timm:vit_small_patch16_dinov3"):
            read_checkpoint(path)

    def test_timms_config__of_a_relative(self, tmp_path: Path) -> None:
        vit = dinov3("vit_small_patch16_lingbot")
        path = save(vit.state_dict(), tmp_path / "model.safetensors")
        config = {
            "architecture": "vit_small_patch16_lingbot",
            "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        }
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "model_args": {"depth": 2}})
        )
        frozen = load_frozen_model(str(path))
        assert frozen.origin.method == "LingBot-Vision"
        assert frozen.origin.mean == (0.5, 0.5, 0.5)
        assert_same(frozen.backbone, vit)
        config["model_args"] = {"depth": 2, "rope_temperature": 50}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="rope_temperature"):
            load_frozen_model(str(path))

    def test_timms_name__with_a_table_beside_rotation(self, tmp_path: Path) -> None:
        name = "vit_small_patch16_rope_mixed_ape_224"
        vit = dinov3(name, dynamic_img_size=True)
        path = save(vit.state_dict(), tmp_path / "model.safetensors")
        config = {"architecture": name, "model_args": {"depth": 2}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        encoder = create_encoder(path, num_queries=0)
        assert encoder.pos_antialias
        assert_same(encoder, vit)

    @pytest.mark.slow
    def test_evaluation__timms_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = f"{NAME}.eupe_lvd1689m"
        vit = timm.create_model(NAME).eval()
        write_hub_cache(full, vit.state_dict(), tmp_path, monkeypatch)
        frozen = load_frozen_model(f"timm:{full}")
        assert (frozen.origin.method, frozen.origin.feature) == ("EUPE", None)
        assert frozen.origin.image_size == (256, 256)
        assert frozen.origin.crop_pct == 1.0
        assert "Noncommercial" in frozen.origin.facts[LICENSE]
        assert_same(frozen.backbone, vit)


class TestAsPrior:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save(metas(dinov3()), tmp_path / "dinov3_vit.pth")

    def test_load_encoder_weights__queries_behind_registers(self, path: Path) -> None:
        encoder = StellarEncoder(NAME, depth=2, num_queries=3)
        fresh = encoder.vit.reg_token[:, 4:].detach().clone()
        report = load_encoder_weights(encoder, path)
        tokens = encoder.vit.reg_token
        assert tokens[:, 4:].equal(fresh)
        assert tokens[:, :4].equal(dinov3().reg_token)
        assert "vit.reg_token" in report.missing

    def test_load_encoder_weights__other_kind(self, path: Path) -> None:
        kinds = {"vit_tiny_patch16_224": {}, NAME: {"rope_temperature": 50.0}}
        for name, arguments in kinds.items():
            encoder = StellarEncoder(name, depth=2, num_queries=0, **arguments)
            with pytest.raises(ValueError, match=r"rotation=.*DinoV3"):
                load_encoder_weights(encoder, path)
        # What training alone draws is free.
        encoder = StellarEncoder(NAME, depth=2, rope_rescale_coords=2.0)
        load_encoder_weights(encoder, path)

    def test_stellar__round_trip(self, path: Path, tmp_path: Path) -> None:
        config = encoder_config(read_checkpoint(path))
        model = Stellar(**{**config, "num_queries": 3, **SMALL_DECODER}).eval()
        load_encoder_weights(model.encoder, path)
        model.save_pretrained(tmp_path / "model")
        again = Stellar.from_pretrained(tmp_path / "model")
        images = torch.randn(1, 3, 48, 80)
        keep = torch.tensor([[3, 0, 11]])
        with torch.no_grad():
            for kept in (None, keep):
                ours, theirs = model(images, kept), again(images, kept)
                assert ours.lowrank.equal(theirs.lowrank)
            assert again.reconstruct(images).equal(model.reconstruct(images))
        assert create_encoder(tmp_path / "model")(images).sparse.equal(
            model(images).sparse
        )


class TestExport:
    def test_to_timm__loads_in_timm_and_here(self, tmp_path: Path) -> None:
        source, output = tmp_path / "dinov3_vit.pth", tmp_path / "timm.safetensors"
        vit = dinov3()
        save(metas(vit), source)
        convert_cli.main([str(source), str(output), "--to", "timm"])
        encoder, report = load_encoder(output)
        assert (report.unexpected, report.missing) == ((), ())
        assert_same(encoder, vit)

    def test_to_timm__other_rotation(self) -> None:
        encoder = StellarEncoder(NAME, depth=1, num_queries=2, rope_temperature=50.0)
        with pytest.raises(ValueError, match="save_pretrained"):
            to_timm(encoder)
        encoder = StellarEncoder(NAME, depth=1, num_queries=2, img_size=64)
        call = timm_call(encoder)
        assert call.startswith(f"timm.create_model('{NAME}', img_size=64, depth=1, ")
        assert "num_reg_tokens=6" in call
        built = eval(
            call, {"timm": timm, "partial": partial, "LayerNorm": nn.LayerNorm}
        )
        built.load_state_dict(to_timm(encoder)[0])

    def test_to_official__refused(self, tmp_path: Path) -> None:
        model = Stellar(NAME, depth=1, num_queries=2, **SMALL_DECODER)
        model.save_pretrained(tmp_path / "model")
        output = str(tmp_path / "official.safetensors")
        with pytest.raises(ValueError, match="rotary positions"):
            convert_cli.main([str(tmp_path / "model"), output, "--to", "official"])


def test_of_timm() -> None:
    assert methods.of_timm("vit_base_patch16_dinov3_qkvb.eupe_lvd1689m").name == "EUPE"
    assert methods.of_timm("vit_large_patch16_dinov3.sat493m").name == "DINOv3"
