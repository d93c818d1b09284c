"""The same weights give the same features, whatever way they come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.checkpoints import create_encoder
from stellar_plugin.checkpoints.export import to_timm
from stellar_plugin.encoder import is_plain
from stellar_plugin.protocols import KNN
from tests.checkpoint_files import FILES, IMAGENET_HEAD, save, timm_vit, write_hub_cache
from tests.lightly_ext.evaluate.small import make_given

ARCHITECTURE = "test_vit"  # 160 px, 64 wide, which does not tell the 2 heads
SIZES = [(160, 160), (96, 96), (64, 192), (208, 176)]


def random_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(1)
    vit = timm.create_model(ARCHITECTURE, num_classes=0, **kwargs)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit.eval()


@pytest.fixture
def vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VisionTransformer:
    """What timm has as its own weights."""
    vit = random_vit()
    state = vit.state_dict() | IMAGENET_HEAD
    write_hub_cache(ARCHITECTURE, state, tmp_path / "hub", monkeypatch)
    return vit


def timms_own(vit: VisionTransformer) -> VisionTransformer:
    """The same weights in timm's model for images of every size."""
    model = timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True)
    model.load_state_dict(vit.state_dict())
    return model.eval()


def write_folder(folder: Path, vit: VisionTransformer) -> str:
    """As timm writes to the hub."""
    cfg = {"tag": "r160_in1k", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.95}
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    save(vit.state_dict(), folder / "model.safetensors")
    return str(folder)


def write_export(folder: Path, vit: VisionTransformer) -> str:
    path = save(vit.state_dict(), folder / "a.pth")
    state, metadata = to_timm(create_encoder(path, num_heads=2))
    save_file(state, folder / "timm.safetensors", metadata)
    return str(folder / "timm.safetensors")


