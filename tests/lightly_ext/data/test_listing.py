from __future__ import annotations

import os
import shutil
import socket
import subprocess
import warnings
from pathlib import Path

import pytest

from lightly_ext.data import list_images, printable
from tests.lightly_ext.data.image_files import write_image


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


class TestListImages:
    def test_list_images__nested_and_in_order(self, tmp_path: Path) -> None:
        names = ["b/x.JPG", "a/deep/er/1.png", "z.Jpeg", "a/0.bmp", "a.png", "a/9.tiff"]
        for name in (*names, ".hidden.png", ".cache/1.png"):
            _touch(tmp_path / name)
        expected = ["a/0.bmp", "a/9.tiff", "a/deep/er/1.png", "a.png", "b/x.JPG"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list_images(tmp_path) == [*expected, "z.Jpeg"]

    def test_list_images__suffixes(self, tmp_path: Path) -> None:
        suffixes = ("jfif", "jpe", "pgm", "pbm", "pnm", "JP2", "avif", "mpo", "dib")
        for suffix in suffixes:
            _touch(tmp_path / f"1.{suffix}")
        assert len(list_images(tmp_path)) == len(suffixes)

    def test_list_images__counts_other_suffixes(self, tmp_path: Path) -> None:
        for name in ("0.png", "1.txt", "a/2.TXT", "3.heic", "LICENSE", "a/4.x\ny"):
            _touch(tmp_path / name)
        with pytest.warns(UserWarning) as record:
            assert list_images(tmp_path) == ["0.png"]
        (warning,) = record
        counts = r"2 .txt, 1 .heic, 1 without suffix, 1 .x\ny"
        assert str(warning.message) == f"Not read as images below {tmp_path}: {counts}."

    def test_list_images__counts_many_other_suffixes(self, tmp_path: Path) -> None:
        _touch(tmp_path / "0.png")
        for number in range(15):
            _touch(tmp_path / f"x.{number:02}")
            os.mkfifo(tmp_path / f"{number:02}.png")
        with pytest.warns(UserWarning) as record:
            list_images(tmp_path)
        text = str(record[0].message)
        assert "1 .09, 5 of 5 other suffixes, 00.png (no file), 01.png" in text
        assert text.endswith("09.png (no file), 5 more that cannot be read.")

    def test_list_images__links(self, tmp_path: Path) -> None:
        _touch(tmp_path / "elsewhere/1.png")
        _touch(tmp_path / "images/b/0.png")
        for source, target in (
            ("images/a.png", "images/b/0.png"),  # of a file: an image of its own
            ("images/c", "elsewhere"),
            ("images/circle", "images"),
            ("images/above", "."),
            ("images/b/again", "images/b"),
            ("images/a", "images/b"),  # b is read where it is
            ("elsewhere/back", "images"),
            ("images/self.png", "images/self.png"),
            ("images/dangling.png", "nowhere"),
        ):
            os.symlink(tmp_path / target, tmp_path / source)
        with pytest.warns(UserWarning) as record:
            names = list_images(tmp_path / "images")
        # A link to nowhere counts as an image that cannot be read.
        assert names == ["a.png", "b/0.png", "c/1.png", "dangling.png"]
        text = str(record[0].message)
        for name in ("circle/", "above/", "b/again/", "a/", "c/back/"):
            assert f" {name} (is read elsewhere)" in text
        assert "self.png (Too many levels of symbolic links)" in text

    def test_list_images__links_that_multiply(self, tmp_path: Path) -> None:
        # 2 ** 40 paths lead to the last image.
        for number in range(40):
            folder = tmp_path / f"store/{number}"
            _touch(folder / "0.png")
            for name in "ab" if number < 39 else "":
                os.symlink(tmp_path / f"store/{number + 1}", folder / name)
        os.symlink(tmp_path / "store/0", tmp_path / "images")
        with pytest.warns(UserWarning, match="b/ \\(is read elsewhere"):
            names = list_images(tmp_path / "images")
        assert names == sorted("a/" * number + "0.png" for number in range(40))

    def test_list_images__special_files(self, tmp_path: Path) -> None:
        _touch(tmp_path / "folder.jpg/0.png")
        os.mkfifo(tmp_path / "pipe.png")
        os.symlink("/dev/zero", tmp_path / "device.png")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket.png"))
            with pytest.warns(UserWarning) as record:
                assert list_images(tmp_path) == ["folder.jpg/0.png"]
        named = "device.png (no file), pipe.png (no file), socket.png (no file)"
        assert named in str(record[0].message)

    def test_list_images__folders_that_cannot_be_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("a/0.png", "gone/1.png", "locked/2.png"):
            _touch(tmp_path / name)

        def scandir(path: str | int) -> object:  # as if it went after it was listed
            if str(path).endswith("gone"):
                shutil.rmtree(path)
            if str(path).endswith("locked"):  # root may read every folder
                raise PermissionError(13, "Permission denied")
            return os_scandir(path)

        os_scandir = os.scandir
        monkeypatch.setattr("lightly_ext.data.listing.os.scandir", scandir)
        with pytest.warns(UserWarning) as record:
            assert list_images(tmp_path) == ["a/0.png"]
        text = str(record[0].message)
        assert "gone/ (No such file or directory), locked/ (Permission denied)" in text

    def test_list_images__deeper_than_the_stack_and_the_longest_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _touch(tmp_path / "0.png")
        for name, depth in (("d", 1500), ("long" * 60, 18)):
            monkeypatch.chdir(tmp_path)
            for _ in range(depth):
                os.mkdir(name)
                os.chdir(name)
            Path("1.png").touch()
        monkeypatch.undo()
        with pytest.warns(UserWarning, match="File name too long"):
            names = list_images(tmp_path)
        assert names == ["0.png", "d/" * 1500 + "1.png"]
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)

    def test_list_images__missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
            list_images(tmp_path / "nowhere")

    def test_list_images__empty_folder(self, tmp_path: Path) -> None:
        for name in ("readme.txt", "1.heic"):
            _touch(tmp_path / name)
        with pytest.raises(ValueError, match=r"no image below .*\.jpg, .*: 1 \.heic, "):
            list_images(tmp_path)

    def test_list_images__names_of_any_bytes(self, tmp_path: Path) -> None:
        names = ["a\nb.png", "été/画像 1.png", os.fsdecode(b"\xff\xfe.png")]
        for name in names:
            write_image(tmp_path / name)
        assert sorted(list_images(tmp_path)) == sorted(names)
        assert list(map(printable, names)) == [
            r"a\nb.png",
            "été/画像 1.png",
            r"\udcff\udcfe.png",
        ]
