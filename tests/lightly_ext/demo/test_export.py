from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lightly_ext.demo.boards import BoardSets
from lightly_ext.demo.export import (
    export_image_folders,
    export_segmentation_set,
    label_values,
)


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


class TestExportImageFolders:
    def test_export_image_folders__round_trip(
        self, sets: BoardSets, tmp_path: Path
    ) -> None:
        stale = tmp_path / "boards" / "train" / "99999.png"
        stale.parent.mkdir(parents=True)
        stale.touch()
        export_image_folders(sets, tmp_path / "boards")
        files = sorted((tmp_path / "boards" / "train").iterdir())
        assert [path.name for path in files[:2]] == ["00000.png", "00001.png"]
        assert len(files) == 120
        for path, image in zip(files, sets.train.images, strict=True):
            np.testing.assert_array_equal(_read(path), image)

    def test_export_image_folders__class_folders(
        self, sets: BoardSets, tmp_path: Path
    ) -> None:
        export_image_folders(sets, tmp_path)
        found = 0
        for path in (tmp_path / "single" / "test").rglob("*.png"):
            board = int(path.stem)
            assert sets.test_single.classes[board, int(path.parent.name)]
            np.testing.assert_array_equal(_read(path), sets.test_single.images[board])
            found += 1
        assert found == 40


class TestExportSegmentationSet:
    def test_export_segmentation_set__round_trip(
        self, sets: BoardSets, tmp_path: Path
    ) -> None:
        export_segmentation_set(sets, tmp_path)
        for part, boards in (("training", sets.train), ("validation", sets.test)):
            images = sorted((tmp_path / "images" / part).iterdir())
            labels = sorted((tmp_path / "annotations" / part).iterdir())
            assert [p.name for p in images] == [p.name for p in labels]
            assert len(images) == len(boards)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                np.testing.assert_array_equal(_read(image), boards.images[i])
                np.testing.assert_array_equal(_read(label), boards.masks[i] + 1)

    def test_label_values__background_is_one(self, sets: BoardSets) -> None:
        values = label_values(sets.train)
        assert values.dtype == np.uint8
        assert set(np.unique(values)) == set(range(1, 12))
        assert ((values == 1) == (sets.train.masks == 0)).all()
