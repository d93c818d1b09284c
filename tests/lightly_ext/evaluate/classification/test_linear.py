from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from lightly_ext.data import epoch_order
from lightly_ext.demo.boards import make_board_sets
from lightly_ext.demo.export import export_image_folders
from lightly_ext.evaluate.classification import linear
from lightly_ext.evaluate.classification.linear import run_linear, run_linear_paper
from lightly_ext.evaluate.classification.probe_data import FeatureRows, ViewFeatures
from lightly_ext.evaluate.classification.probe_training import LOG_NAME, ProbeTraining
from lightly_ext.evaluate.classification.split import label_chance, split_set
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.result import Result
from stellar_cli.__main__ import main as stellar
from stellar_plugin.protocols import LINEAR_PAPER
from tests.distributed import run_as_torchrun
from tests.lightly_ext.evaluate.small import (
    EMBED_DIM,
    IMAGE_SIZE,
    SIZES,
    Given,
    make_given,
    run_options,
    write_classes,
    write_model,
)

GRID: dict[str, Any] = {"lrs": [1e-3, 1e-2], "batch_sizes": [4, 8]}


def _given(tmp_path: Path, **options: Any) -> Given:
    return make_given(tmp_path, write_model(tmp_path / "model"), **SIZES, **options)


def _stored(tmp_path: Path) -> Result:
    (path,) = (tmp_path / "out").glob("linear*/result.json")
    return Result.load(path)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([4, 4, 4, 4, 4, 4, 4], [1, 5, 0, 2, 3, 3, 1]),  # all alike
        ([9, 2, 2, 2, 4, 2, 0], [3, 0, 1, 7, 2, 2, 0]),  # the last of five are tied
        ([5, 5, 1, 0, 0, 0, 0], [1, 2, 3, 0, 0, 4, 5]),
    ],
)
def test_label_chance__mean_over_all_guesses(train: list[int], test: list[int]) -> None:
    labels = [torch.arange(7).repeat_interleave(torch.tensor(n)) for n in (train, test)]
    for name, value in label_chance(*labels, num_classes=7).items():
        k = 5 if name == "top5" else 1
        guesses = list(itertools.combinations(range(7), k))
        most = max(sum(train[c] for c in guess) for guess in guesses)
        best = [g for g in guesses if sum(train[c] for c in g) == most]
        hits = [sum(test[c] for c in guess) / sum(test) for guess in best]
        assert value == pytest.approx(sum(hits) / len(hits))
    assert label_chance(*labels, num_classes=7).keys() == {"accuracy", "top5"}
    balanced = torch.arange(4).repeat(3)
    assert label_chance(balanced, labels[1] % 4, 4) == {"accuracy": pytest.approx(0.25)}


