from __future__ import annotations

import pytest
import torch
from mmseg.registry import PARAM_SCHEDULERS

FRACTION = 1500 / 40000


def factors(max_iters: int, fraction: float = FRACTION) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cfg = {"type": "WarmUpLR", "fraction": fraction, "by_epoch": False}
    # mmengine's runner adds the length of the run as `end`.
    scheduler = PARAM_SCHEDULERS.build(
        {**cfg, "end": max_iters, "optimizer": optimizer}
    )
    rates = []
    for _ in range(max_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


class TestWarmUpLR:
    @pytest.mark.parametrize(("max_iters", "steps"), [(40000, 1500), (400, 15)])
    def test_linear_over_the_fraction(self, max_iters: int, steps: int) -> None:
        rates = factors(max_iters)
        for t in (0, 1, steps // 2, steps - 1, steps, max_iters - 1):
            expected = 1e-6 + (1 - 1e-6) * min(1, t / (steps - 1))
            assert rates[t] == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("max_iters", [1, 2, 39])
    def test_too_short_a_run__no_warm_up(self, max_iters: int) -> None:
        assert factors(max_iters) == [1.0] * max_iters

    def test_bad_fraction(self) -> None:
        with pytest.raises(ValueError, match=r"fraction must be in 0 to 1, got 1\.5"):
            factors(10, fraction=1.5)
