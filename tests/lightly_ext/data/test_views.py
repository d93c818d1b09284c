from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from lightly_ext.data import (
    EpochSampler,
    SampleKey,
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
        assert batch.indices is not None
        assert batch.indices.tolist() == [0, 1]
        assert batch.seeds is None

    def test_collate_views__seeds(self) -> None:
        views = [torch.zeros(3, 4, 4, dtype=torch.uint8)]
        seeds = [-(2**63), 2**63 - 1]
        batch = collate_views([(views, 5, seeds[0]), (views, 6, seeds[1])], 1)
        assert batch.seeds is not None
        assert batch.seeds.tolist() == seeds
        assert batch.indices is not None
        assert batch.indices.tolist() == [5, 6]


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

    @pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
    def test_call__lines(self, size: tuple[int, int]) -> None:
        view = SingleViewTransform(224)(torch.full((3, *size), 7, dtype=torch.uint8))
        assert view.shape == (3, 224, 224)
        assert set(view.flatten().tolist()) == {7}

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
        keys = [SampleKey(epoch, number) for epoch in (0, 1) for number in range(7)]
        draws = {SeededViews(Draws(), seed)[key] for seed in (0, 1) for key in keys}
        assert len({value for _, value in draws}) == 2 * 2 * 7
        torch.manual_seed(5)
        state = torch.get_rng_state()
        again = SeededViews(Draws(), 1)
        assert {again[SampleKey(1, number)] for number in reversed(range(7))} < draws
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_getitem__persistent_workers_like_none(self, workers: int) -> None:
        # Workers hold copies, which do not see what the sampler is told later.
        loaded = []
        for arguments in ({}, {"num_workers": workers, "persistent_workers": True}):
            views = SeededViews(Draws(), 3)
            sampler = EpochSampler(views, 0, 1)
            loader = DataLoader(views, 3, sampler=sampler, **arguments)
            for epoch in (0, 1):
                sampler.set_epoch(epoch)
                loaded.append([batch[1] for batch in loader])
        (first, second, *again) = [torch.cat(values) for values in loaded]
        assert torch.equal(first, again[0]) and torch.equal(second, again[1])
        assert len(set(torch.cat([first, second]).tolist())) == 14

    def test_getitem__numbers_stay(self) -> None:
        # What trained heads and networks have seen: other seeds would move scores.
        views = SeededViews(Draws(), 0)
        assert views[SampleKey(3, 2)][1] == pytest.approx(0.9399001598)
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
            order = epoch_order(7, 0, epoch).tolist()
            # The first ones of the epoch fill up the last turn.
            turns = (order + order)[: -(-7 // world_size) * world_size]
            assert dealt(samplers) == [SampleKey(epoch, i) for i in turns]
            orders.append(order)
        assert orders[0] != orders[1]

    def test_iter__whole_batches(self) -> None:
        views = SeededViews(Draws(), 0)
        samplers = [EpochSampler(views, rank, 2, batch_size=4) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(3)
        assert dealt(samplers) == [SampleKey(3, i) for i in epoch_order(7, 0, 3)[:4]]

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_iter__goes_on_in_mid_epoch(self, world_size: int) -> None:
        views = SeededViews(Draws(), 0)
        samplers = [EpochSampler(views, i, world_size, 2) for i in range(world_size)]
        for sampler in samplers:
            sampler.epoch, sampler.start = 1, 4
            sampler.set_epoch(1)
        keys = [SampleKey(1, i) for i in epoch_order(7, 0, 1)[4:6]]
        assert dealt(samplers, length=2) == keys
        for sampler in samplers:
            assert len(sampler) == 6 // world_size  # of a whole epoch
            sampler.set_epoch(2)
        assert dealt(samplers) == [SampleKey(2, i) for i in epoch_order(7, 0, 2)[:6]]


def dealt(samplers: list[EpochSampler], length: int | None = None) -> list[SampleKey]:
    """What all processes get, in turn."""
    shares = [list(sampler) for sampler in samplers]
    expected = sum(map(len, samplers)) if length is None else length
    assert {len(share) for share in shares} == {expected // len(samplers)}
    return [key for turn in zip(*shares, strict=True) for key in turn]
