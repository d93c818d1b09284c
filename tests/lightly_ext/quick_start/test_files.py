from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from lightly_ext.data import read_image
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.quick_start import files
from lightly_ext.quick_start.files import copy_photos, find_photos, limited
from tests.lightly_ext.data.streams.shard_files import write_tar
from tests.lightly_ext.evaluate.small import write_classes, write_images


@pytest.fixture(autouse=True)
def few_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MIN_IMAGES", 20)


class TestFindPhotos:
    def test_find_photos__last_fifth_of_each_class(self, tmp_path: Path) -> None:
        write_images(tmp_path / "cat", 11)
        write_images(tmp_path / "dog", 20)
        found = find_photos(tmp_path)
        assert "last fifth of each class" in found.split and not found.unlabelled
        assert found.test.names == [
            *(f"cat/{i:04d}.png" for i in (9, 10)),
            *(f"dog/{i:04d}.png" for i in (16, 17, 18, 19)),
        ]
        assert not set(found.train.names) & set(found.test.names)
        assert len(found.train) == 25
        assert found.train.labels == [0] * 9 + [1] * 16
        assert found.train.classes == found.test.classes == ("cat", "dog")

    def test_find_photos__own_split(self, tmp_path: Path) -> None:
        write_classes(tmp_path, ("train", "test"))
        found = find_photos(tmp_path)
        assert "own split" in found.split
        assert (found.train.root, found.test.root) == (
            tmp_path / "train",
            tmp_path / "test",
        )
        assert (len(found.train), len(found.test)) == (24, 24)
        assert found.test.labels == [0] * 8 + [1] * 8 + [2] * 8

    @pytest.mark.parametrize(
        ("folders", "said"),
        [
            ({".": 30}, "do not all lie in subfolders"),
            ({".": 1, "cat": 20, "dog": 20}, "do not all lie in subfolders"),
            ({"cat": 30}, "All photos are of one class, 'cat'."),
            ({"cat": 30, "dog": 1}, "photos of each class, only one has: dog."),
        ],
    )
    def test_find_photos__without_classes(
        self, folders: dict[str, int], said: str, tmp_path: Path
    ) -> None:
        for name, number in folders.items():
            write_images(tmp_path / name, number)
        found = find_photos(tmp_path)
        assert said in found.unlabelled
        assert found.train.labels is found.test.labels is None
        assert found.train.classes == ()
        # The copies have no classes for the same reason.
        assert copy_photos(found, tmp_path / "out").unlabelled == found.unlabelled

    def test_find_photos__too_few(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"16 photos .* 4 to test .*visualize"):
            find_photos(write_images(tmp_path, 20))

    def test_find_photos__nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"notes\.txt"):
            find_photos(tmp_path / "notes.txt")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            find_photos(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="There is no image below"):
            find_photos(tmp_path)

    def test_find_photos__says_what_is_beyond(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "MAX_TEST", 3)
        found = find_photos(write_images(tmp_path, 40))
        assert found.left_out == {"test photos beyond 3": 5}
        assert len(found.test) == 3

    def test_find_photos__tars(self, tmp_path: Path) -> None:
        files = {}
        for number in range(30):
            path = write_images(tmp_path / "one", 1, seed=number) / "0000.png"
            files[f"{number:03d}.png"] = path.read_bytes()
            files[f"{number:03d}.cls"] = b"01"[number % 2 : number % 2 + 1]
        shards = write_tar(tmp_path / "shards" / "photos.tar", files).parent
        found = find_photos(shards)
        assert (len(found.train), len(found.test)) == (24, 6)
        copied = copy_photos(found, tmp_path / "out")
        assert copied.train.labels == [0] * 12 + [1] * 12
        # Their own pixels, in the order of the classes.
        for name, number in ((copied.train.names[0], 0), (copied.test.names[-1], 29)):
            seen = read_image(copied.train.root.parent / _part(name, copied) / name)
            write_images(tmp_path / "one", 1, seed=number)
            whole = read_image(tmp_path / "one" / "0000.png")
            assert seen.shape == whole.shape == (3, 40, 36)
            assert (seen.float() - whole.float()).abs().mean() < 6
        # Commands that read folders alone find the copies.
        assert copied.folder == copied.train.root


