from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from stellar_plugin import Stellar
from stellar_plugin.checkpoints import create_encoder
from stellar_plugin.checkpoints.export import to_timm
from tests import reference
from tests.checkpoint_files import timm_vit

# Parameters of the plain ViT of timm without head, from its own model of that size.
SIZES = {
    "tiny_patch16_224": (192, 12, 3),
    "small_patch16_224": (384, 12, 6),
    "base_patch16_224": (768, 12, 12),
    "large_patch16_224": (1024, 24, 16),
    "huge_patch14_224": (1280, 32, 16),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_create_model__parameters_of_timm_plus_queries(size: str) -> None:
    with torch.device("meta"):
        plain = timm.create_model(f"vit_{size}", num_classes=0)
        ours = timm.create_model(f"stellar_vit_{size}")
    width, depth, heads = SIZES[size]
    count = sum(p.numel() for p in plain.parameters())
    # 16 queries more, and no position of the CLS token
    expected = count + 16 * width - width
    assert sum(p.numel() for p in ours.parameters()) == expected
    assert (ours.embed_dim, len(ours.blocks)) == (width, depth)
    assert ours.blocks[0].attn.num_heads == heads
    assert ours.num_prefix_tokens == 17


def test_create_model__features_only() -> None:
    model = timm.create_model(
        "stellar_vit_tiny_patch16_224", features_only=True, img_size=64
    )
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 4, 4)] * 3


NAME = "stellar_vit_tiny_patch16_224"
FILES = ("timm.safetensors", "model.safetensors", "model.pth")
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "reg_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for images of 64 px: a folder, and its encoder by timm's names."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    model = Stellar(NAME, num_queries=4, **sizes, **decoder)
    torch.nn.init.normal_(model.encoder.vit.pos_embed)
    torch.nn.init.normal_(model.encoder.vit.norm.weight)
    model.save_pretrained(folder)
    save_file(to_timm(model.encoder)[0], folder / "timm.safetensors")
    torch.save({"state_dict": model.state_dict()}, folder / "model.pth")
    return folder


def create(file: Path, **kwargs: Any) -> torch.nn.Module:
    overlay = {"file": str(file)}
    model = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs}
    )
    return model.eval()


