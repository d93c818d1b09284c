"""Warm-up that follows the length of the run."""

from __future__ import annotations

from typing import Any

from mmengine.optim import LinearLR
from mmseg.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class WarmUpLR(LinearLR):
    """Linear warm-up over a fraction of the run.

    mmengine sets `end` of a scheduler to the length of the run where a config does not,
    so that `train_cfg.max_iters` alone shortens the warm-up together with the run.

    Args:
        optimizer:
            Optimiser or its wrapper.
        fraction:
            Length of the warm-up, as a fraction of `end`. None where it would be
            shorter than two steps.
        end:
            Length of the run, in the unit of `by_epoch`.
        start_factor:
            Factor on the learning rate in the first step.
        kwargs:
            Passed on to mmengine's `LinearLR`.

    Raises:
        ValueError: If `fraction` is not in 0 to 1.
    """

    def __init__(
        self,
        optimizer: Any,
        fraction: float,
        end: int,
        start_factor: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in 0 to 1, got {fraction}.")
        steps = round(fraction * end)
        super().__init__(
            optimizer,
            start_factor=start_factor if steps > 1 else 1.0,
            end=max(steps, 2),
            **kwargs,
        )
