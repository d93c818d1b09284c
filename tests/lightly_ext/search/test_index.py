from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.data import read_image
from lightly_ext.evaluate import fingerprints
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import centre_crop
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.parts import Parts, cluster_parts, token_parts
from lightly_ext.search.encoding import IMAGES, Encoded, ImageEncoder
from lightly_ext.search.index import run_index
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.store import LanceStore
from lightly_ext.search.token_index import TokenIndex
from stellar_plugin.encoder import Factorization
from tests import distributed
from tests.lightly_ext.evaluate.small import IMAGE_SIZE, write_images, write_model
from tests.lightly_ext.test_run_lock import hold

NUM = 7
WIDE = "deep/0000.png"


@pytest.fixture(scope="module")
def devices() -> Devices:
    return Devices(accelerator="cpu", num_workers=0, batch_size=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images that count as old enough to be told by their times."""
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    write_images(tmp_path / "images" / "deep", 1, size=(40, 90), seed=1)
    return write_images(tmp_path / "images", NUM - 1)


class Indexing:
    """Runs `stellar index`, and tells which images were encoded and read."""

    def __init__(
        self, devices: Devices, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.devices, self.model = devices, model
        self.encoded: list[str] = []
        self.hashed: list[str] = []
        checked, read = ImageEncoder.checked, fingerprints.file_sha256

        def noted(encoder: ImageEncoder, images: Tensor, names: list[str]) -> Encoded:
            found = checked(encoder, images, names)
            self.encoded += names
            return found

        def hashed(path: Path) -> str:
            self.hashed.append(path.name)
            return read(path)

        monkeypatch.setattr(ImageEncoder, "checked", noted)
        monkeypatch.setattr("lightly_ext.search.freshness.file_sha256", hashed)

    def __call__(self, data: Path, model: str | None = None, **options: Any) -> Any:
        """Runs it and returns the names that were encoded."""
        self.encoded, self.hashed = [], []
        arguments = {"model": model or self.model, "seed": 0}
        output = str(options.pop("output", data.with_name("index")))
        devices = options.pop("devices", self.devices)
        self.index = run_index(arguments, devices, str(data), output, **options)
        return sorted(self.encoded)


@pytest.fixture
def indexing(devices: Devices, model: str, monkeypatch: pytest.MonkeyPatch) -> Indexing:
    return Indexing(devices, model, monkeypatch)


def _names(data: Path) -> list[str]:
    return sorted(str(path.relative_to(data)) for path in data.rglob("*.png"))


def _factorize(model: FrozenModel, data: Path, names: Sequence[str]) -> Factorization:
    sizes = IMAGES.replace(resize=IMAGE_SIZE, crop=IMAGE_SIZE)
    crop = centre_crop(sizes, model.origin.interpolation)
    return model(torch.stack([crop(read_image(data / name)) for name in names]))


def _check(index: TokenIndex, parts: Parts, cls: Tensor) -> None:
    found = index.entries(index.files)
    for ours, wanted in (
        (found.tokens, parts.vectors),
        (found.mean, parts.vectors.mean(dim=1)),
        (found.cls, cls),
    ):
        unit = F.normalize(wanted, dim=-1)
        torch.testing.assert_close(ours, unit, atol=1e-2, rtol=0)
        assert (ours * unit).sum(-1).min() > 0.9999
    torch.testing.assert_close(found.maps, parts.maps, atol=0.51 / 255, rtol=0)
    torch.testing.assert_close(found.masses, parts.masses)


class TestRunIndex:
    def test_entries__as_the_model_gives(
        self, data: Path, indexing: Indexing, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (data / "0003.png").write_bytes(b"no image")
        Image.new("RGB", (50, 60)).save(data / "turned.jpg", exif=_turned())
        indexing(data)
        index = TokenIndex.open(data.with_name("index"))
        names = [*_names(data), "turned.jpg"]
        names.remove("0003.png")
        assert index.files == sorted(names)
        model = load_frozen_model(indexing.model)
        result = _factorize(model, data, index.files)
        assert result.cls is not None
        _check(index, token_parts(result), result.cls)
        sizes = dict(zip(index.files, index.sizes().tolist(), strict=True))
        assert sizes.pop(WIDE) == [40, 90]
        assert sizes.pop("turned.jpg") == [50, 60]
        assert {*map(tuple, sizes.values())} == {(40, 36)}
        said = " ".join(capsys.readouterr().out.split())
        assert "has 8 images: 8 new, 0 changed, 0 as indexed; 0 are gone." in said
        assert "Skipped: 1 of 8 images is unreadable (" in said
        assert "0003.png)" in said
        seen = (5 * 36 / 40 + 40 / 90 + 50 / 60) / 7
        assert f"The model sees {seen:.0%} of their area" in said

    def test_entries__clusters_of_patches(self, data: Path, indexing: Indexing) -> None:
        indexing(data, model="patches:8", clusters=3, crop=IMAGE_SIZE)
        index = indexing.index
        result = _factorize(load_frozen_model("patches:8"), data, index.files)
        assert result.cls is not None
        _check(index, cluster_parts(result, 3, 0), result.cls)

    def test_again__what_is_new_or_has_changed(
        self, data: Path, indexing: Indexing
    ) -> None:
        assert indexing(data) == _names(data)
        store = sorted(data.with_name("index").rglob("*"))
        assert indexing(data) == indexing.hashed == []
        assert sorted(data.with_name("index").rglob("*")) == store

        write_images(data / "new", 2, seed=2)
        assert indexing(data) == ["new/0000.png", "new/0001.png"]

        before = indexing.index.entries(indexing.index.files[:1]).tokens
        _write_other(data / "0000.png")
        assert indexing(data) == ["0000.png"]
        assert not indexing.index.entries(indexing.index.files[:1]).tokens.equal(before)

        (data / "0001.png").unlink()
        assert indexing(data) == []
        assert indexing.index.files == _names(data)
        assert TokenIndex.open(data.with_name("index")).files == _names(data)

    def test_again__same_size_and_time(self, data: Path, indexing: Indexing) -> None:
        indexing(data)
        path = data / "0002.png"
        stat, content = path.stat(), bytearray(path.read_bytes())
        Image.new("RGB", (36, 40), (1, 2, 3)).save(path)
        padding = len(content) - path.stat().st_size
        with path.open("ab") as file:
            file.write(bytes(padding))  # behind the image
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert indexing(data) == ["0002.png"]

    def test_again__touched(self, data: Path, indexing: Indexing) -> None:
        indexing(data)
        for path in data.glob("*.png"):
            os.utime(path, (1, 1))
        assert indexing(data) == []
        assert len(indexing.hashed) == NUM - 1
        assert indexing(data) == indexing.hashed == []
        assert indexing.index.files == _names(data)

    @pytest.mark.slow
    def test_again__too_young(
        self, data: Path, indexing: Indexing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fingerprints, "SETTLED_NS", 10**18)
        indexing(data)
        path = data / "0002.png"
        _write_other(path)
        indexing.hashed.clear()
        assert indexing(data) == ["0002.png"]  # whatever its times
        assert len(indexing.hashed) == NUM + 1
        monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
        assert indexing(data) == []
        assert indexing(data) == indexing.hashed == []

    @pytest.mark.slow
    def test_again__unreadable(self, data: Path, indexing: Indexing) -> None:
        path = data / "0002.png"
        content = path.read_bytes()
        path.write_bytes(b"no image")
        indexing(data)
        assert "0002.png" not in indexing.index.files
        path.write_bytes(content)
        assert indexing(data) == ["0002.png"]
        path.write_bytes(content[:100])  # what is kept is of another content
        indexing(data)
        assert "0002.png" not in indexing.index.files
        path.unlink()
        path.symlink_to("nowhere")
        assert indexing(data) == []

    @pytest.mark.slow
    def test_readers__are_no_forks(
        self, data: Path, indexing: Indexing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fork() -> int:
            raise AssertionError("LanceDB has threads that may hold locks.")

        monkeypatch.setattr(os, "fork", fork)
        readers = Devices(accelerator="cpu", num_workers=1, batch_size=3)
        assert indexing(data, devices=readers) == _names(data)

    def test_no_image_is_readable(self, tmp_path: Path, indexing: Indexing) -> None:
        data = tmp_path / "images"
        data.mkdir()
        (data / "a.png").write_bytes(b"no image")
        with pytest.raises(RuntimeError, match="could be read"):
            indexing(data)

    @pytest.mark.slow
    def test_limit__goes_on(self, data: Path, indexing: Indexing) -> None:
        names = _names(data)
        assert indexing(data, limit=3) == [names[0], names[2], names[4]]
        assert len(indexing(data, limit=3)) == 3
        assert len(indexing(data, limit=3)) == 1
        assert indexing.index.files == names

    @pytest.mark.slow
    def test_moved__goes_on(
        self, data: Path, tmp_path: Path, indexing: Indexing
    ) -> None:
        model = str(shutil.copytree(indexing.model, tmp_path / "model"))
        indexing(data, model=model)
        for name in ("model", "images", "index"):
            (tmp_path / name).rename(tmp_path / f"moved_{name}")
        data, output = tmp_path / "moved_images", tmp_path / "moved_index"
        _write_other(data / "0001.png")
        moved = str(tmp_path / "moved_model")
        assert indexing(data, model=moved, output=output) == ["0001.png"]
        card = IndexCard.load(output)
        assert card.images == str(data)
        assert card.model["model"] == moved
        ImageEncoder.of_card(card, indexing.devices, "it")

    @pytest.mark.slow
    def test_images_of_another_folder(
        self, data: Path, tmp_path: Path, indexing: Indexing
    ) -> None:
        indexing(data)
        other = write_images(tmp_path / "other", 9, size=(50, 50), seed=5)
        with pytest.raises(ValueError, match=rf"'{other}' has 0 of {NUM}: .*--output"):
            indexing(other, output=tmp_path / "index")
        assert TokenIndex.open(tmp_path / "index").files == _names(data)
        assert indexing(data) == []

    @pytest.mark.slow
    def test_other_tokens(self, data: Path, indexing: Indexing) -> None:
        indexing(data)
        half = Devices(accelerator="cpu", precision="bf16-mixed")
        tried: list[tuple[dict[str, Any], str]] = [
            ({"crop": 48}, "crop: 32 there, 48 here"),
            ({"clusters": 2}, "clusters: None there, 2 here"),
            ({"model": "patches:8", "crop": 32}, "sha256: "),
            ({"devices": half}, "precision: 32-true there, bf16-mixed here"),
        ]
        for options, differs in tried:
            with pytest.raises(ValueError, match=differs):
                indexing(data, **options)
        assert indexing(data) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("change, refused", [(0.001, False), (0.1, True)])
    def test_other_code(
        self, data: Path, indexing: Indexing, change: float, refused: bool
    ) -> None:
        """The same weights, with which the code does something else."""
        indexing(data)
        folder = data.with_name("index")
        card = IndexCard.load(folder)
        known = torch.tensor(card.known)
        card.known[0] += change * float(known.norm())
        card.versions["timm"] = "0.1"
        card.save(folder)
        if refused:
            with pytest.raises(ValueError, match=r"differ by 10% .*timm 0\.1 there, "):
                indexing(data)
            with pytest.raises(ValueError, match=r"timm 0\.1 there"):
                ImageEncoder.of_card(card, indexing.devices, "it")
        else:
            assert indexing(data) == []
            assert IndexCard.load(folder) == card  # the first ones stay

    def test_not_finite__names_the_file(
        self, data: Path, indexing: Indexing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = _factorize(load_frozen_model(indexing.model), data, ["0004.png"])
        call = ImageEncoder.__call__

        def broken(encoder: ImageEncoder, images: Tensor) -> Encoded:
            found = call(encoder, images)
            same = (found.parts.vectors - bad.sparse).abs().amax(dim=(1, 2)) < 1e-4
            found.parts.vectors[same] = float("nan")
            return found

        with monkeypatch.context() as context:
            context.setattr(ImageEncoder, "__call__", broken)
            with pytest.raises(RuntimeError, match=r"Features of '0004.png' by .* not"):
                indexing(data)
        assert indexing(data) == ["0003.png", "0004.png", "0005.png", WIDE]
        assert indexing.index.files == _names(data)

    @pytest.mark.slow
    @pytest.mark.parametrize("step", ["create_table", "add", "delete"])
    def test_interrupted(
        self,
        data: Path,
        indexing: Indexing,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
    ) -> None:
        """Nothing is written from some step on, as after a kill."""
        if step == "delete":
            indexing(data)
            for name in ("0000.png", "0002.png"):
                _write_other(data / name)
        put = LanceStore.put

        def killed(store: LanceStore, *arguments: Any) -> None:
            place = "_table" if step == "delete" else "_database"
            setattr(store, place, _Dying(getattr(store, place), step))
            put(store, *arguments)

        with monkeypatch.context() as context:
            context.setattr(LanceStore, "put", killed)
            with pytest.raises(Killed):
                indexing(data)
        assert indexing(data) == (
            ["0000.png", "0002.png"] if step == "delete" else _names(data)
        )
        assert indexing.index.files == _names(data)
        assert indexing(data) == []

    @pytest.mark.slow
    def test_two_at_once__the_second_is_refused(
        self, data: Path, indexing: Indexing
    ) -> None:
        child, keep = hold(data.with_name("index"))
        with pytest.raises(RuntimeError, match=f"is going on: process {child} on"):
            indexing(data)
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(keep)
        assert indexing(data) == _names(data)

    def test_bad_folders(self, data: Path, tmp_path: Path, indexing: Indexing) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.tex").touch()
        (tmp_path / "empty").mkdir()
        (tmp_path / "x.tar").touch()
        for images, output, said in (
            (data, tmp_path / "file", "is a file"),
            (data, tmp_path / "other", "is a folder of something else"),
            (data, data / "index", "lie in one another"),
            (data, tmp_path, "lie in one another"),
            (tmp_path / "none", tmp_path / "index", "There is no folder"),
            (tmp_path / "empty", tmp_path / "index", "There is no image below"),
            (tmp_path / "x.tar", tmp_path / "index", r"x.tar' has none: unpack it"),
        ):
            with pytest.raises(ValueError, match=said):
                # Before the model is looked for.
                indexing(images, model="no_model", output=output)
        assert not (tmp_path / "index").exists()
        with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
            indexing(data, limit=0)


@pytest.mark.slow
class TestProcesses:
    def test_killed(self, data: Path, indexing: Indexing) -> None:
        """A process that writes after each batch is killed while it encodes."""
        code = (
            "import sys; from lightly_ext.search import index\n"
            "from lightly_ext.search.encoding import ImageEncoder\n"
            "index.ROWS_AT_ONCE, checked, told = 1, ImageEncoder.checked, []\n"
            "def tell(encoder, images, names):\n"
            "    print(*names, flush=True)\n"
            "    if len(told) == 4:\n"
            "        sys.stdin.read()\n"  # nothing comes
            "    told.append(names)\n"
            "    return checked(encoder, images, names)\n"
            "ImageEncoder.checked = tell\n"
            "index.main(sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", code, "--model", indexing.model]
        command += ["--data", str(data), "--output", str(data.with_name("index"))]
        command += ["--batch_size", "1", "--num_workers", "0"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as process:
            assert process.stdout is not None
            while process.stdout.readline().strip() != "0004.png":
                assert process.poll() is None
            process.kill()
        # Of the 4 images before, at most the last 2 were not written yet.
        assert {"0002.png", "0003.png"} >= {*indexing(data)} - {*_names(data)[4:]}
        assert indexing.index.files == _names(data)

    def test_full_disk(self, data: Path, indexing: Indexing) -> None:
        code = (
            "import resource, sys; from lightly_ext.search import index, store\n"
            "put = store.LanceStore.put\n"
            "def full(*arguments):\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
            "    put(*arguments)\n"
            "store.LanceStore.put = full\n"
            "import stellar_cli.__main__ as cli\n"
            "cli.main(['index', *sys.argv[1:]])\n"
        )
        command = [sys.executable, "-c", code, "--model", indexing.model]
        command += ["--data", str(data), "--output", str(data.with_name("index"))]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 1
        assert "index' cannot be written: " in found.stderr
        assert "Make room, and run the same command again." in found.stderr
        assert indexing(data) == _names(data)

    def test_two__as_one(self, data: Path, indexing: Indexing) -> None:
        (data / "0003.png").write_bytes(b"no image")
        indexing(data)
        (data.with_name("meet")).mkdir()
        work = partial(_of_process, indexing.model, data)
        files = distributed.run(work, data.with_name("meet"))
        assert files[0] == files[1] == indexing.index.files
        alone = indexing.index.entries(indexing.index.files)
        both = TokenIndex.open(data.with_name("two")).entries(alone.files)
        for name, wanted in vars(alone).items():
            if isinstance(wanted, Tensor):  # a batch decides on the last digits
                torch.testing.assert_close(
                    getattr(both, name), wanted, atol=0.01, rtol=0
                )
        assert indexing(data, output=data.with_name("two")) == []


def _of_process(model: str, data: Path, rank: int, world_size: int) -> list[str]:
    distributed.say_as_torchrun(rank, world_size)
    devices = Devices(devices=world_size, accelerator="cpu", num_workers=0)
    output = str(data.with_name("two"))
    index = run_index({"model": model, "seed": 0}, devices, str(data), output)
    return list(index.files)


class Killed(BaseException):
    """Nothing goes on from here."""


class _Dying:
    """What dies at a step, in the place of a table or database."""

    def __init__(self, real: Any, step: str) -> None:
        self._real, self._step = real, step

    def __getattr__(self, name: str) -> Any:
        if name == self._step:
            raise Killed
        if name == "create_table":
            return lambda *a, **k: _Dying(self._real.create_table(*a, **k), self._step)
        return getattr(self._real, name)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    return exif


def _write_other(path: Path) -> None:
    """Another image under the same name."""
    Image.new("RGB", (36, 40), (200, 10, 30)).save(path)
