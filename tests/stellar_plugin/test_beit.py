from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightly_ext.evaluate.loading import load_frozen_model
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import (
    create_encoder,
    load_encoder,
    load_network,
    read_checkpoint,
    untrained_network,
)
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.load import ASSUMED, READ_AS, RESAMPLED, TAKEN
from stellar_plugin.checkpoints.recognise import parse
from stellar_plugin.networks.beit import BEiT
from tests.checkpoint_files import prefixed, save
from tests.window_files import (
    Grid,
    State,
    beit_shapes,
    filled,
    resampled_table,
    rows_of_pairs,
)

WIDTH, DEPTH, HEADS, GRID, PATCH = 24, 2, 3, 3, 8
CODES = 8192
TABLE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{TABLE}"
MEANS = {"BEiT": (0.5, 0.5, 0.5), "data2vec": (0.485, 0.456, 0.406)}


def pretrained(outputs: int = CODES) -> State:
    return filled(beit_shapes(WIDTH, DEPTH, HEADS, GRID, PATCH, outputs))


def headless() -> State:
    state = pretrained()
    return {k: v for k, v in state.items() if not k.startswith("lm_head.")}


def with_own_tables(state: State) -> State:
    """As fine-tuning makes it: a table per block."""
    state = dict(state)
    table, index = state.pop(SHARED), state.pop("rel_pos_bias.relative_position_index")
    for block in range(DEPTH):
        attention = f"blocks.{block}.attn"
        state[f"{attention}.{TABLE}"] = table + block
        state[f"{attention}.relative_position_index"] = index.clone()
    return state


def classifier() -> State:
    state = with_own_tables(headless())
    del state["mask_token"]
    state |= {
        f"fc_norm.{kind}": state.pop(f"norm.{kind}") for kind in ("bias", "weight")
    }
    return {**state, "head.weight": torch.ones(5, WIDTH), "head.bias": torch.ones(5)}


