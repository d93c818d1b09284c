from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou
from torchvision.tv_tensors import Image

from lightly_ext.evaluate.boxes import (
    CropPlace,
    box_areas,
    box_ious,
    box_shares,
    map_boxes,
)
from lightly_ext.evaluate.images import centre_crop
from stellar_plugin.protocols import KNN


class TestCropPlace:
    @pytest.mark.parametrize(
        "height, width", [(48, 48), (60, 90), (101, 67), (500, 3), (3, 333)]
    )
    @pytest.mark.parametrize("resize, crop", [(32, 32), (40, 32), (256, 224)])
    def test_of__as_the_crop_is_cut(
        self, height: int, width: int, resize: int, crop: int
    ) -> None:
        # Ramps tell where in the image a px of the crop comes from.
        protocol = KNN.replace(resize=resize, crop=crop)
        place = CropPlace.of(height, width, protocol)
        x = torch.arange(width).float().expand(1, height, -1) + 0.5
        y = torch.arange(height).float()[:, None].expand(1, -1, width) + 0.5
        cut = centre_crop(protocol, "bilinear")(Image(torch.cat([x, y])))
        middle = torch.tensor([crop / 2 - 0.5] * 2 + [crop / 2 + 0.5] * 2)
        (x0, y0, x1, y1) = place.to_image(middle).tolist()
        rows = slice(crop // 2 - 1, crop // 2 + 1)
        found = cut[:, rows, rows].mean(dim=(1, 2))
        wanted = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2])
        torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted)

    def test_of__closed_form(self) -> None:
        # 100 x 200 px become 50 x 100, of which the middle 40 x 40 are cut.
        place = CropPlace.of(100, 200, KNN.replace(resize=50, crop=40))
        assert place.box.tolist() == [60.0, 10.0, 140.0, 90.0]
        box = torch.tensor([10.0, 0.0, 40.0, 20.0])
        assert place.to_image(box).tolist() == [80.0, 10.0, 140.0, 50.0]
        torch.testing.assert_close(place.to_crop(place.to_image(box)), box.double())


class TestMapBoxes:
    def test_map_boxes__closed_form(self) -> None:
        maps = torch.zeros(3, 4, 5)
        maps[0, 1:3, 2:5] = 0.4
        maps[0, 0, 0] = 0.19  # below half of the maximum
        maps[1, 3, 0] = 1.0
        found = map_boxes(maps, crop=20).tolist()
        assert found == [[8, 5, 20, 15], [0, 15, 4, 20], [0, 0, 0, 0]]


class TestBoxShares:
    def test_box_shares__closed_form(self) -> None:
        found = box_shares(torch.tensor([5, 0, 20, 15]), (2, 2), crop=20)
        assert found.tolist() == [0.5, 1.0, 0.25, 0.5]

    def test_box_shares__outside(self) -> None:
        assert box_shares(torch.tensor([-9, -9, 0, 0]), (3, 2), 12).sum() == 0


class TestBoxIous:
    def test_box_ious__torchvision(self) -> None:
        corners = torch.rand(2, 9, 2, 2, dtype=torch.float64).sort(dim=2).values
        a, b = corners.flatten(2)
        torch.testing.assert_close(box_ious(a, b), box_iou(a, b))

    def test_box_ious__empty(self) -> None:
        boxes = torch.tensor([[0.0, 0, 0, 0], [0, 0, 2, 2], [5, 5, 4, 4]])
        assert box_ious(boxes, boxes).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
        assert box_areas(boxes).tolist() == [0, 4, 0]
