"""Files of MSN, SiameseIM, SemMAE and AIM, against the formulas of a plain ViT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import LayerNorm

from lightly_ext.evaluate.loading import load_frozen_model
from stellar_plugin import Stellar, StellarEncoder
from stellar_plugin.checkpoints import (
    create_encoder,
    encoder_config,
    inherited,
    load_encoder,
    load_encoder_weights,
    read_checkpoint,
    untrained_encoder,
)
from stellar_plugin.checkpoints.export import timm_call, to_official, to_timm
from stellar_plugin.checkpoints.files import RawCheckpoint
from stellar_plugin.checkpoints.fit import fitted
from stellar_plugin.checkpoints.recognise import parse
from stellar_plugin.vit import sincos_position
from stellar_plugin.weight_files import write_tensors
from tests import published_vits as written
from tests.checkpoint_files import save
from tests.plain_vit import Positions, State, patch_tokens, resampled, sines

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
PUBLISHED_POSITIONS = "vit.pos_embed from 28 x 28 to 14 x 14 patches"


@dataclass(frozen=True)
class Case:
    """One kind of files.

    Attributes:
        content: What a small one holds.
        of: Its tensors that features depend on, by timm's names.
        num_heads: Of a small one.
        feature: What `auto` is.
        told: What tells it.
        beginnings: Of names in the file that are not used.
        sizes: Heights and widths of images, the native one first.
    """

    content: Callable[..., dict[str, Any]]
    of: Callable[[dict[str, Any]], State]
    num_heads: int
    feature: str
    told: str
    beginnings: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (48, 112))


def _used(state: State) -> State:
    names = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    return {k: v for k, v in state.items() if k.startswith(names)}


CASES = {
    "MSN": Case(
        written.msn,
        lambda content: _used(
            {k.removeprefix("module."): v for k, v in content["target_encoder"].items()}
        ),
        4,
        "cls",
        "wrapper target_encoder",
        (
            *("fc.", "encoder", "opt", "prototypes"),
            *("epoch", "loss", "batch_size", "world_size"),
        ),
    ),
    "SiameseIM": Case(
        written.siamese_im,
        lambda content: _used(content["model"]),
        4,
        "dense",
        "tensors mm_patch_embed.*",
        (
            *("mm_", "mask_token", "decoder_", "projector_", "predictor_"),
            *("epoch", "optimizer", "scaler"),
        ),
    ),
    "SemMAE": Case(
        written.semmae,
        lambda content: _used(content["model"]),
        4,
        "dense",
        "tensors decoder_* and 785 positions for patches of 16 px",
        ("decoder_", "mask_token", "epoch", "optimizer", "args"),
        ((224, 224), (48, 112)),
    ),
    "MAE or SemMAE": Case(
        partial(written.semmae, side=4),
        lambda content: _used(content["model"]),
        4,
        "dense",
        "tensors decoder_*",
        ("decoder_", "mask_token", "epoch", "optimizer", "args"),
    ),
    "AIM": Case(
        lambda **sizes: written.aim(**sizes) | written.aim_head(),
        lambda content: _used(written.aim_by_timms_names(content)),
        1,
        "dense",
        "names of layout 'AIM'",
        ("head.",),
        ((224, 224), (42, 112)),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, State]]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    found = {}
    for name, case in CASES.items():
        content = case.content()
        path = save(content, folder / f"{name.replace(' ', '_')}.pth")
        found[name] = path, case.of(content)
    return found


def positions_of(name: str, state: State) -> tuple[State, Positions]:
    """The tensors with the position of the class token in it, and those of patches."""
    if name == "AIM":
        return state, sines(len(state["norm.weight"]))
    table = state["pos_embed"]
    side = round((table.shape[1] - 1) ** 0.5)
    state = {**state, "cls_token": state["cls_token"] + table[:, :1]}
    positions = resampled(table[:, 1:], side)
    if name == "SemMAE":  # brought to images of 224 px first
        positions = resampled(positions(14, 14)[None], 14)
    return state, positions


@pytest.mark.parametrize("name", CASES)
class TestEverySystem:
    def test_features__by_the_formulas(
        self, name: str, files: dict[str, tuple[Path, State]]
    ) -> None:
        case, (path, state) = CASES[name], files[name]
        encoder, report = load_encoder(path, num_heads=case.num_heads)
        assert report.read_as.startswith(f"{name} in layout '")
        assert report.rule == case.told
        assert report.unexpected == report.missing == ()
        assert report.resized == ((PUBLISHED_POSITIONS,) if name == "SemMAE" else ())
        assert all(n.startswith(case.beginnings) for n in report.ignored)
        used = set(state) - ({"pos_embed"} if name == "AIM" else set())
        assert {n.removeprefix("vit.") for n in report.matched} == used
        native = (encoder.image_size[0], encoder.image_size[1])
        assert native == case.sizes[0]
        plain, positions = positions_of(name, state)
        for size in case.sizes:
            images = torch.randn(2, 3, *size)
            with torch.no_grad():
                found = encoder(images)
                (last,) = encoder.forward_intermediates(images, [-1])
            cls, dense = patch_tokens(plain, images, case.num_heads, positions)
            torch.testing.assert_close(found.dense, dense, rtol=1e-5, atol=1e-5)
            assert last.dense.equal(found.dense)
            if cls is None:
                assert found.cls is None
            else:
                torch.testing.assert_close(found.cls, cls, rtol=1e-5, atol=1e-5)

    def test_evaluation__what_the_method_reads(
        self, name: str, files: dict[str, tuple[Path, State]]
    ) -> None:
        case, (path, state) = CASES[name], files[name]
        frozen = load_frozen_model(
            str(path), model_kwargs={"num_heads": case.num_heads}
        )
        assert frozen.origin.method == name
        assert frozen.origin.image_size == case.sizes[0]
        assert (frozen.origin.mean, frozen.origin.std) == (
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
        )
        assert frozen.resolve_feature("auto") == case.feature
        images = torch.rand(2, 3, *case.sizes[1])
        mean, std = (
            torch.tensor(v)[:, None, None]
            for v in (frozen.origin.mean, frozen.origin.std)
        )
        plain, positions = positions_of(name, state)
        cls, dense = patch_tokens(
            plain, (images - mean) / std, case.num_heads, positions
        )
        expected = cls if case.feature == "cls" else dense.mean(dim=1)
        found = frozen.pooled(images, case.feature)
        assert expected is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_prior__keeps_queries_and_hides_patches(
        self, name: str, files: dict[str, tuple[Path, State]], tmp_path: Path
    ) -> None:
        case, (path, _) = CASES[name], files[name]
        checkpoint = read_checkpoint(path)
        arguments = inherited(checkpoint, {"num_heads": case.num_heads})
        model = Stellar(**{**arguments, **DECODER, "num_queries": 2}).eval()
        report = load_encoder_weights(
            model.encoder, checkpoint, num_heads=case.num_heads
        )
        assert "vit.reg_token" in report.missing
        images = torch.randn(2, 3, *case.sizes[1])
        count = images[0, 0].numel() // model.encoder.patch_size**2
        keep = torch.stack([torch.randperm(count) for _ in images])
        with torch.no_grad():
            whole, shuffled = model(images), model(images, keep)
            torch.testing.assert_close(
                shuffled.dense, whole.dense[torch.arange(2)[:, None], keep]
            )
            torch.testing.assert_close(shuffled.sparse, whole.sparse)
            model.save_pretrained(tmp_path)
            read = Stellar.from_pretrained(tmp_path)
            assert read(images).dense.equal(whole.dense)
            assert read.config == model.config

    def test_timm_export__comes_back(
        self, name: str, files: dict[str, tuple[Path, State]], tmp_path: Path
    ) -> None:
        case, (path, _) = CASES[name], files[name]
        encoder = create_encoder(path, num_heads=case.num_heads)
        state, metadata = to_timm(encoder)
        write_tensors(state, tmp_path / "timm.safetensors", metadata)
        vit = eval(  # as a user types it
            timm_call(encoder),
            {"timm": timm, "partial": partial, "LayerNorm": LayerNorm},
        )
        vit.load_state_dict(state)
        read, report = load_encoder(tmp_path / "timm.safetensors")
        assert report.untold == report.missing == report.unexpected == ()
        for size in case.sizes:
            images = torch.randn(1, 3, *size)
            with torch.no_grad():
                tokens = encoder.forward_features(images)
                assert read.forward_features(images).equal(tokens)
                assert encoder.vit.forward_features(images).equal(tokens)
                if size == case.sizes[0]:
                    theirs = vit.eval().forward_features(images)
                    torch.testing.assert_close(theirs, tokens, rtol=1e-5, atol=1e-5)


# What the published file holds; heads, side of the images in px, and the size of the
# file in GB where that is known.
FULL: dict[str, tuple[Callable[[], dict[str, Any]], int, int, float | None]] = {
    "MSN ViT-S/16": (partial(written.msn, 16, 14, 384, 12), 6, 224, None),
    "MSN ViT-B/16": (partial(written.msn, 16, 14, 768, 12), 12, 224, None),
    "MSN ViT-L/16": (partial(written.msn, 16, 14, 1024, 24), 16, 224, None),
    "MSN ViT-B/4": (partial(written.msn, 4, 56, 768, 12), 12, 224, None),
    "MSN ViT-L/7": (partial(written.msn, 7, 32, 1024, 24), 16, 224, None),
    "SiameseIM ViT-B/16": (partial(written.siamese_im, 16, 14, 768, 12), 12, 224, None),
    "MAE or SemMAE ViT-B/16": (partial(written.semmae, 16, 14, 768, 12), 12, 224, None),
    "MAE or SemMAE ViT-B/8": (partial(written.semmae, 8, 28, 768, 12), 12, 224, None),
    "SemMAE ViT-B/16": (partial(written.semmae, 16, 28, 768, 12), 12, 224, None),
    "AIM 600M": (partial(written.aim, 14, 1536, 24), 12, 224, 2.72),
    "AIM 1B": (partial(written.aim, 14, 2048, 24), 16, 224, 4.84),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size__published_names_and_shapes_fit(name: str) -> None:
    content, num_heads, side, gigabytes = FULL[name]
    state = content(fill=written.empty)
    checkpoint = parse(RawCheckpoint(Path(f"{name}.pth"), state))
    assert checkpoint.method is not None and name.startswith(checkpoint.method.name)
    assert checkpoint.unexpected == ()
    with torch.device("meta"):
        encoder = untrained_encoder(checkpoint)
    fitted(encoder, checkpoint, None)
    assert encoder.vit.blocks[0].attn.num_heads == num_heads
    assert encoder.image_size == (side, side)
    if gigabytes is not None:
        found = sum(4 * tensor.numel() for tensor in state.values()) / 1e9
        assert round(found, 2) == gigabytes


class TestAIM:
    def test_heads_of_128(self, tmp_path: Path) -> None:
        path = save(written.aim(width=256, depth=1), tmp_path / "a.pth")
        encoder, report = load_encoder(path)
        assert encoder.vit.blocks[0].attn.num_heads == 2
        assert report.untold == ("num_heads=2",)
        encoder, report = load_encoder(path, num_heads=4)
        assert encoder.vit.blocks[0].attn.num_heads == 4
        assert report.untold == ()

    def test_positions__another_encoder_is_refused(self, tmp_path: Path) -> None:
        path = save(written.aim(depth=1), tmp_path / "a.pth")
        config = encoder_config(read_checkpoint(path))
        other = StellarEncoder(**{**config, "pos_embed": "none"})
        with pytest.raises(ValueError, match=r"pos_embed=None \(checkpoint: sincos\)"):
            load_encoder_weights(other, path)
        none = to_timm(other)[0]
        theirs = save(none, tmp_path / "none.safetensors")
        encoder = StellarEncoder(**config)
        with pytest.raises(ValueError, match=r"pos_embed=sincos \(checkpoint: None\)"):
            load_encoder_weights(encoder, theirs, num_heads=1)

    def test_positions__of_the_grid_not_resampled(self) -> None:
        like = torch.empty(16, 3)
        torch.testing.assert_close(
            sincos_position((3, 5), like), sines(16)(3, 5)[None], rtol=0, atol=1e-6
        )
        assert sincos_position((3, 5), like.half()).dtype == torch.half
        with pytest.raises(ValueError, match="multiple of 4 for pos_embed='sincos'"):
            StellarEncoder(pos_embed="sincos", embed_dim=18, num_heads=1, depth=1)

    def test_half_precision(self, tmp_path: Path) -> None:
        path = save(written.aim(depth=1), tmp_path / "a.pth")
        encoder = create_encoder(path)
        images = torch.randn(1, 3, 28, 42)
        with torch.no_grad():
            dense = encoder(images).dense
            half = encoder.bfloat16()(images.bfloat16()).dense
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), dense, rtol=0.05, atol=0.05)


class TestMixedUp:
    def _refused(self, content: Any, match: str, folder: Path) -> None:
        path = save(content, folder / "mixed_up.pth")
        with pytest.raises(ValueError, match=rf"mixed_up\.pth.*{match}"):
            create_encoder(path, num_heads=4)

    def test_head_of_aim(self, tmp_path: Path) -> None:
        self._refused(written.aim_head(), "attention probe.*_backbone.pth", tmp_path)

    @pytest.mark.parametrize(
        "names",
        [
            ("preprocessor.pos_embed", "trunk.blocks.0.mlp.fc3.weight"),
            (
                "embeddings.patch_embed.weight",
                "encoder.layers.0.rms_norm1.weight",
                "encoder.layers.0.ffn.up_proj.weight",
            ),
        ],
    )
    def test_aim_v2(self, names: tuple[str, ...], tmp_path: Path) -> None:
        content = dict.fromkeys(names, torch.zeros(1))
        self._refused(content, "AIM v2.*timm:aimv2_large_patch14_224", tmp_path)

    def test_aim_v2_by_timms_names(self, tmp_path: Path) -> None:
        sizes = {"embed_dim": 64, "num_heads": 4, "depth": 1}
        vit = timm.create_model("aimv2_large_patch14_224", num_classes=0, **sizes)
        self._refused(
            vit.state_dict(), "no plain MLP.*gated.*by its timm name", tmp_path
        )

    def test_prototypes_of_msn(self, tmp_path: Path) -> None:
        content = {"prototypes": torch.ones(2, 2), "epoch": 1}
        self._refused(content, "prototypes of MSN.*target_encoder", tmp_path)

    def test_siamese_im__cut(self, tmp_path: Path) -> None:
        content = written.siamese_im(depth=3)
        state = content["model"]
        last, middle = (
            {k: v for k, v in state.items() if not k.startswith(f"blocks.{i}.")}
            for i in (2, 1)
        )
        self._refused({"model": last}, "2 blocks and the average of 3", tmp_path)
        self._refused(
            {"model": middle}, r"missing: vit\.blocks\.1.*read as SiameseIM", tmp_path
        )

    def test_siamese_im__fine_tuned(self, tmp_path: Path) -> None:
        state = written.vit(16, 4) | written.norm("fc_norm", 64, written.random)
        content = {"model": state | {"head.weight": torch.zeros(5, 64)}}
        checkpoint = read_checkpoint(save(content, tmp_path / "a.pth"))
        assert checkpoint.method is not None
        assert checkpoint.method.name == "a classifier"
        self._refused(content, r"missing: vit\.norm\.weight.*a classifier", tmp_path)

    def test_siamese_im__official_layout(self, tmp_path: Path) -> None:
        path = save(written.siamese_im(), tmp_path / "a.pth")
        known = inherited(read_checkpoint(path), {"num_heads": 4})
        model = Stellar(**{**known, **DECODER, "num_queries": 2, "norm_eps": 1e-12})
        with pytest.raises(ValueError, match=r"cannot hold .*no norm\.weight"):
            to_official(model)

    def test_msn_without_its_head__is_not_told(self, tmp_path: Path) -> None:
        content = written.msn()
        content["target_encoder"] = {
            k: v for k, v in content["target_encoder"].items() if ".fc." not in k
        }
        checkpoint = read_checkpoint(save(content, tmp_path / "a.pth"))
        assert checkpoint.method is None
