from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import (
    HEADS,
    create_encoder,
    load_encoder_weights,
    load_head_weights,
    load_model_weights,
    model_config,
    read_checkpoint,
    save_heads,
)
from stellar_plugin.checkpoints.export import to_official
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.recognise import parse
from tests import reference
from tests.tokenizer_weights import reference_tokenizer

HEAD_COUNTS = {"num_heads": 3, "decoder_num_heads": 4}
# transformers 5.x, by names of 4.x.
RENAMED_IN_5 = {
    "encoder.encoder.layer.": "encoder.layers.",
    "decoder.encoder.layer.": "decoder.layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    ".output.dense": ".mlp.fc2",
}


def renamed_in_5(name: str) -> str:
    for old, new in RENAMED_IN_5.items():
        name = name.replace(old, new)
    return name


def published_shapes() -> dict[str, list[int]]:
    """Names and shapes of the published ViT-B/16 file."""
    lines = (reference.FIXTURES / "official_keys_base.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines)
    return {name: [int(n) for n in shape.split("x")] for name, shape in pairs}


def parse_meta(shapes: dict[str, list[int]]):
    tensors = {k: torch.empty(v, device="meta") for k, v in shapes.items()}
    return parse(RawCheckpoint(Path("stellar.safetensors"), tensors))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "stellar-tiny.safetensors"
    save_file(reference.weights(), path)
    return path


class TestParity:
    """The reference numbers, through the door that users use."""

    @pytest.mark.parametrize("form", ["4.x", "5.x", "model.", "state_dict"])
    @pytest.mark.parametrize("size", ["", "small", "large", "nonsquare"])
    def test_from_pretrained__reference_numbers(
        self, tmp_path: Path, form: str, size: str
    ) -> None:
        state = reference.weights()
        if form == "5.x":
            state = {renamed_in_5(name): tensor for name, tensor in state.items()}
            assert not any("attention.attention" in name for name in state)
        elif form == "model.":
            state = {f"model.{name}": tensor for name, tensor in state.items()}
        path = tmp_path / ("weights.pth" if form == "state_dict" else "w.safetensors")
        if form == "state_dict":
            torch.save({"state_dict": state, "epoch": 3}, path)
        else:
            save_file(state, path)
        model = Stellar.from_pretrained(path, **HEAD_COUNTS)
        expected = reference.load("forward")
        images = expected[f"{size}.image" if size else "image"]
        with torch.no_grad():
            result = model(reference.normalized(images))
        ours = {
            "cls": result.cls[:, None],
            "sparse": result.sparse,
            "dense": result.dense,
            "spatial": result.localization,
        }
        for name, value in ours.items():
            wanted = expected[f"{size or 'out'}.{name}"]
            torch.testing.assert_close(value, wanted, rtol=0, atol=2e-5)

    def test_from_pretrained__reference_pixels(self, file: Path) -> None:
        model = Stellar.from_pretrained(file, **HEAD_COUNTS)
        expected = reference.load("forward")
        with torch.no_grad():
            result = model(reference.normalized(expected["image"]))
            decoded = model.decode(result.lowrank, result.grid_size)
        torch.testing.assert_close(decoded, expected["out.x_hat"], rtol=0, atol=2e-5)


class TestFromPretrained:
    def test_numerics(self, file: Path) -> None:
        model = Stellar.from_pretrained(file, **HEAD_COUNTS)
        assert model.encoder.vit.norm.eps == 1e-12
        assert model.encoder.pos_antialias is False
        assert not model.training

    def test_half_precision(self, file: Path) -> None:
        save_file({k: v.half() for k, v in reference.weights().items()}, file)
        model = Stellar.from_pretrained(file, **HEAD_COUNTS)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {
            torch.float32
        }

    def test_heads_from_the_config_beside(self, file: Path) -> None:
        config = {"num_attention_heads": 3, "decoder_num_heads": 4}
        (file.parent / "config.json").write_text(json.dumps(config))
        model = Stellar.from_pretrained(file)
        assert model.encoder.vit.blocks[0].attn.num_heads == 3
        assert model.decoder.blocks[0].attn.num_heads == 4

    def test_config_of_another_model_beside(self, file: Path) -> None:
        Stellar(**reference.model_arguments()).save_pretrained(file.parent)
        with pytest.raises(ValueError, match="Pass num_heads"):
            Stellar.from_pretrained(file)

    @pytest.mark.parametrize("given", ["num_heads", "decoder_num_heads"])
    def test_unknown_number_of_heads(self, file: Path, given: str) -> None:
        other = ({"num_heads", "decoder_num_heads"} - {given}).pop()
        with pytest.raises(ValueError, match=rf"width.*Pass {other}\."):
            Stellar.from_pretrained(file, **{given: HEAD_COUNTS[given]})

    def test_without_decoder__fresh_and_reported(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        beginnings = ("decoder", "reconstruction_head", "position_embedding.")
        state = reference.weights()
        state = {k: v for k, v in state.items() if not k.startswith(beginnings)}
        save_file(state, tmp_path / "w.safetensors")
        model = Stellar.from_pretrained(tmp_path / "w.safetensors", num_heads=3)
        assert not any(p.is_meta for p in model.parameters())
        assert "missing, so as initialised (decoder." in caplog.text

    def test_decoder_with_a_gap(self, tmp_path: Path) -> None:
        state = reference.weights()
        del state["decoder.layernorm.bias"]
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"fit the decoder; missing: norm\.bias"):
            Stellar.from_pretrained(tmp_path / "w.safetensors", **HEAD_COUNTS)

    @pytest.mark.parametrize(
        ("removed", "message"),
        [
            ("encoder.layernorm.weight", r"missing: vit\.norm\.weight.*known layouts"),
            (
                "encoder.encoder.layer.1.attention.attention.key.bias",
                r"query, key or value is missing for blocks\.1\.attn\.qkv\.bias",
            ),
            ("encoder.embeddings.position_embeddings", "no position table"),
            (
                "encoder.embeddings.patch_embeddings.projection.weight",
                "no patch embedding",
            ),
            ("dense_proj.bias", r"missing: dense_proj\.bias"),
            ("sparse_tokens", "without latent queries"),
        ],
    )
    def test_gap(self, tmp_path: Path, removed: str, message: str) -> None:
        state = reference.weights()
        del state[removed]
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=message):
            Stellar.from_pretrained(tmp_path / "w.safetensors", **HEAD_COUNTS)

    def test_mixed_namings(self, tmp_path: Path) -> None:
        state = reference.weights()
        name = "encoder.encoder.layer.0.intermediate.dense.weight"
        state[renamed_in_5(name)] = state[name].clone()
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match="mixes layouts"):
            Stellar.from_pretrained(tmp_path / "w.safetensors", **HEAD_COUNTS)

    def test_foreign_block(self, tmp_path: Path) -> None:
        state = reference.weights()
        state["encoder.encoder.layer.0.layer_scale1.lambda1"] = torch.ones(48)
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"unexpected: vit.*layer_scale1"):
            Stellar.from_pretrained(tmp_path / "w.safetensors", **HEAD_COUNTS)

    def test_codes_and_tokenizer(self, tmp_path: Path) -> None:
        tokenizer = reference_tokenizer().state_dict()
        state = reference.weights()
        state["reconstruction_head.weight"] = torch.randn(64, 32)
        state["reconstruction_head.bias"] = torch.randn(64)
        state |= {f"tokenizer.{k}": v.clone() for k, v in tokenizer.items()}
        save_file(state, tmp_path / "w.safetensors")
        model = Stellar.from_pretrained(tmp_path / "w.safetensors", **HEAD_COUNTS)
        assert model.target == "tokens"
        assert model.decoder.head.weight.equal(state["reconstruction_head.weight"])
        for name, tensor in model.tokenizer.state_dict().items():
            assert tensor.equal(tokenizer[name]), name
        written = to_official(model, read_checkpoint(tmp_path / "w.safetensors").heads)
        assert written.keys() == state.keys()


