"""The table of published methods, and what follows from a row of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from lightly_ext.evaluate.loading import load_frozen_model
from stellar_plugin import StellarEncoder
from stellar_plugin.checkpoints import (
    create_encoder,
    methods,
    numerics,
    read_checkpoint,
)
from stellar_plugin.checkpoints.layouts import TRANSFORMERS
from stellar_plugin.checkpoints.load import LICENSE, load_encoder
from stellar_plugin.checkpoints.methods import METHODS, Files, Method, Paper
from stellar_plugin.checkpoints.names import to_transformers
from stellar_plugin.protocols import FEATURES
from tests.checkpoint_files import assert_same_tokens, prefixed, save, timm_vit

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# What the row of a baseline says, and nothing else in the code base does.
MADE_UP = Method(
    "Made-up",
    "cls+dense",
    (
        Files(
            wrappers=("slow_network",),
            renamed={"attention.": "attn."},
            ignored=("guess.",),
            norm_eps=1e-5,
            pos_antialias=True,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        Files(
            TRANSFORMERS,
            wrappers=("slow_network",),
            renamed={"norm_before.": "layernorm_before."},
            ignored=("guess.",),
            norm_eps=1e-5,
        ),
    ),
    (Paper("Made-up", "https://arxiv.org/abs/0000.00000"),),
    timm_names=("*.made_up",),
)


def write_made_up(folder: Path) -> Path:
    state = timm_vit(embed_dim=192, norm_layer=torch.nn.LayerNorm).state_dict()
    state = {name.replace("attn.", "attention."): v for name, v in state.items()}
    state["guess.weight"] = torch.zeros(2)
    content = {
        "quick_network": {name: value + 1 for name, value in state.items()},
        "slow_network": prefixed(state, "module."),
    }
    return save(content, folder / "made_up.pth")


class TestARowMakesABaseline:
    @pytest.fixture(autouse=True)
    def row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(methods, "METHODS", (*METHODS, MADE_UP))

    def test_its_file_loads(self, tmp_path: Path) -> None:
        path = write_made_up(tmp_path)
        checkpoint = read_checkpoint(path)
        assert checkpoint.method is MADE_UP
        assert set(checkpoint.ignored) == {"guess.weight", "quick_network"}
        assert checkpoint.unexpected == ()
        assert numerics(checkpoint) == {
            "norm_eps": 1e-5,
            "pos_antialias": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
        }
        vit = timm_vit(embed_dim=192, norm_layer=torch.nn.LayerNorm)
        assert_same_tokens(create_encoder(path), vit)

    def test_its_file_by_transformers_names_loads(self, tmp_path: Path) -> None:
        vit = timm_vit(embed_dim=192, norm_layer=torch.nn.LayerNorm)
        state = to_transformers(vit.state_dict())
        state = {k.replace("layernorm_b", "norm_b"): v for k, v in state.items()}
        state["guess.weight"] = torch.zeros(2)
        checkpoint = read_checkpoint(
            save({"slow_network": state}, tmp_path / "made_up.pth")
        )
        assert checkpoint.method is MADE_UP
        assert checkpoint.ignored == ("guess.weight",)
        assert checkpoint.unexpected == ()
        assert_same_tokens(create_encoder(checkpoint), vit)

    def test_its_features_are_probed(self, tmp_path: Path) -> None:
        frozen = load_frozen_model(str(write_made_up(tmp_path)))
        assert frozen.origin.method == "Made-up"
        assert frozen.resolve_feature("auto") == "cls+dense"
        images = torch.rand(2, 3, 64, 64)
        vit = timm_vit(embed_dim=192, norm_layer=torch.nn.LayerNorm)
        with torch.no_grad():
            tokens = vit.forward_features((images - 0.5) / 0.25)
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
        pooled = frozen.pooled(images, "cls+dense")
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-4)

    def test_timms_weights_of_it(self) -> None:
        assert methods.of_timm("vit_tiny_patch16_224.made_up") is MADE_UP

    def test_table_and_messages_name_it(self, tmp_path: Path) -> None:
        assert methods.table().splitlines()[-1] == (
            "| [Made-up](https://arxiv.org/abs/0000.00000) | not stated | timm: "
            "wrapper `slow_network`; transformers ViT: wrapper `slow_network` | "
            "`cls+dense` | `*.made_up` |"
        )
        path = save({"conv.weight": torch.ones(1)}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"Known layouts: .*DINOv3, Made-up"):
            read_checkpoint(path)


def test_without_the_row__unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no known layout"):
        read_checkpoint(write_made_up(tmp_path))


class TestLicense:
    def test_license__of_papers_that_differ_each(self) -> None:
        free, none = Paper("A", "", license="MIT"), Paper("B", "")
        assert Method("", None, (), (free,)).license == "MIT"
        assert Method("", None, (), (none, none)).license == ""
        assert Method("", None, (), (free, none)).license == "A MIT, B not stated"

    def test_license__is_logged_and_in_the_facts(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = timm_vit().state_dict() | {"decoder_pred.bias": torch.zeros(1)}
        path = save(state, tmp_path / "mae.pth")
        with caplog.at_level("INFO"):
            _, report = load_encoder(path, num_heads=3)
        license = "MAE CC BY-NC 4.0, SemMAE not stated"
        assert report.facts[LICENSE] == license
        assert f"{LICENSE}: {license}" in caplog.text


class TestCalled:
    @pytest.mark.parametrize(
        "name", ["dino_vitbase16_pretrain.pth", "checkpoint_teacher.pth"]
    )
    def test_backbone_of_dino_and_ibot__by_its_name(
        self, name: str, tmp_path: Path
    ) -> None:
        state = timm_vit().state_dict()
        checkpoint = read_checkpoint(save(state, tmp_path / name))
        assert checkpoint.method is not None
        assert checkpoint.method.name == "DINO or iBOT"
        assert checkpoint.rule == f"name of the file, {name}"
        assert numerics(checkpoint)["pos_antialias"] is False
        renamed = read_checkpoint(save(state, tmp_path / "mine.pth"))
        assert renamed.method is None

    def test_what_tensors_tell__goes_first(self, tmp_path: Path) -> None:
        state = timm_vit().state_dict() | {"head.weight": torch.zeros(10, 48)}
        path = save(state, tmp_path / "checkpoint_teacher.pth")
        method = read_checkpoint(path).method
        assert method is not None and method.name == "a classifier"


class TestSystemOf:
    @pytest.mark.parametrize(
        ("source", "method", "name"),
        [
            ("mae_pretrain_vit_large.pth", "MAE", "MAE ViT-L"),
            ("mae_pretrain_vit_large.pth", "MAE or SemMAE", "MAE ViT-L"),
            ("checkpoints/mae_pretrain_vit_base.pth", "MAE", "MAE ViT-B"),
            ("stellar-h16", "STELLAR", "STELLAR ViT-H"),
            # Of another method, or of none that its tensors tell.
            ("mae_pretrain_vit_base.pth", "a classifier", None),
            ("dino_vitbase16_pretrain.pth", "timm", None),
            ("dino_vitbase16_pretrain.pth", "DINO or iBOT", "DINO ViT-B"),
            # The files of all sizes have this name.
            ("checkpoint_teacher.pth", "DINO or iBOT", None),
            ("ibot/checkpoint_teacher.pth", "DINO or iBOT", None),
            ("a/ibot_large/checkpoint_teacher.pth", "DINO or iBOT", "iBOT ViT-L"),
            ("base_800/checkpoint-799.pth", "data2vec", "Data2Vec ViT-B"),
            ("mine/checkpoint-799.pth", "data2vec", None),
            ("mae_pretrain_vit_base.pth/model.pth", "MAE", None),
            ("mine_mae_pretrain_vit_base.pth", "MAE", None),
        ],
    )
    def test_system_of__name_and_method(
        self, source: str, method: str, name: str | None
    ) -> None:
        system = methods.system_of(source, method)
        assert (system.name if system else None) == name


def test_docs__have_the_table() -> None:
    assert methods.table() in PAGE.read_text()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
class TestEveryRow:
    def test_feature_exists(self, method: Method) -> None:
        assert method.feature in (*FEATURES, None)

    def test_timm_names__stand_in_timm(self, method: Method) -> None:
        for pattern in method.timm_names:
            known = [*timm.list_pretrained(pattern), *timm.list_models(pattern)]
            assert known, pattern
            assert all(methods.of_timm(name) is method for name in known)

    def test_vit_b__builds(self, method: Method) -> None:
        with torch.device("meta"):
            encoder = StellarEncoder(num_queries=0, **method.vit_b)
        assert encoder.embed_dim == 768


OF_TIMM = {
    "MAE": {f"vit_{size}_224.mae" for size in ("base_patch16", "large_patch16")}
    | {"vit_huge_patch14_224.mae"},
    "DINO or iBOT": {
        f"vit_{size}_patch{side}_224.dino"
        for size in ("small", "base")
        for side in (8, 16)
    },
    "DINOv2": {
        f"vit_{size}_patch14_{registers}dinov2.lvd142m"
        for size in ("small", "base", "large", "giant")
        for registers in ("", "reg4_")
    },
    "DINOv3": {
        f"vit_{size}_patch16_dinov3{bias}.lvd1689m"
        for size in ("small", "small_plus", "base", "large", "huge_plus")
        for bias in ("", "_qkvb")
    }
    | {"vit_7b_patch16_dinov3.lvd1689m"}
    | {f"vit_{size}_patch16_dinov3.sat493m" for size in ("large", "7b")}
    | {"vit_large_patch16_dinov3_qkvb.sat493m"},
    "EUPE": {
        f"vit_{size}_patch16_dinov3_qkvb.eupe_lvd1689m"
        for size in ("tiny", "small", "base")
    },
    "LingBot-Vision": set(timm.list_pretrained("vit_*_lingbot")),
    "EVA-CLIP": set(timm.list_pretrained("eva*_clip_*")),
    "I-JEPA": {
        "vit_giant_patch16_gap_224.in22k_ijepa",
        "vit_huge_patch14_gap_224.in1k_ijepa",
        "vit_huge_patch14_gap_224.in22k_ijepa",
        "vit_huge_patch16_gap_448.in1k_ijepa",
    },
}


class TestOfTimm:
    def test_every_name__its_method_or_none(self) -> None:
        kinds = ("vit*", "deit*", "beit*", "eva*", "flexi*", "aim*", "test_vit*")
        names = set(timm.list_pretrained(list(kinds)))
        found: dict[str, set[str]] = {}
        for name in names:
            if method := methods.of_timm(name):
                found.setdefault(method.name, set()).add(name)
        assert found == OF_TIMM
        # Supervised, CLIP, SigLIP, DINOv3, ...: features must be named.
        assert len(names) - sum(map(len, found.values())) > 300

    def test_others(self) -> None:
        for name in ("hiera_base_224.mae_in1k_ft_in1k", "convnextv2_atto.fcmae"):
            assert methods.of_timm(name) is None

    def test_without_tag__that_of_timms_own_weights(self, tmp_path: Path) -> None:
        name, small = "timm:vit_small_patch8_224", {"depth": 1}
        frozen = load_frozen_model(name, untrained=True, model_kwargs=small)
        assert frozen.origin.method == "DINO or iBOT"
        assert frozen.resolve_feature("auto") == "cls"
        # Of other weights the architecture says nothing.
        vit = timm.create_model("vit_small_patch8_224", num_classes=0, depth=1)
        path = str(save(vit.state_dict(), tmp_path / "mine.pth"))
        frozen = load_frozen_model(name, weights=path, model_kwargs=small)
        with pytest.raises(ValueError, match=r"name --features, one of .*dense, cls"):
            frozen.resolve_feature("auto")
        tagged = f"{name}.dino"
        frozen = load_frozen_model(tagged, weights=path, model_kwargs=small)
        assert frozen.resolve_feature("auto") == "cls"
        assert frozen.origin.facts["told by"] == f"timm's name {tagged[5:]}"


def test_ignored__file_of_an_unknown_method(tmp_path: Path) -> None:
    # iBOT's without its wrapper: nothing says who trained it, yet nothing is odd.
    state = timm_vit().state_dict() | {"masked_embed": torch.zeros(1, 48)}
    checkpoint = read_checkpoint(save(state, tmp_path / "bare.pth"))
    assert checkpoint.method is None
    assert checkpoint.ignored == ("masked_embed",)
    assert checkpoint.unexpected == ()
