from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from lightly_ext.evaluate.loading import (
    load_frozen_model,
    load_like,
    load_stellar,
    load_untrained,
    short_name,
)
from stellar_plugin import Stellar
from stellar_plugin.hashes import architecture_sha256
from tests import published_vits as written
from tests.checkpoint_files import prefixed, save, timm_vit
from tests.lightly_ext.evaluate.small import write_model
from tests.resnet_files import resnet_state

SWIN = "swin_tiny_patch4_window7_224"
WIDTH = 192  # of which the number of heads is known: 3


class TestUntrained:
    @pytest.mark.parametrize("kind", ["stellar", "vit", "resnet"])
    def test_decided_by_the_seed(self, tmp_path: Path, kind: str) -> None:
        source = {
            "stellar": lambda: write_model(tmp_path / "model"),
            "vit": lambda: "timm:test_vit",
            "resnet": lambda: "timm:test_resnet",
        }[kind]()
        state = torch.random.get_rng_state()
        first, same, other = (
            load_frozen_model(source, untrained=True, seed=seed) for seed in (0, 0, 1)
        )
        # The random numbers of the run go on as if nothing had been drawn.
        assert torch.random.get_rng_state().equal(state)
        a, b, c = (dict(m.state_dict()) for m in (first, same, other))
        assert all(a[name].equal(b[name]) for name in a)
        assert any(not a[name].equal(c[name]) for name in a)
        assert first.origin == same.origin != other.origin
        assert first.origin.sha256 == "random weights of seed 0"
        assert first.origin.source == source and first.origin.seed == 0
        assert first.origin.label == f"{source} (untrained)"

    def test_same_architecture_other_weights(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        trained = load_frozen_model(source)
        untrained = load_frozen_model(source, untrained=True, seed=5)
        a, b = trained.state_dict(), untrained.state_dict()
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        query = "backbone.vit.reg_token"
        assert not a[query].equal(b[query])
        assert untrained.resolve_feature("auto") == "sparse"


class TestWeightsFile:
    @pytest.mark.parametrize("prefix", ["", "module.encoder_q.", "backbone."])
    def test_resnet_under_a_prefix(self, tmp_path: Path, prefix: str) -> None:
        torch.manual_seed(1)
        model = timm.create_model("test_resnet", num_classes=7)
        state = prefixed(model.state_dict(), prefix)
        # MoCo has a second encoder and a queue beside it.
        state |= {f"other.{k}": torch.zeros_like(v) for k, v in state.items()}
        state["module.queue"] = torch.zeros(2, 2)
        path = save({"state_dict": state, "arch": "resnet"}, tmp_path / "moco.pth")
        frozen = load_frozen_model("timm:test_resnet", weights=str(path))
        loaded, expected = frozen.backbone.model.state_dict(), model.state_dict()  # type: ignore[union-attr]
        assert all(loaded[name].equal(expected[name]) for name in loaded)
        assert len(frozen.origin.sha256) == 64

    def test_moco__the_encoder_of_queries(self, tmp_path: Path) -> None:
        model = timm.create_model("test_resnet", num_classes=0)
        state = dict(model.state_dict())
        keys = {k: torch.zeros_like(v) for k, v in state.items()}
        content = prefixed(keys, "module.encoder_k.")
        content |= prefixed(state, "module.encoder_q.")
        path = save({"state_dict": content, "epoch": 3}, tmp_path / "moco.pth")
        frozen = load_frozen_model("timm:test_resnet", weights=str(path))
        loaded = frozen.backbone.model.state_dict()  # type: ignore[union-attr]
        assert all(loaded[name].equal(tensor) for name, tensor in state.items())
        assert frozen.origin.facts["weights taken"] == (
            "those of 'state_dict.encoder_q', not of encoder_k"
        )

    def test_two_networks(self, tmp_path: Path) -> None:
        state = timm.create_model("test_resnet", num_classes=0).state_dict()
        content = prefixed(state, "left.") | prefixed(state, "right.")
        path = save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"several such networks, under .*right"):
            load_frozen_model("timm:test_resnet", weights=str(path))

    @pytest.mark.parametrize("model", ["patches", "timm:test_resnet"])
    def test_arguments_of_no_vit(self, model: str) -> None:
        with pytest.raises(ValueError, match="model_kwargs are arguments of ViTs"):
            load_frozen_model(model, untrained=True, model_kwargs={"num_heads": 2})

    def test_vit__method_of_the_file(self, tmp_path: Path) -> None:
        state = timm.create_model("test_vit", num_classes=0).state_dict()
        state["decoder_pred.weight"] = torch.zeros(3, 4)
        path = save({"model": state}, tmp_path / "mae.pth")
        frozen = load_frozen_model("timm:test_vit", weights=str(path))
        assert frozen.origin.method == "MAE or SemMAE"
        assert frozen.origin.mean == (0.5, 0.5, 0.5)
        assert frozen.origin.facts["not told, assumed"].endswith(
            "mean and std of timm's model, MAE or SemMAE has ImageNet's"
        )

    def test_vit__nothing_is_said_of_images_that_no_method_tells(
        self, tmp_path: Path
    ) -> None:
        state = timm.create_model("test_vit", num_classes=5).state_dict()
        path = save({"model": state}, tmp_path / "classifier.pth")
        frozen = load_frozen_model("timm:test_vit", weights=str(path))
        assert frozen.origin.mean == (0.5, 0.5, 0.5)
        assert "mean" not in frozen.origin.facts.get("not told, assumed", "")

    @pytest.mark.parametrize(
        ("model", "content", "read_as"),
        [
            ("test_resnet", written.msn, "MSN in layout 'timm'"),
            ("test_vit", written.aim, "AIM in layout 'AIM'"),
            ("test_vit", written.siamese_im, "SiameseIM in layout 'timm'"),
            (
                "test_resnet",
                lambda: {"state_dict": resnet_state(), "author": "DenseCL"},
                "DenseCL in layout 'torchvision ResNet'",
            ),
        ],
    )
    def test_file_of_another_network__says_what_it_is(
        self, tmp_path: Path, model: str, content: Callable[[], Any], read_as: str
    ) -> None:
        path = save(content(), tmp_path / "a.pth")
        pattern = f"{read_as}.* by --model .*a.pth"
        with pytest.raises(ValueError, match=pattern):
            load_frozen_model(f"timm:{model}", weights=str(path))

    def test_wrong_file(self, tmp_path: Path) -> None:
        other = timm.create_model("test_convnext").state_dict()
        path = save(other, tmp_path / "a.pth")
        pattern = (
            r"a.pth' does not hold the weights of ResNet: .* all of its \d+ tensors"
        )
        with pytest.raises(ValueError, match=pattern):
            load_frozen_model("timm:test_resnet", weights=str(path))

    def test_other_shapes(self, tmp_path: Path) -> None:
        state = timm.create_model("test_resnet").state_dict()
        state["conv1.0.weight"] = state["conv1.0.weight"][:, :1]
        path = save(state, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="in their shapes"):
            load_frozen_model("timm:test_resnet", weights=str(path))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no weight file '.*gone\.pth'"):
            load_frozen_model("timm:test_resnet", weights=str(tmp_path / "gone.pth"))

    def test_of_no_timm_model(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        with pytest.raises(ValueError, match="weights belong to a timm model"):
            load_frozen_model(source, weights="a.pth")
        with pytest.raises(ValueError, match="that is not untrained"):
            load_frozen_model("timm:test_resnet", weights="a.pth", untrained=True)


class TestErrors:
    def test_unknown_timm_name(self) -> None:
        with pytest.raises(FileNotFoundError, match="knows no model 'no_such_net'"):
            load_frozen_model("timm:no_such_net", untrained=True)

    def test_timm_has_no_weights(self) -> None:
        name = "resnetv2_50d"  # without pretrained weights in timm
        assert not timm.get_pretrained_cfg(name).has_weights  # type: ignore[union-attr]
        with pytest.raises(FileNotFoundError, match="of your own give its path"):
            load_frozen_model(f"timm:{name}")

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
            load_frozen_model(str(tmp_path / "gone"))

    def test_sha256__of_file_or_of_tensors(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        digest = load_frozen_model(source).origin.sha256
        assert len(digest) == 64 and load_frozen_model(source).origin.sha256 == digest
        write_model(tmp_path / "model", num_queries=3)
        assert load_frozen_model(source).origin.sha256 != digest


class TestNames:
    @pytest.mark.parametrize(
        ("source", "name"),
        [
            ("runs/mine/model", "mine"),
            ("runs/mine/checkpoints/last.ckpt", "last"),
            ("x/mae_pretrain.pth", "mae_pretrain"),
            ("stellar-b16", "stellar-b16"),
            ("microsoft/STELLAR", "STELLAR"),
            ("timm:resnet50", "timm:resnet50"),
            ("moco/v2.pth.tar", "v2.pth"),
        ],
    )
    def test_short_name(self, source: str, name: str) -> None:
        assert short_name(source) == name

    def test_load__as_the_paper_calls_a_published_file(self, tmp_path: Path) -> None:
        vit = timm_vit().state_dict()
        mae = vit | {"decoder_pred.bias": torch.zeros(1)}
        name, heads = "mae_pretrain_vit_base.pth", {"num_heads": 3}
        path = str(save(mae, tmp_path / name))
        loaded = load_frozen_model(path, model_kwargs=heads)
        assert loaded.origin.name == "MAE ViT-B"
        loaded = load_frozen_model(path, name="mine", model_kwargs=heads)
        assert loaded.origin.name == "mine"
        # Of no method: the name of a file alone tells nothing.
        save(vit, tmp_path / name)
        loaded = load_frozen_model(path, model_kwargs=heads)
        assert loaded.origin.name == "mae_pretrain_vit_base"

    def test_load__of_the_model_or_as_given(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "mine" / "model")
        assert load_frozen_model(source).origin.name == "mine"
        given = load_frozen_model(source, untrained=True, name="ours")
        assert given.origin.name == "ours (untrained)"
        model = timm.create_model("test_resnet", num_classes=0)
        path = save(model.state_dict(), tmp_path / "v2.safetensors")
        loaded = load_frozen_model("timm:test_resnet", weights=str(path))
        assert loaded.origin.name == "v2"


class TestLoadLike:
    @pytest.mark.parametrize("seed", [None, 4])
    def test_trained_or_random_as_the_first(
        self, tmp_path: Path, seed: int | None
    ) -> None:
        first = load_frozen_model(
            write_model(tmp_path / "mine"), untrained=seed is not None, seed=seed or 0
        )
        source = write_model(tmp_path / "six", num_queries=6)
        other = load_like(first, source)
        assert (other.num_queries, other.origin.seed) == (6, seed)
        same = load_frozen_model(source, untrained=seed is not None, seed=seed or 0)
        assert other.origin == same.origin
        expected = same.state_dict()
        assert all(v.equal(expected[k]) for k, v in other.state_dict().items())


class TestLoadStellar:
    def test_trained(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        stellar = load_stellar(load_frozen_model(source))
        expected = Stellar.from_pretrained(source).state_dict()
        assert all(v.equal(expected[k]) for k, v in stellar.state_dict().items())
        assert not any(p.requires_grad for p in stellar.parameters())

    @pytest.mark.parametrize("untrained", [False, True])
    def test_with_the_encoder_of_the_run(self, tmp_path: Path, untrained: bool) -> None:
        source = write_model(tmp_path / "model")
        given = {"img_size": 64}
        frozen = load_frozen_model(
            source, untrained=untrained, seed=4, model_kwargs=given
        )
        images = torch.rand(2, 3, 64, 64)
        stellar = load_stellar(frozen)
        assert stellar.encoder is frozen.backbone
        seen = frozen(images)
        expected = stellar.decode(seen.lowrank, seen.grid_size).clamp(0, 1)
        assert stellar.reconstruct(frozen.normalize(images)).equal(expected)
        again = load_stellar(frozen)
        assert again.reconstruct(frozen.normalize(images)).equal(expected)


class TestLoadUntrained:
    def test_architecture_is_that_of_the_model_with_its_arguments(
        self, tmp_path: Path
    ) -> None:
        source = write_model(tmp_path / "model")
        given = {"img_size": 64}
        trained = load_frozen_model(source, model_kwargs=given)
        untrained = load_untrained(trained, seed=4)
        as_named = load_frozen_model(source, untrained=True, seed=4, model_kwargs=given)
        backbones = trained.backbone, untrained.backbone, as_named.backbone
        assert len({architecture_sha256(backbone) for backbone in backbones}) == 1
        plain = load_frozen_model(source, untrained=True).backbone
        assert architecture_sha256(plain) != architecture_sha256(trained.backbone)
        expected = as_named.state_dict()
        assert all(v.equal(expected[k]) for k, v in untrained.state_dict().items())
        whole = [load_stellar(model) for model in (trained, untrained, as_named)]
        assert len({architecture_sha256(stellar) for stellar in whole}) == 1
        ours, named = (stellar.state_dict() for stellar in whole[1:])
        assert all(v.equal(named[k]) for k, v in ours.items())

    def test_only_of_stellar(self) -> None:
        frozen = load_frozen_model("timm:test_resnet", untrained=True)
        with pytest.raises(ValueError, match=r"needs a STELLAR model .* is pooled by"):
            load_stellar(frozen)
