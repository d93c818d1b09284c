from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from lightly_ext.evaluate.loading import load_frozen_model
from stellar_plugin.checkpoints import create_encoder, load_network, read_checkpoint
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.load import ASSUMED, RESAMPLED
from stellar_plugin.checkpoints.recognise import parse
from tests.checkpoint_files import prefixed, save
from tests.window_files import (
    State,
    filled,
    resampled_table,
    rows_of_pairs,
    swin_shapes,
)

# Two stages: a cell of the last map has 8 px, and windows are for images of 24 px.
WIDTH, DEPTHS, HEADS, WINDOW = 8, (2, 2), (1, 2), 3
TABLE = "relative_position_bias_table"


def pretrained(depths: Sequence[int] = DEPTHS, heads: Sequence[int] = HEADS) -> State:
    return filled(swin_shapes(WIDTH, depths, heads, WINDOW))


def encoder_of(state: State) -> State:
    """Without what only pre-training has."""
    return {
        name.removeprefix("encoder."): tensor
        for name, tensor in state.items()
        if name.startswith("encoder.") and name != "encoder.mask_token"
    }


def expected_map(state: State, images: Tensor, window: int = WINDOW) -> Tensor:
    """The formulas, (B, h, w, d): attention by pairs of tokens."""
    state = encoder_of(state)
    x = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 4
    ).permute(0, 2, 3, 1)
    x = norm(x, state, "patch_embed.norm")
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        for block in range(depth):
            own = part(state, f"layers.{stage}.blocks.{block}.")
            attended = [
                windowed(one, own, heads, window, shifted=block % 2 == 1)
                for one in norm(x, own, "norm1")
            ]
            x = x + torch.stack(attended)
            y = F.gelu(F.linear(norm(x, own, "norm2"), *pair(own, "mlp.fc1")))
            x = x + F.linear(y, *pair(own, "mlp.fc2"))
        if stage + 1 < len(DEPTHS):
            merging = part(state, f"layers.{stage}.downsample.")
            corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            y = norm(torch.cat(corners, dim=-1), merging, "norm")
            x = F.linear(y, merging["reduction.weight"])
    return norm(x, state, "norm")


