from __future__ import annotations

import numpy as np
import pytest
import torch
from mmseg.registry import TRANSFORMS


def build(name: str, **kwargs: object) -> object:
    cfg = {"type": "TorchvisionTransform", "name": name, **kwargs}
    return TRANSFORMS.build(cfg)


def results(height: int, width: int) -> dict[str, object]:
    """An image whose first channel is the label map."""
    labels = np.arange(height * width, dtype=np.uint8).reshape(height, width) % 150
    image = np.stack([labels, labels, labels], axis=2)
    return {"img": image, "gt_seg_map": labels, "seg_fields": ["gt_seg_map"]}


class TestTorchvisionTransform:
    def test_centre_crop__image_and_labels_alike(self) -> None:
        whole = results(20, 31)
        cut = build("CenterCrop", size=11)(dict(whole))
        expected = whole["gt_seg_map"][4:15, 10:21]
        np.testing.assert_array_equal(cut["gt_seg_map"], expected)
        np.testing.assert_array_equal(cut["img"][..., 0], expected)
        assert cut["img_shape"] == (11, 11)
        assert cut["img"].dtype == cut["gt_seg_map"].dtype == np.uint8

    @pytest.mark.parametrize(
        ("size", "expected"), [((40, 60), (16, 24)), ((51, 30), (27, 16))]
    )
    def test_resize__shorter_side_and_nearest_labels(
        self, size: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        whole = results(*size)
        whole["gt_seg_map"] = np.where(whole["gt_seg_map"] < 75, 3, 255).astype("uint8")
        resize = build("Resize", size=16, interpolation="bicubic")
        resized = resize(whole)
        assert resized["img_shape"] == resized["gt_seg_map"].shape == expected
        assert set(np.unique(resized["gt_seg_map"])) == {3, 255}

    def test_random_resized_crop__area_in_its_range(self) -> None:
        # Pixels are their own columns, so that a crop's width can be read off.
        columns = np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))
        torch.manual_seed(0)
        crop = build("RandomResizedCrop", size=200, scale=(0.25, 1.0), ratio=(1.0, 1.0))
        widths = []
        for _ in range(60):
            image = np.repeat(columns[..., None], 3, axis=2)
            cut = crop(
                {
                    "img": image,
                    "gt_seg_map": columns.copy(),
                    "seg_fields": ["gt_seg_map"],
                }
            )
            labels = cut["gt_seg_map"]
            widths.append(int(labels.max()) - int(labels.min()) + 1)
            assert abs(cut["img"][..., 0].astype(int) - labels).max() <= 2
        areas = (np.array(widths) / 200) ** 2
        assert 0.24 < areas.min() < 0.35
        assert 0.9 < areas.max() <= 1.0

    def test_without_labels(self) -> None:
        image = results(8, 10)["img"]
        cut = build("CenterCrop", size=4)({"img": image})
        np.testing.assert_array_equal(cut["img"], image[2:6, 3:7])
        assert cut.keys() == {"img", "img_shape"}

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"v2 has no 'CentreCrop'"):
            build("CentreCrop", size=4)
