from __future__ import annotations

import gc
import os
import pickle
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_ext.data import ImageFolderDataset
from lightly_ext.transforms import STELLARTransform
from tests.lightly_ext.data.image_files import write_folder, write_image, write_noise


def _break(path: Path) -> Path:
    path.write_bytes(b"not an image")
    return path


class TestImageFolderDataset:
    def test_getitem__index_or_label(self, tmp_path: Path) -> None:
        for number, name in enumerate(["cat/a/1.png", "dog/1.png", "cat/2.png"]):
            write_image(tmp_path / name, value=number)
        unlabelled = ImageFolderDataset(tmp_path)
        labelled = ImageFolderDataset(tmp_path, labelled=True)
        # Order: cat/2.png, cat/a/1.png, dog/1.png.
        values = [(int(image[0, 0, 0]), number) for image, number in unlabelled]
        assert values == [(2, 0), (0, 1), (1, 2)]
        assert labelled.classes == ["cat", "dog"]
        assert [label for _, label in labelled] == [0, 0, 1]
        assert labelled.labels is not None
        assert labelled.labels.tolist() == [0, 0, 1]

    def test_getitem__applies_transform(self, tmp_path: Path) -> None:
        transform = STELLARTransform(2, 3, global_crop_size=24, local_crop_size=12)
        dataset = ImageFolderDataset(write_folder(tmp_path), transform)
        views, index = dataset[3]
        assert index == 3
        assert [view.shape[-1] for view in views] == [24, 24, 12, 12, 12]
        assert {int(view[0].max()) for view in views} == {3}

    @pytest.mark.parametrize(("size", "tried"), [(8, 8), (4000, 101)])
    def test_getitem__errors_of_the_transform_are_not_hidden(
        self, tmp_path: Path, size: int, tried: int
    ) -> None:
        def fail(image: Tensor) -> Tensor:
            raise RuntimeError("bug")

        write_image(tmp_path / "0000.png")
        for number in range(1, size):
            os.link(tmp_path / "0000.png", tmp_path / f"{number:04}.png")
        dataset = ImageFolderDataset(tmp_path, transform=fail)
        with (
            pytest.warns(UserWarning),
            pytest.raises(
                RuntimeError, match=rf"{tried} of {size} .* none was readable.*: bug\)"
            ),
        ):
            dataset[0]

    def test_getitem__images_that_the_transform_fails_on(self, tmp_path: Path) -> None:
        def check(image: Tensor) -> Tensor:
            if image[0, 0, 0] == 3:
                raise ValueError("too dark")
            return image

        dataset = ImageFolderDataset(write_folder(tmp_path), transform=check)
        with pytest.warns(UserWarning, match=r"003\.png \(ValueError: too dark\)"):
            assert dataset[3][1] == 4
        assert dataset.unreadable_files() == [tmp_path / "003.png"]

    def test_getitem__replacement_is_drawn_as_if_it_was_known(
        self, tmp_path: Path
    ) -> None:
        def draw(image: Tensor) -> Tensor:
            number = torch.rand(())
            if image[0, 0, 0] == 3:
                raise ValueError("too dark")
            return number

        dataset = ImageFolderDataset(write_folder(tmp_path), transform=draw)
        numbers = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                torch.manual_seed(0)
                numbers.append([float(dataset[i][0]) for i in (3, 0)])
        assert numbers[0] == numbers[1]

    @pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
    def test_getitem__lines(self, tmp_path: Path, size: tuple[int, int]) -> None:
        write_image(tmp_path / "line.png", size=size)
        views, _ = ImageFolderDataset(tmp_path, STELLARTransform())[0]
        assert [len(view[0]) for view in views] == [224] * 8 + [96] * 8

    def test_getitem__limit_of_pixels(self, tmp_path: Path) -> None:
        for name, size in (("0.png", (40, 31)), ("1.png", (40, 30))):
            write_image(tmp_path / name, size=size)
        dataset = ImageFolderDataset(tmp_path, max_pixels=1200)
        with pytest.warns(UserWarning, match=r"0\.png .*40 x 31 .*max_pixels=1200"):
            assert dataset[0][1] == 1

    def test_getitem__names_of_any_bytes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        names = ["0.png", "a\nb.png", os.fsdecode(b"c\xff.png"), "été.png"]
        for number, name in enumerate(names):
            write_image(tmp_path / name, value=number)
        dataset = ImageFolderDataset(tmp_path)
        assert [int(image[0, 0, 0]) for image, _ in dataset] == [0, 1, 2, 3]
        for number in (1, 2):
            _break(dataset.file(number))
        dataset = ImageFolderDataset(tmp_path)
        with pytest.warns(UserWarning) as record:
            assert dataset[1][1] == 3
        for warning in record:
            print(warning.message)
        assert r"a\nb.png (Unidentified" in capsys.readouterr().out

    def test_getitem__files_that_became_pipes(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        dataset.file(0).unlink()
        os.mkfifo(dataset.file(0))

        def waited(*_: object) -> None:
            raise TimeoutError

        handler = signal.signal(signal.SIGALRM, waited)
        signal.alarm(20)  # else a reader that waits for a writer would wait forever
        try:
            with pytest.warns(UserWarning, match="no regular file"):
                assert dataset[0][1] == 1
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)

    def test_getitem__leaks_no_file(self, tmp_path: Path) -> None:
        for suffix in ("jpg", "png", "tif", "gif", "webp"):
            for kept in (0.3, 0.9, 1.0):
                path = tmp_path / f"{kept}.{suffix}"
                write_noise(path)
                data = path.read_bytes()
                path.write_bytes(data[: int(kept * len(data))])
        dataset = ImageFolderDataset(tmp_path)
        gc.disable()
        before = len(os.listdir("/proc/self/fd"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(len(dataset)):
                dataset[number]
        after = len(os.listdir("/proc/self/fd"))
        gc.enable()
        assert after == before

    def test_init__memory_of_names(self, tmp_path: Path) -> None:
        write_folder(tmp_path, 50)
        write_image(tmp_path / f"{'long/' * 700}0.png")
        data = pickle.dumps(ImageFolderDataset(tmp_path)._names)
        assert len(data) < 50 * len("000.png") + 5 * 700 + 100

    def test_getitem__outside(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        for index in (-1, 8):
            with pytest.raises(IndexError, match="among 8"):
                dataset[index]

    def test_init__image_outside_of_class(self, tmp_path: Path) -> None:
        write_image(tmp_path / "cat/1.png")
        write_image(tmp_path / "stray.png")
        with pytest.raises(ValueError, match=r"stray\.png does not"):
            ImageFolderDataset(tmp_path, labelled=True)

    def test_getitem__next_readable_takes_the_place(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        broken = [_break(dataset.file(i)) for i in (3, 4, 7)]
        with pytest.warns(UserWarning, match=r"unreadable image .*003\.png"):
            assert dataset[3][1] == 5
        with pytest.warns(UserWarning, match=r"007\.png"):
            assert dataset[7][1] == 0  # the first one follows the last one
        assert dataset.num_unreadable == 3
        assert dataset.unreadable_files() == broken

    def test_getitem__reads_a_broken_file_once(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        _break(dataset.file(2))
        with pytest.warns(UserWarning):
            assert dataset[2][1] == 3
        write_image(dataset.file(2))  # would be readable now
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dataset[2][1] == 3
        assert dataset.num_unreadable == 1

    def test_getitem__counts_across_workers(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path, 40))
        broken = [_break(dataset.file(i)) for i in (0, 1, 13, 26, 39)]
        loader = DataLoader(dataset, batch_size=4, num_workers=2)
        for _ in range(2):
            indices = torch.cat([index for _, index in loader])
            assert len(indices) == 40
            assert not {0, 1, 13, 26, 39} & set(indices.tolist())
            assert dataset.num_unreadable == 5
        assert dataset.unreadable_files() == broken

    def test_getitem__all_broken(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path, 3))
        for index in range(3):
            _break(dataset.file(index))
        with (
            pytest.warns(UserWarning),
            pytest.raises(RuntimeError, match=r"3 of 3 images below .*unreadable"),
        ):
            dataset[0]
        with pytest.raises(RuntimeError, match="None of the 3 images"):
            dataset[1]

    @pytest.mark.parametrize(("size", "tolerated"), [(150, 100), (2400, 120)])
    def test_getitem__too_many_broken(
        self, tmp_path: Path, size: int, tolerated: int
    ) -> None:
        write_image(tmp_path / "image.png")
        for number in range(size - 1):
            (tmp_path / f"{number:04}.png").write_bytes(b"")
        dataset = ImageFolderDataset(tmp_path)
        assert dataset[size - 1][1] == size - 1
        with (
            pytest.warns(UserWarning) as record,
            pytest.raises(RuntimeError, match=f"{tolerated + 1} of {size} images"),
        ):
            dataset[0]
        assert len(record) == tolerated

    def test_getitem__unreachable_files_are_unreadable(self, tmp_path: Path) -> None:
        dataset = ImageFolderDataset(write_folder(tmp_path))
        dataset.file(0).unlink()
        with pytest.warns(UserWarning, match="FileNotFoundError"):
            assert dataset[0][1] == 1