def expected_tokens(state: State, images: Tensor, grid: Grid) -> Tensor:
    """The formulas: attention by pairs of tokens, CLS first, without final norm."""
    patches = F.conv2d(
        images,
        state["patch_embed.proj.weight"],
        state["patch_embed.proj.bias"],
        stride=PATCH,
    )
    cls = state["cls_token"].expand(len(images), -1, -1)
    x = torch.cat([cls, patches.flatten(2).mT], dim=1)
    rows = rows_of_pairs(grid, with_cls=True)
    for block in range(DEPTH):
        own = {
            name.removeprefix(f"blocks.{block}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"blocks.{block}.")
        }
        table = own.get(f"attn.{TABLE}", state.get(SHARED))
        assert table is not None
        if grid != (GRID, GRID):
            table = resampled_table(table, (GRID, GRID), grid)
        y = F.layer_norm(x, (WIDTH,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        x = x + own["gamma_1"] * attention(y, own, table, rows)
        y = F.layer_norm(x, (WIDTH,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        y = F.linear(y, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
        x = x + own["gamma_2"] * y
    return x


def attention(x: Tensor, own: State, table: Tensor, rows: Tensor) -> Tensor:
    query, key, value = F.linear(x, own["attn.qkv.weight"]).chunk(3, dim=-1)
    query, value = query + own["attn.q_bias"], value + own["attn.v_bias"]
    outputs = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        logits = query[..., part] @ key[..., part].mT / (WIDTH // HEADS) ** 0.5
        for i, j in torch.cartesian_prod(*[torch.arange(len(rows))] * 2).tolist():
            logits[:, i, j] += table[rows[i, j], head]
        outputs.append(logits.softmax(dim=-1) @ value[..., part])
    return F.linear(
        torch.cat(outputs, dim=-1), own["attn.proj.weight"], own["attn.proj.bias"]
    )


def final(state: State, tokens: Tensor, norm: str = "norm") -> Tensor:
    weight, bias = state[f"{norm}.weight"], state[f"{norm}.bias"]
    return F.layer_norm(tokens, (WIDTH,), weight, bias, 1e-6)


def assert_near(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    content = {
        "model": pretrained(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="beit_base_patch16_224_8k_vocab"),
    }
    return save(content, tmp_path / "beit.pth")


class TestFeatures:
    @pytest.mark.parametrize("grid", [(GRID, GRID), (5, 5), (2, 4)])
    @pytest.mark.parametrize("own_tables", [False, True])
    @torch.no_grad()
    def test_forward__the_formulas(
        self, own_tables: bool, grid: Grid, tmp_path: Path
    ) -> None:
        state = with_own_tables(pretrained()) if own_tables else pretrained()
        network, _ = load_network(save({"model": state}, tmp_path / "beit.pth"))
        images = torch.randn(2, 3, grid[0] * PATCH, grid[1] * PATCH)
        result = network(images)
        tokens = final(state, expected_tokens(state, images, grid))
        assert_near(result.cls, tokens[:, 0])
        assert_near(result.dense, tokens[:, 1:])
        assert result.grid_size == grid
        assert result.sparse.shape == (2, 0, WIDTH)

    @torch.no_grad()
    def test_forward__classifier_as_it_pools(self, tmp_path: Path) -> None:
        state = classifier()
        network, report = load_network(save(state, tmp_path / "ft22k.pth"))
        images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH)
        result = network(images)
        tokens = expected_tokens(state, images, (GRID, GRID))[:, 1:]
        assert_near(result.dense, tokens)
        assert_near(result.cls, final(state, tokens.mean(dim=1), "fc_norm"))
        assert "head.weight" in report.ignored and not report.unexpected

    @torch.no_grad()
    def test_img_size__resampled_once_as_per_image(self, path: Path) -> None:
        network, report = load_network(path, img_size=40)
        images = torch.randn(2, 3, 40, 40)
        assert_near(network(images).dense, load_network(path)[0](images).dense)
        assert network.image_size == (40, 40)
        resized = f"{SHARED} from {GRID} x {GRID} to 5 x 5 patches"
        assert report.facts[RESAMPLED] == resized

    def test_gradients__reach_the_tables_on_any_grid(self, path: Path) -> None:
        network, _ = load_network(path)
        table: Any = network.named.rel_pos_bias.relative_position_bias_table
        for side in (GRID, 4):
            table.grad = None
            images = torch.randn(2, 3, side * PATCH, side * PATCH)
            with torch.inference_mode():
                network(images)  # keeps nothing that gradients cannot pass
            network(images).dense.square().sum().backward()
            assert (table.grad != 0).any(dim=0).all()
            assert (table.grad[-3:] != 0).all()

    @torch.no_grad()
    def test_state__follows_weights_and_keeps_no_grid(self, path: Path) -> None:
        network, _ = load_network(path)
        images = torch.randn(1, 3, 32, 32)
        before, names = network(images).dense, list(network.state_dict())
        network.named.rel_pos_bias.relative_position_bias_table.zero_()  # type: ignore[union-attr]
        assert (network(images).dense - before).abs().max() > 1e-3
        assert list(network.state_dict()) == names

    @torch.no_grad()
    def test_batch__images_stand_alone(self, path: Path) -> None:
        network, _ = load_network(path)
        images = torch.randn(3, 3, 32, 32)
        order = torch.tensor([2, 0, 1])
        assert_near(network(images[order]).dense, network(images).dense[order])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_autocast__biases_keep_their_digits(
        self, path: Path, dtype: torch.dtype
    ) -> None:
        network: Any = load_network(path)[0]
        exact = network.named.rel_pos_bias.of_grid((4, 4))
        images = torch.randn(2, 3, 32, 32)
        with torch.autocast("cpu", dtype):
            assert network.named.rel_pos_bias.of_grid((4, 4)).equal(exact)
            rounded = network(images).dense.float()
        difference = (rounded - network(images).dense).abs().max()
        assert 0 < difference < 0.3

    @pytest.mark.slow
    @torch.no_grad()
    def test_compile__same_features(self, path: Path) -> None:
        network, _ = load_network(path)
        compiled = torch.compile(network, backend="eager", dynamic=False)
        images = torch.randn(2, 3, 24, 32)
        assert_near(compiled(images).dense, network(images).dense)

    def test_forward__not_whole_patches(self, path: Path) -> None:
        network, _ = load_network(path)
        with pytest.raises(ValueError, match="24 x 30 is no multiple of the patch"):
            network(torch.zeros(1, 3, 24, 30))


class TestFiles:
    @pytest.mark.parametrize(("method", "outputs"), [("BEiT", CODES), ("data2vec", 24)])
    def test_head__tells_method_and_images(
        self, method: str, outputs: int, tmp_path: Path
    ) -> None:
        content = {
            "model": pretrained(outputs),
            "args": argparse.Namespace(model="beit_base_patch16_224"),
        }
        frozen = load_frozen_model(str(save(content, tmp_path / "a.pth")))
        assert frozen.origin.method == method
        assert frozen.resolve_feature("auto") == "dense"
        assert frozen.origin.mean == MEANS[method]
        assert frozen.origin.image_size == (24, 24)
        assert ASSUMED not in frozen.origin.facts

    def test_no_head__images_are_not_told(self, tmp_path: Path) -> None:
        frozen = load_frozen_model(str(save(headless(), tmp_path / "a.pth")))
        assert frozen.origin.feature is None
        text = frozen.origin.facts[ASSUMED]
        assert text.startswith("mean=(0.485, 0.456, 0.406), std=") and "of" not in text

    def test_no_head__timms_config_tells_images(self, tmp_path: Path) -> None:
        save(classifier(), tmp_path / "model.safetensors")
        cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}
        config = {"architecture": "beit_base_patch16_224", "pretrained_cfg": cfg}
        (tmp_path / "config.json").write_text(json.dumps(config))
        frozen = load_frozen_model(str(tmp_path))
        assert frozen.origin.method == "a classifier"
        assert frozen.origin.std == (0.25, 0.5, 0.5)
        assert ASSUMED not in frozen.origin.facts

    def test_second_version__is_not_called_beit(self, tmp_path: Path) -> None:
        state = pretrained() | {"cls_pt_layers.0.norm1.weight": torch.ones(WIDTH)}
        checkpoint = read_checkpoint(save(state, tmp_path / "beitv2.pth"))
        assert checkpoint.method is None and "mean" in checkpoint.assumed
        assert checkpoint.unexpected == ("cls_pt_layers.0.norm1.weight",)

    def test_average__is_taken_and_said(self, tmp_path: Path) -> None:
        state = pretrained(WIDTH)
        content = {"model": headless(), "model_ema": state}
        _, report = load_network(save(content, tmp_path / "checkpoint-799.pth"))
        assert report.facts[READ_AS] == "data2vec in layout 'BEiT'"
        assert report.facts[TAKEN] == "those of 'model_ema', not of model"

    @pytest.mark.parametrize(
        ("outputs", "width", "depth", "heads", "parameters"),
        [
            (CODES, 768, 12, 12, 85_665_360),
            (768, 768, 12, 12, 85_665_360),
            (CODES, 1024, 24, 16, 303_136_192),
        ],
        ids=["BEiT ViT-B", "Data2Vec ViT-B", "BEiT ViT-L"],
    )
    def test_full_size__strictly(
        self, outputs: int, width: int, depth: int, heads: int, parameters: int
    ) -> None:
        state = filled(beit_shapes(width, depth, heads, 14, 16, outputs), "meta")
        checkpoint = parse(RawCheckpoint(Path("a.pth"), {"model": state}))
        with torch.device("meta"):
            network, report = load_network(checkpoint)
        assert report.missing == report.unexpected == report.resized == ()
        assert network.image_size == (224, 224)
        assert (network.embed_dim, network.stride) == (width, 16)
        assert sum(p.numel() for p in network.parameters()) == parameters
        dropped = {"mask_token", "lm_head.weight", "lm_head.bias"}
        dropped.add("rel_pos_bias.relative_position_index")
        assert {*report.ignored} == dropped


class TestWrongFiles:
    def test_no_vit__what_it_is(self, path: Path, tmp_path: Path) -> None:
        told = r"BEiT.*takes no latent queries.*--model` reads it"
        for read in (create_encoder, load_encoder, Stellar.from_pretrained):
            with pytest.raises(ValueError, match=told):
                read(path)
        with pytest.raises(ValueError, match=told):
            load_frozen_model("timm:vit_tiny_patch16_224", weights=str(path))

    def test_other_model_of_timm__what_it_is(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"holds a BEiT \(img_size=24, .*read as BEiT.*--model"
        ):
            load_frozen_model("timm:convnext_atto", weights=str(path))

    @pytest.mark.parametrize("block", range(DEPTH))
    def test_table_lost__says_of_which_block(self, block: int, tmp_path: Path) -> None:
        state = with_own_tables(pretrained())
        del state[f"blocks.{block}.attn.{TABLE}"]
        told = "1 .from 0. have none" if block else "no table .* in block 0"
        with pytest.raises(ValueError, match=rf"{told}.* a part of the file is lost"):
            read_checkpoint(save(state, tmp_path / "a.pth"))

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            (SHARED, torch.zeros(29, HEADS), r"\(2 h - 1\)\^2 \+ 3 rows"),
            ("pos_embed", torch.zeros(1, 10, WIDTH), "position table beside relative"),
            (
                "rel_pos_bias.relative_position_index",
                torch.zeros(10, 10, dtype=torch.long),
                "does not number the pairs",
            ),
            (SHARED, torch.zeros(28), "2 dimensions"),
            (SHARED, torch.zeros(28, 5), "embed_dim 24 is no multiple of num_heads 5"),
        ],
    )
    def test_odd_tensors__named(
        self, name: str, tensor: Tensor, message: str, tmp_path: Path
    ) -> None:
        path = save({**pretrained(), name: tensor}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=message) as error:
            load_network(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        "lost", ["patch_embed.proj.weight", "blocks.1.attn.q_bias"]
    )
    def test_tensor_lost__named(self, lost: str, tmp_path: Path) -> None:
        state = pretrained()
        del state[lost]
        with pytest.raises(ValueError, match=rf"a\.pth.*{lost}"):
            load_network(save(state, tmp_path / "a.pth"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (f"encoder.relative_position_bias.{TABLE}", "transformers: take .*pt22k"),
            (
                "beit.encoder.layer.0.attention.attention.relative_position_bias."
                f"{TABLE}",
                "transformers: take .*checkpoint-799",
            ),
            ("backbone.layers.0.ln1.weight", "OpenMMLab"),
        ],
    )
    def test_other_names__which_file_to_take(
        self, name: str, message: str, tmp_path: Path
    ) -> None:
        state = {name: torch.zeros(28, 3), "embeddings.cls_token": torch.zeros(1, 1, 3)}
        with pytest.raises(ValueError, match=rf"a\.pth' holds .*{message}"):
            read_checkpoint(save(state, tmp_path / "a.pth"))

    def test_arguments__of_another_size(self, path: Path) -> None:
        checkpoint = read_checkpoint(path)
        with pytest.raises(ValueError, match=r"beit\.pth.*30 x 30 is no multiple"):
            untrained_network(checkpoint, img_size=30)
        with pytest.raises(ValueError, match="no argument"):
            untrained_network(checkpoint, num_queries=3)


def test_untrained__finite_on_another_grid() -> None:
    network = BEiT(24, 8, 24, 1, 3, shared=False).eval()
    assert network(torch.randn(1, 3, 16, 40)).dense.isfinite().all()


def test_prefix__before_the_names(tmp_path: Path) -> None:
    path = save(prefixed(pretrained(), "module."), tmp_path / "a.pth")
    assert load_network(path)[1].read_as == "BEiT in layout 'BEiT'"
