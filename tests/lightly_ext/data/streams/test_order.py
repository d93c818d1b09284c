from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightly_ext.data.streams.order import EpochPlan, num_lanes, plan_epoch


@pytest.mark.parametrize(
    ("shards", "lanes"), [(1, 1), (2, 2), (3, 2), (63, 32), (64, 64), (1000, 64)]
)
def test_num_lanes__power_of_two(shards: int, lanes: int) -> None:
    assert num_lanes(shards) == lanes


class TestPlanEpoch:
    COUNTS = (7, 1, 12, 3, 30, 5, 5, 9, 1, 4)

    def test_plan_epoch__by_hand_of_one_shard(self) -> None:
        # A buffer of all of it: one block, any order.
        plan = plan_epoch((5,), 0, 0, 5)
        assert sorted(plan.order.tolist()) == [0, 1, 2, 3, 4]
        assert plan.sequence.tolist() == [0, 1, 2, 3, 4]
        assert (plan.blocks.tolist(), plan.lanes.tolist()) == ([0, 5], [0, 5])
        # Blocks of one image: as they lie.
        assert plan_epoch((5,), 0, 0, 1).order.tolist() == [0, 1, 2, 3, 4]

    def test_plan_epoch__lanes_in_turns_as_they_lie(self) -> None:
        # Blocks of one: nothing but the deal of the shards is random.
        plan = plan_epoch((3, 3, 3, 3), 0, 0, 4)
        assert plan.order.reshape(3, 4).T.flatten().tolist() == plan.sequence.tolist()
        assert np.array_equal(plan.sequence.reshape(4, 3) % 3, [[0, 1, 2]] * 4)
        assert sorted(plan.sequence[::3].tolist()) == [0, 3, 6, 9]

    @pytest.mark.parametrize("buffer", [1, 8, 40, 1000])
    def test_plan_epoch__every_image_once_within_its_block(self, buffer: int) -> None:
        plan = plan_epoch(self.COUNTS, 3, 1, buffer)
        total, lanes, block = sum(self.COUNTS), 8, max(1, buffer // 8)
        assert sorted(plan.order.tolist()) == list(range(total))
        assert sorted(plan.sequence.tolist()) == list(range(total))
        assert set(plan.lanes) <= set(plan.blocks)
        assert len(plan.lanes) == lanes + 1
        assert np.diff(plan.blocks).max() <= block
        # By brute force: each lane hands on its blocks one after the other, in turns.
        left = [
            [list(plan.sequence[a:b]) for a, b in self._blocks(plan, lane)]
            for lane in range(lanes)
        ]
        lane = 0
        for number in plan.order:
            while not left[lane % lanes]:
                lane += 1
            blocks = left[lane % lanes]
            blocks[0].remove(number)
            if not blocks[0]:
                blocks.pop(0)
            lane += 1

    def _blocks(self, plan: EpochPlan, lane: int) -> list[tuple[int, int]]:
        start, stop = plan.lanes[lane : lane + 2]
        inside = [b for b in plan.blocks.tolist() if start <= b <= stop]
        return list(itertools.pairwise(inside))

    def test_plan_epoch__first_blocks_end_one_after_the_other(self) -> None:
        plan = plan_epoch((100,) * 4, 0, 0, 40)
        first = [self._blocks(plan, lane)[0] for lane in range(4)]
        assert [stop - start for start, stop in first] == [10, 8, 5, 3]

    def test_plan_epoch__lanes_are_of_like_length(self) -> None:
        counts = tuple(np.random.default_rng(0).integers(50, 150, 200).tolist())
        plan = plan_epoch(counts, 0, 0, 4096)
        lengths = np.diff(plan.lanes)
        # None is behind another by more than a shard.
        assert lengths.max() - lengths.min() <= max(counts)

    def test_plan_epoch__seed_and_epoch_decide(self) -> None:
        first = plan_epoch(self.COUNTS, 3, 1, 40).order
        plan_epoch.cache_clear()
        assert np.array_equal(plan_epoch(self.COUNTS, 3, 1, 40).order, first)
        for seed, epoch in ((3, 2), (4, 1)):
            other = plan_epoch(self.COUNTS, seed, epoch, 40).order
            assert (other == first).mean() < 0.2
