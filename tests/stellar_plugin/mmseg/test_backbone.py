from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import create_encoder, files
from stellar_plugin.mmseg import StellarViT, pretrained
from stellar_plugin.mmseg.pretrained import _cut
from tests import published_vits
from tests.checkpoint_files import save, timm_vit, write_hub_cache
from tests.stellar_plugin.mmseg.mmseg_sets import (
    MODEL_NAME,
    NUM_QUERIES,
    VIT,
    write_checkpoint,
)


def build(**kwargs: object) -> StellarViT:
    torch.manual_seed(0)
    return StellarViT(MODEL_NAME, **{"num_queries": NUM_QUERIES, **VIT, **kwargs})


def init_cfg(path: Path) -> dict[str, object]:
    return {"type": "Pretrained", "checkpoint": str(path)}


class TestWeightsOfTimm:
    """As `stellar evaluate` reads them, also where nothing tells how."""

    SIZES = (("img_size", (32, 64)), ("embed_dim", 192), ("depth", 1))

    def _write(self, folder: Path) -> tuple[Path, torch.nn.Module]:
        vit = timm_vit(**dict(self.SIZES), dynamic_img_size=True)
        return save(vit.state_dict(), folder / "a.pth"), vit

    def _assert_as_timm(self, model: StellarViT, vit: torch.nn.Module) -> None:
        for size in ((32, 64), (48, 48), (96, 128)):
            images = torch.randn(2, 3, *size)
            with torch.no_grad():
                tokens = vit.forward_features(images)[:, 1:]
                (features,) = model(images)
            found = features.flatten(2).mT
            torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)

    def test_built_of_the_file(self, tmp_path: Path) -> None:
        path, vit = self._write(tmp_path)
        model = StellarViT(img_size=(32, 64), init_cfg=init_cfg(path))
        model.init_weights()
        assert model.weights_facts["not told, assumed"].startswith("pos_antialias=True")
        self._assert_as_timm(model.eval(), vit)

    def test_built_by_name__says_how(self, tmp_path: Path) -> None:
        path, vit = self._write(tmp_path)
        arguments = {"num_queries": 0, "init_cfg": init_cfg(path), **dict(self.SIZES)}
        with pytest.raises(ValueError, match=r"does not tell: set pos_antialias=True"):
            StellarViT("vit_tiny_patch16_224", **arguments).init_weights()
        arguments["pos_antialias"] = True
        model = StellarViT("vit_tiny_patch16_224", **arguments)
        model.init_weights()
        self._assert_as_timm(model.eval(), vit)


@pytest.mark.parametrize("name", ["msn", "siamese_im", "semmae", "aim"])
def test_published_vits__built_of_the_file(name: str, tmp_path: Path) -> None:
    content = getattr(published_vits, name)(depth=1)
    path = save(content, tmp_path / "weights.pth")
    model = StellarViT(init_cfg=init_cfg(path), num_heads=2, out_indices=-1)
    model.init_weights()
    encoder = create_encoder(path, num_heads=2)
    images = torch.randn(1, 3, 5 * encoder.patch_size, 7 * encoder.patch_size)
    with torch.no_grad():
        (features,) = model(images)
        expected = encoder(images).dense.mT.unflatten(2, (5, 7))
    assert features.equal(expected)


