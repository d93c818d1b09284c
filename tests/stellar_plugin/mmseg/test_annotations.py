from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stellar_plugin.mmseg import LoadConvertedAnnotations


def load(path: Path, array: Any, *values: Any, mode: str = "", **info: Any) -> Any:
    """Classes of a label file that holds `array`, stored as an image of this mode."""
    image = Image.fromarray(np.asarray(array))
    path = path.with_suffix(".tif") if image.mode == "F" else path
    (image.convert(mode) if mode else image).save(path)
    results = {"seg_map_path": str(path), "seg_fields": [], **info}
    loaded = LoadConvertedAnnotations(*values)(results)
    assert loaded["seg_fields"] == ["gt_seg_map"]
    assert loaded["gt_seg_map"].dtype == np.uint8
    return loaded["gt_seg_map"].tolist()


MASK = np.array([[0, 255], [255, 0], [0, 0]], np.uint8)
RED = [[[255, 0, 0], [0, 0, 0]], [[0, 0, 128], [0, 0, 0]]]
COLOURS = np.array(RED, np.uint8)


class TestLoadConvertedAnnotations:
    @pytest.mark.parametrize(
        ("array", "values", "expected"),
        [
            (MASK, ([0, 255],), [[0, 1], [1, 0], [0, 0]]),
            (MASK, ([255, 0],), [[1, 0], [0, 1], [1, 1]]),
            # One-based, 0 is no class.
            (np.uint8([[1, 3, 0]]), ([1, 2, 3], [0]), [[0, 2, 255]]),
            # As wide as a colour is long.
            (np.uint8([[1, 2, 3]]), ([3, 2, 1],), [[2, 1, 0]]),
            (np.uint16([[300, 44], [44, 0]]), ([44, 300], [0]), [[1, 0], [0, 255]]),
            (np.array([[True, False]]), ([0, 1],), [[1, 0]]),
            (np.uint8([[1, 0]]), ([0], 1), [[255, 0]]),
            (np.float32([[1, 0]]), ([0, 1],), [[1, 0]]),
            (
                COLOURS,
                ([[0, 0, 0], [255, 0, 0]], [[0, 0, 128]]),
                [[1, 0], [255, 0]],
            ),
        ],
    )
    def test_values_and_colours(
        self, array: Any, values: tuple, expected: list, tmp_path: Path
    ) -> None:
        assert load(tmp_path / "a.png", array, *values) == expected

    @pytest.mark.parametrize("mode", ["P", "RGBA"])
    def test_colours__of_a_palette_and_with_alpha(
        self, mode: str, tmp_path: Path
    ) -> None:
        colours = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
        image = np.array([[colours[2], colours[1]], [colours[0]] * 2], np.uint8)
        classes = load(tmp_path / "a.png", image, colours, mode=mode)
        assert classes == [[2, 1], [0, 0]]

    def test_other_values(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a\.png' has the values 0, 255, which"):
            load(tmp_path / "a.png", MASK, [1, 2])
        with pytest.raises(ValueError, match=r"has the colours \[0, 0, 128\], which"):
            load(tmp_path / "a.png", COLOURS, [[0, 0, 0], [255, 0, 0]])
        with pytest.raises(ValueError, match=r"a\.png' has colours \(RGB\); give"):
            load(tmp_path / "a.png", COLOURS, [0, 255])
        with pytest.raises(ValueError, match=r"values 1, .* 1 bit per pixel: "):
            load(tmp_path / "a.png", MASK > 0, [0, 255])
        with pytest.raises(ValueError, match=r"a\.tif' has values that are no "):
            load(tmp_path / "a.tif", np.float32([[0.9, 0]]), [0, 1])

    @pytest.mark.parametrize("name", ["reduce_zero_label", "label_map"])
    def test_converted_by_the_set_too(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="set reduce_zero_label=False"):
            load(tmp_path / "a.png", MASK, [0, 255], **{name: {1: 2}})

    def test_no_label_file__nothing_is_loaded(self) -> None:
        assert LoadConvertedAnnotations([0, 255])({"img": 1}) == {"img": 1}

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([], "has to be up to 255 integers"),
            ([0, [1, 2, 3]], "has to be up to 255 integers"),
            ([[1, 2]], "has to be up to 255 integers"),
            ([0.0, 255.0], "has to be up to 255 integers"),
            (["0", "255"], "has to be up to 255 integers"),
            (list(range(256)), "has to be up to 255 integers"),
            ([3, 3], "A value stands twice"),
        ],
    )
    def test_bad_values(self, values: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LoadConvertedAnnotations(values)
