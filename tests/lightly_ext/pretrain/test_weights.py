from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain.export import export_model
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import create_encoder, read_checkpoint
from tests import reference
from tests.checkpoint_files import (
    IMAGENET_HEAD,
    assert_same_tokens,
    write_hub_cache,
)

HEADS = {"sparse_head": "clustering_head", "cls_head": "cls_cluster_head"}


def pretraining(seed: int = 1, **kwargs: Any) -> StellarPretraining:
    # Another seed where weights have to come from a file.
    torch.manual_seed(seed)
    settings = {
        "model": reference.model_arguments(),
        "head": reference.head_arguments(),
    }
    return StellarPretraining(**{**settings, **kwargs})


@pytest.fixture
def official(tmp_path: Path) -> str:
    path = tmp_path / "official.safetensors"
    save_file(reference.weights(), path)
    return str(path)


@pytest.fixture
def mae(tmp_path: Path) -> str:
    sizes = {k: reference.model_arguments()[k] for k in ("img_size", "embed_dim")}
    vit = VisionTransformer(**sizes, depth=2, num_heads=3, mlp_ratio=2, num_classes=0)
    torch.save({"model": vit.state_dict()}, tmp_path / "mae.pth")
    return str(tmp_path / "mae.pth")


class TestWeights:
    def test_official__model_and_heads(self, official: str) -> None:
        module = pretraining(weights=official)
        expected = reference.model_state(reference.weights())
        for name, tensor in module.model.state_dict().items():
            assert tensor.equal(expected[name]), name
        for ours, theirs in HEADS.items():
            state = reference.head_state(reference.weights(), theirs)
            for name, tensor in getattr(module, ours).state_dict().items():
                assert tensor.equal(state[name]), name

    def test_official__teacher_starts_from_the_weights(self, official: str) -> None:
        module = pretraining(weights=official, teacher_momentum=0.9)
        teacher = module.teacher["sparse_head"].prototypes.weight
        assert teacher.equal(reference.weights()["clustering_head.layer.weight"])

    def test_export__round_trip_with_heads(self, tmp_path: Path) -> None:
        first = pretraining()
        export_model(first, tmp_path / "model")
        second = pretraining(seed=7, weights=str(tmp_path / "model"))
        for name, tensor in first.state_dict().items():
            assert second.state_dict()[name].equal(tensor), name

    def test_own_training_checkpoint(self, tmp_path: Path) -> None:
        first = pretraining(teacher_momentum=0.9)
        checkpoint = {
            "state_dict": first.state_dict(),
            "hyper_parameters": dict(first.hparams),
            "epoch": 1,
        }
        path = tmp_path / "last.ckpt"
        torch.save(checkpoint, path)
        loaded = Stellar.from_pretrained(path)
        for name, tensor in first.model.state_dict().items():
            assert loaded.state_dict()[name].equal(tensor), name
        second = pretraining(seed=7, weights=str(path))
        assert second.cls_head.prototypes.weight.equal(first.cls_head.prototypes.weight)
        assert "teacher.encoder.vit.cls_token" in read_checkpoint(path).ignored

    def test_without_heads(
        self, official: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = reference.weights()
        state = {k: v for k, v in state.items() if not k.startswith("cls_cluster_head")}
        save_file(state, official)
        module = pretraining(weights=official)
        assert "has no cls_head: freshly initialised" in caplog.text
        prototypes = module.sparse_head.prototypes.weight
        assert prototypes.equal(state["clustering_head.layer.weight"])

    def test_heads_of_another_size(self, official: str) -> None:
        head = {**reference.head_arguments(), "num_prototypes": 8}
        with pytest.raises(ValueError, match=r"\(32, 16\).*num_prototypes"):
            pretraining(weights=official, head=head)

    def test_prior_and_weights(self, official: str) -> None:
        with pytest.raises(ValueError, match="not both"):
            pretraining(weights=official, prior=official)


class TestPrior:
    def test_numerics_of_the_prior(self, mae: str, official: str) -> None:
        assert pretraining(prior=mae).model.encoder.vit.norm.eps == 1e-6
        assert pretraining(prior=official).model.encoder.vit.norm.eps == 1e-12

    def test_contradiction(self, mae: str) -> None:
        model = {**reference.model_arguments(), "norm_eps": 1e-5}
        with pytest.raises(
            ValueError, match=r"1e-05 \(checkpoint: 1e-06\).* model_name,"
        ):
            pretraining(prior=mae, model=model)

    def test_export_and_checkpoint_keep_the_numerics(
        self, mae: str, tmp_path: Path
    ) -> None:
        module = pretraining(prior=mae)
        assert module.hparams["model"]["norm_eps"] == 1e-6
        module.model.save_pretrained(tmp_path / "model")
        loaded = Stellar.from_pretrained(tmp_path / "model")
        assert loaded.encoder.vit.norm.eps == 1e-6
        again = pretraining(weights=str(tmp_path / "model"))
        assert again.model.encoder.vit.norm.eps == 1e-6

    def test_model_is_that_of_the_prior(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        vit = timm.create_model("test_vit", num_classes=0).eval()
        state = vit.state_dict() | IMAGENET_HEAD
        write_hub_cache("test_vit", state, tmp_path / "hub", monkeypatch)
        decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
        given = {"num_queries": 4, **decoder}
        module = pretraining(prior="timm:test_vit", model=given)
        config = module.model.config
        assert (config["model_name"], config["img_size"]) == ("test_vit", 160)
        assert config["mean"] == [0.5] * 3 and config["pos_antialias"]
        assert config["num_queries"] == 4
        images = torch.randn(1, 3, 160, 160)
        plain = create_encoder("timm:test_vit")
        with torch.no_grad():
            assert_same_tokens(plain, vit, images)
        for name, tensor in plain.state_dict().items():
            assert module.model.encoder.state_dict()[name].equal(tensor), name
        # Neither the hub nor its cache is needed again.
        shutil.rmtree(tmp_path / "hub")
        again = Stellar(**module.hparams["model"])
        assert again.state_dict().keys() == module.model.state_dict().keys()

    def test_model_of_a_file(self, mae: str) -> None:
        sizes = reference.model_arguments()
        given = {k: v for k, v in sizes.items() if k.startswith(("decoder", "num_"))}
        module = pretraining(prior=mae, model=given)
        assert module.model.encoder.embed_dim == sizes["embed_dim"]
        assert module.model.config["mlp_ratio"] == 2
        with pytest.raises(ValueError, match=r"pretrain` --model\.model\.num_heads"):
            pretraining(prior=mae, model={"num_queries": 4})

    def test_encoder_only(self, official: str) -> None:
        module = pretraining(prior=official)
        state = reference.weights()
        assert module.model.encoder.dense_proj.weight.equal(state["dense_proj.weight"])
        assert not module.model.decoder.proj.weight.equal(state["decoder_proj.weight"])
        prototypes = module.sparse_head.prototypes.weight
        assert not prototypes.equal(state["clustering_head.layer.weight"])
