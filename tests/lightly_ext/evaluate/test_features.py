from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import Tensor

from lightly_ext.data import read_image
from lightly_ext.evaluate import images, numerics, resumable
from lightly_ext.evaluate.features import POOLED, CachedFeatures, FeatureCache
from lightly_ext.evaluate.fingerprints import Contents
from lightly_ext.evaluate.images import ImageFiles, centre_crop, folder_images
from lightly_ext.evaluate.resumable import ResumableArrays
from stellar_plugin.protocols import KNN
from tests.lightly_ext.evaluate.small import (
    Given,
    make_given,
    write_images,
    write_model,
)


class Counted:
    """Mean colours, and the number of images that they were asked of.

    The first call is no batch: it finds out shapes.
    """

    def __init__(self, fails_at: int | None = None) -> None:
        self.sizes: list[int] = []
        self.fails_at = fails_at

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        if len(self.sizes) == self.fails_at:
            raise RuntimeError("the power went out")
        self.sizes.append(len(images))
        means = images.float().mean(dim=(2, 3))
        return {"means": means, "first": images[:, 0, :2, :2].half()}


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return _given(tmp_path, write_model(tmp_path / "model"))


def _given(tmp_path: Path, model: str, **options: Any) -> Given:
    return make_given(tmp_path, model, **{"batch_size": 4, **options})


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    return folder_images(write_images(tmp_path / "images", 18))


PROTOCOL = KNN.replace(resize=36, crop=32)


def computed(
    given: Given, files: ImageFiles, kind: str = "a", protocol: Any = PROTOCOL
) -> tuple[CachedFeatures, list[int]]:
    """Features, and the sizes of the batches they took."""
    counted = Counted()
    cached = given.cache.features(files, protocol, kind, counted)
    return cached, counted.sizes[1:]


