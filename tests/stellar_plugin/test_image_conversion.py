from __future__ import annotations

import pytest
import torch

from stellar_plugin.image_conversion import cut_ends


class TestCutEnds:
    @pytest.mark.parametrize("size", [(30, 30), (2, 64), (64, 2)])
    def test_cut_ends__leaves_others_whole(self, size: tuple[int, int]) -> None:
        image = torch.zeros(3, *size)
        assert cut_ends(image) is image

    def test_cut_ends__keeps_the_middle(self) -> None:
        columns = torch.arange(200).expand(3, 2, 200)
        middle = list(range(68, 132))
        assert cut_ends(columns)[0, 0].tolist() == middle
        assert cut_ends(columns.mT)[0, :, 1].tolist() == middle
