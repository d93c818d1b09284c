from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lightly_ext.loss import SetKoLeoLoss
from lightly_ext.metrics import (
    effective_rank,
    health_figures,
    localization_entropy,
    mean_token_cosine,
    nearest_token_distance,
    prototype_usage,
)


class TestPrototypeUsage:
    def test_prototype_usage__closed_forms(self) -> None:
        prototypes = torch.eye(4)
        assert prototype_usage(torch.eye(4), prototypes) == pytest.approx((1.0, 4))
        assert prototype_usage(torch.eye(4)[[1, 1, 1]], prototypes) == (0.0, 1)
        # Two of four prototypes, used alike
        embeddings = torch.eye(4)[[0, 0, 3, 3]].view(2, 2, 4)
        expected = math.log(2) / math.log(4)
        assert prototype_usage(embeddings, prototypes) == pytest.approx((expected, 2))

    def test_prototype_usage__fewer_embeddings_than_prototypes(self) -> None:
        found = prototype_usage(torch.eye(4)[:2], torch.eye(4))
        assert found == pytest.approx((1.0, 2))
        assert prototype_usage(torch.eye(4)[:1], torch.eye(4)) == (0.0, 1)


class TestEffectiveRank:
    def test_effective_rank__closed_forms(self) -> None:
        corners = torch.cat([torch.eye(3), -torch.eye(3)])
        assert effective_rank(corners) == pytest.approx(3.0, rel=1e-5)
        line = torch.linspace(-1, 1, 10)[:, None] * torch.ones(1, 5)
        assert effective_rank(line) == pytest.approx(1.0, rel=1e-3)

    def test_effective_rank__singular_values(self) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(4, 10, 6) * torch.arange(1, 7)
        singular = torch.linalg.svdvals(tokens.flatten(0, 1))
        share = singular / singular.sum()
        expected = (-(share * share.log()).sum()).exp()
        torch.testing.assert_close(effective_rank(tokens), expected)

    def test_effective_rank__all_the_same(self) -> None:
        torch.manual_seed(0)
        same = torch.ones(3, 4, 5)
        assert effective_rank(same) == 1
        noisy = same + 1e-3 * torch.randn(3, 4, 5)
        assert effective_rank(noisy) == pytest.approx(1.0, abs=0.03)


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


class TestNearestTokenDistance:
    def test_nearest_token_distance__closed_forms(self) -> None:
        # Lengths do not count; the first two are 60 degrees apart, the third 90 more.
        tokens = torch.tensor([[[2.0, 0.0], [0.5, 0.75**0.5], [-3 * 0.75**0.5, 1.5]]])
        expected = (1 + 1 + math.sqrt(2)) / 3
        assert nearest_token_distance(tokens) == pytest.approx(expected)
        assert nearest_token_distance(torch.ones(2, 3, 4)) == 0

    def test_nearest_token_distance__what_koleo_sees(self) -> None:
        torch.manual_seed(0)
        tokens = torch.randn(1, 2, 8)
        koleo = SetKoLeoLoss()(tokens)
        expected = torch.tensor(2 * math.exp(-koleo))
        torch.testing.assert_close(nearest_token_distance(tokens), expected)


class TestLocalizationEntropy:
    def test_localization_entropy__closed_forms(self) -> None:
        uniform = torch.full((2, 6, 4), 0.25)
        assert localization_entropy(uniform) == pytest.approx((1.0, 1.0))
        one_takes_all = torch.eye(4)[[2] * 6][None]
        assert localization_entropy(one_takes_all) == (0.0, 0.0)
        # Two of four tokens take half of the patches each.
        halves = torch.eye(4)[[0, 1, 0, 1]][None]
        assert localization_entropy(halves) == pytest.approx((0.0, 0.5))


class TestHealthFigures:
    def test_health_figures__half_precision_is_only_read(self) -> None:
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(4, 7, 64, generator=generator).bfloat16()
        prototypes = torch.randn(99, 64, generator=generator)
        localization = torch.rand(4, 9, 7, generator=generator).bfloat16()
        wide = health_figures(
            half.float(), half.float(), prototypes, localization.float()
        )
        assert health_figures(half, half, prototypes, localization) == wide

    def test_health_figures__of_what_there_is(self) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(4, 3, 6, generator=generator)
        localization = torch.rand(4, 9, 3, generator=generator).softmax(dim=-1)
        usage = prototype_usage(tokens, torch.eye(6))
        patch, image = localization_entropy(localization)
        assert health_figures(tokens, tokens, torch.eye(6), localization) == {
            "token_rank": effective_rank(tokens),
            "token_cosine": mean_token_cosine(tokens),
            "token_distance": nearest_token_distance(tokens),
            "localization_entropy": patch,
            "localization_usage": image,
            "prototype_usage": usage.entropy,
            "prototypes_used": usage.number,
        }
        # Of one token there is no other to compare with.
        alone = health_figures(tokens[:, :1], localization=localization[..., :1])
        assert alone == {"token_rank": effective_rank(tokens[:, 0])}

    def test_health_figures__not_finite_is_no_error(self) -> None:
        tokens = torch.randn(4, 3, 6)
        tokens[1, 0, 0] = torch.nan
        figures = health_figures(tokens, tokens, torch.eye(6), tokens.mT)
        assert figures["token_rank"].isnan() and figures["token_cosine"].isnan()
