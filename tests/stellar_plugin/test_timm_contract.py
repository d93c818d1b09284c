"""What timm asks of every model that it creates, of the sizes of STELLAR."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import stellar_plugin  # registers the sizes
from stellar_plugin.vit import SIZES

NAMES = [f"stellar_{size.name}" for size in SIZES]
CLASSES = 5


def model_of(name: str, **kwargs: Any) -> Any:
    """A model for images of two by two patches, shallow unless told otherwise."""
    side = 28 if "patch14" in name else 32
    torch.manual_seed(0)
    return timm.create_model(name, **{"img_size": side, "depth": 1, **kwargs}).eval()


def images_for(model: Any, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    height, width = model.patch_embed.img_size
    channels = model.patch_embed.proj.in_channels
    return torch.randn(batch, channels, height, width, generator=generator)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The smallest size, as deep as it is."""
    return model_of(NAMES[0], depth=12, num_classes=CLASSES)


def test_sizes__are_listed() -> None:
    assert stellar_plugin.Stellar  # the import is what is tested
    assert set(NAMES) == set(timm.list_models("stellar_vit_*"))
    assert timm.list_models("stellar_vit_*", pretrained=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sizes__default_cfg_names_what_is_there(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=CLASSES)
        output = model(torch.zeros(1, *model.default_cfg["input_size"]))
    assert output.shape == (1, CLASSES)
    names = model.state_dict().keys()
    cfg = model.default_cfg
    assert f"{cfg['first_conv']}.weight" in names
    assert f"{cfg['classifier']}.weight" in names
    assert model.get_classifier() is model.head
    assert model.num_features == model.head_hidden_size == model.head.in_features
    assert set(model.no_weight_decay()) & names == {
        *("cls_token", "reg_token", "pos_embed"),
    }
    assert [info["reduction"] for info in model.feature_info] == [
        model.patch_embed.patch_size[0]
    ] * len(model.blocks)


def test_forward__is_features_then_head_and_does_not_depend_on_the_batch(
    tiny: Any,
) -> None:
    images = images_for(tiny)
    with torch.no_grad():
        features = tiny.forward_features(images)
        logits = tiny.forward_head(features)
        torch.testing.assert_close(tiny(images), logits, rtol=0, atol=0)
        torch.testing.assert_close(tiny(images[1:]), logits[1:])
    assert features.shape == (2, 1 + 16 + 4, 192)
    assert logits.shape == (2, CLASSES) and logits.isfinite().all()


def test_backward__reaches_every_parameter(tiny: Any) -> None:
    model = copy.deepcopy(tiny).train()
    model(images_for(model)).mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []
    # A token's gradient may be small, and none is exactly nothing.
    assert model.reg_token.grad.abs().amax(-1).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_backward__other_sizes(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=CLASSES, depth=2)
        model(torch.zeros(2, 3, 224, 224)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_set_grad_checkpointing__same_gradients(tiny: Any) -> None:
    images = images_for(tiny)
    gradients = []
    for enable in (False, True):
        model = copy.deepcopy(tiny).train()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model(images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


@pytest.mark.parametrize("pool, tokens", [("token", 0), ("avg", 17), ("", None)])
def test_global_pool__and_reset_classifier(
    tiny: Any, pool: str, tokens: int | None
) -> None:
    model = copy.deepcopy(tiny)
    images = images_for(model)
    with torch.no_grad():
        features = model.forward_features(images)
        model.reset_classifier(0, pool)
        assert model.num_classes == 0
        assert isinstance(model.get_classifier(), nn.Identity)
        expected = features
        if tokens is not None:  # of the class token, or over the patches
            expected = features[:, 0] if tokens == 0 else features[:, tokens:].mean(1)
        torch.testing.assert_close(model(images), expected)
        pre_logits = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pre_logits, expected)
        model.reset_classifier(7)
        assert model(images).shape[-1] == 7


def test_num_classes_0__is_the_pooled_vector() -> None:
    model = model_of(NAMES[0], num_classes=0)
    images = images_for(model)
    with torch.no_grad():
        features = model.forward_features(images)
        torch.testing.assert_close(model(images), features[:, 0], rtol=0, atol=0)


def test_forward_intermediates__end_in_forward_features(tiny: Any) -> None:
    images = images_for(tiny)
    with torch.no_grad():
        features = tiny.forward_features(images)
        final, maps = tiny.forward_intermediates(images, indices=[3, 11], norm=True)
        _, prefixed = tiny.forward_intermediates(
            images, indices=1, output_fmt="NLC", return_prefix_tokens=True, norm=True
        )
    torch.testing.assert_close(final, features)
    assert [m.shape for m in maps] == [(2, 192, 2, 2)] * 2
    patches = features[:, tiny.num_prefix_tokens :]
    torch.testing.assert_close(maps[1].flatten(2).mT, patches)
    torch.testing.assert_close(torch.cat(prefixed[0][::-1], 1), features)


@pytest.mark.parametrize("out_indices", [None, (0, 2), (-1,)])
def test_features_only__maps_of_out_indices(out_indices: tuple[int, ...]) -> None:
    told = {} if out_indices is None else {"out_indices": out_indices}
    model: Any = model_of(NAMES[0], depth=3, features_only=True, **told)
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 32, 32))
    assert len(maps) == len(out_indices or range(3))
    assert model.feature_info.channels() == [m.shape[1] for m in maps]
    assert model.feature_info.reduction() == [32 // m.shape[2] for m in maps]


def test_group_matcher__layer_decay_orders_every_parameter(tiny: Any) -> None:
    groups = param_groups_layer_decay(tiny, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {name: scales[id(p)] for name, p in tiny.named_parameters()}
    assert len(of) == len(scales)
    depth = len(tiny.blocks)
    early = ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight")
    assert {of[name] for name in early} == {0.5 ** (depth + 1)}
    for index in range(depth):
        assert of[f"blocks.{index}.attn.qkv.weight"] == 0.5 ** (depth - index)
    assert of["norm.weight"] == of[f"blocks.{depth - 1}.norm1.weight"]  # as in ViTs
    assert of["head.weight"] == 1
    coarse = tiny.group_matcher(coarse=True)
    assert re.match(coarse["stem"], "reg_token")


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(in_chans: int) -> None:
    model = model_of(NAMES[0], in_chans=in_chans)
    with torch.no_grad():
        assert model(images_for(model)).shape == (2, 192)


def test_dynamic_img_size__and_set_input_size() -> None:
    fixed = model_of(NAMES[0])
    dynamic = model_of(NAMES[0], dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    images = torch.randn(1, 3, 48, 64)
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(images)
    fixed.set_input_size((48, 64))
    with torch.no_grad():
        torch.testing.assert_close(dynamic(images), fixed(images))


@pytest.mark.slow
def test_traced__fx_and_export() -> None:
    model = model_of(NAMES[0])
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        graph: Any = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(graph(images), expected)
        program = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(program(images), expected)
