from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.evaluate.images import folder_images
from lightly_ext.evaluate.text.probe import (
    TOKENS,
    AttentionProbe,
    cached_tokens,
    embed_images,
    resolve_tokens,
    token_set,
)
from stellar_plugin.protocols import ALIGN_TEXT
from tests.lightly_ext.evaluate.small import (
    EMBED_DIM,
    IMAGE_SIZE,
    NUM_QUERIES,
    Given,
    make_given,
    write_images,
    write_model,
)

PROTOCOL = ALIGN_TEXT.replace(resize=IMAGE_SIZE, crop=IMAGE_SIZE)


def _given(tmp_path: Path, model: str | None = None, **options: Any) -> Given:
    model = model or write_model(tmp_path / "model")
    return make_given(tmp_path, model, batch_size=4, **options)


class TestAttentionProbe:
    def test_forward__a_set_has_no_order(self) -> None:
        torch.manual_seed(0)
        probe = AttentionProbe(96, 16)
        tokens = torch.randn(3, 5, 96)
        embeddings = probe(tokens)
        assert embeddings.shape == (3, 16)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(probe(tokens.flip(1)), embeddings)

    @pytest.mark.parametrize(
        ("dim", "heads"), [(48, 1), (192, 3), (768, 12), (1000, 10)]
    )
    def test_heads__divide_the_size(self, dim: int, heads: int) -> None:
        assert AttentionProbe(dim, 8).pool.num_heads == heads

    def test_gradient__every_parameter(self) -> None:
        torch.manual_seed(0)
        probe = AttentionProbe(96, 16)
        probe(torch.randn(2, 3, 96))[:, 0].sum().backward()
        sums = {n: p.grad.abs().sum().item() for n, p in probe.named_parameters()}
        assert all(total > 0.1 for total in sums.values()), sums
        # The same for all keys: softmax does not see it.
        keys, values = probe.pool.kv.bias.grad.chunk(2)
        torch.testing.assert_close(keys, torch.zeros(96), rtol=0, atol=1e-4)
        assert values.abs().sum() > 0.1


class TestResolveTokens:
    @pytest.mark.parametrize(
        ("model", "features", "expected"),
        [
            (None, "auto", "sparse"),
            (None, "dense", "dense"),
            (None, "cls", "cls"),
            ("timm:vit_small_patch16_224.dino", "auto", "cls+dense"),
            ("timm:vit_base_patch16_224.mae", "auto", "dense"),
            ("timm:vit_small_patch14_dinov2.lvd142m", "auto", "cls+dense"),
            ("timm:resnet10t", "auto", "dense"),
        ],
    )
    @pytest.mark.slow
    def test_auto__a_set_of_tokens(
        self, tmp_path: Path, model: str | None, features: str, expected: str
    ) -> None:
        given = _given(tmp_path, model, untrained=model is not None)
        assert resolve_tokens(given.model, features) == expected

    def test_auto__unknown_method(self, tmp_path: Path) -> None:
        given = _given(tmp_path, "timm:vit_tiny_patch16_224", untrained=True)
        with pytest.raises(ValueError, match="name --features, one of sparse, dense"):
            resolve_tokens(given.model, "auto")


def test_token_set__all_tokens_of_both(tmp_path: Path) -> None:
    result = _given(tmp_path).model(torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    tokens = token_set(result, "cls+dense")
    assert torch.equal(tokens[:, 0], result.cls)
    assert torch.equal(tokens[:, 1:], result.dense)
    other = dataclasses.replace(result, cls=result.cls[:, :5])
    with pytest.raises(ValueError, match="differ in size, 5 and 48"):
        token_set(other, "cls+dense")


def test_cached_tokens__half_precision_of_the_encoder(tmp_path: Path) -> None:
    given = _given(tmp_path)
    files = folder_images(write_images(tmp_path / "images", 5, (32, 32)))
    cached = cached_tokens(given.cache, files, PROTOCOL, "sparse")
    assert cached.arrays[TOKENS].shape == (5, NUM_QUERIES, EMBED_DIM)
    assert cached.arrays[TOKENS].dtype == "float16"
    probe = AttentionProbe(EMBED_DIM, 8).eval()
    embeddings = embed_images(given.devices, probe, cached)
    tokens = torch.from_numpy(cached.arrays[TOKENS].copy()).float()
    torch.testing.assert_close(embeddings, probe(tokens).detach())


def test_cached_tokens__beyond_half_precision(tmp_path: Path) -> None:
    given = _given(tmp_path)
    files = folder_images(write_images(tmp_path / "images", 2))
    given.model.backbone.vit.norm.weight.data.fill_(1e6)
    with pytest.raises(RuntimeError, match="not finite in half precision"):
        cached_tokens(given.cache, files, PROTOCOL, "sparse")
