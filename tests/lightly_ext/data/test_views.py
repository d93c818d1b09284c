from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from lightly_ext.data import (
    EpochSampler,
    SeededViews,
    SingleViewTransform,
    collate_views,
    epoch_order,
)


class TestCollateViews:
    def test_collate_views__order(self) -> None:
        samples = [
            (
                [
                    torch.full((3, 4, 4), 10 * i + v, dtype=torch.uint8)
                    for v in range(2)
                ],
                i,
            )
            for i in range(3)
        ]
        for index in range(3):
            for view in range(2, 5):
                samples[index][0].append(
                    torch.full((3, 2, 2), 10 * index + view, dtype=torch.uint8)
                )
        batch = collate_views(samples, num_global_views=2)
        assert batch.local_views is not None
        assert batch.global_views.shape == (3, 2, 3, 4, 4)
        assert batch.local_views.shape == (3, 3, 3, 2, 2)
        assert batch.global_views[:, :, 0, 0, 0].tolist() == [
            [0, 1],
            [10, 11],
            [20, 21],
        ]
        assert batch.local_views[:, :, 2, 1, 1].tolist() == [
            [2, 3, 4],
            [12, 13, 14],
            [22, 23, 24],
        ]

    def test_collate_views__without_local_views(self) -> None:
        views = [torch.zeros(3, 4, 4, dtype=torch.uint8)]
        batch = collate_views([(views, 0), (views, 1)], num_global_views=1)
        assert batch.global_views.shape == (2, 1, 3, 4, 4)
        assert batch.local_views is None


class TestSingleViewTransform:
    def test_call__identity_on_fitting_image(self) -> None:
        image = torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8)
        assert torch.equal(SingleViewTransform(60)(image), image)

    @pytest.mark.parametrize("size", [(30, 90), (90, 30)])
    def test_call__centre_of_the_longer_side(self, size: tuple[int, int]) -> None:
        columns = torch.arange(90, dtype=torch.uint8).expand(3, 30, 90)
        image = columns if size == (30, 90) else columns.transpose(1, 2)
        view = SingleViewTransform(30)(image)
        assert view.shape == (3, 30, 30)
        assert sorted(set(view.flatten().tolist())) == list(range(30, 60))

    @pytest.mark.parametrize("height", [20, 75])
    def test_call__bicubic_with_antialiasing(self, height: int) -> None:
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(256, (3, height, height), generator=generator).byte()
        view = SingleViewTransform(30)(image)
        # Pillow always antialiases.
        expected = F.pil_to_tensor(F.to_pil_image(image).resize((30, 30), 3))
        assert (view.int() - expected.int()).abs().max() <= 1


class Draws(Dataset):
    """A number and a random number for each image."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item()


class TestSeededViews:
    def test_getitem__depends_on_seed_epoch_and_image_only(self) -> None:
        draws = set()
        for seed in (0, 1):
            views = SeededViews(Draws(), seed)
            for views.epoch in (0, 1):
                draws |= {views[index] for index in range(len(views))}
        assert len({value for _, value in draws}) == 2 * 2 * 7
        torch.manual_seed(5)
        state = torch.get_rng_state()
        again = SeededViews(Draws(), 1)
        again.epoch = 1
        assert {again[index] for index in reversed(range(7))} < draws
        assert torch.equal(torch.get_rng_state(), state)

    def test_getitem__workers_like_none(self) -> None:
        views = SeededViews(Draws(), 3)
        loaded = []
        for workers in (0, 2):
            batches = list(DataLoader(views, 3, num_workers=workers))
            loaded.append(torch.cat([values for _, values in batches]))
        assert torch.equal(*loaded)

    def test_getitem__numbers_stay(self) -> None:
        # What trained heads and networks have seen: other seeds would move scores.
        views = SeededViews(Draws(), 0)
        views.epoch = 3
        assert views[2][1] == pytest.approx(0.9399001598)
        assert epoch_order(7, 0, 3).tolist() == [4, 6, 3, 0, 1, 2, 5]


class TestEpochSampler:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_iter__every_image_in_equal_shares(self, world_size: int) -> None:
        views = SeededViews(Draws(), 0)
        samplers = [EpochSampler(views, i, world_size) for i in range(world_size)]
        orders = []
        for epoch in (0, 1):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            shares = [list(sampler) for sampler in samplers]
            assert [len(share) for share in shares] == [len(s) for s in samplers]
            dealt = [i for turn in zip(*shares, strict=True) for i in turn]
            order = epoch_order(7, 0, epoch).tolist()
            # The first ones of the epoch fill up the last turn.
            assert dealt == (order + order)[: -(-7 // world_size) * world_size]
            orders.append(order)
        assert orders[0] != orders[1]

    def test_iter__whole_batches(self) -> None:
        views = SeededViews(Draws(), 0)
        samplers = [EpochSampler(views, rank, 2, batch_size=4) for rank in range(2)]
        samplers[0].set_epoch(3)
        shares = [list(sampler) for sampler in samplers]
        assert [len(s) for s in shares] == [len(s) for s in samplers] == [2, 2]
        dealt = [i for turn in zip(*shares, strict=True) for i in turn]
        assert dealt == epoch_order(7, 0, 3)[:4].tolist()
