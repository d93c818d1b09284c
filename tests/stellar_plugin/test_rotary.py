"""DINOv3 and its relatives: rotary positions instead of a table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from stellar_plugin import StellarEncoder

DINOV3 = "vit_small_patch16_dinov3"
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}
# Of every kind of rotary positions that timm has, and with a table beside them.
NAMES = (
    DINOV3,
    "vit_small_patch16_rope_mixed_ape_224",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "vit_small_plus_patch16_dinov3",
            "vit_small_patch16_dinov3_qkvb",
            "vit_7b_patch16_dinov3",
            "vit_small_patch16_lingbot",
            "vit_small_patch16_rope_224",
            "vit_small_patch16_rope_mixed_224",
            "eva02_tiny_patch14_224",
            "eva_giant_patch14_clip_224",
            "vit_pe_core_base_patch16_224",
            "vit_medium_patch16_rope_reg1_gap_256",
        )
    ),
)
SIZES = [(64, 64), (32, 96), (80, 48)]


def randomised(module: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def tiny(name: str = DINOV3, **kwargs: Any) -> StellarEncoder:
    sizes = {**TINY, "patch_size": 16, "num_queries": 3}
    return randomised(StellarEncoder(name, **{**sizes, **kwargs}))


class TestRotaryEncoder:
    @pytest.mark.parametrize("name", NAMES)
    def test_forward__is_timm_at_any_size(self, name: str) -> None:
        encoder = tiny(name, num_queries=0, pos_antialias=True)
        arguments = {"no_embed_class": True, "dynamic_img_size": True}
        vit = timm.create_model(
            name, **TINY, patch_size=16, num_classes=0, global_pool="", **arguments
        ).eval()
        vit.load_state_dict(encoder.vit.state_dict())
        for height, width in SIZES:
            images = torch.randn(2, 3, height, width)
            with torch.no_grad():
                expected = vit.forward_features(images)
                result = encoder(images)
            patches = expected[:, vit.num_prefix_tokens :]
            assert (result.dense - patches).abs().max() < 1e-5
            if result.cls is not None:
                assert (result.cls - expected[:, 0]).abs().max() < 1e-5
            assert result.sparse.shape == (2, 0, 48)

    @pytest.mark.parametrize("name", [DINOV3, "vit_small_plus_patch16_dinov3"])
    def test_forward__is_plain_loop(self, name: str) -> None:
        encoder = tiny(name).double()
        # Centres of 2 x 4 patches are exact in float32, in which timm has them.
        images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
        keep = torch.tensor([[7, 0, 4], [2, 3, 5]])
        with torch.no_grad():
            for kept in (None, keep):
                result = encoder(images, kept)
                for i in range(2):
                    places = range(8) if kept is None else kept[i].tolist()
                    expected = reference_tokens(encoder, images[i], list(places))
                    ours = torch.cat([result.cls[i, None], result.sparse[i]])
                    assert (ours - expected[[0, 5, 6, 7]]).abs().max() < 1e-10
                    assert (result.dense[i] - expected[8:]).abs().max() < 1e-10

    @pytest.mark.parametrize("name", NAMES)
    def test_forward__keep_all_in_any_order_is_plain_forward(self, name: str) -> None:
        encoder = tiny(name).double()
        images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
        keep = torch.stack([torch.randperm(6) for _ in range(2)])
        with torch.no_grad():
            plain, kept = encoder(images), encoder(images, keep)
        order = keep[..., None].expand(-1, -1, 48)
        assert (kept.sparse - plain.sparse).abs().max() < 1e-10
        assert (kept.dense - plain.dense.gather(1, order)).abs().max() < 1e-10
        # Positions matter, or the order would be for nothing.
        moved = encoder(images.flip(3))
        assert (moved.sparse - plain.sparse).abs().max() > 1e-3

    def test_forward__permuted_queries_permute_tokens(self) -> None:
        encoder = tiny().double()
        images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        before = encoder(images).sparse
        order = torch.tensor([0, 1, 2, 3, 6, 4, 5])  # behind four registers
        encoder.vit.reg_token.data = encoder.vit.reg_token.data[:, order]
        assert (encoder(images).sparse - before[:, [2, 0, 1]]).abs().max() < 1e-10

    @pytest.mark.parametrize("name", [DINOV3, "vit_small_patch16_rope_mixed_ape_224"])
    def test_forward__every_parameter_has_gradient(self, name: str) -> None:
        encoder = tiny(name).train()
        result = encoder(torch.randn(2, 3, 64, 32), torch.tensor([[0, 5], [7, 2]]))
        (result.lowrank.square().mean() + result.cls.square().mean()).backward()
        zero = [n for n, p in encoder.named_parameters() if not p.grad.abs().sum() > 0]
        assert zero == []

    def test_forward__gradient_of_queries(self) -> None:
        encoder = tiny(depth=1).double()
        images = torch.randn(1, 3, 32, 48, dtype=torch.float64)
        keep = torch.tensor([[5, 1, 2]])
        queries = encoder.vit.reg_token

        def tokens(value: Tensor) -> Tensor:
            state = {"vit.reg_token": value}
            result = torch.func.functional_call(encoder, state, (images, keep))
            return result.sparse.square().sum() + result.dense[..., 0].sum()

        start = queries.detach().requires_grad_()
        assert torch.autograd.gradcheck(tokens, (start,), fast_mode=True)

    def test_forward__grad_checkpointing_same_gradient(self) -> None:
        images, keep = torch.randn(2, 3, 64, 64), torch.tensor([[1, 7], [9, 3]])
        gradients = []
        for enable in (False, True):
            encoder = tiny().train()
            encoder.set_grad_checkpointing(enable)
            encoder(images, keep).lowrank.square().mean().backward()
            gradients.append(encoder.vit.blocks[0].attn.qkv.weight.grad)
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_forward_intermediates__last_is_forward(self) -> None:
        encoder = tiny()
        images = torch.randn(1, 3, 32, 64)
        first, last = encoder.forward_intermediates(images, (0, -1))
        torch.testing.assert_close(last.dense, encoder(images).dense)
        assert (first.dense - last.dense).abs().max() > 0.1

    @pytest.mark.parametrize("masked", [False, True])
    def test_augmentation__in_training_alone(self, masked: bool) -> None:
        kinds = ("shift", "jitter", "rescale")
        encoder = tiny(**{f"rope_{kind}_coords": 2.0 for kind in kinds})
        plain = tiny()
        images = torch.randn(2, 3, 32, 48)
        keep = torch.tensor([[5, 1, 2], [0, 3, 4]]) if masked else None
        with torch.no_grad():
            expected = plain(images, keep).sparse
            assert encoder(images, keep).sparse.equal(expected)
            encoder.train()
            torch.manual_seed(1)
            drawn = encoder(images, keep).sparse
            # timm draws one change of coordinates for all images of a batch.
            torch.manual_seed(1)
            rope = encoder.vit.rope.get_embed(shape=[2, 3])
            plain.vit._rotations[2, 3] = rope
            assert drawn.equal(plain(images, keep).sparse)
            assert (drawn - expected).abs().max() > 1e-3
            assert encoder.eval()(images, keep).sparse.equal(expected)

    def test_rotations__are_kept_for_any_later_use(self) -> None:
        encoder = tiny()
        images = torch.randn(1, 3, 32, 48)
        with torch.inference_mode():
            expected = encoder(images).sparse.clone()
        encoder(images).sparse.sum().backward()  # not what inference left behind
        kept = encoder.vit.rotations((2, 3), None)[0]
        assert encoder.vit.rotations((2, 3), None)[1] is kept
        encoder.double()
        assert encoder.vit.rotations((2, 3), None)[0].dtype == torch.float64
        assert torch.allclose(
            encoder(images.double()).sparse.float(), expected, atol=1e-4
        )

    def test_init__queries_behind_own_registers(self) -> None:
        assert tiny(num_queries=0).vit.num_reg_tokens == 4
        assert tiny(num_queries=5).vit.num_reg_tokens == 9
        assert tiny(num_queries=5, reg_tokens=1).vit.num_reg_tokens == 6

    def test_init__norm_eps(self) -> None:
        assert tiny().vit.norm.eps == 1e-5
        encoder = tiny(norm_eps=1e-6)
        assert encoder.vit.norm.eps == encoder.vit.blocks[0].norm1.eps == 1e-6

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"num_heads": 5}, "embed_dim 48 .* a multiple of 4 x num_heads 5"),
            ({"num_heads": 8}, "embed_dim 48 .* a multiple of 4 x num_heads 8"),
            ({"num_heads": 5, "use_rot_pos_emb": False}, "multiple of num_heads 5"),
        ],
    )
    def test_init__heads_of_no_such_width(
        self, changes: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(ValueError, match=said):
            tiny(**changes)

    def test_init__timms_name_of_registers(self) -> None:
        with pytest.raises(ValueError, match="did you mean 'reg_tokens'"):
            tiny(num_reg_tokens=4)

    @pytest.mark.slow
    def test_init__largest(self) -> None:
        with torch.device("meta"):
            encoder = StellarEncoder("vit_7b_patch16_dinov3")
        result = encoder(torch.empty(1, 3, 32, 48, device="meta"))
        assert result.dense.shape == (1, 6, 4096)
        assert result.sparse.shape == (1, 16, 4096)
        assert encoder.vit.num_reg_tokens == 4 + 16


def reference_tokens(
    encoder: StellarEncoder, image: Tensor, places: list[int]
) -> Tensor:
    """All tokens of one image by DINOv3's formulas, patch by patch, head by head.

    Positions are those of https://arxiv.org/abs/2508.10104: centres of patches in
    [-1, 1] of each side, divided by periods of 100^(i / quarter of the head's width).
    """
    vit: Any = encoder.vit
    state = vit.state_dict()
    width, height = image.shape[2] // 16, image.shape[1] // 16
    tokens = [*state["cls_token"][0], *state["reg_token"][0]]
    num_prefix = len(tokens)
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    angles = []
    size = vit.embed_dim // vit.blocks[0].attn.num_heads
    periods = vit.rope.periods.tolist()
    formula = [100 ** (4 * i / size) for i in range(size // 4)]
    assert periods == pytest.approx(formula, rel=1e-6)  # float32 in timm
    for place in places:
        row, column = divmod(place, width)
        patch = image[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        tokens.append((kernel * patch).sum((1, 2, 3)) + bias)
        centre = (2 * (row + 0.5) / height - 1, 2 * (column + 0.5) / width - 1)
        angles.append([2 * math.pi * c / p for c in centre for p in periods])
    x = torch.stack(tokens)

    def rotated(vectors: Tensor) -> Tensor:
        result = vectors.clone()
        for i, angle in enumerate(angles, start=num_prefix):
            for j, a in enumerate(angle):
                first, second = vectors[i, j], vectors[i, j + size // 2]
                result[i, j] = first * math.cos(a) - second * math.sin(a)
                result[i, j + size // 2] = second * math.cos(a) + first * math.sin(a)
        return result

    for block in vit.blocks:
        normed = block.norm1(x)
        query, key, value = (normed @ block.attn.qkv.weight.T).chunk(3, dim=1)
        heads = []
        for part in range(0, vit.embed_dim, size):
            q, k = (rotated(t[:, part : part + size]) for t in (query, key))
            weights = (q @ k.T / size**0.5).softmax(1)
            heads.append(weights @ value[:, part : part + size])
        x = x + block.gamma_1 * block.attn.proj(torch.cat(heads, 1))
        normed = block.norm2(x)
        if hasattr(block.mlp, "fc1_g"):
            hidden = nn.functional.silu(block.mlp.fc1_g(normed)) * block.mlp.fc1_x(
                normed
            )
        else:
            hidden = nn.functional.gelu(block.mlp.fc1(normed))
        x = x + block.gamma_2 * block.mlp.fc2(hidden)
    return vit.norm(x)