def _part(name: str, photos: files.PhotoSets) -> str:
    return "train" if name == photos.train.names[0] else "val"


class TestCopyPhotos:
    def test_copy_photos__tiny_ones_larger(self, tmp_path: Path) -> None:
        photos = write_images(tmp_path / "photos", 30, (20, 30))
        copied = copy_photos(find_photos(photos), tmp_path / "out")
        small = read_image(copied.train.root / copied.train.names[0])
        assert small.shape == (3, 32, 48)

    def test_copy_photos__large_ones_smaller_broken_ones_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "COPIED_SIDE", 32)
        monkeypatch.setattr(files, "MAX_BANK", 10)
        photos = tmp_path / "photos"
        write_images(photos / "a", 20, (32, 40))
        write_images(photos / "b", 20, (64, 96), seed=1)
        (photos / "a" / "0003.png").write_bytes(b"broken")
        (photos / "b" / "0019.png").write_bytes(b"broken")
        copied = copy_photos(find_photos(photos), tmp_path / "out")
        assert copied.left_out == {"unreadable": 2}
        assert (len(copied.train), len(copied.test)) == (31, 7)
        assert copied.train.labels == [0] * 15 + [1] * 16
        same = (tmp_path / "out" / "train" / "a" / "0000.png").read_bytes()
        assert same == (photos / "a" / "0000.png").read_bytes()
        small = read_image(tmp_path / "out" / "train" / "b" / "0000.png.jpg")
        assert small.shape == (3, 32, 48)
        whole = read_image(photos / "b" / "0000.png").float()
        means = whole.unflatten(1, (32, 2)).unflatten(3, (48, 2)).mean(dim=(2, 4))
        assert (small.float() - means).abs().mean() < 3
        bank = (tmp_path / "out" / "bank").rglob("*.*")
        names = {
            path.relative_to(tmp_path / "out" / "bank").as_posix() for path in bank
        }
        assert names == set(copied.bank.names)
        assert len(names) == 9

    def test_copy_photos__unreadable(self, tmp_path: Path) -> None:
        photos = write_images(tmp_path / "photos", 30)
        for path in sorted(photos.iterdir())[:10]:
            path.write_bytes(b"broken")
        with pytest.raises(ValueError, match=r"14 photos .* 6 to .* 10 are unread"):
            copy_photos(find_photos(photos), tmp_path / "out")

    @pytest.mark.parametrize("side", [20, 40])  # made larger, and copied as it is
    def test_copy_photos__full_disk_is_no_broken_photo(
        self, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = find_photos(write_images(tmp_path / "photos", 30, (side, side)))

        def full(path: Path, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"copied to .*train': .*No space left"):
            copy_photos(found, tmp_path / "out")

    def test_copy_photos__name_that_can_be_no_longer(self, tmp_path: Path) -> None:
        photos = write_images(tmp_path / "photos", 30, (20, 20))
        (photos / "0000.png").rename(photos / f"{'a' * 251}.png")
        copied = copy_photos(find_photos(photos), tmp_path / "out")
        assert copied.left_out == {"unreadable": 1}

    def test_copy_photos__labels_of_what_is_left(self, tmp_path: Path) -> None:
        photos = tmp_path / "photos"
        for i, name in enumerate("abc"):
            write_images(photos / name, 15, seed=i)
        for path in (photos / "a").iterdir():
            path.write_bytes(b"broken")
        copied = copy_photos(find_photos(photos), tmp_path / "out")
        assert copied.train.classes == copied.test.classes == ("b", "c")
        assert copied.test.labels == [0] * 3 + [1] * 3


class TestLimited:
    def test_limited__each_class_has_one(self, tmp_path: Path) -> None:
        labels = [0] * 90 + [1] * 9 + [2]
        names = [f"{i}.png" for i in range(100)]
        some = limited(ImageFiles(tmp_path, names, labels, ("a", "b", "c")), 20)
        assert np.bincount(some.labels).tolist() == [18, 1, 1]
        assert some.names[:3] == ["0.png", "5.png", "10.png"]
