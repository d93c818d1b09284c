from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.evaluate.images import folder_images
from lightly_ext.evaluate.masks import find_masks, listed_files, read_mask
from tests.lightly_ext.evaluate.small import write_images


class TestReadMask:
    def test_read_mask__palette_16_bits_and_bits(self, tmp_path: Path) -> None:
        values = np.array([[0, 1], [200, 255]])
        palette = Image.fromarray(values.astype(np.uint8)).convert("P")
        palette.putdata(values.flatten().tolist())
        palette.putpalette([5 * i % 256 for i in range(768)])
        palette.save(tmp_path / "palette.png")
        assert Image.open(tmp_path / "palette.png").mode == "P"
        assert read_mask(tmp_path / "palette.png").tolist() == values.tolist()
        Image.fromarray((values * 200).astype(np.uint16)).save(tmp_path / "deep.png")
        assert read_mask(tmp_path / "deep.png").tolist() == (values * 200).tolist()
        Image.fromarray(values > 0).save(tmp_path / "bits.png")
        assert read_mask(tmp_path / "bits.png").tolist() == [[0, 1], [1, 1]]
        assert read_mask(tmp_path / "bits.png").dtype == torch.int32


class TestFindMasks:
    def test_find_masks__names_in_folders(self, tmp_path: Path) -> None:
        for name in ("b/1.v2", "b/0", "a"):
            for kind, suffix in (("images", ".bmp"), ("masks", ".png")):
                path = tmp_path / kind / f"{name}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (4, 3)).save(path)
        files = folder_images(tmp_path / "images")
        masks = find_masks(files, str(tmp_path / "masks"))
        names = [str(mask.relative_to(tmp_path / "masks")) for mask in masks]
        assert names == ["a.png", "b/0.png", "b/1.v2.png"]

    def test_find_masks__turned_by_exif(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[274] = 6
        image = Image.new("RGB", (30, 20))
        (tmp_path / "images").mkdir()
        (tmp_path / "masks").mkdir()
        image.save(tmp_path / "images" / "a.jpg", exif=exif)
        files = folder_images(tmp_path / "images")
        Image.new("L", (20, 30)).save(tmp_path / "masks" / "a.png")
        assert len(find_masks(files, str(tmp_path / "masks"))) == 1
        Image.new("L", (30, 20)).save(tmp_path / "masks" / "a.png")
        with pytest.raises(ValueError, match="30 x 20 px, its image 20 x 30 px"):
            find_masks(files, str(tmp_path / "masks"))

    def test_find_masks__jpeg_is_no_mask(self, tmp_path: Path) -> None:
        files = folder_images(write_images(tmp_path / "images", 1))
        (tmp_path / "masks").mkdir()
        Image.new("L", (36, 40)).save(tmp_path / "masks" / "0000.jpg")
        with pytest.raises(ValueError, match=r"1 of 1 images have no mask.*\.png"):
            find_masks(files, str(tmp_path / "masks"))


class TestListedFiles:
    def test_listed_files__with_and_without_extension(self, tmp_path: Path) -> None:
        files = folder_images(write_images(tmp_path / "images", 4))
        (tmp_path / "list.txt").write_text("0002\r\n\n 0000.jpg \n")
        names = listed_files(files, str(tmp_path / "list.txt")).names
        assert names == ["0002.png", "0000.png"]