class TestPretrained:
    @pytest.mark.parametrize(
        "name", ["timm.safetensors", "model.safetensors", "model.pth"]
    )
    @pytest.mark.parametrize("size", [(64, 64), (160, 160), (32, 32), (48, 80)])
    @pytest.mark.slow
    def test_img_size(self, folder: Path, name: str, size: tuple[int, int]) -> None:
        """As the encoder, which resamples positions without antialiasing."""
        images = torch.randn(2, 3, *size)
        expected = create_encoder(folder).forward_features(images)
        torch.testing.assert_close(
            create(folder / name, img_size=size).forward_features(images), expected
        )
        resized = create(folder / name, img_size=64)
        resized.set_input_size(size)
        torch.testing.assert_close(resized.forward_features(images), expected)
        # One model for all sizes.
        model = create(folder / name, img_size=64, dynamic_img_size=True)
        torch.testing.assert_close(model.forward_features(images), expected)

    def test_as_many_patches_of_another_shape(self, folder: Path) -> None:
        """The grid that pretrained_cfg tells is that of the weights."""
        images = torch.randn(1, 3, 32, 128)
        overlay = {"file": str(folder / "timm.safetensors"), "input_size": (3, 64, 64)}
        kwargs = {"img_size": (32, 128), "pretrained_cfg_overlay": overlay}
        model = timm.create_model(NAME, pretrained=True, **SMALL, **kwargs).eval()
        torch.testing.assert_close(
            model.forward_features(images),
            create_encoder(folder).forward_features(images),
        )
        # Its own weights are taken as they are.
        positions = model.pos_embed.clone()
        model.load_state_dict(model.state_dict())
        assert model.pos_embed.equal(positions)

    def test_checkpoint_path(self, folder: Path) -> None:
        images = torch.randn(1, 3, 48, 80)
        for name in FILES:
            model = timm.create_model(
                NAME, checkpoint_path=str(folder / name), img_size=(48, 80), **SMALL
            )
            torch.testing.assert_close(
                model.eval().forward_features(images),
                create_encoder(folder).forward_features(images),
            )

    def test_other_names(self, tmp_path: Path) -> None:
        save_file(reference.weights(), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"missing: cls_token.*`stellar convert`"):
            create(tmp_path / "a.safetensors")

    def test_features_only(self, folder: Path) -> None:
        images = torch.randn(1, 3, 96, 96)
        model = create(
            folder / "timm.safetensors",
            img_size=96,
            features_only=True,
            out_indices=(0, 1),
        )
        expected = create(folder / "timm.safetensors", img_size=96)
        blocks = expected.forward_intermediates(images, [0, 1], intermediates_only=True)
        for features, block in zip(model(images), blocks, strict=True):
            torch.testing.assert_close(features, block)

    def test_global_pool(self, folder: Path) -> None:
        """The average of the patches' features, as everywhere here."""
        images = torch.randn(2, 3, 64, 64)
        file = folder / "timm.safetensors"
        encoded = create_encoder(folder)(images)
        pooled = create(file, img_size=64, global_pool="avg")(images)
        torch.testing.assert_close(pooled, encoded.dense.mean(1))
        torch.testing.assert_close(create(file, img_size=64)(images), encoded.cls)

    def test_num_classes_and_in_chans(self, folder: Path) -> None:
        """A fresh classifier; three channels summed into one."""
        file = folder / "timm.safetensors"
        model = create(file, img_size=64, num_classes=10, in_chans=1)
        assert model.head.weight.shape == (10, 24)
        grey = torch.randn(1, 1, 64, 64)
        torch.testing.assert_close(
            model.forward_features(grey),
            create_encoder(folder).forward_features(grey.expand(-1, 3, -1, -1)),
        )
        save_file(model.state_dict(), folder / "tuned.safetensors")
        tuned = timm.create_model(
            NAME,
            checkpoint_path=str(folder / "tuned.safetensors"),
            **{**SMALL, "img_size": 64, "num_classes": 10, "in_chans": 1},
        )
        torch.testing.assert_close(tuned.eval()(grey), model(grey))

    @pytest.mark.parametrize("num_classes", [0, 10])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"reg_tokens": 3}, r"reg_token \(1, 4, 24\) instead of \(1, 3, 24\)"),
            ({"reg_tokens": 0}, "unexpected: reg_token"),
            ({"depth": 1}, r"unexpected: blocks\.1\."),
            ({"depth": 3}, r"missing: blocks\.2\."),
            ({"class_token": False, "global_pool": ""}, "unexpected: cls_token"),
            ({"patch_size": 8}, "patches of 16 x 16 px, and .* 8 x 8: .* patch_size"),
            ({"num_heads": 6}, r"timm\.safetensors' .* num_heads=3, and 6 heads"),
        ],
    )
    def test_another_model(
        self, folder: Path, num_classes: int, change: dict[str, Any], message: str
    ) -> None:
        kwargs = {"img_size": 64, "num_classes": num_classes, **change}
        with pytest.raises(ValueError, match=message):
            create(folder / "timm.safetensors", **kwargs)

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            (None, FileNotFoundError, "do not exist: name a file by pretrained_cfg"),
            ("version https://git-lfs.github.com", ValueError, "pointer of git-lfs"),
            ("abc", ValueError, "has 3 bytes"),
        ],
    )
    def test_no_weights(
        self,
        content: str | None,
        error: type[Exception],
        message: str,
        tmp_path: Path,
    ) -> None:
        if content:
            (tmp_path / "a.safetensors").write_text(content)
        with pytest.raises(error, match=rf"a\.safetensors' .*{message}"):
            create(tmp_path / "a.safetensors")

    def test_exported__tells_its_heads(self, folder: Path, tmp_path: Path) -> None:
        state, metadata = to_timm(create_encoder(folder))
        save_file(state, tmp_path / "a.safetensors", metadata)
        assert create(tmp_path / "a.safetensors", img_size=64).pos_embed.shape[1] == 16
        with pytest.raises(ValueError, match="trained with num_heads=3, and 4 heads"):
            create(tmp_path / "a.safetensors", img_size=64, num_heads=4)

    def test_plain_vit(self, tmp_path: Path) -> None:
        save_file(timm_vit().state_dict(), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"position table of 17 rows"):
            create(tmp_path / "a.safetensors", img_size=64)