class TestReport:
    def test_unused_tensors_are_listed(self, file: Path) -> None:
        model = Stellar(**reference.model_arguments())
        report = load_model_weights(model, file)
        assert report.layout == "official STELLAR"
        assert set(report.ignored) == {
            "encoder.pooler.dense.weight",
            "encoder.pooler.dense.bias",
            "decoder.embeddings.cls_token",
            "decoder.embeddings.position_embeddings",
            "decoder.embeddings.patch_embeddings.projection.weight",
            "decoder.embeddings.patch_embeddings.projection.bias",
            "decoder.pooler.dense.weight",
            "decoder.pooler.dense.bias",
        }
        assert report.missing == report.unexpected == report.resized == ()
        assert set(report.matched) == set(model.state_dict())

    def test_unexpected(self, file: Path, caplog: pytest.LogCaptureFixture) -> None:
        state = reference.weights() | {"fancy.weight": torch.zeros(2)}
        save_file(state, file)
        report = load_model_weights(Stellar(**reference.model_arguments()), file)
        assert report.unexpected == ("fancy.weight",)
        assert "1 unexpected (fancy.weight)" in caplog.text

    def test_teacher_is_ignored(self, file: Path) -> None:
        teacher = {
            k: v
            for k, v in reference.load("train_teacher").items()
            if k.startswith("state.teacher_")
        }
        extra = {k.removeprefix("state."): v for k, v in teacher.items()}
        save_file(reference.weights() | extra, file)
        checkpoint = read_checkpoint(file)
        assert set(extra) <= set(checkpoint.ignored)
        assert checkpoint.unexpected == ()

    def test_resized(self, file: Path) -> None:
        arguments = {**reference.model_arguments(), "img_size": (96, 48)}
        model = Stellar(**arguments).eval()
        report = load_model_weights(model, file)
        assert report.resized == ("vit.pos_embed from 4 x 4 to 6 x 3 patches",)
        original = Stellar.from_pretrained(file, **HEAD_COUNTS)
        images = torch.randn(1, 3, 96, 48)
        torch.testing.assert_close(model(images).dense, original(images).dense)

    def test_missing_queries_and_projections(self, file: Path) -> None:
        new = ("sparse_tokens", "dense_proj", "sparse_proj")
        state = reference.weights()
        save_file({k: v for k, v in state.items() if not k.startswith(new)}, file)
        encoder = Stellar(**reference.model_arguments()).encoder
        before = encoder.vit.reg_token.clone()
        report = load_encoder_weights(encoder, file)
        assert set(report.missing) == {
            "vit.reg_token",
            "dense_proj.weight",
            "dense_proj.bias",
            "sparse_proj.weight",
            "sparse_proj.bias",
        }
        assert encoder.vit.reg_token.equal(before)


