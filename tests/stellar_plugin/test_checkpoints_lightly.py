"""What lightly's examples and lightly-train save: names of their own modules."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightly_ext.evaluate.loading import load_frozen_model
from stellar_plugin.checkpoints import create_encoder, load_encoder, read_checkpoint
from tests.checkpoint_files import State, assert_same_tokens, prefixed, save, timm_vit

modules = pytest.importorskip("lightly.models.modules")
HEADS = {"num_heads": 3}


def vit_with_classifier(**kwargs: Any) -> VisionTransformer:
    """As lightly and lightly-train build it: the classifier stays, untrained."""
    return timm_vit(num_classes=10, dynamic_img_size=True, **kwargs)


def masked(vit: VisionTransformer) -> nn.Module:
    module: nn.Module = modules.MaskedVisionTransformerTIMM(
        vit, weight_initialization="skip", pos_embed_initialization="skip"
    )
    return module


def last_layers() -> nn.Module:
    sizes = {"hidden_dim": 8, "bottleneck_dim": 4, "output_dim": 8}
    head: nn.Module = modules.DINOProjectionHead(48, **sizes)
    return head


def decoder() -> nn.Module:
    sizes = {"num_patches": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    module: nn.Module = modules.MaskedVisionTransformerDecoderTIMM(**sizes)
    return module


def decoder_before_1_6() -> nn.Module:
    module = nn.ModuleDict({"decoder_embed": nn.Linear(48, 16)})
    module.mask_token = nn.Parameter(torch.zeros(1, 1, 16))
    return module


def wrapped(vit: VisionTransformer) -> nn.Module:
    """lightly-train's EmbeddingModel around its ModelWrapper around a ViT."""
    return nn.ModuleDict({"wrapped_model": nn.ModuleDict({"_model": vit})})


def both_heads() -> nn.Module:
    return nn.ModuleDict({"dino_head": last_layers(), "ibot_head": last_layers()})


# Whose checkpoint -> its modules around a ViT and another one, the method, the feature,
# which of the two is taken. Names of attributes are those of lightly 1.6.0
# (benchmarks/imagenet/vitb16, examples/pytorch_lightning) and lightly-train 0.18.0.
SAVED: dict[str, tuple[Callable[..., dict[str, nn.Module]], str, str, str]] = {
    "lightly, MAE": (
        lambda vit, _: {
            "backbone": masked(vit),
            "decoder_embed": nn.Linear(48, 16),
            "decoder": decoder(),
            "prediction_head": nn.Linear(16, 768),
        },
        "MAE",
        "dense",
        "",
    ),
    "lightly before 1.6, MAE": (
        lambda vit, _: {"backbone": masked(vit), "decoder": decoder_before_1_6()},
        "MAE",
        "dense",
        "",
    ),
    "lightly, DINO": (
        lambda vit, other: {
            "backbone": masked(vit),
            "projection_head": last_layers(),
            "student_backbone": masked(other),
            "student_projection_head": last_layers(),
        },
        "DINO or iBOT",
        "cls",
        "backbone.vit', not of student_backbone.vit",
    ),
    "lightly, iBOT": (
        lambda vit, other: {
            "student_backbone": masked(other),
            "teacher_backbone": masked(vit),
            "student_head": last_layers(),
            "teacher_head": last_layers(),
        },
        "DINO or iBOT",
        "cls",
        "teacher_backbone.vit', not of student_backbone.vit",
    ),
    "lightly, DINOv2": (
        lambda vit, other: {
            "student_backbone": masked(other),
            "teacher_backbone": masked(vit),
            "student_head": both_heads(),
            "teacher_head": both_heads(),
        },
        "DINOv2",
        "cls+dense",
        "teacher_backbone.vit', not of student_backbone.vit",
    ),
    "lightly-train, DINO": (
        lambda vit, other: {
            "student_embedding_model": wrapped(other),
            "teacher_embedding_model": wrapped(vit),
            "student_projection_head": last_layers(),
            "teacher_projection_head": last_layers(),
        },
        "DINO or iBOT",
        "cls",
        "wrapped_model._model', not of student_embedding_model.wrapped_model._model",
    ),
    "lightly-train, SimCLR": (
        lambda vit, _: {"embedding_model": wrapped(vit)},
        "",
        "",
        "",
    ),
    "lightly, SimMIM": (
        lambda vit, _: {"backbone": masked(vit), "decoder": nn.Linear(48, 8)},
        "",
        "",
        "",
    ),
}


def state_of(parts: dict[str, nn.Module]) -> State:
    return {
        k: v for n, m in parts.items() for k, v in m.state_dict(prefix=f"{n}.").items()
    }