def test_weights_of_dinov3__built_of_the_file(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_dinov3_qkvb"
    vit = timm.create_model(name, depth=2, num_classes=0).eval()
    path = save(vit.state_dict(), tmp_path / "dinov3.pth")
    backbone = StellarViT(init_cfg=init_cfg(path), out_indices=(0, 1))
    backbone.init_weights()
    assert backbone.settings()["rotation"].startswith("RotaryEmbeddingDinoV3(")
    images = torch.randn(1, 3, 32, 80)
    with torch.no_grad():
        _, expected = vit.forward_intermediates(images, norm=True)
        for ours, theirs in zip(backbone(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


class TestStellarViT:
    @pytest.mark.parametrize(
        ("size", "grid"),
        [
            ((64, 64), (4, 4)),
            ((32, 80), (2, 5)),
            ((50, 33), (4, 3)),
            ((1, 17), (1, 2)),
        ],
    )
    def test_forward__shape(self, size: tuple[int, int], grid: tuple[int, int]) -> None:
        (features,) = build()(torch.rand(2, 3, *size))
        assert features.shape == (2, VIT["embed_dim"], *grid)

    @pytest.mark.parametrize("feature", ["dense", "lowrank", "localization"])
    def test_forward__is_the_encoders_feature(self, feature: str) -> None:
        model = build(feature=feature).eval()
        images = torch.rand(2, 3, 48, 64)
        expected = getattr(model.encoder(images), feature)  # (B, 3 * 4, C)
        (features,) = model(images)
        for row in range(3):
            for column in range(4):
                torch.testing.assert_close(
                    features[:, :, row, column], expected[:, 4 * row + column]
                )

    def test_forward__localization_sums_to_one_at_any_size(self) -> None:
        (maps,) = build(feature="localization")(torch.rand(1, 3, 70, 41))
        assert maps.shape == (1, NUM_QUERIES, 5, 3)
        torch.testing.assert_close(maps.sum(1), torch.ones(1, 5, 3))

    def test_forward__several_blocks(self) -> None:
        model = build(depth=4, out_indices=(0, 2, -1)).eval()
        images = torch.rand(1, 3, 64, 64)
        outputs = model(images)
        expected = model.encoder.forward_intermediates(images, (0, 2, 3))
        assert model.out_indices == (0, 2, 3)
        for output, result in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output.flatten(2).mT, result.dense)
        torch.testing.assert_close(
            outputs[-1].flatten(2).mT, model.encoder(images).dense
        )

    @pytest.mark.parametrize("feature", ["dense", "lowrank", "localization"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_forward__autocast(self, feature: str, dtype: torch.dtype) -> None:
        model = build(feature=feature).train()
        images = torch.rand(2, 3, 48, 80)
        with torch.autocast("cpu", dtype):
            expected = getattr(model.encoder(images), feature)
            (features,) = model(images)
        assert features.dtype == expected.dtype
        assert features.flatten(2).mT.equal(expected)

    def test_train__frozen_stays_in_eval_mode(self) -> None:
        model = build().train()
        assert model.training
        assert not any(module.training for module in model.encoder.modules())

    def test_train__not_frozen(self) -> None:
        model = build(frozen=False)
        assert all(module.training for module in model.train().modules())
        assert not any(module.training for module in model.eval().modules())

    def test_forward__frozen_has_no_gradient(self) -> None:
        model = build()
        (features,) = model(torch.rand(1, 3, 64, 64, requires_grad=True))
        assert not features.requires_grad
        assert not any(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("feature", ["dense", "lowrank", "localization"])
    @pytest.mark.parametrize("out_indices", [(-1,), (0,), (0, 1)])
    def test_forward__every_trainable_parameter_has_a_gradient(
        self, feature: str, out_indices: tuple[int, ...]
    ) -> None:
        model = build(frozen=False, feature=feature, out_indices=out_indices, depth=3)
        sum(f.square().sum() for f in model(torch.rand(1, 3, 64, 50))).backward()
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert "encoder.vit.patch_embed.proj.weight" in trainable
        assert [n for n, p in trainable.items() if p.grad is None] == []

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"feature": "cls"}, "feature must be one of"),
            ({"feature": "lowrank", "num_queries": 0}, "needs num_queries >= 1"),
            ({"feature": "lowrank", "localization": False}, "with reconstruction"),
            ({"out_indices": (2,)}, r"ascending block numbers in \[-2, 1\]"),
            ({"out_indices": (1, 0)}, "ascending"),
            ({"out_indices": (-1, 1)}, "ascending"),
            ({"out_indices": ()}, "ascending"),
            ({"pretrained": "x.pth"}, "takes no 'pretrained'"),
            ({"init_cfg": {"type": "TruncNormal"}}, "init_cfg must be None or"),
            (
                {"init_cfg": {"type": "Pretrained", "checkpoint": None}},
                "names no checkpoint",
            ),
        ],
    )
    def test_bad_input(self, kwargs: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build(**kwargs)


class TestInitWeights:
    def test_loads_the_encoder(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        expected = Stellar.from_pretrained(tmp_path)
        model = build(init_cfg=init_cfg(tmp_path), feature="lowrank")
        images = torch.rand(1, 3, 64, 64)
        assert not model(images)[0].flatten(2).mT.allclose(expected(images).lowrank)
        model.init_weights()
        torch.testing.assert_close(
            model(images)[0].flatten(2).mT, expected(images).lowrank
        )

    def test_missing_checkpoint(self, tmp_path: Path) -> None:
        model = build(init_cfg=init_cfg(tmp_path / "nowhere"))
        with pytest.raises(
            FileNotFoundError, match=r"nowhere.*model\.backbone\.init_cfg\.checkpoint="
        ):
            model.init_weights()

    def test_checkpoint_of_a_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class State:
            """What mmengine writes beside the weights, of no package's safe list."""

        State.__module__, State.__qualname__ = "mmengine.made_up", "State"
        monkeypatch.setitem(sys.modules, State.__module__, SimpleNamespace(State=State))
        content = {"state_dict": {}, "message_hub": State()}
        torch.save(content, tmp_path / "iter_4.pth")
        model = build(init_cfg=init_cfg(tmp_path / "iter_4.pth"))
        with pytest.raises(
            ValueError, match=r"iter_4\.pth' is .* run .*load_from=PATH"
        ):
            model.init_weights()

    def test_checkpoint_of_another_size(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        model = build(init_cfg=init_cfg(tmp_path), embed_dim=24)
        with pytest.raises(ValueError, match=r"of another shape: .*vit\.cls_token"):
            model.init_weights()

    def test_constructor_needs_no_file(self, tmp_path: Path) -> None:
        trained = build(init_cfg=init_cfg(write_checkpoint(tmp_path / "a")))
        trained.init_weights()
        tested = build(init_cfg=init_cfg(tmp_path / "nowhere"))
        tested.load_state_dict(trained.state_dict())
        images = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(tested(images)[0], trained(images)[0])
        assert not build()(images)[0].allclose(trained(images)[0])

    @pytest.mark.parametrize("where", ["folder", "file", "hub"])
    def test_sizes_of_the_checkpoint(
        self, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A width that says nothing of its heads: config.json does."""
        write_checkpoint(tmp_path, num_heads=4, depth=3, patch_size=8, num_queries=2)
        source = {"folder": tmp_path, "file": tmp_path / "model.safetensors"}
        monkeypatch.setattr(files, "hf_hub_download", lambda _, name: tmp_path / name)
        cfg = init_cfg(source.get(where, Path("me/mine")))
        model = StellarViT(init_cfg=cfg, feature="lowrank")
        model.init_weights()
        expected = Stellar.from_pretrained(tmp_path)
        assert model.encoder.vit.blocks[0].attn.num_heads == 4
        images = torch.rand(1, 3, 48, 64)
        torch.testing.assert_close(
            model(images)[0].flatten(2).mT, expected(images).lowrank
        )
        # What is given holds, and is compared with the weights.
        model = StellarViT(num_queries=3, init_cfg=cfg)
        with pytest.raises(ValueError, match=r"num_queries=3 .*: 2.*model\.backbone\."):
            model.init_weights()

    def test_timms_weights_from_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vit = timm.create_model("test_vit")
        write_hub_cache("test_vit", vit.state_dict(), tmp_path / "hub", monkeypatch)
        model = StellarViT(init_cfg=init_cfg(Path("timm:test_vit")), pos_antialias=True)
        model.init_weights()
        images = torch.rand(1, 3, 160, 160)
        torch.testing.assert_close(
            model(images)[0].flatten(2).mT, vit.eval().forward_features(images)[:, 1:]
        )

    def test_sizes_of_any_layout(self, tmp_path: Path) -> None:
        vit = timm_vit(norm_layer=partial(nn.LayerNorm, eps=1e-6), depth=3)
        torch.save(vit.state_dict(), tmp_path / "a.pth")
        cfg = init_cfg(tmp_path / "a.pth")
        model = StellarViT(init_cfg=cfg, num_heads=3)
        model.init_weights()
        images = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(
            model(images)[0].flatten(2).mT, vit.eval().forward_features(images)[:, 1:]
        )
        # The width tells no number of heads.
        with pytest.raises(ValueError, match=r"number of attention heads .*num_heads"):
            StellarViT(init_cfg=cfg).init_weights()

    @pytest.mark.parametrize("feature", ["dense", "lowrank"])
    def test_queries_that_are_not_there(self, feature: str, tmp_path: Path) -> None:
        torch.save(timm_vit().state_dict(), tmp_path / "a.pth")
        kwargs = {"norm_eps": 1e-6, "pos_antialias": True, "feature": feature}
        kwargs["init_cfg"] = init_cfg(tmp_path / "a.pth")
        model = build(**kwargs)
        with pytest.raises(ValueError, match=r"a\.pth' has no .*vit\.reg_token.*=0"):
            model.init_weights()
        # To be trained they may be fresh.
        build(frozen=False, **kwargs).init_weights()

    def test_random_weights__said(self, log: list[str]) -> None:
        build().init_weights()
        assert any("its weights are random" in line for line in log)

    def test_other_mean__said(self, tmp_path: Path, log: list[str]) -> None:
        Stellar(
            MODEL_NAME,
            num_queries=NUM_QUERIES,
            decoder_dim=16,
            decoder_depth=1,
            decoder_num_heads=2,
            mean=(0.5, 0.5, 0.5),
            **VIT,
        ).save_pretrained(tmp_path)
        build(init_cfg=init_cfg(tmp_path)).init_weights()
        warnings = [line for line in log if "is not ImageNet's" in line]
        assert len(warnings) == 1
        assert (
            "model.data_preprocessor.mean must be [127.5, 127.5, 127.5]" in warnings[0]
        )

    @pytest.fixture
    def log(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        lines: list[str] = []
        monkeypatch.setattr(
            pretrained, "print_log", lambda text, **_: lines.append(text)
        )
        return lines


class TestCut:
    def test_linear_ramp__cells_lie_where_the_image_is(self) -> None:
        # 5 cells of 16 px, 72 px of them image: cell j is centred at (j + 0.5) 72 / 5.
        ramp = (torch.arange(5) + 0.5) * 16
        maps = ramp.expand(1, 1, 3, 5)
        expected = (torch.arange(5) + 0.5) * 72 / 5
        expected[0] = 8.0  # left of the first centre nothing is known
        torch.testing.assert_close(_cut(maps, 1.0, 72 / 80)[0, 0, 1], expected)
        turned = _cut(maps.mT, 72 / 80, 1.0)
        torch.testing.assert_close(turned[0, 0, :, 1], expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision__cells_do_not_move(self, dtype: torch.dtype) -> None:
        ramp = ((torch.arange(37) + 0.5) / 37).expand(1, 1, 37, 37)
        expected = _cut(ramp, 500 / 592, 590 / 592)
        with torch.autocast("cpu", dtype):
            cut = _cut(ramp, 500 / 592, 590 / 592)
        torch.testing.assert_close(cut, expected, rtol=0, atol=0)
        cut = _cut(ramp.to(dtype), 500 / 592, 590 / 592)
        assert cut.dtype == dtype
        assert (cut.float() - expected).abs().max() <= torch.finfo(dtype).eps / 2

    def test_everything__unchanged(self) -> None:
        maps = torch.rand(2, 3, 4, 5)
        torch.testing.assert_close(_cut(maps, 1.0, 1.0), maps)
