from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_ext.evaluate.dense import bank as bank_module
from lightly_ext.evaluate.dense.in_context import confusion, run_in_context
from lightly_ext.evaluate.result import Result
from tests.lightly_ext.evaluate.dense.in_context_loops import brute_force
from tests.lightly_ext.evaluate.small import (
    IMAGE_SIZE,
    SIZES,
    Given,
    make_given,
    write_model,
    write_scenes,
)

SIZE = (IMAGE_SIZE, IMAGE_SIZE)


def _pairs(given: Given, data: Path, part: str, features: str) -> list[Any]:
    """Patch features and labels of images of the size of the crop."""
    found = []
    for path in sorted((data / "images" / part).iterdir()):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        rows = getattr(given.model(image[None]), features)[0].double().numpy()
        labels = np.array(Image.open(data / "masks" / part / path.name)).astype(int)
        found.append((rows, np.where(labels == 255, -1, labels)))
    return found


def _stripes(root: Path, part: str, classes: list[int], size: int = 8) -> None:
    """Writes an image of upright stripes, each in the colour of its class."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])
    mask = np.repeat(classes, size)[None].repeat(4 * size, axis=0)
    for kind, array in (("masks", mask), ("images", colours[mask])):
        (root / kind / part).mkdir(parents=True, exist_ok=True)
        number = len(list((root / kind / part).iterdir()))
        image = Image.fromarray(array.astype(np.uint8))
        image.save(root / kind / part / f"{number}.png")


def test_confusion__ignored_px_count_nowhere() -> None:
    predicted = torch.tensor([[0, 1, 1], [2, 0, 0]])
    labels = torch.tensor([[0, 1, 0], [-1, 2, 0]])
    expected = [[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion(predicted, labels, 4).tolist() == expected


class TestRunInContext:
    @pytest.mark.parametrize(
        ("model", "features", "grid"),
        [("patches:8", "dense", (4, 4)), ("tokens", "lowrank", (2, 2))],
    )
    def test_scores__as_by_loops(
        self, model: str, features: Any, grid: tuple[int, int], tmp_path: Path
    ) -> None:
        data = write_scenes(tmp_path / "scenes", 5, 3, SIZE)
        source = write_model(tmp_path / "model") if model == "tokens" else model
        given = make_given(tmp_path, source, batch_size=2, **SIZES)
        result = run_in_context(
            *given, str(data), features, neighbours=5, temperature=0.1
        )
        pairs = [_pairs(given, data, part, features) for part in ("train", "val")]
        expected = brute_force(*pairs, grid, 3, neighbours=5, temperature=0.1)
        assert result.scores == pytest.approx(expected, abs=1e-9)
        assert 0 < result.scores["mIoU"] < result.scores["aAcc"] < 1
        px, tested = (
            np.bincount(np.concatenate([m[m >= 0] for _, m in part])) for part in pairs
        )
        constant = tested[px.argmax()] / tested.sum()
        assert result.chance == {"mIoU": constant / 3, "aAcc": constant}

    def test_scores__colours_tell_all(self, tmp_path: Path) -> None:
        data = tmp_path / "stripes"
        for classes in ([0, 1, 2, 3], [3, 3, 0, 0]):
            _stripes(data, "train", classes)
        for classes in ([2, 1, 3, 0], [0, 0, 1, 1], [3, 2, 0, 2]):
            _stripes(data, "val", classes)
        given = make_given(tmp_path, "patches:8", **SIZES)
        result = run_in_context(*given, str(data), neighbours=1)
        assert result.scores["mIoU"] == result.scores["aAcc"] == 1
        assert result.provenance["class_iou"] == dict.fromkeys("0123", 1)

    def test_scores__every_patch_finds_itself(self, tmp_path: Path) -> None:
        """Noise tells no class, but the test images are in the bank."""
        rng = np.random.default_rng(0)
        data = tmp_path / "noise"
        for classes in ([0, 1, 2, 3], [3, 1, 0, 0]):
            for part in ("train", "val"):
                _stripes(data, part, classes)
        for path in (data / "images" / "train").iterdir():
            noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            for part in ("train", "val"):
                noise.save(data / "images" / part / path.name)
        given = make_given(tmp_path, "patches:8", **SIZES)
        result = run_in_context(*given, str(data), neighbours=1)
        assert result.scores["mIoU"] == 1

    def test_bank__any_batch_and_after_a_stop(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_scenes(tmp_path / "scenes", 6, 2, SIZE)

        def run(output: str, seed: int = 0, **options: Any) -> tuple[Result, list[Any]]:
            place = str(tmp_path / output)
            given = make_given(
                tmp_path, "patches:8", seed=seed, output=place, **options, **SIZES
            )
            result = run_in_context(*given, str(data), bank=30, neighbours=3)
            paths = sorted(Path(place).glob("cache/*/*/[!s]*.npy"))
            return result, [np.load(path) for path in paths]

        first, arrays = run("a", batch_size=6)
        assert [a.shape for a in arrays] == [(6, 5, 3), (6, 5, 192), (6, 3)]
        assert first.scores["num_patches"] <= 30
        alone = run("b", batch_size=1)
        assert alone[0].scores == first.scores
        for ours, theirs in zip(arrays, alone[1], strict=True):
            assert np.array_equal(ours, theirs)
        other = run("c", seed=1)[1]
        assert not np.array_equal(other[1], arrays[1])  # other patches
        steps = bank_module._Filling.steps

        def stopped(self: Any, batches: Any) -> Any:
            yield from list(steps(self, batches))[:2]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(bank_module._Filling, "steps", stopped)
            run("d", batch_size=2)
        resumed = run("d", batch_size=2)
        assert resumed[0].provenance["num_reused"] == 4
        assert resumed[0].scores == first.scores
        for ours, theirs in zip(arrays, resumed[1], strict=True):
            assert np.array_equal(ours, theirs)

    def test_bank__smaller_than_the_images(self, tmp_path: Path) -> None:
        data = write_scenes(tmp_path / "scenes", 6, 2, SIZE)
        given = make_given(tmp_path, "patches:8", **SIZES)
        result = run_in_context(*given, str(data), bank=3, neighbours=1)
        assert result.scores["num_patches"] == 3

    def test_labels__unknown_never_seen_and_broken(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = write_scenes(tmp_path / "scenes", 21, 2, SIZE)
        (data / "classes.txt").write_text("sky\nsea\nsand\nship\n")
        (data / "images" / "train" / "0002.png").write_bytes(b"no image")
        given = make_given(tmp_path, "patches:8", **SIZES)
        result = run_in_context(*given, str(data), neighbours=2)
        assert result.provenance["not_in_bank"] == ["ship"]
        assert result.provenance["unreadable"] == {"train": 1, "test": 0}
        said = capsys.readouterr().out
        assert "No patch has a px of: ship." in said
        assert "1 of 21 images is unreadable" in said
        (data / "classes.txt").write_text("sky\nsea\n")
        with pytest.raises(ValueError, match=r"has the value 2.*2 \(sky, sea\)"):
            run_in_context(*given, str(data), neighbours=2)

    def test_bad__fewer_patches_than_neighbours(self, tmp_path: Path) -> None:
        data = write_scenes(tmp_path / "scenes", 2, 1, SIZE)
        given = make_given(tmp_path, "patches:16", **SIZES)
        with pytest.raises(ValueError, match=r"neighbours must be in 1 to 4, the"):
            run_in_context(*given, str(data), bank=4, neighbours=5)
        with pytest.raises(ValueError, match=r"in 1 to 8, the number of patches in"):
            run_in_context(*given, str(data))

    def test_bad__all_training_px_are_ignored(self, tmp_path: Path) -> None:
        data = write_scenes(tmp_path / "scenes", 2, 1, SIZE)
        for path in (data / "masks" / "train").iterdir():
            Image.new("L", SIZE[::-1], 255).save(path)
        given = make_given(tmp_path, "patches:16", **SIZES)
        with pytest.raises(RuntimeError, match="No px of the training images has"):
            run_in_context(*given, str(data), neighbours=1)
