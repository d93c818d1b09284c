"""The order of images that lie in shards: random, and read nearly as they lie."""

from __future__ import annotations

import heapq
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lightly_ext.randomness import mix_seeds

MAX_LANES = 64
Numbers = npt.NDArray[np.int64]


class EpochPlan(NamedTuple):
    """In which order the images of an epoch are read, and handed on.

    Attributes:
        order:
            Numbers of the images by their positions in the epoch, int64 with shape
            (N,).
        sequence:
            The same numbers as they are read, lane after lane and shard after shard.
        blocks:
            Where blocks start in `sequence`, and where the last one ends: int64 with
            shape (num_blocks + 1,). Images are shuffled within blocks.
        lanes:
            The same for lanes, each of which is whole blocks.
    """

    order: Numbers
    sequence: Numbers
    blocks: Numbers
    lanes: Numbers


def num_lanes(num_shards: int) -> int:
    """Shards that are read side by side: a power of two, which processes divide."""
    return 1 << min(num_shards, MAX_LANES).bit_length() - 1


@lru_cache(maxsize=1)
def plan_epoch(
    shard_sizes: tuple[int, ...], seed: int, epoch: int, buffer: int
) -> EpochPlan:
    """Plans an epoch, a function of nothing but the arguments.

    Shards are dealt to lanes in random order. In each lane images are shuffled within
    blocks of `buffer / lanes`; the first block of a lane is the shorter, the higher its
    number, so that they do not all end at once. Positions go to lanes in turns.

    Args:
        shard_sizes:
            Number of images of each shard, all > 0.
        seed:
            Decides on the order of all epochs.
        epoch:
            Number of the epoch.
        buffer:
            Images of all lanes that are shuffled with each other.

    Returns:
        The order, and how to read it.
    """
    counts = np.array(shard_sizes, np.int64)
    generator = torch.Generator().manual_seed(mix_seeds(seed, epoch))
    lanes = num_lanes(len(counts))
    shards = _dealt(counts, torch.randperm(len(counts), generator=generator), lanes)
    sequence = _rows(counts, np.concatenate(shards))
    totals = np.array([counts[lane].sum() for lane in shards])
    lane = np.repeat(np.arange(lanes), totals)
    turn = np.arange(len(sequence)) - np.repeat(totals.cumsum() - totals, totals)
    block = max(1, buffer // lanes)
    within = (turn + lane * block // lanes) // block
    random = torch.rand(len(sequence), dtype=torch.float64, generator=generator)
    shuffled = sequence[np.lexsort((random.numpy(), within, lane))]
    starts = np.flatnonzero(np.diff(within, prepend=-1) | np.diff(lane, prepend=-1))
    return EpochPlan(
        order=shuffled[np.argsort(turn * lanes + lane, kind="stable")],
        sequence=sequence,
        blocks=np.append(starts, len(sequence)),
        lanes=np.append(0, totals.cumsum()),
    )


def _dealt(counts: Numbers, order: torch.Tensor, lanes: int) -> list[Numbers]:
    """Shards of every lane: each goes to the one that has the fewest images so far."""
    heap = [(0, lane) for lane in range(lanes)]
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    for shard in order.tolist():
        total, lane = heap[0]
        dealt[lane].append(shard)
        heapq.heapreplace(heap, (total + int(counts[shard]), lane))
    return [np.array(shards, np.int64) for shards in dealt]


def _rows(counts: Numbers, shards: Numbers) -> Numbers:
    """Numbers of the images of shards, one shard after the other."""
    first, lengths = counts.cumsum() - counts, counts[shards]
    before = lengths.cumsum() - lengths
    return np.arange(lengths.sum()) + np.repeat(first[shards] - before, lengths)
