from __future__ import annotations

import pytest
import torch

from lightly_ext.evaluate.localization import foreground_iou, query_roles


def _one_hot(winners: list[list[int]], num_queries: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(winners), num_queries).float()


class TestQueryRoles:
    def test_query_roles__majority(self) -> None:
        localization = _one_hot([[0, 0, 0, 1], [1, 2, 2, 1]], num_queries=4)
        foreground = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).bool()
        # 0: 2 of 3, 1: 1 of 3, 2: 1 of 2 (no majority), 3: wins nothing
        roles = query_roles(localization, foreground)
        assert roles.tolist() == [True, False, False, False]


class TestForegroundIoU:
    def test_foreground_iou__closed_form(self) -> None:
        localization = _one_hot([[0, 0, 1, 1], [0, 1, 1, 1]], num_queries=2)
        foreground = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]).bool()
        roles = torch.tensor([True, False])
        # Predicted 3 patches, present 3, both 2.
        assert foreground_iou(localization, foreground, roles) == pytest.approx(2 / 4)

    def test_foreground_iou__does_not_depend_on_order_of_queries(self) -> None:
        generator = torch.Generator().manual_seed(0)
        localization = torch.rand(10, 25, 8, generator=generator).softmax(dim=-1)
        foreground = torch.rand(10, 25, generator=generator) < 0.4
        roles = torch.rand(8, generator=generator) < 0.5
        order = torch.randperm(8, generator=generator)
        plain = foreground_iou(localization, foreground, roles)
        permuted = foreground_iou(localization[..., order], foreground, roles[order])
        assert plain == permuted
        assert 0 < plain < 1

    def test_foreground_iou__nothing_there(self) -> None:
        localization = _one_hot([[0, 1]], num_queries=2)
        nothing = torch.zeros(1, 2, dtype=torch.bool)
        assert foreground_iou(localization, nothing, nothing[0]) == 0.0
