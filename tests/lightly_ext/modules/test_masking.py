from __future__ import annotations

import math

import pytest
import torch

from lightly_ext.modules import focal_bump, masking, random_focal_mask
from tests import reference


class TestFocalBump:
    def test_focal_bump__reference_numbers(self) -> None:
        f = {
            name.removeprefix("masking.gaussian."): tensor
            for name, tensor in reference.load("ops").items()
        }
        centre = torch.stack([f["center_y"], f["center_x"]], dim=1)
        bump = focal_bump((4, 4), centre, f["sigma"])
        biased = f["noise"] - f["use_focus"][:, None] * bump
        torch.testing.assert_close(biased, f["biased_noise"], rtol=0, atol=1e-6)
        assert torch.equal(biased.argsort(dim=1)[:, :4], f["ids_keep"])

    def test_focal_bump__non_square_closed_form(self) -> None:
        bump = focal_bump((2, 8), torch.tensor([[1, 5]]), torch.tensor([0.25]))
        bump = bump.view(2, 8)
        assert bump[1, 5] == 1.0
        # sigma = 0.25 * sqrt(16) = 1 patch
        assert bump[0, 5].item() == pytest.approx(math.exp(-0.5))
        assert bump[0, 3].item() == pytest.approx(math.exp(-(1 + 4) / 2))


class TestRandomFocalMask:
    @pytest.mark.parametrize(
        "grid_size, ratio, count",
        [
            ((14, 14), 0.8, 39),
            ((14, 14), 0.6, 78),
            ((10, 10), 0.9, 10),
            ((3, 5), 0, 15),
        ],
    )
    def test_random_focal_mask__distinct_patches(
        self, grid_size: tuple[int, int], ratio: float, count: int
    ) -> None:
        keep = random_focal_mask(64, grid_size, ratio)
        assert keep.shape == (64, count)
        assert keep.min() >= 0 and keep.max() < math.prod(grid_size)
        assert all(len(set(row.tolist())) == count for row in keep)

    def test_random_focal_mask__uniform_without_focus(self) -> None:
        generator = torch.Generator().manual_seed(0)
        keep = random_focal_mask(20000, (4, 4), 0.75, 0.0, generator=generator)
        share = torch.bincount(keep.flatten(), minlength=16) / 20000
        # 5 standard deviations of a share of 1/4
        assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 20000)

    def test_random_focal_mask__keeps_what_is_nearest_to_the_focus(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[torch.Tensor] = []

        def towering(
            grid_size: tuple[int, int], centre: torch.Tensor, sigma: torch.Tensor
        ) -> torch.Tensor:
            # No noise gets over the distance, only over the order of equal distances.
            drawn.extend([centre, sigma])
            y, x = torch.arange(6)[:, None], torch.arange(9)
            away = (y - centre[:, :1, None]) ** 2 + (x - centre[:, 1:, None]) ** 2
            return -2 * away.flatten(1)

        monkeypatch.setattr(masking, "focal_bump", towering)
        generator = torch.Generator().manual_seed(0)
        keep = random_focal_mask(8000, (6, 9), 0.8, 0.3, generator=generator)
        centre, sigma = drawn
        away = -towering((6, 9), centre, sigma) / 2
        farthest = away.gather(1, keep).amax(dim=1)
        nearest_hidden = away.scatter(1, keep, math.inf).amin(dim=1)
        focal = (farthest <= nearest_hidden).float().mean().item()
        # Within 4 standard errors, as all shares below.
        assert focal == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 8000))
        for places, side in zip(centre.long().T, (6, 9), strict=True):
            share = torch.bincount(places, minlength=side) / 8000
            assert len(share) == side
            error = math.sqrt((1 - 1 / side) / side / 8000)
            assert (share - 1 / side).abs().max() < 4 * error
        assert torch.equal(centre, centre.round())
        assert sigma.min().item() == pytest.approx(0.1, abs=1e-3)
        assert sigma.max().item() == pytest.approx(0.5, abs=1e-3)
        assert sigma.mean().item() == pytest.approx(
            0.3, abs=4 * 0.4 / (12 * 8000) ** 0.5
        )

    def test_random_focal_mask__focus_gathers(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def spread(focal_prob: float) -> float:
            keep = random_focal_mask(
                2000, (14, 14), 0.8, focal_prob, generator=generator
            )
            places = torch.stack([keep // 14, keep % 14]).float()
            return places.std(dim=2).mean().item()

        assert spread(1.0) < 0.85 * spread(0.0)

    def test_random_focal_mask__on_the_device(self) -> None:
        assert random_focal_mask(2, (4, 4), device="meta").device.type == "meta"

    def test_random_focal_mask__generator_decides(self) -> None:
        masks = [
            random_focal_mask(4, (6, 6), generator=torch.Generator().manual_seed(s))
            for s in (1, 1, 2)
        ]
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[0], masks[2])

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ({"mask_ratio": 0.99}, r"mask_ratio 0\.99 keeps none of the 2 x 3"),
            ({"mask_ratio": 1.0}, "keeps none"),
            ({"mask_ratio": -0.1}, "mask_ratio -0.1"),
            ({"focal_prob": 2.0}, "focal_prob"),
        ],
    )
    def test_random_focal_mask__bad_input(
        self, arguments: dict[str, float], match: str
    ) -> None:
        with pytest.raises(ValueError, match=match):
            random_focal_mask(1, (2, 3), **arguments)