@pytest.mark.parametrize("name", SAVED)
def test_checkpoint(name: str, tmp_path: Path) -> None:
    make, method, feature, choice = SAVED[name]
    scale = {"init_values": 0.5} if "iBOT" in name or "v2" in name else {}
    vit = vit_with_classifier(**scale)
    other = vit_with_classifier(depth=1)
    content = {
        "state_dict": state_of(make(vit, other)),
        "hyper_parameters": {"batch_size_per_device": 8, "num_classes": 10},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "pytorch-lightning_version": "2.6.6",
    }
    path = save(content, tmp_path / "last.ckpt")
    encoder, report = load_encoder(path, **HEADS)
    assert report.read_as == (f"{method} in " if method else "") + "layout 'timm'"
    assert report.missing == report.unexpected == report.resized == ()
    assert choice in report.choice and bool(choice) == bool(report.choice)
    assert_same_tokens(encoder, vit)
    frozen = load_frozen_model(str(path), model_kwargs=HEADS)
    if feature:
        assert frozen.resolve_feature("auto") == feature
    else:
        with pytest.raises(ValueError, match="name --features, one of"):
            frozen.resolve_feature("auto")


def test_mae__positions_as_lightly_resamples_them(tmp_path: Path) -> None:
    backbone = masked(vit_with_classifier(sines=True))
    state = state_of({"backbone": backbone, "decoder": decoder_before_1_6()})
    encoder = create_encoder(save(state, tmp_path / "a.ckpt"), **HEADS)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.forward_features(images),
            backbone.encode(images),  # type: ignore[operator]
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize("scale", [{}, {"init_values": 0.5}])
def test_wrapper_alone__does_not_tell(tmp_path: Path, scale: dict[str, float]) -> None:
    """Mask token, classifier and LayerScale are of the wrapper, not of a method."""
    vit = vit_with_classifier(**scale)
    path = save(masked(vit).state_dict(), tmp_path / "backbone.pth")
    encoder, report = load_encoder(path, **HEADS)
    assert report.read_as == "layout 'timm'"
    assert_same_tokens(encoder, vit)


def test_wrapped_without_mask_token__classifier_tells(tmp_path: Path) -> None:
    state = prefixed(vit_with_classifier().state_dict(), "vit.")
    checkpoint = read_checkpoint(save(state, tmp_path / "a.pth"))
    assert checkpoint.read_as == "a classifier in layout 'timm'"


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import sys; sys.modules['ran'] = None",)


def test_lightly_train__objects_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of lightly-train holds the model as an object, too."""
    package = types.ModuleType("lightly_train")
    embedding_model = type(
        "EmbeddingModel", (nn.Module,), {"__module__": package.__name__}
    )
    monkeypatch.setattr(package, "EmbeddingModel", embedding_model, raising=False)
    vit = vit_with_classifier()
    model: Any = embedding_model()
    model.wrapped_model = vit
    content = {
        "state_dict": state_of({"embedding_model": wrapped(vit)}),
        "lightly_train": {
            "version": "0.18.0",
            "models": {"model": vit, "embedding_model": model, "other": _Runs()},
            "normalize_args": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        },
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lightly_train", package)
        path = save(content, tmp_path / "last.ckpt")
    encoder, report = load_encoder(path, **HEADS)
    assert "ran" not in sys.modules
    assert_same_tokens(encoder, vit)
    assert report.config["mean"] == [0.1, 0.2, 0.3]
    assert load_frozen_model(str(path), model_kwargs=HEADS).origin.std == (
        0.4,
        0.5,
        0.6,
    )
    # Without lightly-train's, objects are refused as ever.
    content["lightly_train"]["models"].pop("embedding_model")
    with pytest.raises(ValueError, match=r"no file of tensors alone: it holds"):
        read_checkpoint(save(content, tmp_path / "last.ckpt"))


def test_lightly_train__export_of_dinov2(tmp_path: Path) -> None:
    vit = timm_vit(init_values=0.5)
    state = vit.state_dict() | {"mask_token": torch.zeros(1, 48)}
    encoder, report = load_encoder(save(state, tmp_path / "exported_last.pt"), **HEADS)
    assert report.read_as == "DINOv2 in layout 'timm'"
    assert_same_tokens(encoder, vit)


def test_unknown__says_what_is_read(tmp_path: Path) -> None:
    path = save({"backbone.conv1.weight": torch.ones(1)}, tmp_path / "resnet.ckpt")
    with pytest.raises(ValueError, match=r"Known layouts: .*DINOv2.* 'teacher_back"):
        read_checkpoint(path)