HEADS = {"num_heads": 2}
# Way -> source, and arguments of `load_frozen_model`.
WAYS: dict[str, Callable[[Path, VisionTransformer], tuple[str, dict[str, Any]]]] = {
    "by name": lambda *_: (f"timm:{ARCHITECTURE}", {}),
    "by name without prefix": lambda *_: (ARCHITECTURE, {}),
    "name and file": lambda folder, vit: (
        f"timm:{ARCHITECTURE}",
        {"weights": str(save(vit.state_dict(), folder / "a.pth"))},
    ),
    "hub folder": lambda folder, vit: (write_folder(folder, vit), {}),
    "our export": lambda folder, vit: (write_export(folder, vit), {}),
    "safetensors": lambda folder, vit: (
        str(save(vit.state_dict(), folder / "a.safetensors")),
        {"model_kwargs": HEADS},
    ),
    **{
        name: lambda folder, vit, content=content: (
            str(save(content(dict(vit.state_dict())), folder / "a.pth")),
            {"model_kwargs": HEADS},
        )
        for name, content in FILES.items()
        if name.startswith(("timm", "a classifier"))
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_features_of_timm(way: str, vit: VisionTransformer, tmp_path: Path) -> None:
    source, options = WAYS[way](tmp_path, vit)
    frozen: Any = load_frozen_model(source, **options)
    model = timms_own(vit)
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens = model.forward_features(images)
            for ours in (frozen.backbone, frozen.backbone.vit):
                found = ours.forward_features(images)
                torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)
    origin = frozen.origin
    told = "name" in way or "folder" in way
    assert origin.mean == ((0.5,) * 3 if told else (0.485, 0.456, 0.406))
    assert origin.image_size == (160, 160)
    assert origin.crop_pct == (0.95 if told else None)
    if not told and way != "our export":
        assert origin.facts["not told, assumed"] == (
            "pos_antialias=True, activation=GELU, positions of 10 x 10 patches"
            + (", mean and std of ImageNet" if "classifier" not in way else "")
        )


def test_kept_with_the_result(vit: VisionTransformer, tmp_path: Path) -> None:
    content = {"state_dict_ema": vit.state_dict(), "state_dict": vit.state_dict()}
    path = str(save(content, tmp_path / "a.pth"))

    @evaluation
    def run(model: FrozenModel, devices: Devices, results: Results) -> Result:
        return results.result(model, "knn", "set", KNN, {}, {})

    result = run(*make_given(tmp_path, load_frozen_model(path, model_kwargs=HEADS)))
    assert result.provenance["weights"] == {
        "read as": "layout 'timm'",
        "told by": "nothing",
        "weights taken": "those of 'state_dict_ema', not of state_dict",
        "not told, assumed": "pos_antialias=True, activation=GELU, positions of "
        "10 x 10 patches, mean and std of ImageNet",
    }


def test_license__kept_with_the_result_and_deciding_nothing(
    vit: VisionTransformer, tmp_path: Path
) -> None:
    state = vit.state_dict() | {"decoder_pred.bias": torch.zeros(1)}
    path = str(save(state, tmp_path / "a.pth"))

    @evaluation
    def run(model: FrozenModel, devices: Devices, results: Results) -> Result:
        return results.result(model, "knn", "set", KNN, {}, {})

    result = run(*make_given(tmp_path, load_frozen_model(path, model_kwargs=HEADS)))
    text = "MAE CC BY-NC 4.0, SemMAE not stated"
    license = {"licence of the published weights": text}
    assert license.items() <= result.provenance["weights"].items()
    assert "CC BY-NC" not in str(result.identity)
    read_as = result.identity["model"]["facts"]["read as"]
    assert read_as == "MAE or SemMAE in layout 'timm'"


def test_untrained__as_trained(vit: VisionTransformer) -> None:
    trained = load_frozen_model(f"timm:{ARCHITECTURE}")
    untrained: Any = load_frozen_model(f"timm:{ARCHITECTURE}", untrained=True)
    untrained.load_state_dict(trained.state_dict())
    images = torch.randn(2, 3, 96, 128)
    assert untrained(images).dense.equal(trained(images).dense)
    assert untrained.origin.mean == trained.origin.mean


def test_model_kwargs__go_first(vit: VisionTransformer, tmp_path: Path) -> None:
    path = str(save(vit.state_dict(), tmp_path / "a.pth"))
    options = {**HEADS, "pos_antialias": False}
    frozen: Any = load_frozen_model(path, model_kwargs=options)
    images = torch.randn(2, 3, 96, 96)
    tokens = timms_own(vit).forward_features(images)
    difference = (frozen.backbone.forward_features(images) - tokens).abs().max()
    assert not frozen.backbone.pos_antialias and difference > 0.01
    # What the file or timm's name tells is not for an option to change.
    with pytest.raises(ValueError, match=r"pos_antialias=False \(checkpoint: True\)"):
        load_frozen_model(f"timm:{ARCHITECTURE}", model_kwargs=options)


def test_beit__mean_and_std_of_its_images(tmp_path: Path) -> None:
    state = dict(timm_vit(embed_dim=192, depth=1).state_dict())
    query, _, value = state.pop("blocks.0.attn.qkv.bias").chunk(3)
    state |= {"blocks.0.attn.q_bias": query, "blocks.0.attn.v_bias": value}
    frozen = load_frozen_model(str(save({"model": state}, tmp_path / "beit.pth")))
    assert frozen.origin.mean == frozen.origin.std == (0.5, 0.5, 0.5)
    assert frozen.resolve_feature("auto") == "dense"
    state["head.weight"] = torch.zeros(5, 192)
    frozen = load_frozen_model(str(save({"model": state}, tmp_path / "tuned.pth")))
    assert frozen.origin.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="read as a classifier"):
        frozen.resolve_feature("auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "aimv2_large_patch14_224",
        "deit3_small_patch16_224",
        "flexivit_small",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch16_siglip_224",
        "vit_base_patch32_clip_224",
        "vit_intern300m_patch14_448",
        "vit_medium_patch16_gap_240",
        "vit_small_patch14_reg4_dinov2",
        "vit_so150m_patch16_reg4_gap_256",
        "vit_so400m_patch14_siglip_gap_224",
    ],
)
def test_kinds_of_timm(name: str, tmp_path: Path) -> None:
    """Activations, norms, epsilons, registers, class tokens and pools."""
    sizes = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    torch.manual_seed(1)
    vit: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True, **sizes)
    assert is_plain(vit)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save(vit.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "model_args": sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = str(tmp_path / "model.safetensors")
    side = vit.patch_embed.patch_size[0]
    images = torch.randn(2, 3, 5 * side, 3 * side)
    with torch.no_grad():
        tokens = vit.eval().forward_features(images)
        for source, options in (
            (str(tmp_path), {}),
            (f"timm:{name}", {"weights": weights, "model_kwargs": sizes}),
        ):
            frozen: Any = load_frozen_model(source, **options)
            found = frozen.backbone.forward_features(images)
            torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)
            assert frozen.origin.mean == tuple(vit.pretrained_cfg["mean"])
            assert frozen.origin.interpolation == vit.pretrained_cfg["interpolation"]


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "test_vit2", "vit_tiny_r_s16_p8_224"]
)
def test_no_plain_vit__what_timm_pools(name: str) -> None:
    # Two class tokens; a norm behind the pool; a network before the patches.
    frozen = load_frozen_model(f"timm:{name}", untrained=True, seed=3)
    torch.manual_seed(3)
    model: Any = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        tokens = model.forward_features(images)
        pooled = model.forward_head(tokens, pre_logits=True)
        result = frozen.backbone(images)
    torch.testing.assert_close(result.cls, pooled, rtol=0, atol=1e-5)
    dense = tokens[:, model.num_prefix_tokens :]
    torch.testing.assert_close(result.dense, dense, rtol=0, atol=1e-5)