class TestRunLinear:
    def test_run_linear__scores_card_and_provenance(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "data", num=10)
        result = run_linear(*_given(tmp_path), str(data), epochs=8, **GRID)
        assert result.scores == {"accuracy": 1.0, "num_test": 30}
        assert result.protocol["epochs"] == 8
        assert result.protocol["lrs"] == [1e-3, 1e-2]
        assert result.protocol["data"] == "data"
        provenance = result.provenance
        assert provenance["feature"] == "sparse"
        assert provenance["num_train"] == 27
        assert provenance["num_held_out"] == 3
        assert provenance["unreadable"] == {"train": 0, "held_out": 0, "test": 0}
        table = provenance["held_out_accuracies"]
        assert list(table) == ["4", "8"] and list(table["4"]) == ["0.001", "0.01"]
        best = max(a for row in table.values() for a in row.values())
        chosen = str(provenance["chosen_batch_size"]), f"{provenance['chosen_lr']:g}"
        assert table[chosen[0]][chosen[1]] == best == provenance["held_out_accuracy"]
        assert _stored(tmp_path).scores == result.scores

    @pytest.mark.parametrize("run", [run_linear, run_linear_paper])
    @pytest.mark.slow
    def test_run_linear__learns_from_mixed_precision(
        self, tmp_path: Path, run: Callable[..., Result]
    ) -> None:
        data = write_classes(tmp_path / "data", num=10)
        given = _given(tmp_path, precision="bf16-mixed")
        assert run(*given, str(data), epochs=8, **GRID).scores["accuracy"] == 1.0

    def test_run_linear__log_has_every_epoch_and_no_checkpoint_stays(
        self, tmp_path: Path
    ) -> None:
        data = write_classes(tmp_path / "data")
        given = _given(tmp_path)
        result = run_linear(*given, str(data), epochs=3, **GRID)
        folder = given.results.folder(result)
        lines = (folder / LOG_NAME).read_text().splitlines()
        log = [json.loads(line) for line in lines]
        assert [entry["epoch"] for entry in log] == [1, 2, 3]
        assert all(entry["num_images"] == 22 for entry in log)
        assert max(log[-1]["held_out"]) == result.provenance["held_out_accuracy"]
        assert not list(folder.glob("checkpoint*"))

    @pytest.mark.slow
    def test_run_linear__an_interrupted_run_ends_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = str(write_classes(tmp_path / "data"))
        straight = _given(tmp_path, output=str(tmp_path / "straight"))
        expected = run_linear(*straight, data, epochs=4, **GRID)
        given = _given(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(linear, "epoch_order", _fails_at(2))
            with pytest.raises(KeyboardInterrupt):
                run_linear(*given, data, epochs=4, **GRID)
        epochs: list[int] = []
        monkeypatch.setattr(linear, "epoch_order", _recorded(epochs))
        result = run_linear(*given, data, epochs=4, **GRID)
        assert epochs == [2, 3]
        assert result.scores == expected.scores
        logs = [
            (s.results.folder(r) / LOG_NAME).read_text()
            for s, r in ((straight, expected), (given, result))
        ]
        assert logs[0] == logs[1]

    @pytest.mark.slow
    def test_run_linear__killed_while_the_checkpoint_is_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = str(write_classes(tmp_path / "data"))
        given = _given(tmp_path)
        finish = ProbeTraining.finish

        def killed(path: Path, ignore_errors: bool = False) -> None:
            for file in path.glob("*.pt"):
                file.unlink()
                raise KeyboardInterrupt

        def finish_killed(training: ProbeTraining) -> None:
            with monkeypatch.context() as patched:
                patched.setattr(shutil, "rmtree", killed)
                finish(training)

        with monkeypatch.context() as patched:
            patched.setattr(ProbeTraining, "finish", finish_killed)
            with pytest.raises(KeyboardInterrupt):
                run_linear(*given, data, epochs=2, **GRID)
        (result,) = (tmp_path / "out").glob("linear*/result.json")
        before = Result.load(result).scores
        assert run_linear(*given, data, epochs=2, **GRID).scores == before

    @pytest.mark.slow
    def test_run_linear__a_checkpoint_of_other_images_is_not_continued(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        first = str(write_classes(tmp_path / "a" / "data"))
        second = str(write_classes(tmp_path / "b" / "data", num=9))
        given = _given(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(linear, "epoch_order", _fails_at(1))
            with pytest.raises(KeyboardInterrupt):
                run_linear(*given, first, epochs=2, **GRID)
        result = run_linear(*given, second, epochs=2, **GRID)
        assert "Continues the training" not in capsys.readouterr().out
        assert result.provenance["num_train"] == 24

    @pytest.mark.slow
    def test_run_linear__unreadable_images_are_dropped_and_counted(
        self, tmp_path: Path
    ) -> None:
        data = write_classes(tmp_path / "data", num=30)
        given = _given(tmp_path)
        split = split_set(given.devices, str(data))
        for part, number in (
            (split.data.train, split.kept[5]),
            (split.data.train, split.held_out[2]),
            (split.data.test, 40),
        ):
            (part.root / part.names[int(number)]).write_bytes(b"no image")
        result = run_linear(*given, str(data), epochs=1, **GRID)
        assert result.provenance["unreadable"] == {
            "train": 1,
            "held_out": 1,
            "test": 1,
        }
        assert result.provenance["num_train"] == 80
        assert result.scores["num_test"] == 89

    @pytest.mark.slow
    def test_run_linear__equal_heads_smaller_number_and_border_notes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # One class in the held-out images is enough for equal heads.
        data = write_classes(tmp_path / "data", num=4)
        result = run_linear(
            *_given(tmp_path), str(data), epochs=30, lrs=[0.03, 0.01], batch_sizes=[5]
        )
        assert result.provenance["chosen_lr"] == 0.01
        tie, border = result.provenance["notes"]  # one batch size has no border
        assert tie.startswith("2 of 2 heads are equally good on the held-out images")
        assert border.startswith("The best lr, 0.01, lies at the border")
        assert "best lr, 0.01, lies at the border" in capsys.readouterr().out

    def test_run_linear__batch_sizes_that_do_not_fit_are_left_out(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = write_classes(tmp_path / "data")
        result = run_linear(
            *_given(tmp_path), str(data), epochs=1, batch_sizes=[8, 16, 32]
        )
        assert "Left out: batch sizes 32, more than the 22 images" in (
            capsys.readouterr().out
        )
        assert list(result.provenance["held_out_accuracies"]) == ["8", "16"]
        assert result.protocol["batch_sizes"] == [8, 16, 32]

    @pytest.mark.slow
    def test_run_linear__top5_only_with_more_than_five_classes(
        self, tmp_path: Path
    ) -> None:
        data = write_classes(tmp_path / "data", classes="abcdefg", num=4)
        result = run_linear(*_given(tmp_path), str(data), epochs=2, **GRID)
        assert result.scores["top5"] >= result.scores["accuracy"]
        assert set(result.scores) == {"accuracy", "top5", "num_test"}

    @pytest.mark.slow
    def test_run_linear__reaches_logistic_regression(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = str(write_classes(tmp_path / "data", num=40, classes="abcde"))
        parts = {"train": _clusters(200, 0), "val": _clusters(200, 1)}

        def rows(cache: FeatureCache, files: ImageFiles, *_: object) -> FeatureRows:
            features = parts[files.root.name][files.label_tensor, _index(files)]
            numbers = torch.arange(len(files))
            return FeatureRows(
                features.numpy(), files.label_tensor, numbers, torch.device("cpu")
            )

        monkeypatch.setattr(linear, "cached_rows", rows)
        given = _given(tmp_path)
        result = run_linear(*given, data, epochs=300, lrs=[0.01], batch_sizes=[90])
        split = split_set(given.devices, data)
        train = rows(given.cache, split.data.train)
        test = rows(given.cache, split.data.test)
        x, y = next(iter(train.among(split.kept).blocks()))
        test_x, test_y = next(iter(test.blocks()))
        reference = LogisticRegression(C=100, max_iter=2000)
        reference.fit(F.layer_norm(x, x.shape[1:]).numpy(), y.numpy())
        expected = reference.score(
            F.layer_norm(test_x, x.shape[1:]).numpy(), test_y.numpy()
        )
        assert result.scores["accuracy"] == pytest.approx(expected, abs=0.03)
        assert 0.6 < expected < 1


class TestRunLinearPaper:
    @pytest.mark.slow
    def test_run_linear_paper__card_and_score(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "data", num=10)
        result = run_linear_paper(*_given(tmp_path), str(data), epochs=8, **GRID)
        assert result.scores == {"accuracy": 1.0, "num_test": 30}
        assert result.protocol["train_scale"] == [0.5, 1.0]
        assert result.protocol["name"] == "linear-paper"
        assert result.provenance["num_train"] == 27

    @pytest.mark.slow
    def test_run_linear_paper__an_interrupted_run_ends_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = str(write_classes(tmp_path / "data"))
        straight = _given(tmp_path, output=str(tmp_path / "straight"))
        expected = run_linear_paper(*straight, data, epochs=3, **GRID)
        given = _given(tmp_path)
        original = ViewFeatures.blocks

        def blocks(self: ViewFeatures, epoch: int, size: int) -> Iterator[Any]:
            if epoch == 2:
                raise KeyboardInterrupt
            return original(self, epoch, size)

        with monkeypatch.context() as patched:
            patched.setattr(ViewFeatures, "blocks", blocks)
            with pytest.raises(KeyboardInterrupt):
                run_linear_paper(*given, data, epochs=3, **GRID)
        result = run_linear_paper(*given, data, epochs=3, **GRID)
        logs = [
            (s.results.folder(r) / LOG_NAME).read_text()
            for s, r in ((straight, expected), (given, result))
        ]
        assert logs[0] == logs[1]

    def test_run_linear_paper__too_many_unreadable_images(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "data")
        given = _given(tmp_path)
        split = split_set(given.devices, str(data))
        files = split.data.train
        for number in split.kept[:2].tolist():
            (files.root / files.names[number]).write_bytes(b"no image")
        with pytest.raises(RuntimeError, match=r"2 of 22 images in .* unreadable"):
            run_linear_paper(*given, str(data), epochs=1, **GRID)


class TestViewFeatures:
    def _files(self, tmp_path: Path) -> ImageFiles:
        given = _given(tmp_path)
        data = write_classes(tmp_path / "data", parts=("train", "val"))
        return split_set(given.devices, str(data)).data.train

    def test_blocks__all_images_in_the_order_of_the_epoch(self, tmp_path: Path) -> None:
        files, given = self._files(tmp_path), _given(tmp_path)
        protocol = LINEAR_PAPER.replace(crop=IMAGE_SIZE)
        views = ViewFeatures(given.model, given.devices, files, protocol, "sparse")
        blocks = list(views.blocks(1, size=10))
        assert [len(labels) for _, labels in blocks] == [10, 10, 4]
        assert blocks[0][0].shape == (10, EMBED_DIM)
        order = epoch_order(24, given.devices.seed, 1)
        assert torch.equal(
            torch.cat([labels for _, labels in blocks]), files.label_tensor[order]
        )
        again, other = (next(views.blocks(epoch, 24)) for epoch in (1, 2))
        torch.testing.assert_close(torch.cat([x for x, _ in blocks]), again[0])
        assert not torch.allclose(again[0].sum(0), other[0].sum(0))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs must be at least 1, got 0"),
            ({"lrs": []}, "lrs needs at least one value"),
            ({"batch_sizes": []}, "batch_sizes needs at least one value"),
            ({"lrs": [1e-3, 0.0]}, "lrs must be positive"),
            ({"lrs": [float("nan")]}, "lrs must be positive"),
            ({"batch_sizes": [0, 4]}, "divide the largest"),
            ({"batch_sizes": [3, 4]}, "divide the largest"),
            ({"features": "nonsense"}, "features must be"),
        ],
    )
    @pytest.mark.parametrize("run", [run_linear, run_linear_paper])
    def test_run__bad_options(
        self,
        tmp_path: Path,
        run: Callable[..., Result],
        options: dict[str, Any],
        message: str,
    ) -> None:
        data = write_classes(tmp_path / "data")
        with pytest.raises(ValueError, match=message):
            run(*_given(tmp_path), str(data), **{**GRID, **options})

    def test_run__a_batch_larger_than_the_data_is_cut(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = str(write_classes(tmp_path / "data"))
        options = {**GRID, "epochs": 1, "batch_sizes": [64, 128]}
        result = run_linear(*_given(tmp_path), data, **options)
        assert result.protocol["batch_sizes"] == [22]
        assert "A batch of 64 is cut to 22" in capsys.readouterr().out

    def test_run__one_class(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "data", classes=["cat"])
        with pytest.raises(ValueError, match=r"has 1 class\(es\)"):
            run_linear(*_given(tmp_path), str(data), **GRID)

    def test_run__fewer_images_than_classes(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "data")
        with pytest.raises(ValueError, match="2 training images for 3 classes"):
            run_linear(*_given(tmp_path, limit=2), str(data), **GRID)


class TestSplitSet:
    def test_split_set__the_same_for_every_seed(self, tmp_path: Path) -> None:
        data = str(write_classes(tmp_path / "data", num=20))
        splits = [split_set(_given(tmp_path, seed=s).devices, data) for s in (0, 1)]
        assert torch.equal(splits[0].held_out, splits[1].held_out)
        assert len(splits[0].held_out) == 6
        both = torch.cat([splits[0].kept, splits[0].held_out])
        assert both.sort()[0].tolist() == list(range(60))

    def test_split_set__a_class_that_vanishes_is_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = str(write_classes(tmp_path / "data", num=1))
        split = split_set(_given(tmp_path).devices, data)
        assert len(split.held_out) == 1 and len(split.lost_classes) == 1
        assert f"of 1 class(es): {split.lost_classes[0]}" in capsys.readouterr().out


@pytest.mark.slow
def test_linear__digit_boards_from_the_command_line(tmp_path: Path) -> None:
    sets = make_board_sets(0, 10, 10, num_train_single=120, num_test_single=60)
    export_image_folders(sets, tmp_path / "boards")
    data = tmp_path / "boards" / "single"
    (data / "test").rename(data / "val")
    model = write_model(tmp_path / "model", img_size=60, patch_size=12)
    options = ["--model", model, "--data", str(data)]
    options += ["--features", "dense", "--epochs", "60", "--lrs", "[0.01,0.1]"]
    options += [*run_options(tmp_path), "--resize", "60", "--crop", "60"]
    main(["linear", *options, "--batch_sizes", "[8,16]"])
    result = _stored(tmp_path)
    # Far from chance, 0.1 and 0.5: random features tell digits apart somewhat.
    assert 0.4 < result.scores["accuracy"] < result.scores["top5"]
    assert 0.8 < result.scores["top5"] <= 1
    assert result.protocol["crop"] == 60


def test_linear_paper__from_the_command_line(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data")
    model = write_model(tmp_path / "model")
    options = ["--model", model, "--data", str(data), *run_options(tmp_path)]
    main(["linear-paper", *options, "--epochs", "1", "--batch_sizes", "[8]"])
    assert _stored(tmp_path).task == "linear-paper"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["linear", "linear-paper"])
def test_linear__two_processes_equal_one(tmp_path: Path, task: str) -> None:
    data = write_classes(tmp_path / "data", num=9)
    lrs, batch_sizes = [3e-4, 1e-3, 1e-2], [4, 8]
    given = _given(tmp_path, output=str(tmp_path / "1"))
    run = run_linear if task == "linear" else run_linear_paper
    one = run(*given, str(data), epochs=3, lrs=lrs, batch_sizes=batch_sizes)
    source = given.model.origin.source
    command = ["evaluate", task, "--model", source, "--data", str(data)]
    command += ["--epochs", "3", "--lrs", str(lrs), "--batch_sizes", str(batch_sizes)]
    command += [*run_options(tmp_path / "2"), "--devices", "2"]
    run_as_torchrun(stellar, command, tmp_path)
    two = _stored(tmp_path / "2")
    assert one.scores == two.scores
    assert one.provenance["num_train"] == two.provenance["num_train"] == 24
    for name in ("held_out_accuracies", "chosen_lr", "chosen_batch_size"):
        assert one.provenance[name] == two.provenance[name]


def _fails_at(last: int) -> Callable[[int, int, int], torch.Tensor]:
    def order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
        if epoch == last:
            raise KeyboardInterrupt
        return epoch_order(num_images, seed, epoch)

    return order


def _recorded(epochs: list[int]) -> Callable[[int, int, int], torch.Tensor]:
    def order(num_images: int, seed: int, epoch: int) -> torch.Tensor:
        epochs.append(epoch)
        return epoch_order(num_images, seed, epoch)

    return order


def _clusters(num: int, seed: int) -> torch.Tensor:
    """Features of five classes that overlap, (5, num / 5, 12)."""
    centres = np.random.default_rng(7).normal(size=(5, 1, 12))
    noise = np.random.default_rng(seed).normal(size=(5, num // 5, 12))
    return torch.from_numpy(centres + 1.2 * noise).float()


def _index(files: ImageFiles) -> torch.Tensor:
    return torch.tensor([int(Path(name).stem) for name in files.names])
