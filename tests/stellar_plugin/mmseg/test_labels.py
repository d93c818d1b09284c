from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset, PascalVOCDataset
from mmseg.structures import SegDataSample
from PIL import Image

from stellar_plugin.mmseg.label_files import check_labels
from stellar_plugin.mmseg.labels import check_batch, check_datasets
from stellar_plugin.mmseg.pipeline import name_files


def write(root: Path, maps: list[np.ndarray]) -> None:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, labels in enumerate(maps):
        # mmsegmentation reads a map of one row as a list.
        labels = labels.repeat(2, axis=0) if len(labels) == 1 else labels
        image = np.zeros((*labels.shape[:2], 3), np.uint8)
        Image.fromarray(image).save(root / f"images/{number:03d}.png")
        labels = labels if labels.dtype == np.uint16 else labels.astype(np.uint8)
        Image.fromarray(labels).save(root / f"labels/{number:03d}.png")


def dataset(
    root: Path, num_classes: int, reduce: bool = False, **options: Any
) -> BaseSegDataset:
    loaders = [{"type": "LoadImageFromFile"}, {"type": "mmseg.LoadAnnotations"}]
    return BaseSegDataset(
        **{
            "data_root": str(root),
            "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
            "img_suffix": ".png",
            "metainfo": {"classes": [str(number) for number in range(num_classes)]},
            "reduce_zero_label": reduce,
            "pipeline": loaders,
            "serialize_data": False,  # it collects garbage: half a second
            **options,
        }
    )


