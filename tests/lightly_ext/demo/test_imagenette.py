from __future__ import annotations

import hashlib
import tarfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torchvision.datasets
from PIL import Image

from lightly_ext.demo import imagenette
from lightly_ext.demo.imagenette import URL, download_imagenette
from lightly_ext.quick_start import files
from lightly_ext.quick_start.files import find_photos
from stellar_cli.__main__ import main

WNIDS = {"n01440764": "tench", "n03028079": "church"}


@pytest.fixture()
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive in the layout of the real one, with fewer photos."""
    source = tmp_path / "made" / "imagenette2-160"
    for part, number in (("train", 12), ("val", 2)):
        for wnid in WNIDS:
            (source / part / wnid).mkdir(parents=True)
            for i in range(number):
                path = source / part / wnid / f"{wnid}_{i}.JPEG"
                Image.new("RGB", (20, 16), (i, 9, 9)).save(path, "jpeg")
    path = tmp_path / "cache" / "imagenette2-160.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as file:
        file.add(source, source.name)
    monkeypatch.setattr(imagenette, "NUM_PHOTOS", {"train": 24, "val": 4})
    archives = torchvision.datasets.Imagenette._ARCHIVES
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(archives, "160px", (URL, digest))
    return path


@pytest.fixture()
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


class TestDownloadImagenette:
    def test_download_imagenette__same_address_as_torchvision(self) -> None:
        assert torchvision.datasets.Imagenette._ARCHIVES["160px"][0] == URL

    def test_download_imagenette__unpacks_and_names(
        self, archive: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, names = download_imagenette(archive.parent)
        assert names == WNIDS
        monkeypatch.setattr(files, "MIN_IMAGES", 20)
        found = find_photos(folder)
        assert found.train.classes == tuple(WNIDS)
        assert (len(found.train), len(found.test)) == (24, 4)
        # What was cut off while it was unpacked is unpacked again.
        lost = folder / "val" / "n03028079" / "n03028079_1.JPEG"
        lost.unlink()
        download_imagenette(archive.parent)
        assert lost.is_file()
        archive.unlink()
        assert download_imagenette(archive.parent) == (folder, names)

    def test_download_imagenette__damaged(
        self, archive: Path, no_network: None
    ) -> None:
        archive.write_bytes(archive.read_bytes()[:-9])
        with pytest.raises(RuntimeError, match="cannot be downloaded from https"):
            download_imagenette(archive.parent)

    def test_download_imagenette__other_photos(
        self, archive: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(imagenette, "NUM_PHOTOS", {"train": 25, "val": 4})
        with pytest.raises(RuntimeError, match="has not the 29 photos of Imagenette"):
            download_imagenette(archive.parent)

    @pytest.mark.usefixtures("no_network")
    def test_main__no_network(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--photos", "--output", str(tmp_path / "out")])
        assert ended.value.code == 1
        (line, hint) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"stellar demo: Imagenette cannot be downloaded from {URL}"
        )
        assert "name resolution" in line and "stellar try FOLDER" in line
        assert f"put that file (94 MB) into '{tmp_path / 'imagenette'}'" in line
        assert "--debug" in hint
        assert not (tmp_path / "out").exists()

    def test_check_server__does_not_answer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(imagenette, "PATIENCE", 0.05)
        ended = threading.Event()

        def wait(*_: Any, **__: Any) -> None:
            ended.wait()
            raise OSError

        monkeypatch.setattr(urllib.request, "urlopen", wait)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="it does not answer"):
            download_imagenette(tmp_path)
        assert time.monotonic() - start < 5
        ended.set()


class TestMain:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--data", "x"], "Photos of your own: stellar try FOLDER."),
            (["--minutes", "3"], "--minutes belongs to --photos."),
            (["--photos", "--minutes", "0"], "--minutes must be above 0, got 0."),
            (["--photos", "--minutes", "inf"], "must be above 0, got inf."),
        ],
    )
    def test_main__options(
        self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["demo", *arguments])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
