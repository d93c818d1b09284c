"""Weights of other methods: each layout's own names, written by the tests."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import (
    create_encoder,
    encoder_config,
    files,
    load_encoder,
    load_encoder_weights,
    numerics,
    read_checkpoint,
)
from stellar_plugin.checkpoints.export import to_timm
from stellar_plugin.checkpoints.recognise import unwrap
from tests.checkpoint_files import (
    FILES,
    HEAD,
    IMAGENET_HEAD,
    NAME,
    SIZES,
    assert_same_tokens,
    encoder_for,
    prefixed,
    save,
    timm_vit,
    transformers_names,
    write_hub_cache,
)


class TestSameTokensAsTimm:
    @pytest.mark.parametrize("name", FILES)
    def test_with_cls_position(self, tmp_path: Path, name: str) -> None:
        heads = 12 if name == "MoCo v3" else 3
        vit = timm_vit(sines=name == "MAE or SemMAE", num_heads=heads)
        content = FILES[name](vit.state_dict())
        path = save(content, tmp_path / "weights.pth")
        encoder = encoder_for(vit, num_heads=heads)
        report = load_encoder_weights(encoder, path)
        method = name.split(",")[0]
        assert report.layout == "timm"
        assert report.read_as == (
            "layout 'timm'" if method == "timm" else f"{method} in layout 'timm'"
        )
        assert report.missing == report.unexpected == report.resized == ()
        assert_same_tokens(encoder, vit)
        if name == "DINO or iBOT":
            assert {"student", "optimizer", "args"} <= set(report.ignored)

    def test_dino__teacher_is_preferred(self, tmp_path: Path) -> None:
        teacher, student = timm_vit(), timm_vit(depth=1)
        content = {
            "student": prefixed(student.state_dict(), "module.backbone."),
            "teacher": prefixed(teacher.state_dict(), "backbone."),
        }
        encoder = create_encoder(save(content, tmp_path / "a.pth"), num_heads=3)
        assert_same_tokens(encoder, teacher)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_dinov2(self, tmp_path: Path, chunked: bool) -> None:
        # DINOv2 gives registers no position, in timm one has to say so.
        vit = timm_vit(
            img_size=518,
            patch_size=14,
            init_values=1.0,
            reg_tokens=4,
            no_embed_class=True,
        )
        state = dict(vit.state_dict())
        position = torch.randn(1, 1, 48)
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - position
        state["register_tokens"] = state.pop("reg_token")
        state["mask_token"] = torch.zeros(1, 48)
        if chunked:
            state = {k.replace("blocks.", "blocks.0."): v for k, v in state.items()}
            state = {
                "teacher": prefixed(state, "backbone.") | {"dino_head.a": position}
            }
        path = save(state, tmp_path / "dinov2.pth")
        assert read_checkpoint(path).read_as == "DINOv2 in layout 'timm'"
        assert encoder_config(read_checkpoint(path), num_heads=3) == {
            "model_name": "stellar_vit_base_patch16_224",
            "num_queries": 0,
            "img_size": 518,
            "patch_size": 14,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 3,
            "mlp_ratio": 4.0,
            "norm_eps": 1e-6,
            "pos_antialias": True,
            "reg_tokens": 4,
            "init_values": 1e-5,
        }
        encoder = create_encoder(path, num_heads=3)
        assert_same_tokens(encoder, vit, torch.randn(1, 3, 518, 518))
        # Own registers come before the queries.
        prior = encoder_for(
            vit,
            num_queries=2,
            reg_tokens=4,
            init_values=1.0,
            patch_size=14,
            img_size=224,
            pos_antialias=True,
        )
        queries = prior.vit.reg_token[:, 4:].clone()
        report = load_encoder_weights(prior, path)
        assert report.resized == ("vit.pos_embed from 37 x 37 to 16 x 16 patches",)
        assert "vit.reg_token" in report.missing
        registers = prior.vit.reg_token
        assert registers[:, :4].equal(vit.reg_token) and registers[:, 4:].equal(queries)

    def test_registers_with_positions(self, tmp_path: Path) -> None:
        vit = timm_vit(reg_tokens=2)
        assert vit.pos_embed.shape[1] == 16 + 3
        path = save(vit.state_dict(), tmp_path / "a.safetensors")
        assert_same_tokens(create_encoder(path, num_heads=3), vit)

    def test_i_jepa__no_cls_token(self, tmp_path: Path) -> None:
        vit = timm_vit(class_token=False)
        state = prefixed(vit.state_dict(), "module.")
        predictor = {"module.predictor_embed.weight": torch.zeros(2, 2)}
        content = {
            "encoder": {k: v + 1 for k, v in state.items()},
            "predictor": predictor,
            "target_encoder": state,
            "opt": {},
        }
        path = save(content, tmp_path / "ijepa.pth.tar")
        assert read_checkpoint(path).read_as == "I-JEPA in layout 'timm'"
        encoder = create_encoder(path, num_heads=3)
        assert encoder(torch.randn(1, 3, 64, 64)).cls is None
        assert_same_tokens(encoder, vit)
        with pytest.raises(ValueError, match=r"missing: vit\.cls_token.*class_token=F"):
            load_encoder_weights(encoder_for(vit), path)

    def test_beit__with_a_position_table(self, tmp_path: Path) -> None:
        vit = timm_vit(init_values=1.0)
        state = vit.state_dict()
        for block in range(2):
            name = f"blocks.{block}."
            query, key, value = state.pop(f"{name}attn.qkv.bias").chunk(3)
            key.zero_()
            state |= {f"{name}attn.q_bias": query, f"{name}attn.v_bias": value}
            for i in (1, 2):
                state[f"{name}gamma_{i}"] = state.pop(f"{name}ls{i}.gamma")
        path = save({"model": state}, tmp_path / "beit.pth")
        encoder = create_encoder(path, num_heads=3)
        assert read_checkpoint(path).read_as == "BEiT in layout 'timm'"
        assert_same_tokens(encoder, vit)

    def test_beit__relative_positions(self, tmp_path: Path) -> None:
        state = dict(timm_vit().state_dict())
        state["blocks.0.attn.relative_position_bias_table"] = torch.zeros(9, 3)
        path = save({"model": state}, tmp_path / "beit.pth")
        with pytest.raises(ValueError, match=r"position table beside relative .*BEiT"):
            create_encoder(path)

    @pytest.mark.parametrize("version", [4, 5])
    @pytest.mark.parametrize("prefix", ["", "vit."])
    def test_transformers(self, tmp_path: Path, version: int, prefix: str) -> None:
        vit = timm_vit(norm_layer=partial(torch.nn.LayerNorm, eps=1e-12))
        state = prefixed(transformers_names(vit.state_dict(), version), prefix)
        extra = {"decoder.mask_token": torch.zeros(1, 1, 8)} if prefix else {}
        path = save(state | extra, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(
            '{"num_attention_heads": 3, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}'
        )
        encoder = create_encoder(tmp_path)
        assert encoder.vit.norm.eps == 1e-12
        assert_same_tokens(encoder, vit)
        assert set(read_checkpoint(path).ignored) == set(extra)
        # transformers resamples positions without antialiasing.
        assert not encoder.pos_antialias


class TestPositionTables:
    """Their grid is told, or fits, or is square behind a class token, or is asked."""

    @pytest.mark.parametrize("size", [(32, 64), (64, 32), (32, 128), (16, 128)])
    @pytest.mark.parametrize("no_embed_class", [False, True])
    def test_as_the_encoder_has_it(
        self, tmp_path: Path, size: tuple[int, int], no_embed_class: bool
    ) -> None:
        vit = timm_vit(img_size=size, no_embed_class=no_embed_class)
        path = save(vit.state_dict(), tmp_path / "a.pth")
        encoder = encoder_for(vit, img_size=size)
        report = load_encoder_weights(encoder, path)
        assert report.resized == ()
        assert_same_tokens(encoder, vit, torch.randn(2, 3, *size))
        created = create_encoder(path, num_heads=3, img_size=size)
        assert_same_tokens(created, vit, torch.randn(2, 3, *size))

    @pytest.mark.parametrize(
        ("size", "no_embed_class", "rows"),
        [((32, 64), False, 9), ((64, 64), True, 16), ((16, 48), False, 4)],
    )
    def test_not_known__asked(
        self, tmp_path: Path, size: tuple[int, int], no_embed_class: bool, rows: int
    ) -> None:
        # 9 rows: 2 x 4 and one of the class token, or 3 x 3.
        vit = timm_vit(img_size=size, no_embed_class=no_embed_class)
        path = save(vit.state_dict(), tmp_path / "a.pth")
        pattern = rf"nothing tells the patch grid .* of {rows} rows.*name the img_size"
        with pytest.raises(ValueError, match=pattern):
            create_encoder(path, num_heads=3)
        with pytest.raises(ValueError, match=pattern):
            load_encoder_weights(encoder_for(vit, img_size=96), path)

    def test_square__by_rule_and_reported(self, tmp_path: Path) -> None:
        path = save(timm_vit(img_size=(32, 128)).state_dict(), tmp_path / "a.pth")
        _, report = load_encoder(path, num_heads=3)
        assert report.facts == {
            "read as": "layout 'timm'",
            "told by": "nothing",
            "not told, assumed": "pos_antialias=True, activation=GELU, positions of "
            "4 x 4 patches",
        }

    @pytest.mark.parametrize("kind", ["timm", "export", "transformers"])
    def test_told_by_a_config(self, tmp_path: Path, kind: str) -> None:
        sizes = {"img_size": (32, 64), "embed_dim": 192, "depth": 1}
        config: dict[str, Any] = {}
        metadata: dict[str, str] = {}
        if kind == "timm":
            vit = timm_vit(**sizes)
            state = dict(vit.state_dict())
            arguments = {"img_size": [32, 64], "depth": 1, "global_pool": "avg"}
            arguments["fc_norm"] = False
            config = {"architecture": NAME, "model_args": arguments}
        elif kind == "export":
            vit = timm_vit(**sizes, no_embed_class=True)
            encoder = encoder_for(vit, **sizes, pos_antialias=True)
            encoder.vit.load_state_dict(vit.state_dict())
            state, metadata = to_timm(encoder)
        else:
            vit = timm_vit(**sizes, norm_layer=partial(torch.nn.LayerNorm, eps=1e-12))
            state = transformers_names(vit.state_dict(), 4)
            config = {"image_size": [32, 64], "patch_size": 16, "hidden_size": 192}
            config |= {"num_hidden_layers": 1}
        save_file(state, tmp_path / "model.safetensors", metadata)
        (tmp_path / "config.json").write_text(json.dumps(config))
        encoder, report = load_encoder(tmp_path)
        assert_same_tokens(encoder, vit, torch.randn(2, 3, 32, 64))
        assert "positions" not in report.facts.get("not told, assumed", "")
        # As many patches, yet other ones: not taken as they are.
        turned = create_encoder(tmp_path, img_size=(64, 32))
        assert not turned.vit.pos_embed.equal(encoder.vit.pos_embed)
        wrong = {
            "timm": config | {"model_args": {"depth": 2}},
            "export": config,
            "transformers": config | {"num_hidden_layers": 12},
        }[kind]
        if wrong != config:
            (tmp_path / "config.json").write_text(json.dumps(wrong))
            with pytest.raises(ValueError, match=r"config\.json says .*of one model"):
                create_encoder(tmp_path)
        (tmp_path / "config.json").write_text('{"architecture": ')
        with pytest.raises(ValueError, match=r"config\.json' cannot be read as JSON"):
            create_encoder(tmp_path)

    def test_contradicted_by_the_config(self, tmp_path: Path) -> None:
        vit = timm_vit(embed_dim=192, depth=1)
        save(vit.state_dict(), tmp_path / "model.safetensors")
        config = {"architecture": NAME, "model_args": {"depth": 1}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="17 rows, its config tells a grid of 14"):
            create_encoder(tmp_path)


class TestSeveralInOneFile:
    @pytest.mark.parametrize(
        ("taken", "beside", "choice"),
        [
            ("teacher", "student", "those of 'teacher', not of student"),
            ("state_dict_ema", "state_dict", "'state_dict_ema', not of state_dict"),
            ("model_ema", "model", "those of 'model_ema', not of model"),
            ("base_encoder", "momentum_encoder", "'base_encoder', not of momentum_e"),
        ],
    )
    @pytest.mark.parametrize("flat", [False, True])
    def test_which_is_taken_is_said(
        self, tmp_path: Path, taken: str, beside: str, choice: str, flat: bool
    ) -> None:
        vit = timm_vit(num_heads=12)
        state = dict(vit.state_dict())
        content: dict[str, Any] = {
            beside: {k: v + 1 for k, v in state.items()},
            taken: state,
        }
        if flat:
            content = {f"{w}.{k}": v for w in content for k, v in content[w].items()}
        path = save(content, tmp_path / "a.pth")
        encoder, report = load_encoder(path, num_heads=12)
        assert choice in report.facts["weights taken"]
        assert_same_tokens(encoder, vit)

    def test_one__nothing_to_say(self, tmp_path: Path) -> None:
        path = save({"model": timm_vit().state_dict(), "epoch": 3}, tmp_path / "a.pth")
        assert "weights taken" not in load_encoder(path, num_heads=3)[1].facts


class TestTimmByName:
    NAME = "test_vit"  # of timm's own tests: 160 px, 64 wide, 6 blocks

    @pytest.fixture
    def vit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VisionTransformer:
        torch.manual_seed(0)
        vit = timm.create_model(self.NAME, num_classes=0, dynamic_img_size=True)
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        state = vit.state_dict() | IMAGENET_HEAD
        write_hub_cache(self.NAME, state, tmp_path / "hub", monkeypatch)
        return vit.eval()

    @pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit.r160_in1k", NAME])
    def test_same_tokens(self, vit: VisionTransformer, name: str) -> None:
        encoder = create_encoder(name)
        assert encoder.pos_antialias
        for size in (64, 160):
            assert_same_tokens(encoder, vit, torch.randn(2, 3, size, size))
        assert numerics(read_checkpoint(name)) == {
            "norm_eps": 1e-6,
            "pos_antialias": True,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        }

    def test_an_existing_path_wins(
        self, vit: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        state = timm_vit(depth=1).state_dict()
        (tmp_path / self.NAME).mkdir()
        save(state, tmp_path / self.NAME / "model.safetensors")
        assert encoder_config(read_checkpoint(self.NAME), num_heads=3)["depth"] == 1

    def test_other_activation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        vit = timm_vit(act_layer=torch.nn.SiLU)
        vit.pretrained_cfg = {}
        monkeypatch.setattr(files, "timm_model", lambda _: vit)
        checkpoint = read_checkpoint(f"timm:{NAME}")
        with pytest.raises(ValueError, match=r"activation=GELU \(checkpoint: SiLU\)"):
            create_encoder(checkpoint)
        assert_same_tokens(create_encoder(checkpoint, act_layer=torch.nn.SiLU), vit)

    @pytest.mark.parametrize(
        ("name", "pattern"),
        [
            ("stellar_vit_tiny_patch16_224", "no trained weights of 'stellar_vit_tiny"),
            ("vit_tiny_patch8_224", r"no model '.*mean 'vit_\w*tiny_patch16_224'\?"),
            (
                "vit_base_patch16_224.mea",
                r"no weights 'mea' .*_patch16_224\.mae'\? I",
            ),
            ("resnet18", r"'resnet18' is a ResNet; .*VisionTransformer"),
        ],
    )
    def test_refused__before_the_hub_is_asked(
        self, name: str, pattern: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "hf_hub_download", None)
        with pytest.raises((FileNotFoundError, ValueError), match=pattern):
            read_checkpoint(f"timm:{name}")

    def test_damaged_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_hub_cache(self.NAME, HEAD, tmp_path / "hub", monkeypatch)
        with pytest.raises(ValueError, match=rf"'{path}' does not hold timm's 'test_v"):
            read_checkpoint("timm:test_vit")
        path.write_bytes(path.read_bytes()[:70])
        with pytest.raises(ValueError, match=r"does not hold .*have it downloaded"):
            read_checkpoint("timm:test_vit")

    def test_not_in_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_hub_cache(self.NAME, HEAD, tmp_path / "hub", monkeypatch)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"hf download timm/.*/hub'"):
            read_checkpoint("timm:test_vit")


class TestPriorOfStellar:
    """What a pretraining run does with a prior."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        vit = timm_vit(sines=True)
        return save({"model": vit.state_dict()}, tmp_path / "mae.pth")

    def test_keeps_queries_and_projections(self, file: Path) -> None:
        encoder = encoder_for(timm_vit(), num_queries=4)
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        report = load_encoder_weights(encoder, file)
        after = encoder.state_dict()
        assert set(report.missing) == {
            "vit.reg_token",
            "dense_proj.weight",
            "dense_proj.bias",
            "sparse_proj.weight",
            "sparse_proj.bias",
        }
        assert all(after[name].equal(before[name]) for name in report.missing)
        assert not any(after[name].equal(before[name]) for name in report.matched)

    def test_numerics_of_the_prior(self, file: Path) -> None:
        sizes = {k: SIZES[k] for k in ("img_size", "embed_dim", "depth", "num_heads")}
        decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
        model = Stellar("stellar_vit_tiny_patch16_224", **sizes, **decoder)
        with pytest.raises(ValueError, match=r"norm_eps=1e-12 \(checkpoint: 1e-06\)"):
            load_encoder_weights(model.encoder, file)
        known = numerics(read_checkpoint(file))
        assert known == {"norm_eps": 1e-6, "pos_antialias": False}

    def test_config_beside(self, file: Path) -> None:
        config = file.parent / "config.json"
        config.write_text('{"schema_version": 1, "num_queries": 4, "norm_eps": 0.1}')
        checkpoint = read_checkpoint(file)
        assert checkpoint.num_queries == 0
        assert numerics(checkpoint)["norm_eps"] == 1e-6
        config.write_text(
            '{"architecture": "a", "pretrained_cfg": {"mean": [0, 0, 0]}}'
        )
        assert numerics(read_checkpoint(file))["mean"] == [0, 0, 0]

    def test_number_of_heads_by_width(self, tmp_path: Path) -> None:
        vit = timm_vit(embed_dim=192, depth=1)
        path = save({"model": vit.state_dict()}, tmp_path / "a.pth")
        wrong = encoder_for(vit, embed_dim=192, depth=1, num_heads=6)
        with pytest.raises(ValueError, match=r"num_heads=6 \(checkpoint: 3\)"):
            load_encoder_weights(wrong, path)
        load_encoder_weights(wrong, path, num_heads=6)

    def test_other_shape__sizes_are_shown(self, file: Path) -> None:
        encoder = encoder_for(timm_vit(), depth=3)
        with pytest.raises(ValueError, match=r"missing: vit\.blocks\.2.*depth=2.*MAE"):
            load_encoder_weights(encoder, file)


