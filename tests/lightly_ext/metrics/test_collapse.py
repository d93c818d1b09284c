from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightly_ext.metrics import (
    effective_rank,
    mean_token_cosine,
    prototype_usage,
    signs_of_collapse,
)


class TestPrototypeUsage:
    def test_prototype_usage__closed_forms(self) -> None:
        prototypes = torch.eye(4)
        assert prototype_usage(torch.eye(4), prototypes) == pytest.approx(1.0)
        assert prototype_usage(torch.eye(4)[[1, 1, 1]], prototypes) == 0.0
        # Two of four prototypes, used alike
        embeddings = torch.eye(4)[[0, 0, 3, 3]].view(2, 2, 4)
        expected = math.log(2) / math.log(4)
        assert prototype_usage(embeddings, prototypes) == pytest.approx(expected)

    def test_prototype_usage__fewer_embeddings_than_prototypes(self) -> None:
        assert prototype_usage(torch.eye(4)[:2], torch.eye(4)) == pytest.approx(1.0)
        assert prototype_usage(torch.eye(4)[:1], torch.eye(4)) == 0.0


class TestEffectiveRank:
    def test_effective_rank__closed_forms(self) -> None:
        corners = torch.cat([torch.eye(3), -torch.eye(3)])
        assert effective_rank(corners) == pytest.approx(3.0, rel=1e-5)
        line = torch.linspace(-1, 1, 10)[:, None] * torch.ones(1, 5)
        assert effective_rank(line) == pytest.approx(1.0, rel=1e-3)

    def test_effective_rank__singular_values(self) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(4, 10, 6) * torch.arange(1, 7)
        rows = tokens.flatten(0, 1)
        singular = torch.linalg.svdvals(rows - rows.mean(0))
        share = singular / singular.sum()
        expected = (-(share * share.log()).sum()).exp()
        torch.testing.assert_close(effective_rank(tokens), expected)

    def test_effective_rank__all_the_same(self) -> None:
        assert effective_rank(torch.ones(3, 4, 5)) == 1


class TestMeanTokenCosine:
    def test_mean_token_cosine__brute_force(self) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(3, 5, 4)
        pairs = [
            F.cosine_similarity(image[i], image[j], dim=0)
            for image in tokens
            for i in range(5)
            for j in range(5)
            if i != j
        ]
        expected = torch.stack(pairs).mean()
        torch.testing.assert_close(mean_token_cosine(tokens), expected)

    def test_mean_token_cosine__identical_tokens(self) -> None:
        assert mean_token_cosine(torch.ones(2, 3, 4)) == pytest.approx(1.0)


class TestSignsOfCollapse:
    def test_signs_of_collapse__half_precision_is_only_read(self) -> None:
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(4, 7, 64, generator=generator).bfloat16()
        prototypes = torch.randn(99, 64, generator=generator)
        wide = signs_of_collapse(half.float(), half.float(), prototypes)
        assert signs_of_collapse(half, half, prototypes) == wide

    def test_signs_of_collapse__of_what_there_is(self) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(4, 3, 6, generator=generator)
        signs = signs_of_collapse(tokens, tokens, torch.eye(6))
        assert signs == {
            "token_rank": effective_rank(tokens),
            "token_cosine": mean_token_cosine(tokens),
            "prototype_usage": prototype_usage(tokens, torch.eye(6)),
        }
        # Of one token there is no other to compare with.
        alone = signs_of_collapse(tokens[:, :1], None, None)
        assert alone == {"token_rank": effective_rank(tokens[:, 0])}
