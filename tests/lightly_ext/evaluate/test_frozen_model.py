from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightly_ext.evaluate.frozen_model import pool, select_tokens
from lightly_ext.evaluate.loading import (
    load_frozen_model,
    load_untrained,
)
from stellar_plugin import Stellar
from stellar_plugin import encoder as encoder_module
from stellar_plugin.checkpoints.export import to_timm
from stellar_plugin.encoder import Factorization
from stellar_plugin.hashes import architecture_sha256
from tests.checkpoint_files import (
    FILES,
    NAME,
    SIZES,
    assert_same_tokens,
    prefixed,
    save,
    timm_vit,
    transformers_names,
)
from tests.lightly_ext.evaluate.small import EMBED_DIM, NUM_QUERIES, write_model

SWIN = "swin_tiny_patch4_window7_224"
WIDTH = 192  # of which the number of heads is known: 3


def bytes_of(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def small_timm(monkeypatch: pytest.MonkeyPatch, name: str, **sizes: Any) -> None:
    """Makes timm build `name` with other sizes."""
    create = timm.create_model

    def create_model(asked: str, **kwargs: Any) -> nn.Module:
        return create(asked, **{**(sizes if asked == name else {}), **kwargs})

    monkeypatch.setattr(timm, "create_model", create_model)
    # What was remembered of the model is of another one.
    monkeypatch.setattr(encoder_module, "_kind", encoder_module._kind.__wrapped__)


def write_vit(path: Path, layout: str, **sizes: Any) -> str:
    """A file in the layout of another method; returns its path."""
    heads = 12 if layout == "MoCo v3" else 3
    sizes = {"embed_dim": WIDTH, "num_heads": heads, "depth": 1, **sizes}
    vit = timm_vit(sines=layout == "MAE or SemMAE", **sizes)
    return str(save(FILES[layout](vit.state_dict()), path / "weights.pth"))


class TestForward:
    def test_stellar__tokens_of_the_model(self, tmp_path: Path) -> None:
        source = write_model(tmp_path / "model")
        frozen, images = load_frozen_model(source), bytes_of(2, 3, 32, 32)
        result = frozen(images)
        assert (frozen.origin.method, frozen.num_queries) == ("STELLAR", NUM_QUERIES)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        normalised = (images / 255 - mean) / std
        with torch.no_grad():
            expected = Stellar.from_pretrained(source).encoder(normalised)
        torch.testing.assert_close(result.sparse, expected.sparse)
        torch.testing.assert_close(result.localization, expected.localization)
        torch.testing.assert_close(frozen(images / 255).sparse, result.sparse)

    @pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])
    def test_timm__equals_timm(self, name: str) -> None:
        self._assert_as_timm(name, 64)

    def test_swin__equals_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
        small_timm(monkeypatch, SWIN, img_size=56, **sizes)
        self._assert_as_timm(SWIN, 56)

    def _assert_as_timm(self, name: str, size: int) -> None:
        frozen = load_frozen_model(f"timm:{name}", untrained=True, seed=3)
        torch.manual_seed(3)
        model: Any = timm.create_model(name, num_classes=0).eval()
        images = bytes_of(2, 3, size, size)
        result = frozen(images)
        cfg = model.pretrained_cfg
        mean, std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        with torch.no_grad():
            features = model.forward_features((images / 255 - mean) / std)
            pooled = model.forward_head(features, pre_logits=True)
        tight = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(result.cls, pooled, **tight)
        torch.testing.assert_close(frozen.pooled(images, "cls"), pooled, **tight)
        last = features if name == SWIN else features.permute(0, 2, 3, 1)
        assert result.grid_size == tuple(last.shape[1:3])
        torch.testing.assert_close(result.dense, last.flatten(1, 2), **tight)
        means = last.mean(dim=(1, 2))
        torch.testing.assert_close(frozen.pooled(images, "dense"), means, **tight)
        assert result.sparse.shape[1] == 0 and frozen.num_queries == 0

    @pytest.mark.parametrize("size", [(160, 160), (96, 96), (64, 192), (208, 176)])
    def test_plain_vit__equals_timm(
        self, tmp_path: Path, size: tuple[int, int]
    ) -> None:
        torch.manual_seed(1)
        model: Any = timm.create_model(
            "test_vit", num_classes=0, dynamic_img_size=True
        ).eval()
        torch.nn.init.normal_(model.pos_embed)
        weights = save(model.state_dict(), tmp_path / "a.pth")
        frozen = load_frozen_model("timm:test_vit", weights=str(weights))
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            tokens = model.forward_features((images - 0.5) / 0.5)
        result = frozen(images)
        torch.testing.assert_close(result.cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.dense, tokens[:, 1:], rtol=1e-4, atol=1e-5)
        assert result.grid_size == (size[0] // 16, size[1] // 16)

    def test_plain_vit__untrained_equals_timm(self) -> None:
        frozen = load_frozen_model("timm:test_vit", untrained=True, seed=3)
        model: Any = timm.create_model(
            "test_vit", num_classes=0, dynamic_img_size=True
        ).eval()
        state = {
            name.removeprefix("backbone.vit."): tensor
            for name, tensor in frozen.state_dict().items()
        }
        cls_position = torch.zeros(1, 1, 64)
        state["pos_embed"] = torch.cat([cls_position, state["pos_embed"]], dim=1)
        model.load_state_dict(state)
        images = torch.rand(2, 3, 64, 192)
        with torch.no_grad():
            tokens = model.forward_features((images - 0.5) / 0.5)
        torch.testing.assert_close(
            frozen(images).dense, tokens[:, 1:], rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("registers", [0, 4])
    def test_plain_vit__positions_as_the_file_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registers: int
    ) -> None:
        # DINOv2 with registers antialiases, MAE does not.
        small_timm(monkeypatch, NAME, **{**SIZES, "depth": 1, "reg_tokens": registers})
        kwargs = {"reg_tokens": registers, "no_embed_class": True}
        vit = timm_vit(sines=not registers, depth=1, **kwargs)
        state = dict(vit.state_dict())
        if registers:
            state["register_tokens"] = state.pop("reg_token")
        weights = save(state if registers else {"model": state}, tmp_path / "a.pth")
        frozen: Any = load_frozen_model(f"timm:{NAME}", weights=str(weights))
        method = "DINOv2" if registers else "MAE or SemMAE"
        assert frozen.origin.method == method
        assert frozen.backbone.pos_antialias == bool(registers)
        assert_same_tokens(frozen.backbone, vit)
        # The control beside it computes in the same way.
        control = load_untrained(frozen, seed=0)
        assert control.mean.equal(frozen.mean) and control.std.equal(frozen.std)
        backbones = frozen.backbone, control.backbone
        assert len({architecture_sha256(backbone) for backbone in backbones}) == 1

    def test_tokens_without_a_map(self) -> None:
        # A network of tokens that is no plain ViT: its grid follows the image.
        frozen = load_frozen_model("timm:mixer_s32_224", untrained=True)
        result = frozen(bytes_of(1, 3, 224, 224))
        assert result.grid_size == (7, 7) and result.dense.shape == (1, 49, 512)

    def test_frozen__evaluation_mode_and_no_gradients(self) -> None:
        frozen = load_frozen_model("timm:test_resnet", untrained=True)
        images = torch.rand(4, 3, 64, 64)
        before = frozen.train()(images).cls
        assert not any(m.training for m in frozen.modules())
        assert not any(p.requires_grad for p in frozen.parameters())
        assert before is not None and not before.requires_grad
        assert frozen(images).cls.equal(before)


class TestHas:
    """What a model has is what its checkpoint has."""

    @pytest.mark.parametrize("untrained", [False, True])
    @pytest.mark.parametrize("target", ["pixels", None])
    def test_model_of_this_package(
        self, tmp_path: Path, target: str | None, untrained: bool
    ) -> None:
        source = write_model(tmp_path / "model", target=target)
        frozen = load_frozen_model(source, untrained=untrained)
        assert frozen.has_decoder == frozen.has_localization == (target == "pixels")

    def test_encoder_in_timms_layout(self, tmp_path: Path) -> None:
        encoder = Stellar.from_pretrained(write_model(tmp_path / "model")).encoder
        state, metadata = to_timm(encoder)
        save_file(state, tmp_path / "timm.safetensors", metadata=metadata)
        frozen = load_frozen_model(str(tmp_path / "timm.safetensors"))
        assert frozen.num_queries == NUM_QUERIES
        assert not frozen.has_decoder and not frozen.has_localization
        images = bytes_of(1, 3, 32, 32)
        result = frozen(images)
        whole = load_frozen_model(str(tmp_path / "model"))
        assert result.sparse.equal(whole(images).sparse)
        with pytest.raises(ValueError, match="has no localization"):
            _ = result.localization

    def test_other_models(self, tmp_path: Path) -> None:
        for source in (write_vit(tmp_path, "MAE or SemMAE"), "patches"):
            frozen = load_frozen_model(source)
            assert not frozen.has_decoder and not frozen.has_localization


class TestNormalize:
    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
    def test_mean_std_and_interpolation_of_timm(self, name: str) -> None:
        frozen = load_frozen_model(f"timm:{name}", untrained=True)
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        origin = frozen.origin
        assert (origin.mean, origin.std) == (cfg.mean, cfg.std)
        assert origin.interpolation == cfg.interpolation
        images = bytes_of(1, 3, 4, 4)
        expected = torch.stack(
            [
                (images[:, c] / 255 - m) / s
                for c, (m, s) in enumerate(zip(cfg.mean, cfg.std, strict=True))
            ],
            dim=1,
        )
        torch.testing.assert_close(frozen.normalize(images), expected)

    def test_other_interpolation_and_mean_are_among_them(self) -> None:
        # Else the test above shows nothing.
        resnet = load_frozen_model("timm:test_resnet", untrained=True).origin
        efficientnet = load_frozen_model(
            "timm:test_efficientnet", untrained=True
        ).origin
        assert resnet.interpolation == "bilinear"
        assert efficientnet.interpolation == "bicubic"
        assert resnet.mean != efficientnet.mean


class TestAuto:
    @pytest.mark.parametrize(
        ("layout", "feature"),
        [
            ("MAE or SemMAE", "dense"),
            ("MAE or SemMAE, full", "dense"),
            ("DINO or iBOT", "cls"),
            ("MoCo v3", "cls"),
        ],
    )
    def test_layouts(self, tmp_path: Path, layout: str, feature: str) -> None:
        frozen = load_frozen_model(write_vit(tmp_path, layout))
        assert frozen.origin.method == layout.split(",")[0]
        assert frozen.resolve_feature("auto") == feature

    def test_i_jepa(self, tmp_path: Path) -> None:
        vit = timm_vit(class_token=False, embed_dim=WIDTH, depth=1)
        state = prefixed(vit.state_dict(), "module.")
        content = {"encoder": state, "target_encoder": state, "predictor": {}}
        path = save(content, tmp_path / "ijepa.pth.tar")
        frozen = load_frozen_model(str(path))
        assert frozen.resolve_feature("auto") == "dense"
        with pytest.raises(ValueError, match="has no CLS token: name dense features"):
            frozen.pooled(torch.zeros(1, 3, 64, 64), "cls")

    def test_dinov2(self, tmp_path: Path) -> None:
        vit = timm_vit(
            img_size=56, patch_size=14, init_values=1.0, embed_dim=WIDTH, depth=1
        )
        state = vit.state_dict() | {"mask_token": torch.zeros(1, WIDTH)}
        path = save(state, tmp_path / "dinov2.pth")
        frozen = load_frozen_model(str(path))
        assert frozen.resolve_feature("auto") == "cls+dense"
        assert frozen.pooled(torch.zeros(1, 3, 56, 56), "cls+dense").shape == (
            1,
            2 * WIDTH,
        )

    def test_stellar(self, tmp_path: Path) -> None:
        frozen = load_frozen_model(write_model(tmp_path / "model"))
        assert frozen.resolve_feature("auto") == "sparse"

    def test_not_a_vit(self) -> None:
        frozen = load_frozen_model("timm:test_resnet", untrained=True)
        assert frozen.resolve_feature("auto") == "cls"

    def test_mae_of_transformers(self, tmp_path: Path) -> None:
        state = timm_vit(embed_dim=WIDTH, depth=1).state_dict()
        state = prefixed(transformers_names(state, 4), "vit.")
        state["decoder.mask_token"] = torch.zeros(1, 1, 8)
        frozen = load_frozen_model(str(save(state, tmp_path / "model.safetensors")))
        assert frozen.resolve_feature("auto") == "dense"

    def test_classifier_in_the_wrapping_of_mae(self, tmp_path: Path) -> None:
        state = timm_vit(embed_dim=WIDTH, depth=1).state_dict()
        state["head.weight"] = torch.zeros(5, WIDTH)
        frozen = load_frozen_model(str(save({"model": state}, tmp_path / "deit.pth")))
        with pytest.raises(ValueError, match="read as a classifier"):
            frozen.resolve_feature("auto")

    @pytest.mark.parametrize("layout", ["timm", "transformers"])
    def test_a_method_that_weights_do_not_tell(
        self, tmp_path: Path, layout: str
    ) -> None:
        if layout == "timm":
            source = write_vit(tmp_path, "timm")
        else:
            state = timm_vit(embed_dim=WIDTH, depth=1).state_dict()
            path = tmp_path / "model.safetensors"
            source = str(save(transformers_names(state, 4), path))
        frozen = load_frozen_model(source)
        pattern = r"does not tell which method .*\(read as .*'auto' are not known: name"
        with pytest.raises(ValueError, match=pattern):
            frozen.resolve_feature("auto")
        assert frozen.resolve_feature("dense") == "dense"

    def test_resolve_feature__bad_names(self) -> None:
        frozen = load_frozen_model("timm:test_resnet", untrained=True)
        with pytest.raises(
            ValueError, match=r"must be 'auto' or one of sparse, .*'all'"
        ):
            frozen.resolve_feature("all")
        for feature in ("sparse", "lowrank"):
            pattern = f"has no latent queries, so no {feature} features"
            with pytest.raises(ValueError, match=pattern):
                frozen.resolve_feature(feature)


class TestPool:
    def test_pool__means_in_float32(self) -> None:
        tokens = torch.randn(2, 5, 8, dtype=torch.bfloat16)
        cls = torch.randn(2, 8, dtype=torch.bfloat16)
        result = Factorization(
            cls, tokens[:, :3], tokens, (1, 5), lambda dense, _: dense
        )
        both = pool(result, "cls+dense")
        assert both.dtype == torch.float32
        expected = torch.cat([cls.float(), tokens.float().mean(dim=1)], dim=1)
        assert both.equal(expected)
        assert pool(result, "sparse").equal(tokens[:, :3].float().mean(dim=1))

    def test_pool__lowrank(self, tmp_path: Path) -> None:
        frozen = load_frozen_model(write_model(tmp_path / "model"))
        images = bytes_of(2, 3, 32, 32)
        result = frozen(images)
        expected = (result.localization @ result.sparse).mean(dim=1)
        torch.testing.assert_close(frozen.pooled(images, "lowrank"), expected)
        assert select_tokens(result, "cls").shape == (2, 1, EMBED_DIM)


class TestRawPatches:
    def test_patches_mean_and_spread(self) -> None:
        frozen, images = load_frozen_model("patches:4"), bytes_of(2, 3, 8, 12)
        result = frozen(images)
        assert result.grid_size == (2, 3) and result.sparse.shape == (2, 0, 48)
        normalised = frozen.normalize(images).double()
        patches = [
            normalised[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            for row in range(2)
            for column in range(3)
        ]
        expected = torch.stack([patch.flatten(1) for patch in patches], dim=1)
        assert torch.equal(result.dense.double(), expected)
        assert result.cls is not None
        spread = expected.var(dim=1, correction=0).sqrt()
        pooled = torch.cat([expected.mean(dim=1), spread], dim=1)
        torch.testing.assert_close(result.cls.double(), pooled, rtol=0, atol=1e-6)
        auto = frozen.resolve_feature("auto")
        assert torch.equal(frozen.pooled(images, auto), result.cls)
        assert frozen.origin.sha256 == "no weights"

    def test_sizes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="no multiple of the patch size 16"):
            load_frozen_model("patches")(bytes_of(1, 3, 32, 40))
        with pytest.raises(ValueError, match="'patches:big' must be"):
            load_frozen_model("patches:big")
