from __future__ import annotations

import pytest
import torch

from lightly_ext.data import SingleViewTransform, collate_views


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
