from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from stellar_plugin import Factorization, StellarEncoder
from stellar_plugin.vit import resample_position
from tests import reference


def tiny(**kwargs) -> StellarEncoder:
    torch.manual_seed(0)
    settings = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_queries": 3}
    encoder = StellarEncoder("stellar_vit_tiny_patch16_224", **{**settings, **kwargs})
    return encoder.eval()


class TestStellarEncoder:
    @pytest.mark.parametrize("size", ["", "small.", "large.", "nonsquare."])
    def test_forward__reference_numbers(self, size: str) -> None:
        expected = reference.load("forward")
        encoder = reference.stellar().encoder
        with torch.no_grad():
            result = encoder(reference.normalized(expected[f"{size}image"]))
        prefix = size or "out."
        for ours, name in (
            (result.cls, "cls"),
            (result.sparse, "sparse"),
            (result.dense, "dense"),
            (result.localization, "spatial"),
        ):
            theirs = expected[prefix + name].view_as(ours)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        if not size:
            torch.testing.assert_close(
                result.lowrank, expected["out.lowrank"], rtol=0, atol=2e-5
            )

    def test_forward__is_timm_at_trained_size(self) -> None:
        encoder = tiny()
        images = torch.randn(2, 3, 64, 64)
        expected = encoder.vit.forward_features(images)
        result = encoder(images)
        torch.testing.assert_close(encoder.forward_features(images), expected)
        torch.testing.assert_close(result.cls, expected[:, 0])
        torch.testing.assert_close(result.sparse, expected[:, 1:4])
        torch.testing.assert_close(result.dense, expected[:, 4:])

    @pytest.mark.parametrize("height, width", [(64, 64), (32, 96), (80, 48)])
    def test_forward__keep_all_in_any_order_is_plain_forward(
        self, height: int, width: int
    ) -> None:
        encoder = tiny()
        images = torch.randn(2, 3, height, width)
        num_patches = height * width // 256
        keep = torch.stack([torch.randperm(num_patches) for _ in range(2)])
        plain, kept = encoder(images), encoder(images, keep)
        order = keep[..., None].expand(-1, -1, 48)
        torch.testing.assert_close(kept.sparse, plain.sparse, rtol=0, atol=2e-5)
        torch.testing.assert_close(
            kept.dense, plain.dense.gather(1, order), rtol=0, atol=2e-5
        )
        assert kept.grid_size == (height // 16, width // 16)

    def test_forward__hidden_patches_change_nothing(self) -> None:
        encoder = tiny()
        images = torch.randn(1, 3, 64, 64)
        keep = torch.tensor([[0, 5, 10]])
        changed = images.clone()
        changed[..., 48:, :] = 100.0  # last row of patches, all hidden
        torch.testing.assert_close(
            encoder(changed, keep).sparse, encoder(images, keep).sparse
        )

    def test_forward__hidden_patches_are_no_tokens(self) -> None:
        encoder = tiny()
        tokens = encoder.forward_features(
            torch.randn(2, 3, 64, 64), torch.tensor([[1, 2], [3, 4]])
        )
        assert tokens.shape == (2, 1 + 3 + 2, 48)

    def test_forward__permuted_queries_permute_tokens(self) -> None:
        # Queries carry no position.
        encoder = tiny()
        images = torch.randn(2, 3, 64, 64)
        before = encoder(images)
        order = torch.tensor([2, 0, 1])
        encoder.vit.reg_token.data = encoder.vit.reg_token.data[:, order]
        after = encoder(images)
        torch.testing.assert_close(after.sparse, before.sparse[:, order])
        torch.testing.assert_close(after.localization, before.localization[..., order])
        torch.testing.assert_close(after.lowrank, before.lowrank)

    @pytest.mark.parametrize(
        "shape, match",
        [
            ((1, 3, 60, 64), "60 x 64 is no multiple of the patch size 16; .* 64 x 64"),
            ((1, 1, 64, 64), "shape"),
            ((3, 64, 64), "shape"),
        ],
    )
    def test_forward__bad_image(self, shape: tuple[int, ...], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            tiny()(torch.randn(shape))

    def test_forward__every_parameter_has_gradient(self) -> None:
        encoder = tiny().train()
        result = encoder(torch.randn(2, 3, 64, 32))
        (result.lowrank.square().mean() + result.cls.square().mean()).backward()
        zero = [n for n, p in encoder.named_parameters() if not p.grad.abs().sum() > 0]
        assert zero == []

    def test_forward__bfloat16_autocast(self) -> None:
        encoder = tiny()
        images = torch.randn(2, 3, 64, 64)
        expected = encoder(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = encoder(images)
        sums = result.localization.float().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-2)
        error = (result.sparse - expected.sparse).norm() / expected.sparse.norm()
        assert error < 0.02

    def test_forward__grad_checkpointing_same_gradient(self) -> None:
        images = torch.randn(2, 3, 64, 64)
        gradients = []
        for enable in (False, True):
            encoder = tiny().train()
            encoder.set_grad_checkpointing(enable)
            encoder(images).lowrank.square().mean().backward()
            gradients.append(encoder.vit.blocks[0].attn.qkv.weight.grad)
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_localize__brute_force(self) -> None:
        encoder = tiny()
        dense, sparse = torch.randn(2, 5, 48), torch.randn(2, 3, 48)
        result = encoder.localize(dense, sparse)
        for b in range(2):
            for i in range(5):
                u = encoder.dense_proj(dense[b, i])
                scores = torch.stack(
                    [
                        F.cosine_similarity(u, encoder.sparse_proj(s), dim=0) / 0.06
                        for s in sparse[b]
                    ]
                )
                torch.testing.assert_close(
                    result[b, i], scores.softmax(0), rtol=0, atol=1e-5
                )

    def test_forward_intermediates__last_is_forward(self) -> None:
        encoder = tiny()
        images = torch.randn(1, 3, 32, 64)
        first, last = encoder.forward_intermediates(images, (0, -1))
        torch.testing.assert_close(last.dense, encoder(images).dense)
        assert first.dense.shape == (1, 8, 48)
        with pytest.raises(ValueError, match="2 blocks"):
            encoder.forward_intermediates(images, (2,))

    def test_init__queries_behind_own_registers(self) -> None:
        encoder = StellarEncoder(
            "vit_small_patch14_reg4_dinov2", num_queries=3, img_size=56, depth=1
        )
        assert encoder.vit.num_reg_tokens == 7
        result = encoder(torch.randn(1, 3, 56, 28))
        assert result.sparse.shape == (1, 3, 384)
        assert result.dense.shape == (1, 8, 384)

    def test_init__query_standard_deviation(self) -> None:
        encoder = StellarEncoder(
            "stellar_vit_base_patch16_224", num_queries=64, depth=1
        )
        queries = encoder.vit.reg_token.detach()
        assert queries.std().item() == pytest.approx(768**-0.5, rel=0.02)

    def test_init__plain_vit(self) -> None:
        encoder = tiny(num_queries=0)
        result = encoder(torch.randn(2, 3, 64, 64))
        assert result.sparse.shape == (2, 0, 48)
        assert result.localization.shape == (2, 16, 0)
        assert not any("_proj" in name.split(".")[0] for name in encoder.state_dict())
        with pytest.raises(ValueError, match="num_queries=0"):
            _ = result.lowrank

    @pytest.mark.parametrize(
        "name, match",
        [("resnet18", "ResNet"), ("vit_unknown", "timm knows no model")],
    )
    def test_init__bad_name(self, name: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            StellarEncoder(name)

    def test_init__patch_drop(self) -> None:
        with pytest.raises(ValueError, match="by `keep`, instead of patch_drop_rate"):
            tiny(patch_drop_rate=0.5)

    def test_init__negative_queries(self) -> None:
        with pytest.raises(ValueError, match="num_queries"):
            StellarEncoder(num_queries=-1)

    def test_init__norm_eps(self) -> None:
        assert tiny().vit.norm.eps == 1e-12
        assert tiny(norm_eps=1e-6).vit.blocks[0].norm1.eps == 1e-6

    def test_other_size__with_antialias_as_timm(self) -> None:
        images = torch.randn(2, 3, 64, 96)
        differences = []
        for antialias in (True, False):
            encoder = tiny(pos_antialias=antialias, img_size=128)
            torch.nn.init.normal_(encoder.vit.pos_embed)
            vit = timm.create_model(
                "vit_tiny_patch16_224",
                img_size=128,
                embed_dim=48,
                depth=2,
                num_classes=0,
                reg_tokens=3,
                no_embed_class=True,
                dynamic_img_size=True,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-12),
            )
            vit.load_state_dict(encoder.vit.state_dict())
            with torch.no_grad():
                ours = encoder.forward_features(images)
                timms = vit.eval().forward_features(images)
                # The ViT itself, for those who call it.
                assert encoder.vit.forward_features(images).equal(ours)
            differences.append((ours - timms).abs().max())
        assert differences[0] < 1e-5 and differences[1] > 0.1


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new_grid", [(4, 6), (2, 2), (9, 5)])
def test_resample_position__bicubic_per_channel(
    antialias: bool, new_grid: tuple[int, int]
) -> None:
    table = torch.randn(1, 3 * 5, 8)
    result = resample_position(table, (3, 5), new_grid, antialias)
    for channel in range(8):
        expected = F.interpolate(
            table[0, :, channel].reshape(1, 1, 3, 5),
            size=new_grid,
            mode="bicubic",
            antialias=antialias,
        )
        torch.testing.assert_close(result[0, :, channel], expected.flatten())


class TestFactorization:
    def test_localization__computed_once_and_only_when_read(self) -> None:
        calls = []

        def localize(dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return (dense @ sparse.mT).softmax(-1)

        result = Factorization(
            None, torch.randn(1, 2, 4), torch.randn(1, 6, 4), (2, 3), localize
        )
        assert calls == []
        torch.testing.assert_close(result.lowrank, result.localization @ result.sparse)
        assert calls == [1]
