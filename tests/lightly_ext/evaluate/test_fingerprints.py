from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray

from lightly_ext.evaluate import fingerprints
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.fingerprints import Contents, content_hashes
from lightly_ext.evaluate.images import ImageFiles

NAMES = ["b/1.png", "a/2.png", "a/3.png"]


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(accelerator="cpu", num_workers=0)


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return _files(tmp_path / "set")


def _files(root: Path) -> ImageFiles:
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return ImageFiles(root, NAMES, [0, 1, 1])


def _expected(files: ImageFiles) -> list[bytes]:
    contents = [(files.root / name).read_bytes() for name in files.names]
    return [hashlib.sha256(content).hexdigest().encode() for content in contents]


class Reads:
    """Counts the files that are read, which count as old enough to be remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settled: int = 0) -> None:
        self.names: list[str] = []
        self._read = fingerprints.file_sha256
        monkeypatch.setattr(fingerprints, "file_sha256", self)
        monkeypatch.setattr(fingerprints, "SETTLED_NS", settled)

    def __call__(self, path: Path) -> str:
        self.names.append(f"{path.parent.name}/{path.name}")
        return self._read(path)

    def of(self, devices: Devices, cache: Path, files: ImageFiles) -> list[str]:
        """What is read to hash files, after a check of the hashes."""
        self.names.clear()
        found = content_hashes(devices, cache, files)
        assert found.tolist() == _expected(files)
        return sorted(self.names)


class TestContentHashes:
    def test_content_hashes__of_unchanged_files_once(
        self,
        devices: Devices,
        files: ImageFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        reads = Reads(monkeypatch)
        assert reads.of(devices, tmp_path / "cache", files) == sorted(NAMES)
        assert reads.of(devices, tmp_path / "cache", files) == []
        assert reads.of(devices, tmp_path / "cache", files[[2]]) == []
        assert reads.of(devices, tmp_path / "other", files) == sorted(NAMES)
        (files.root / NAMES[2]).write_bytes(b"another size")
        assert reads.of(devices, tmp_path / "cache", files) == [NAMES[2]]
        assert reads.of(devices, tmp_path / "cache", files) == []

    def test_content_hashes__same_size_and_time_of_change(
        self,
        devices: Devices,
        files: ImageFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        reads, path = Reads(monkeypatch), files.root / NAMES[0]
        reads.of(devices, tmp_path, files)
        stat = path.stat()
        other = tmp_path / "other"
        other.write_bytes(b"2" * stat.st_size)
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(path)
        assert path.stat().st_mtime_ns == stat.st_mtime_ns
        assert reads.of(devices, tmp_path, files) == [NAMES[0]]

    def test_content_hashes__young_files_are_read_again(
        self,
        devices: Devices,
        files: ImageFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        reads = Reads(monkeypatch, settled=10**12)
        for _ in range(2):
            assert reads.of(devices, tmp_path, files) == sorted(NAMES)

    def test_content_hashes__missing(self, devices: Devices, files: ImageFiles) -> None:
        (files.root / NAMES[1]).unlink()
        for _ in range(2):
            found = content_hashes(devices, files.root, files)
            assert [len(sha256) for sha256 in found] == [64, 0, 64]
        files = _files(files.root)
        found = content_hashes(devices, files.root, files)
        assert found.tolist() == _expected(files)

    def test_content_hashes__broken_memory_is_built_anew(
        self,
        devices: Devices,
        files: ImageFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        reads = Reads(monkeypatch)
        reads.of(devices, tmp_path / "cache", files)
        (memo,) = (tmp_path / "cache" / fingerprints.FOLDER).iterdir()
        whole = memo.read_bytes()
        sha256 = _expected(files)[0]
        at = whole.index(sha256)
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        for broken in (b"", whole[: len(whole) // 2], whole[:-1], flipped):
            memo.write_bytes(broken)
            assert reads.of(devices, tmp_path / "cache", files) == sorted(NAMES)
            assert reads.of(devices, tmp_path / "cache", files) == []

    def test_content_hashes__full_disk(
        self,
        devices: Devices,
        files: ImageFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def full(file: BinaryIO, **arrays: object) -> None:
            file.write(b"PK")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        reads = Reads(monkeypatch)
        monkeypatch.setattr(np, "savez", full)
        assert reads.of(devices, tmp_path / "cache", files) == sorted(NAMES)
        folder = tmp_path / "cache" / fingerprints.FOLDER
        said = capsys.readouterr().out
        assert f"'{folder}/" in said and "No space left on device" in said
        assert not list(folder.iterdir())

    def test_content_hashes__killed_while_writing(
        self,
        devices: Devices,
        files: ImageFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def torn(file: BinaryIO, **arrays: object) -> None:
            file.write(b"PK")
            raise KeyboardInterrupt

        reads = Reads(monkeypatch)
        with monkeypatch.context() as context:
            context.setattr(np, "savez", torn)
            with pytest.raises(KeyboardInterrupt):
                content_hashes(devices, tmp_path, files)
        assert reads.of(devices, tmp_path, files) == sorted(NAMES)
        assert reads.of(devices, tmp_path, files) == []


class TestContents:
    def test_hashes__once_in_a_run(
        self,
        devices: Devices,
        files: ImageFiles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        looked: list[ImageFiles] = []

        def look(_: Devices, __: Path, these: ImageFiles) -> NDArray[np.bytes_]:
            looked.append(these)
            return content_hashes(devices, tmp_path, these)

        monkeypatch.setattr(fingerprints, "content_hashes", look)
        run = Contents(devices, tmp_path)
        part = files[[2, 0]]
        digest = run.fingerprint(files, part)
        before = _expected(files)
        (files.root / NAMES[0]).write_bytes(b"replaced")
        assert run.hashes(files).tolist() == before
        assert run.hashes(part).tolist() == [before[2], before[0]]
        assert run.fingerprint(files, part) == digest
        assert [len(these) for these in looked] == [3, 2]
        later = Contents(devices, tmp_path)
        assert later.hashes(files).tolist() == _expected(files) != before
        assert later.fingerprint(files, part) != digest


class TestFingerprint:
    def test_fingerprint__by_contents_names_and_labels(
        self, devices: Devices, files: ImageFiles, tmp_path: Path
    ) -> None:
        def of(*parts: ImageFiles, beside: object = None) -> str:
            return Contents(devices, tmp_path).fingerprint(*parts, beside=beside)

        first = of(files)
        found = [
            first,
            of(ImageFiles(files.root, NAMES, [1, 0, 0])),
            of(ImageFiles(files.root, NAMES)),
            of(files[[1, 0, 2]]),
            of(files[[0, 1]]),
            # A name that is no text, as Linux allows.
            of(ImageFiles(files.root, ["\udcff.png"])),
            of(files, files),
            of(files, beside=[["a caption"]]),
        ]
        moved = files.root.rename(tmp_path / "moved")
        assert of(ImageFiles(moved, NAMES, [0, 1, 1])) == first
        (moved / NAMES[0]).write_bytes(b"replaced")
        found.append(of(ImageFiles(moved, NAMES, [0, 1, 1])))
        assert len(set(found)) == len(found)

    def test_fingerprint__parts_are_told_apart(
        self, devices: Devices, files: ImageFiles, tmp_path: Path
    ) -> None:
        a, b = (
            Contents(devices, tmp_path).fingerprint(files[range(i)], files[range(i, 3)])
            for i in (1, 2)
        )
        assert a != b