class TestHeads:
    def test_read_and_loaded(self, file: Path) -> None:
        pytest.importorskip("lightly")
        from lightly_ext.modules import STELLARProjectionHead

        arguments = reference.head_arguments()
        heads = {name: STELLARProjectionHead(48, **arguments) for name in HEADS}
        assert load_head_weights(heads, read_checkpoint(file)) == []
        expected = reference.load("forward")
        with torch.no_grad():
            logits = heads["cls_head"].prototypes(
                heads["cls_head"](expected["out.cls"])
            )
        wanted = expected["cluster.cls.logits"]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)

    def test_other_size(self, file: Path) -> None:
        head = torch.nn.Sequential(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"sparse_head .* num_prototypes"):
            load_head_weights({"sparse_head": head}, read_checkpoint(file))

    def test_own_folder__round_trip(self, file: Path, tmp_path: Path) -> None:
        checkpoint = read_checkpoint(file)
        model = Stellar.from_checkpoint(checkpoint, **HEAD_COUNTS)
        model.save_pretrained(tmp_path / "ours")
        save_heads(checkpoint.heads, tmp_path / "ours")
        heads = read_checkpoint(tmp_path / "ours").heads
        assert heads.keys() == set(HEADS)
        for name in HEADS:
            assert heads[name].keys() == checkpoint.heads[name].keys()
            for key, tensor in heads[name].items():
                assert tensor.equal(checkpoint.heads[name][key])