class TestFeatures:
    def test_values_and_types(self, given: Given, files: ImageFiles) -> None:
        cached, sizes = computed(given, files)
        assert sizes == [4, 4, 4, 4, 2] and cached.num_unreadable == 0
        means = cached.rows("means")
        assert means.shape == (18, 3) and means.dtype == torch.float32
        first = cached.rows("first")
        assert first.shape == (18, 2, 2) and first.dtype == torch.float16

    def test_copies_of_an_image_are_computed_once(
        self, given: Given, files: ImageFiles
    ) -> None:
        write_images(files.root, 40)
        files = folder_images(files.root)
        for name in files.names[10:]:
            (files.root / name).write_bytes((files.root / files.names[3]).read_bytes())
        for name in (files.names[1], files.names[20]):
            (files.root / name).write_bytes(b"broken")
        cached, sizes = computed(given, files[range(39, -1, -1)], kind="copies")
        assert sizes == [4, 4, 2]  # of the 9 readable contents, and of the broken one
        means = cached.rows("means")
        copies = [*means[:19], means[35]]
        assert torch.stack(copies).unique(dim=0).shape == (1, 3)
        assert means.unique(dim=0).shape == (9, 3)
        assert cached.readable.tolist() == [i for i in range(40) if i not in (19, 38)]
        assert cached.num_unreadable == 2

    def test_a_second_time_from_files(self, given: Given, files: ImageFiles) -> None:
        cached, _ = computed(given, files)
        again, sizes = computed(given, files)
        assert sizes == [] and again.rows("means").equal(cached.rows("means"))

    def test_resumes(
        self, tmp_path: Path, files: ImageFiles, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = write_model(tmp_path / "model")
        given = _given(tmp_path, model)
        # The third batch: the first call is none.
        with pytest.raises(RuntimeError, match="the power went out"):
            given.cache.features(files, PROTOCOL, "a", Counted(fails_at=3))
        resumed, sizes = computed(given, files)
        assert sizes == [4, 4, 2]
        said = "a: 8 of 18 features reused from"
        assert said in capsys.readouterr().out and resumed.num_reused == 8
        whole, _ = computed(
            _given(tmp_path, model, output=str(tmp_path / "other")), files
        )
        assert resumed.readable.equal(torch.arange(18))
        for name in ("means", "first"):
            assert resumed.rows(name).equal(whole.rows(name))

    def test_another_batch_size_continues(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        model = write_model(tmp_path / "model")
        with pytest.raises(RuntimeError):
            given = _given(tmp_path, model)
            given.cache.features(files, PROTOCOL, "a", Counted(fails_at=2))
        given = _given(tmp_path, model, batch_size=7)
        assert computed(given, files)[1] == [7, 7]

    @pytest.mark.slow
    def test_whatever_matters_makes_another_cache(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        first = write_model(tmp_path / "first")
        make = partial(_given, tmp_path, first)
        given = make()
        asked = [
            (given, files, "a", PROTOCOL),
            (given, files, "another feature", PROTOCOL),
            (given, files, "a", PROTOCOL.replace(crop=16)),
            (given, files, "a", PROTOCOL.replace(resize=40)),
            (make(precision="bf16-mixed"), files, "a", PROTOCOL),
            (make(untrained=True), files, "a", PROTOCOL),
            (make(untrained=True, seed=1), files, "a", PROTOCOL),
        ]
        for arguments in asked:
            assert sum(computed(*arguments)[1]) == len(files)
        for arguments in asked:
            assert computed(*arguments)[1] == []
        # The same folder with other weights in it.
        write_model(tmp_path / "first", num_queries=3)
        assert sum(computed(make(), files)[1]) == len(files)


def _right(given: Given, files: ImageFiles, cached: CachedFeatures) -> bool:
    """Whether features are those of a cache that was empty."""
    with TemporaryDirectory() as folder:
        fresh = FeatureCache(
            given.model, given.devices, Contents(given.devices, Path(folder))
        )
        new = fresh.features(files, PROTOCOL, "a", Counted())
        return new.readable.equal(cached.readable) and all(
            new.rows(name).equal(cached.rows(name)) for name in ("means", "first")
        )


class TestReuse:
    """What has changed is computed, and nothing else."""

    def test_replaced_added_removed_renamed(self, given: Given, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "images", 18)
        others = write_images(tmp_path / "others", 3, seed=1)
        computed(given, folder_images(folder))
        stat = (folder / "0004.png").stat()
        (others / "0000.png").replace(folder / "0004.png")
        os.utime(folder / "0004.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (others / "0001.png").rename(folder / "0003b.png")
        (folder / "0009.png").unlink()
        (folder / "0000.png").rename(folder / "last.png")
        files = folder_images(folder)
        cached, sizes = computed(given, files)
        assert sizes == [2] and cached.num_reused == 16
        assert _right(given, files, cached)

    def test_swapped_images(self, given: Given, files: ImageFiles) -> None:
        computed(given, files)
        a, b, other = (files.root / n for n in ("0000.png", "0001.png", "other"))
        for source, target in ((a, other), (b, a), (other, b)):
            source.rename(target)
        cached, sizes = computed(given, files)
        assert sizes == [] and cached.num_reused == 18
        assert _right(given, files, cached)

    def test_moved_folder_and_other_labels(
        self, given: Given, files: ImageFiles
    ) -> None:
        first, _ = computed(given, files)
        moved = files.root.rename(files.root.with_name("moved"))
        labelled = ImageFiles(moved, files.names, [0] * 9 + [1] * 9, ["a", "b"])
        again, sizes = computed(given, labelled)
        assert sizes == [] and again.rows("means").equal(first.rows("means"))

    def test_another_reading_of_the_same_weights(
        self, given: Given, files: ImageFiles
    ) -> None:
        def scaled(images: Tensor) -> Mapping[str, Tensor]:
            return {k: 1.01 * v for k, v in Counted()(images).items()}

        first, _ = computed(given, files)
        other = given.cache.features(files, PROTOCOL, "a", scaled)
        assert other.num_reused == 0
        assert other.rows("means").equal(1.01 * first.rows("means"))
        assert computed(given, files)[1] == []

    def test_another_configuration_of_the_same_weights(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        source = write_model(tmp_path / "model", norm_eps=1e-6)
        first = _given(tmp_path, source, precision="bf16-mixed")
        first.cache.pooled(files, PROTOCOL, "sparse")
        path = Path(source, "config.json")
        config = json.loads(path.read_text())
        # Of these only the first moves the features of an image by much.
        changes = {"num_heads": 1, "norm_eps": 1e-5, "pos_antialias": True}
        for name, value in changes.items():
            path.write_text(json.dumps({**config, name: value}))
            other = _given(tmp_path, source, precision="bf16-mixed")
            assert other.model.origin.sha256 == first.model.origin.sha256
            cached = other.cache.pooled(files, PROTOCOL, "sparse")
            fresh = FeatureCache(
                other.model, other.devices, Contents(other.devices, tmp_path / name)
            )
            expected = fresh.pooled(files, PROTOCOL, "sparse").rows(POOLED)
            assert cached.num_reused == 0 and cached.rows(POOLED).equal(expected)

    def test_another_version_computes_anew(
        self, given: Given, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed(given, files)
        monkeypatch.setattr(numerics, "version", lambda name: "0")
        assert computed(given, files)[0].num_reused == 0

    def test_damaged_files_are_made_anew(
        self, given: Given, files: ImageFiles, capsys: pytest.CaptureFixture[str]
    ) -> None:
        computed(given, files)
        (folder,) = given.results.cache.glob("*-0/*/")
        for name, kept in (("means", -1), ("state", 100), ("contents", 0)):
            path = folder / f"{name}.npy"
            path.write_bytes(path.read_bytes()[:kept])
            cached, _ = computed(given, files)
            assert cached.num_reused == 0 and _right(given, files, cached)
            assert f"'{folder}' is damaged" in capsys.readouterr().out
        path.write_bytes(b"")
        assert computed(given, files[range(17)])[0].num_reused == 0

    def test_full_disk(
        self, given: Given, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int, start: int, size: int) -> None:
            sizes.append(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        sizes: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            said = r"needs 0.001459 MiB.* No space left on device\. .*--output"
            with pytest.raises(OSError, match=said):
                computed(given, files)
        assert sizes == [128 + 18 * 3 * 4]  # the header, and float32
        assert not list(given.results.cache.glob("*-0/.*"))
        assert computed(given, files)[1] == [4, 4, 4, 4, 2]

    def test_another_run_at_the_same_time(
        self, given: Given, files: ImageFiles
    ) -> None:
        """It fills the same files while this one is in the middle."""
        mine = Counted()

        def compute(images: Tensor) -> Mapping[str, Tensor]:
            if len(mine.sizes) == 2:
                assert computed(given, files)[0].num_reused == 0
            return mine(images)

        cached = given.cache.features(files, PROTOCOL, "a", compute)
        assert cached.num_unreadable == 0 and _right(given, files, cached)

    @pytest.mark.parametrize("moment", ["arrays", "known"])
    def test_killed_while_the_cache_is_made(
        self,
        given: Given,
        files: ImageFiles,
        monkeypatch: pytest.MonkeyPatch,
        moment: str,
    ) -> None:
        def torn(file: BinaryIO, **_: Any) -> None:
            file.write(b"PK")
            raise KeyboardInterrupt

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            if moment == "arrays":
                patched.setattr(os, "rename", killed)
            else:
                patched.setattr(np, "savez", torn)
            with pytest.raises(KeyboardInterrupt):
                computed(given, files)
        cached, _ = computed(given, files)
        assert cached.num_reused == 0 and _right(given, files, cached)

    def test_killed_while_features_are_written(
        self, given: Given, files: ImageFiles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the values of the second batch and their state."""
        monkeypatch.setattr(resumable, "SECONDS_BETWEEN_WRITES", 0)
        write = ResumableArrays._write

        def killed(self: ResumableArrays, reached: Any) -> None:
            if (reached != 0).sum() > 4:
                os._exit(9)
            write(self, reached)

        child = os.fork()
        if child == 0:
            ResumableArrays._write = killed  # type: ignore[method-assign]
            computed(given, files)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        cached, sizes = computed(given, files)
        assert sizes == [4, 4, 4, 2] and _right(given, files, cached)


class TestUnreadable:
    def test_skipped_counted_and_named(
        self, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_images(tmp_path / "images", 20)
        (folder / "0007.png").write_bytes(b"broken")
        files = folder_images(folder)
        cached, _ = computed(given, files)
        assert cached.num_unreadable == 1
        assert cached.readable.tolist() == [i for i in range(20) if i != 7]
        good = files[cached.readable.tolist()]
        assert cached.rows("means").equal(computed(given, good)[0].rows("means"))
        said = capsys.readouterr().out
        assert f"1 of 20 images is unreadable ({folder}/0007.png)" in said

    def test_too_many(self, given: Given, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "images", 20)
        for i in (3, 7, 8, 9):
            (folder / f"000{i}.png").write_bytes(b"broken")
        pattern = r"4 of 20 .* unreadable \(.*03.png, .*07.png, .*08.png, \.\.\.\)"
        with pytest.raises(RuntimeError, match=pattern):
            computed(given, folder_images(folder))

    def test_repaired_image_comes_back(self, given: Given, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "images", 20)
        whole = (folder / "0007.png").read_bytes()
        (folder / "0007.png").write_bytes(whole[:100])
        assert computed(given, folder_images(folder))[0].num_unreadable == 1
        (folder / "0007.png").write_bytes(whole)
        repaired, sizes = computed(given, folder_images(folder))
        assert sizes == [1] and repaired.num_reused == 19
        assert repaired.readable.tolist() == list(range(20))
        assert _right(given, folder_images(folder), repaired)

    def test_image_that_could_not_be_read_for_a_while(
        self, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = folder_images(write_images(tmp_path / "images", 20))

        def fails(path: Path) -> Tensor:
            if path.name == "0007.png":
                raise OSError("the network is away")
            return read_image(path)

        with monkeypatch.context() as patched:
            patched.setattr(images, "read_image", fails)
            for _ in range(2):
                assert computed(given, files)[0].num_unreadable == 1
        later, sizes = computed(given, files)
        assert sizes == [1] and later.num_unreadable == 0
        assert _right(given, files, later)


class TestPooled:
    @pytest.mark.parametrize("feature", ["sparse", "cls+dense"])
    def test_rows_of_the_model(
        self, given: Given, tmp_path: Path, feature: str
    ) -> None:
        folder = write_images(tmp_path / "images", 21)
        (folder / "0002.png").write_bytes(b"broken")
        files = folder_images(folder)
        cached = given.cache.pooled(files, PROTOCOL, feature)
        assert cached.num_unreadable == 1
        assert cached.readable.tolist() == [i for i in range(21) if i != 2]
        crop = centre_crop(PROTOCOL, given.model.origin.interpolation)
        good = [files.names[i] for i in cached.readable]
        images = torch.stack([crop(read_image(folder / name)) for name in good])
        expected = given.model.pooled(images, feature)
        torch.testing.assert_close(cached.rows(POOLED), expected, rtol=1e-5, atol=1e-5)

    def test_precision__features_stay_float32(
        self, tmp_path: Path, files: ImageFiles
    ) -> None:
        model = write_model(tmp_path / "model")
        exact, rounded = (
            _given(tmp_path, model, precision=p)
            .cache.pooled(files, PROTOCOL, "sparse")
            .rows(POOLED)
            for p in ("32-true", "bf16-mixed")
        )
        assert rounded.dtype == torch.float32 and not rounded.equal(exact)
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