def test_unwrap__what_is_left_of_every_level() -> None:
    weight = torch.ones(1)
    inner = {"norm.weight": weight, "step": 3}
    content = {"epoch": 1, "state_dict": {"model": inner, "args": None}}
    tensors, wrappers, left = unwrap(content)
    assert tensors == {"norm.weight": weight}
    assert wrappers == ["state_dict", "model"]
    assert left == ["epoch", "args", "step"]


class TestFaultyFiles:
    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.pth").touch()
        with pytest.raises(ValueError, match="is empty"):
            read_checkpoint(tmp_path / "a.pth")

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize(
        ("keep", "message"),
        [(3, "has 3 bytes"), (1000, "cut short"), (-100, "cut short")],
    )
    def test_truncated(
        self, tmp_path: Path, suffix: str, keep: int, message: str
    ) -> None:
        path = save(timm_vit().state_dict(), tmp_path / f"a{suffix}")
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=rf"a\{suffix}'.*{message}.*again"):
            read_checkpoint(path)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("\n<!DOCTYPE html>\n<html><title>Not found", "is a web page, not weights"),
            ("<html>404</html>", "is a web page, not weights"),
            ("version https://git-lfs.github.com/spec/v1\noid", "by `git lfs pull`"),
            ("not weights " * 9, r"is damaged|cannot be read.*is damaged"),
        ],
    )
    def test_text(self, tmp_path: Path, suffix: str, text: str, message: str) -> None:
        (tmp_path / f"a{suffix}").write_text(text)
        with pytest.raises(ValueError, match=rf"a\{suffix}'.*({message})"):
            read_checkpoint(tmp_path / f"a{suffix}")

    def test_foreign_objects(self, tmp_path: Path) -> None:
        path = save({"model": timm_vit()}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"VisionTransformer.*not unpickled"):
            read_checkpoint(path)

    def test_no_names(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds a Tensor"):
            read_checkpoint(save(torch.zeros(2), tmp_path / "a.pth"))

    @pytest.mark.parametrize(
        "content", [{}, {"epoch": 3}, {"conv.weight": torch.ones(1)}]
    )
    def test_no_vit(self, tmp_path: Path, content: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"no known layout.*timm .*MAE"):
            read_checkpoint(save(content, tmp_path / "a.pth"))

    def test_two_vits(self, tmp_path: Path) -> None:
        state = timm_vit().state_dict()
        content = prefixed(state, "left.") | prefixed(state, "right.")
        with pytest.raises(ValueError, match="mixes several ViTs"):
            read_checkpoint(save(content, tmp_path / "a.pth"))

    def test_two_layouts(self, tmp_path: Path) -> None:
        state = dict(timm_vit().state_dict())
        state = transformers_names(state, 4) | state
        path = save({k: v.clone() for k, v in state.items()}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="mixes layouts"):
            read_checkpoint(path)

    def test_fine_tuned_without_last_norm(self, tmp_path: Path) -> None:
        state = dict(timm_vit().state_dict())
        state["fc_norm.weight"] = state.pop("norm.weight")
        state["fc_norm.bias"] = state.pop("norm.bias")
        path = save({"model": state}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"missing: vit\.norm\.weight"):
            load_encoder_weights(encoder_for(timm_vit()), path)

    def test_gated_mlp(self, tmp_path: Path) -> None:
        state = dict(timm_vit().state_dict())
        for block in range(2):
            for kind, shape in (("weight", (64, 48)), ("bias", (64,))):
                del state[f"blocks.{block}.mlp.fc1.{kind}"]
                state[f"blocks.{block}.mlp.w12.{kind}"] = torch.zeros(shape)
            state[f"blocks.{block}.mlp.w3.weight"] = state.pop(
                f"blocks.{block}.mlp.fc2.weight"
            )[:, :32]
        path = save(state, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="no plain MLP"):
            create_encoder(path, num_heads=3)

    def test_not_rgb(self, tmp_path: Path) -> None:
        path = save(timm_vit(in_chans=1).state_dict(), tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"no patch embedding of RGB.*48, 1, 16"):
            create_encoder(path, num_heads=3)

    def test_folder_with_two_files(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save(timm_vit().state_dict(), tmp_path / f"{name}.safetensors")
        with pytest.raises(FileNotFoundError, match=r"holds a\.safetensors, b\.safe"):
            read_checkpoint(tmp_path)


def test_two_names_of_one_tensor__name_the_file(tmp_path: Path) -> None:
    state = timm_vit().state_dict()
    path = save(
        {**state, "module.norm.weight": state["norm.weight"]}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match=r"a\.pth' cannot be used: Two tensors are"):
        read_checkpoint(path)


def test_half_precision__sums_of_token_and_position_are_rounded_once(
    tmp_path: Path,
) -> None:
    state = {name: tensor.half() for name, tensor in timm_vit().state_dict().items()}
    encoder = create_encoder(save(state, tmp_path / "half.pth"), num_heads=3)
    expected = state["cls_token"].float() + state["pos_embed"][:, :1].float()
    assert encoder.vit.cls_token.equal(expected)