class TestFullSize:
    """On the meta device, at the sizes of the published files."""

    def test_base(self) -> None:
        shapes = published_shapes()
        checkpoint = parse_meta(shapes)
        config = model_config(checkpoint)
        expected = {
            "model_name": "stellar_vit_base_patch16_224",
            "num_queries": 16,
            "img_size": 224,
            "num_heads": 12,
            "decoder_num_heads": 8,
        }
        assert {name: config[name] for name in expected} == expected
        with torch.device("meta"):
            model = Stellar(**config)
            plain = Stellar("stellar_vit_base_patch16_224")
        assert self.shapes(model.state_dict()) == self.shapes(plain.state_dict())
        load_model_weights(model, checkpoint)
        assert checkpoint.unexpected == ()

    def test_base__5x_naming(self) -> None:
        shapes = {renamed_in_5(k): v for k, v in published_shapes().items()}
        assert model_config(parse_meta(shapes)) == model_config(
            parse_meta(published_shapes())
        )

    def test_base__back(self) -> None:
        shapes = published_shapes()
        checkpoint = parse_meta(shapes)
        model = Stellar.from_checkpoint(checkpoint)
        written = to_official(model, checkpoint.heads)
        assert self.shapes(written) == {k: tuple(v) for k, v in shapes.items()}

    def test_base__back_without_heads(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Stellar.from_checkpoint(parse_meta(published_shapes()))
        written = to_official(model)
        assert self.shapes(written) == {
            k: tuple(v) for k, v in published_shapes().items()
        }
        assert "without cls_head; zeros" in caplog.text

    @pytest.mark.parametrize(
        ("name", "width", "depth", "heads", "patch", "patches"),
        [("large", 1024, 24, 16, 16, 196), ("huge", 1280, 32, 16, 14, 256)],
    )
    @pytest.mark.slow
    def test_larger(
        self, name: str, width: int, depth: int, heads: int, patch: int, patches: int
    ) -> None:
        checkpoint = parse_meta(self.scaled(width, depth, patch, patches))
        config = model_config(checkpoint)
        assert config["model_name"] == f"stellar_vit_{name}_patch{patch}_224"
        assert (config["depth"], config["num_heads"]) == (depth, heads)
        assert config["img_size"] == 224
        with torch.device("meta"):
            model = Stellar(**config)
            plain = Stellar(config["model_name"])
        assert self.shapes(model.state_dict()) == self.shapes(plain.state_dict())
        load_model_weights(model, checkpoint)

    def scaled(
        self, width: int, depth: int, patch: int, patches: int
    ) -> dict[str, list[int]]:
        """The published names at the sizes of another model."""
        result = {}
        sizes = {768: width, 3072: 4 * width}
        for name, shape in published_shapes().items():
            new = [sizes.get(n, n) for n in shape]
            if "position_embeddings" in name and name.startswith("encoder."):
                new[1] = patches + 1
            if new[-1] == 16 and not name.startswith("decoder."):
                new[-2:] = [patch, patch]
            result[name] = new
            if name.startswith("encoder.encoder.layer.0."):
                for layer in range(12, depth):
                    result[name.replace(".0.", f".{layer}.", 1)] = new
        return result

    @staticmethod
    def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in state.items()}


class TestToOfficial:
    def test_same_outputs_and_sums(self, file: Path, tmp_path: Path) -> None:
        checkpoint = read_checkpoint(file)
        model = Stellar.from_checkpoint(checkpoint, **HEAD_COUNTS)
        save_file(to_official(model, checkpoint.heads), tmp_path / "back.safetensors")
        written = load_file(tmp_path / "back.safetensors")
        original = reference.weights()
        assert written.keys() == original.keys()
        position = original["encoder.embeddings.position_embeddings"]
        cls_token = original["encoder.embeddings.cls_token"] + position[:, :1]
        assert written["encoder.embeddings.cls_token"].equal(cls_token)
        table = written["encoder.embeddings.position_embeddings"]
        assert table[:, 0].eq(0).all() and table[:, 1:].equal(position[:, 1:])
        unused = {n for n in written if "pooler" in n or n.startswith("decoder.embed")}
        assert all(written[name].eq(0).all() for name in unused)
        changed = {
            "encoder.embeddings.cls_token",
            "encoder.embeddings.position_embeddings",
        }
        for name in written.keys() - unused - changed:
            assert written[name].equal(original[name]), name
        again = Stellar.from_pretrained(tmp_path / "back.safetensors", **HEAD_COUNTS)
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(
            again.reconstruct(images), model.reconstruct(images), rtol=0, atol=1e-6
        )

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"norm_eps": 1e-6}, "epsilon is not 1e-12"),
            ({"pos_antialias": True}, "antialiasing"),
            ({"class_token": False}, "no CLS token"),
            ({"reg_tokens": 2}, "registers"),
            ({"init_values": 1e-5}, r"has blocks\.0\.ls1\.gamma"),
            ({"img_size": (64, 32)}, "not square"),
            ({"mean": (0.5, 0.5, 0.5)}, "not normalised"),
            ({"target": None}, "no decoder"),
            ({"target": "tokens"}, "tokenizer is not loaded"),
        ],
    )
    def test_other_models(self, kwargs: dict[str, object], message: str) -> None:
        model = Stellar(**{**reference.model_arguments(), **kwargs})
        with pytest.raises(ValueError, match=message):
            to_official(model)


def test_create_encoder(file: Path) -> None:
    encoder = create_encoder(file, num_heads=3, img_size=96)
    assert encoder.grid_size == (6, 6) and encoder.num_queries == 4