def windowed(x: Tensor, own: State, heads: int, window: int, shifted: bool) -> Tensor:
    """Attention of one map (h, w, d), all its tokens against all."""
    height, width, dim = x.shape
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    sides = padded.shape[:2]
    shifts = [
        window // 2 if shifted and side > window else 0 for side in (height, width)
    ]
    places = list(itertools.product(range(sides[0]), range(sides[1])))
    bias = torch.full((heads, len(places), len(places)), -torch.inf)
    rows, table = rows_of_pairs((window, window), False), own[f"attn.{TABLE}"]
    # Of each token: its window, the edge it was shifted over, its place in the window.
    found = []
    for place in places:
        moved = [(p - s) % n for p, s, n in zip(place, shifts, sides, strict=True)]
        over = tuple(p < s for p, s in zip(place, shifts, strict=True))
        cell = moved[0] % window * window + moved[1] % window
        found.append(((moved[0] // window, moved[1] // window, over), cell))
    for (i, (group, a)), (j, (other, b)) in itertools.product(
        enumerate(found), repeat=2
    ):
        if group == other:
            bias[:, i, j] = table[rows[a, b]]
    qkv = F.linear(padded.flatten(0, 1), *pair(own, "attn.qkv"))
    query, key, value = qkv.unflatten(1, (3, heads, dim // heads)).permute(1, 2, 0, 3)
    logits = query @ key.mT / (dim // heads) ** 0.5 + bias
    y = (logits.softmax(dim=-1) @ value).transpose(0, 1).flatten(1)
    y = F.linear(y, *pair(own, "attn.proj")).unflatten(0, sides)
    return y[:height, :width]


def part(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def pair(state: State, name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *pair(state, name), 1e-5)


def assert_near(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    content = {
        "model": pretrained(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "lr_scheduler": {"last_epoch": 3},
        "max_accuracy": 0.0,
        "epoch": 799,
    }
    return save(content, tmp_path / "simmim.pth")


class TestFeatures:
    # Its own size; maps to be padded on both sides, on one; smaller than a window.
    @pytest.mark.parametrize("size", [(24, 24), (32, 40), (24, 56), (16, 16)])
    @torch.no_grad()
    def test_forward__the_formulas(self, size: tuple[int, int], path: Path) -> None:
        network, _ = load_network(path)
        images = torch.randn(2, 3, *size)
        result = network(images)
        expected = expected_map(pretrained(), images)
        assert_near(result.dense, expected.flatten(1, 2))
        assert_near(result.cls, expected.mean(dim=(1, 2)))
        assert result.grid_size == (size[0] // 8, size[1] // 8)
        assert network.stride == 8 and network.image_size == (24, 24)

    @torch.no_grad()
    def test_img_size__other_windows_with_tables_resampled(self, path: Path) -> None:
        network, report = load_network(path, img_size=32)
        state = {
            name: resampled_table(tensor, (3, 3), (4, 4))
            if name.endswith(TABLE)
            else tensor
            for name, tensor in pretrained().items()
        }
        images = torch.randn(2, 3, 32, 32)
        expected = expected_map(state, images, window=4)
        assert_near(network(images).dense, expected.flatten(1, 2))
        told = "4 tables of biases from windows of 3 x 3 to 4 x 4"
        assert report.facts[RESAMPLED] == told

    @torch.no_grad()
    def test_forward__as_timm_at_its_own_size(self, path: Path) -> None:
        network, _ = load_network(path)
        sizes: dict[str, Any] = {"depths": DEPTHS, "num_heads": HEADS}
        swin = SwinTransformer(24, 4, 3, 0, "avg", WIDTH, window_size=3, **sizes)
        swin.load_state_dict(network.named.state_dict())
        images = torch.randn(2, 3, 24, 24)
        assert_near(network(images).cls, swin.eval()(images))

    @pytest.mark.slow
    @torch.no_grad()
    def test_forward__as_mmsegmentation_where_maps_are_padded(self, path: Path) -> None:
        swin = pytest.importorskip("mmseg.models.backbones.swin")
        theirs = swin.ShiftWindowMSA(WIDTH, 1, window_size=3, shift_size=1).eval()
        own = part(encoder_of(pretrained()), "layers.0.blocks.1.attn.")
        theirs.w_msa.load_state_dict(own)
        x = torch.randn(1, 8, 10, WIDTH)
        expected = theirs(x.flatten(1, 2), (8, 10)).unflatten(1, (8, 10))
        own = {f"attn.{name}": tensor for name, tensor in own.items()}
        assert_near(windowed(x[0], own, 1, 3, shifted=True), expected[0])

    def test_gradients__reach_all_parameters(self, path: Path) -> None:
        network, _ = load_network(path)
        with torch.inference_mode():
            network(torch.randn(1, 3, 32, 32))
        network(torch.randn(2, 3, 32, 32)).dense.square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name

    @torch.no_grad()
    def test_batch__images_stand_alone(self, path: Path) -> None:
        network, _ = load_network(path)
        images = torch.randn(3, 3, 32, 32)
        order = torch.tensor([2, 0, 1])
        assert_near(network(images[order]).dense, network(images).dense[order])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_autocast__near(self, path: Path, dtype: torch.dtype) -> None:
        network, _ = load_network(path)
        images = torch.randn(2, 3, 32, 32)
        with torch.autocast("cpu", dtype):
            rounded = network(images).dense.float()
        difference = (rounded - network(images).dense).abs().mean()
        assert 0 < difference < 0.05

    @pytest.mark.slow
    @torch.no_grad()
    def test_compile__same_features(self, path: Path) -> None:
        network, _ = load_network(path)
        compiled = torch.compile(network, backend="eager", dynamic=False)
        images = torch.randn(2, 3, 32, 24)
        assert_near(compiled(images).dense, network(images).dense)

    def test_forward__no_multiple_of_the_stride(self, path: Path) -> None:
        network, _ = load_network(path)
        with pytest.raises(ValueError, match="24 x 28 is no multiple of 8"):
            network(torch.zeros(1, 3, 24, 28))


class TestFiles:
    def test_simmim__method_and_images(self, path: Path) -> None:
        frozen = load_frozen_model(str(path))
        assert frozen.origin.method == "SimMIM"
        assert frozen.resolve_feature("auto") == "dense"
        assert frozen.origin.mean == (0.485, 0.456, 0.406)
        assert ASSUMED not in frozen.origin.facts

    @pytest.mark.parametrize(
        ("extra", "method"),
        [
            ({}, None),
            ({"head.weight": torch.ones(5, 16)}, "a classifier"),
            ({"head.fc.weight": torch.ones(5, 16)}, "a classifier"),
        ],
    )
    @torch.no_grad()
    def test_others__of_swins_own_code_and_of_timm(
        self, extra: State, method: str | None, path: Path, tmp_path: Path
    ) -> None:
        state = encoder_of(pretrained())
        ours = save({"model": {**state, **extra}}, tmp_path / "swin.pth")
        network, report = load_network(ours)
        found = read_checkpoint(ours).method
        assert (found.name if found else None) == method
        assert not report.unexpected and {*extra} <= {*report.ignored}
        timms = save({**network.named.state_dict(), **extra}, tmp_path / "timm.pth")
        images = torch.randn(1, 3, 24, 24)
        expected = load_network(path)[0](images).dense
        for file in (ours, timms):
            assert load_network(file)[0](images).dense.equal(expected)

    @pytest.mark.slow
    def test_full_size__strictly(self) -> None:
        shapes = swin_shapes(128, (2, 2, 18, 2), (4, 8, 16, 32), 6)
        state = filled(shapes, "meta")
        # What the file holds beside buffers is known.
        of_model = [k for k in state if not k.endswith(("index", "attn_mask"))]
        assert sum(state[name].numel() for name in of_model) == 89_874_104
        checkpoint = parse(RawCheckpoint(Path("a.pth"), {"model": state}))
        with torch.device("meta"):
            network, report = load_network(checkpoint)
        assert report.missing == report.unexpected == report.resized == ()
        assert network.image_size == (192, 192)
        assert (network.embed_dim, network.stride) == (1024, 32)
        count = sum(p.numel() for p in network.parameters())
        assert count == 89_874_104 - 3072 * 1025 - 128
        assert {
            name.rsplit(".", 1)[1] for name in report.ignored if "layers" in name
        } == {
            "relative_position_index",
            "attn_mask",
        }

    def test_four_stages__strictly(self, tmp_path: Path) -> None:
        state = pretrained((2, 1, 2, 1), (1, 2, 2, 4))
        network, report = load_network(save({"model": state}, tmp_path / "a.pth"))
        assert network.image_size == (96, 96) and network.stride == 32
        assert not report.unexpected
        assert network(torch.zeros(1, 3, 64, 96)).grid_size == (2, 3)


class TestWrongFiles:
    def test_no_vit__what_it_is(self, path: Path) -> None:
        with pytest.raises(ValueError, match=r"SimMIM.*a Swin, which takes no latent"):
            create_encoder(path)

    def test_another_window__what_it_is(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"holds a Swin \(img_size=24, .*SimMIM.*--model"
        ):
            load_frozen_model("timm:swin_tiny_patch4_window7_224", weights=str(path))

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            (
                f"layers.1.blocks.1.attn.{TABLE}",
                torch.zeros(49, 2),
                r"have 25, 49 rows, expected \(2 w - 1\)\^2",
            ),
            (
                "layers.0.blocks.0.attn.relative_position_index",
                torch.zeros(9, 9, dtype=torch.long),
                "does not number the pairs",
            ),
            ("absolute_pos_embed", torch.zeros(1, 36, WIDTH), "with a position table"),
            (f"layers.0.blocks.0.attn.{TABLE}", torch.zeros(25), "2 dimensions"),
            (
                f"layers.1.blocks.0.attn.{TABLE}",
                torch.zeros(25, 3),
                "width 16 of a stage is no multiple of its 3 heads",
            ),
        ],
    )
    def test_odd_tensors__named(
        self, name: str, tensor: Tensor, message: str, tmp_path: Path
    ) -> None:
        state = prefixed({**encoder_of(pretrained()), name: tensor}, "encoder.")
        path = save(state, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=message) as error:
            load_network(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        "lost", ["layers.1.blocks.1.attn.qkv.bias", f"layers.0.blocks.1.attn.{TABLE}"]
    )
    def test_tensor_lost__named(self, lost: str, tmp_path: Path) -> None:
        state = encoder_of(pretrained())
        del state[lost]
        with pytest.raises(ValueError, match=rf"a\.pth.*missing: {lost}"):
            load_network(save(state, tmp_path / "a.pth"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                f"swin.encoder.layers.0.blocks.0.attention.self.{TABLE}",
                "Swin by the names of transformers: take .*simmim_pretrain",
            ),
            (f"backbone.stages.0.blocks.0.attn.w_msa.{TABLE}", "OpenMMLab"),
            ("layers.0.blocks.0.attn.logit_scale", "Swin V2.*timm:swinv2"),
        ],
    )
    def test_other_names__what_to_take(
        self, name: str, message: str, tmp_path: Path
    ) -> None:
        path = save({name: torch.zeros(25, 1)}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=rf"a\.pth' holds .*{message}"):
            read_checkpoint(path)

    def test_arguments__of_another_size(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"simmim\.pth.*img_size 30 is no multiple"
        ):
            load_network(path, img_size=30)