def check(dataset: BaseDataset, num_classes: int) -> None:
    check_datasets({"train": dataset}, num_classes)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the check logs."""
    said: list[str] = []
    monkeypatch.setattr(
        "stellar_plugin.mmseg.labels.print_log", lambda text, *_: said.append(text)
    )
    return said


class TestCheckDatasets:
    def test_all_values_are_classes(self, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 3], [255, 2]])])
        check(dataset(tmp_path, 4), 4)

    def test_shifted_labels(self, tmp_path: Path) -> None:
        # 0 is ignored, 1 to 4 become 0 to 3, 255 stays ignored.
        write(tmp_path, [np.array([[0, 4], [255, 1]])])
        check(dataset(tmp_path, 4, reduce=True), 4)
        shifted = dataset(tmp_path, 4, reduce=True)[0]["gt_seg_map"]
        assert shifted.tolist() == [[255, 3], [255, 0]]

    def test_value_beyond_the_classes(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2)), np.array([[0, 4], [7, 4]])])
        message = (
            r"001\.png' of .* has the label values 4, 7 after.*0 to 3.*reduce_zero"
        )
        with pytest.raises(ValueError, match=message):
            check(dataset(tmp_path, 4), 4)

    def test_wrapped_sets(self, tmp_path: Path) -> None:
        write(tmp_path / "good", [np.array([[0, 3]])])
        write(tmp_path / "bad", [np.array([[0, 4]])])
        good, bad = (dataset(tmp_path / name, 4) for name in ("good", "bad"))
        check(RepeatDataset(good, 2), 4)
        check(ConcatDataset([good, good]), 4)
        with pytest.raises(ValueError, match=r"bad/labels/000\.png' of .* values 4 "):
            check(ConcatDataset([good, bad]), 4)

    def test_many_files__evenly_spread_ones_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("stellar_plugin.mmseg.labels.NUM_READ", 3)
        write(tmp_path, [np.eye(2)] * 9)
        for unread in (1, 2, 3, 5, 6, 7):
            (tmp_path / f"labels/{unread:03d}.png").write_bytes(b"")
        check(dataset(tmp_path, 4), 4)
        for missing in (2, 5):  # by their names all are checked
            (tmp_path / f"labels/{missing:03d}.png").unlink()
        message = r"002\.png' for .*002\.png' of .*, and 1 more are missing; there are"
        with pytest.raises(FileNotFoundError, match=message):
            check(dataset(tmp_path, 4), 4)
        for read in (0, 4, 8):
            write(tmp_path, [np.eye(2) * (4 if i == read else 1) for i in range(9)])
            with pytest.raises(ValueError, match=rf"00{read}\.png' of .* values 4 "):
                check(dataset(tmp_path, 4), 4)

    def test_other_number_of_classes(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2))])
        with pytest.raises(ValueError, match=r"has 4 classes, .*num_classes is 5"):
            check(dataset(tmp_path, 4), 5)

    def test_missing_label_file(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2)), np.zeros((2, 2))])
        (tmp_path / "labels/001.png").unlink()
        message = r"no label file '.*001\.png' for the image .*; there are 000\.png\. "
        with pytest.raises(FileNotFoundError, match=message):
            check(dataset(tmp_path, 4), 4)

    def test_wrong_suffix(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2))])
        message = r"000_mask\.png' .* there are 000\.png\. .*suffix \('_mask\.png'\)"
        with pytest.raises(FileNotFoundError, match=message):
            check(dataset(tmp_path, 4, seg_map_suffix="_mask.png"), 4)
        with pytest.raises(FileNotFoundError, match=r"no images: .* ends on '\.jpg'"):
            check(dataset(tmp_path, 4, img_suffix=".jpg"), 4)

    def test_no_folder_of_labels(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((2, 2))])
        with pytest.raises(ValueError, match="names no label files; set data_prefix"):
            check(dataset(tmp_path, 4, data_prefix={"img_path": "images"}), 4)

    @pytest.mark.parametrize(
        "loader",
        [
            {"type": "mmseg.LoadAnnotations"},
            {"type": "mmseg.LoadAnnotations", "imdecode_backend": "cv2"},
            {"type": "mmseg.LoadConvertedAnnotations", "values": [0, 1, 2, 3]},
        ],
    )
    def test_no_image(self, loader: dict[str, Any], tmp_path: Path) -> None:
        write(tmp_path, [np.random.default_rng(0).integers(0, 4, (64, 64))])
        path = tmp_path / "labels/000.png"
        for content in (b"no image", path.read_bytes()[:200]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"000\.png' .* can be read"):
                check(dataset(tmp_path, 4, pipeline=[loader]), 4)

    def test_masks_of_0_and_255(self, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 255]])] * 2)
        message = r"2 of 2 .* \(train\) are 0 and 255, .*values=\[0, 255\]\) in place"
        with pytest.raises(ValueError, match=message):
            check(dataset(tmp_path, 2), 2)

    def test_masks_of_0_and_255__where_they_mean_ignored(self, tmp_path: Path) -> None:
        # Each split by itself, as only some of them may be masks.
        write(tmp_path / "val", [np.array([[0, 255]])])
        write(tmp_path / "train", [np.array([[0, 1, 255]])])
        train, val = (dataset(tmp_path / name, 2) for name in ("train", "val"))
        with pytest.raises(ValueError, match=r"1 of 1 .* \(val\) are 0 and 255, "):
            check_datasets({"train": train, "val": val}, 2)
        # The data set names what 0 and 255 are.
        loader = {"type": "mmseg.LoadConvertedAnnotations", "ignored": [255]}
        declared = {"pipeline": [{**loader, "values": [0, 7]}]}
        check_datasets(
            {"train": train, "val": dataset(val.data_root, 2, **declared)}, 2
        )

    def test_class_of_no_value(self, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 255]])])
        loader = {"type": "mmseg.LoadConvertedAnnotations", "ignored": [255]}
        options = {"pipeline": [{**loader, "values": [0]}]}
        with pytest.raises(ValueError, match=r"are 1, .* are 2: class 1 can never"):
            check(dataset(tmp_path, 2, **options), 2)

    def test_unreadable__others_are_checked(
        self, tmp_path: Path, said: list[str]
    ) -> None:
        write(tmp_path, [np.array([[0, 1]])] * 3)
        (tmp_path / "images/001.png").write_bytes(b"")
        check(dataset(tmp_path, 2), 2)
        assert said[0].startswith("Labels in 2 of 3 label files (train): ")
        assert said[1].startswith("1 files of train could not be checked and may stop")
        assert "images/001.png' or its labels: " in said[1]
        Image.new("L", (2, 2), 7).save(tmp_path / "labels/002.png")
        with pytest.raises(ValueError, match=r"002\.png' of .* values 7 after"):
            check(dataset(tmp_path, 2), 2)

    def test_steps_of_others__may_make_classes(self, tmp_path: Path) -> None:
        def over_127(results: dict[str, Any]) -> dict[str, Any]:
            np.random.rand()  # the run draws the same numbers as without the check
            labels = results["gt_seg_map"]
            labels = labels[..., 0] if labels.ndim == 3 else labels
            return {**results, "gt_seg_map": (labels > 127).astype(np.uint8)}

        loaders = [{"type": "LoadImageFromFile"}, {"type": "mmseg.LoadAnnotations"}]
        write(tmp_path, [np.array([[0, 255]]), np.array([[[0] * 3, [255] * 3]])])
        state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
        check(dataset(tmp_path, 2, pipeline=[*loaders, over_127]), 2)
        assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]
        Image.new("L", (2, 2), 255).save(tmp_path / "labels/001.png")
        with pytest.raises(ValueError, match=r"000\.png' of .* values 1 after"):
            check(dataset(tmp_path, 1, pipeline=[*loaders, over_127]), 1)

    def test_images_left_out_and_shared(self, tmp_path: Path, said: list[str]) -> None:
        write(tmp_path, [np.array([[0, 1]])] * 3)
        for name in ("000.jpeg", "sub/001.PNG", "list.txt"):
            (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "images" / name).write_bytes(b"")
        val = dataset(tmp_path, 2, indices=2)
        (tmp_path / "one.txt").write_text("002\n000\n")
        train = dataset(tmp_path, 2, ann_file="one.txt")
        check_datasets({"train": train, "val": val}, 2)
        left_out, both = said[1:]
        assert left_out.startswith("2 images in the folder of val are not used, such")
        assert left_out.endswith("/000.jpeg': their names do not end on img_suffix.")
        assert both.startswith("1 of 2 images (val) are trained on too, such as ")
        assert both.endswith(
            "000.png': the score is not one of new images. Check "
            "ann_file and data_prefix."
        )

    @pytest.mark.parametrize("line", ["", "000.png"])
    def test_images_that_do_not_exist(self, line: str, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 1]])])
        (tmp_path / "list.txt").write_text(f"000\n{line}\n")
        message = rf"no image '.*/{line}\.png' of .*without blank lines"
        with pytest.raises(FileNotFoundError, match=message):
            check(dataset(tmp_path, 2, ann_file="list.txt"), 2)

    def test_rare_class__is_looked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
    ) -> None:
        monkeypatch.setattr("stellar_plugin.mmseg.labels.NUM_READ", 2)
        write(tmp_path, [np.array([[0, int(i == 3), 255]]) for i in range(6)])
        check(dataset(tmp_path, 2), 2)
        # Files 0 and 5, then 1, 2 and 3, which has class 1.
        assert said == [
            "Labels in 5 of 6 label files (train): share of the pixels, files\n"
            "                          train\n"
            "  0               60.00 %     5\n"
            "  1                6.67 %     1\n"
            "  (ignored)       33.33 %     5"
        ]

    @pytest.mark.parametrize("values", [[0, 255], [0], [255]])
    def test_reduced__all_is_ignored(self, values: list[int], tmp_path: Path) -> None:
        write(tmp_path, [np.array([values * 2])])
        message = r"Every pixel is 'ignored' in 1 of 1 .*reduce_zero_label=True"
        with pytest.raises(ValueError, match=message):
            check(dataset(tmp_path, 2, reduce=True), 2)

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_every_split(self, split: str, tmp_path: Path) -> None:
        write(tmp_path / "good", [np.array([[0, 1]])])
        write(tmp_path / "bad", [np.array([[255, 255]])])
        sets = dict.fromkeys(("train", "val", "test"), dataset(tmp_path / "good", 2))
        check_datasets(sets, 2)
        sets[split] = dataset(tmp_path / "bad", 2)
        with pytest.raises(ValueError, match=rf"ignored' in 1 of 1 .* \({split}\)"):
            check_datasets(sets, 2)

    def test_values_of_16_bits(self, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 3]], np.uint16)])
        check(dataset(tmp_path, 4), 4)  # as they are
        write(tmp_path, [np.array([[0, 258]], np.uint16)])  # would become 2
        with pytest.raises(ValueError, match=r"000\.png' of .* values up to 258, "):
            check(dataset(tmp_path, 4), 4)

    def test_values_of_16_bits__in_any_file_that_is_read(self, tmp_path: Path) -> None:
        write(
            tmp_path, [np.array([[0, 3]], np.uint16), np.array([[0, 256]], np.uint16)]
        )
        read = dataset(tmp_path, 4)
        assert read[1]["gt_seg_map"].tolist() == [[0, 0]] * 2
        name_files([read])
        assert read[0]["gt_seg_map"].tolist() == [[0, 3]] * 2
        with pytest.raises(ValueError, match=r"001\.png' has values up to 256, "):
            read[1]

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
    def test_colours__although_red_is_green_is_blue(
        self, mode: str, tmp_path: Path
    ) -> None:
        write(tmp_path, [np.array([[0, 1], [2, 3]])])
        path = tmp_path / "labels/000.png"
        Image.open(path).convert(mode).save(path)
        with pytest.raises(ValueError, match=r"000\.png' .* colour or alpha, where"):
            check(dataset(tmp_path, 4), 4)

    def test_palette__with_alpha_is_read_by_index(self, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 1], [2, 3]])])
        path = tmp_path / "labels/000.png"
        image = Image.open(path)
        image.putpalette([0, 0, 0, 9, 9, 9, 8, 8, 8, 7, 7, 7])
        image.save(path, transparency=b"\x00\x80\xff\xff")
        check(dataset(tmp_path, 4), 4)
        options = {"imdecode_backend": "cv2", "type": "mmseg.LoadAnnotations"}
        with pytest.raises(ValueError, match="colour or alpha"):
            check(dataset(tmp_path, 4, pipeline=[options]), 4)

    def test_size__not_the_images(self, tmp_path: Path) -> None:
        write(tmp_path, [np.zeros((4, 6)), np.zeros((4, 6))])
        Image.new("L", (3, 2)).save(tmp_path / "labels/001.png")
        message = (
            r"001\.png' of .* is 2 x 3 pixels .*images/001\.png' is 4 x 6\. Resize"
        )
        with pytest.raises(ValueError, match=message):
            check(dataset(tmp_path, 4), 4)

    @pytest.mark.parametrize(("kind", "fits"), [("color", True), ("unchanged", False)])
    def test_size__of_an_image_that_is_turned(
        self, kind: str, fits: bool, tmp_path: Path
    ) -> None:
        write(tmp_path, [np.zeros((6, 4))])
        exif = Image.Exif()
        exif[0x0112] = 6  # by 90 degrees: 4 x 6 as stored, 6 x 4 as shown
        Image.new("RGB", (6, 4)).save(tmp_path / "images/000.jpg", exif=exif)
        loaders = [{"type": "LoadImageFromFile", "color_type": kind}]
        loaders.append({"type": "mmseg.LoadAnnotations"})
        turned = dataset(tmp_path, 4, img_suffix=".jpg", pipeline=loaders)
        with nullcontext() if fits else pytest.raises(ValueError, match="4 x 6"):
            check(turned, 4)

    def test_jpeg(self, tmp_path: Path, said: list[str]) -> None:
        write(tmp_path, [np.zeros((8, 8))])
        labels = Image.fromarray(np.eye(8, dtype=np.uint8))
        labels.save(tmp_path / "labels/000.jpg", quality=100)
        check(dataset(tmp_path, 4, seg_map_suffix=".jpg"), 4)
        assert said[-1].startswith("JPEG files among 1 of 1 label files (train): 1; ")

    def test_class_map_of_the_set(self, tmp_path: Path) -> None:
        # Two of VOC's classes: 15 (person) becomes 1, the others are ignored.
        write(tmp_path, [np.array([[0, 15, 3, 255]])])
        classes = ["background", "person"]
        options = {"metainfo": {"classes": classes}, "ann_file": "list.txt"}
        (tmp_path / "list.txt").write_text("000\n")
        loader = {"type": "mmseg.LoadAnnotations"}
        own = PascalVOCDataset(
            data_root=str(tmp_path),
            data_prefix={"img_path": "images", "seg_map_path": "labels"},
            img_suffix=".png",
            pipeline=[loader],
            **options,
        )
        check(own, 2)
        assert own[0]["gt_seg_map"].tolist() == [[0, 1, 255, 255]] * 2

    def test_inside_of_test_time_augmentation(self, tmp_path: Path) -> None:
        write(tmp_path, [np.array([[0, 4]])])
        pack = {"type": "mmseg.PackSegInputs"}
        steps = [[{"type": "RandomFlip", "prob": 0.0}], [pack]]
        steps.insert(1, [{"type": "mmseg.LoadAnnotations"}])
        augment = {"type": "TestTimeAug", "transforms": steps}
        pipeline = [{"type": "LoadImageFromFile"}, augment]
        with pytest.raises(ValueError, match="values 4 "):
            check(dataset(tmp_path, 4, pipeline=pipeline), 4)

    def test_table_and_missing_classes(self, tmp_path: Path, said: list[str]) -> None:
        write(tmp_path / "a", [np.array([[0, 0, 0, 1]]), np.array([[0, 0, 255, 0]])])
        write(tmp_path / "b", [np.array([[1, 2, 2, 2]])])
        train, val = (dataset(tmp_path / name, 4) for name in ("a", "b"))
        check_datasets({"train": train, "val": val}, 4)
        assert said == [
            "Labels in 2 of 2 label files (train), 1 of 1 label files (val): share of "
            "the pixels, files\n"
            "                          train               val\n"
            "  0               75.00 %     2      0.00 %     0\n"
            "  1               12.50 %     1     25.00 %     1\n"
            "  2                0.00 %     0     75.00 %     1\n"
            "  3                0.00 %     0      0.00 %     0\n"
            "  (ignored)       12.50 %     1      0.00 %     0",
            "2 of 4 classes do not occur in 2 of 2 label files (train): 2, 3.",
            "2 of 4 classes do not occur in 1 of 1 label files (val): 0, 3.",
        ]

    def test_table__the_most_frequent_of_many(
        self, tmp_path: Path, said: list[str]
    ) -> None:
        write(tmp_path, [np.array([[*range(60), 59]])])
        check(dataset(tmp_path, 60), 60)
        lines = said[0].splitlines()
        assert [line.split()[0] for line in lines[2:-2]] == [*map(str, range(39)), "59"]
        assert lines[-1] == "  and 20 classes that are rarer"


def batch(labels: torch.Tensor, image: tuple[int, int]) -> dict[str, Any]:
    sample = SegDataSample(metainfo={"img_path": "a.png", "ori_shape": (8, 6)})
    sample.gt_sem_seg = PixelData(data=labels)
    return {"inputs": [torch.zeros(3, *image)], "data_samples": [sample]}


class TestCheckBatch:
    @pytest.mark.parametrize("size", [(8, 6), (4, 3)])
    def test_as_large_as_the_image_or_what_the_model_sees(
        self, size: tuple[int, int]
    ) -> None:
        check_batch(batch(torch.zeros(1, *size).long(), (4, 3)), 2, 255)

    def test_as_large_as_what_it_is_compared_with(self) -> None:
        resized = batch(torch.zeros(1, 4, 3).long(), (4, 3))
        message = r"is 4 x 3 pixels .*, its image is 8 x 6\. Predictions are compared"
        with pytest.raises(ValueError, match=message):
            check_batch(resized, 2, 255, original=True)
        check_batch(batch(torch.zeros(1, 8, 6).long(), (4, 3)), 2, 255, original=True)

    def test_smaller_than_its_image(self) -> None:
        message = r"of 'a\.png' is 2 x 2 pixels .*, its image is 8 x 6\. Resize"
        with pytest.raises(ValueError, match=message):
            check_batch(batch(torch.zeros(1, 2, 2).long(), (4, 3)), 2, 255)

    def test_values_and_colours(self) -> None:
        with pytest.raises(ValueError, match="values -1, 2 after"):
            check_batch(batch(torch.tensor([[[-1, 2, 255]]]), (1, 3)), 2, 255)
        with pytest.raises(ValueError, match="colour or alpha"):
            check_batch(batch(torch.zeros(4, 3, 3).long(), (4, 3)), 2, 255)


class TestCheckLabels:
    def test_first_few_of_many_values(self) -> None:
        labels = torch.arange(100)[None]
        with pytest.raises(ValueError, match=r"'x' has .* 9, 10, 11 and 88 more after"):
            check_labels(labels, 4, 255, "'x'")
