"""Random numbers that need no saving: functions of a seed, an epoch and a number.

Whatever draws them, wherever a run was cut and however many processes and workers it
has, they are the same.
"""

from __future__ import annotations

import os
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What is drawn with the seed of a sample, each from numbers of its own."""

    VIEWS = 0
    GLOBAL_COLORS = 1
    LOCAL_COLORS = 2
    MASKS = 3


def run_seed() -> int:
    """Returns the seed of Lightning's `seed_everything`, 0 without it."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def mix_seeds(*numbers: int) -> int:
    """One seed, an int64, of several numbers that may be large or close together."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(state.view(np.int64)[0])


def seeded_uniform(seeds: Tensor, stream: Stream, *shape: int) -> Tensor:
    """Draws uniform numbers for samples, each from its own seed.

    Args:
        seeds:
            int64 tensor with shape (B,) on the CPU.
        stream:
            What the numbers are for.
        *shape:
            Shape of the numbers of one sample.

    Returns:
        Tensor on the CPU with shape (B, *shape), values in [0, 1).

    """
    rows = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(rows, seeds.tolist(), strict=True):
        row.uniform_(generator=generator.manual_seed(seed + stream))
    return rows
