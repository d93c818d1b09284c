from __future__ import annotations

import csv
import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.text.align_text import run_align_text
from lightly_ext.evaluate.text.tower import load_text_tower
from lightly_ext.evaluate.text.training import Alignment
from tests.lightly_ext.evaluate.small import (
    SIZES,
    Given,
    make_given,
    run_options,
    write_model,
)
from tests.lightly_ext.evaluate.text.small_text import (
    COLOURS,
    write_image,
    write_pairs,
    write_tower,
)

TRAIN = ["--pairs_per_batch", "30"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, text tower and training set."""
    folder = tmp_path_factory.mktemp("small")
    return {
        "model": write_model(folder / "model"),
        "text_model": write_tower(folder / "tower"),
        "data": str(write_pairs(folder / "train", copies=4)),
    }


def _given(small: dict[str, str], output: Path, **options: Any) -> Given:
    values = {**SIZES, "output": str(output), "batch_size": 32, **options}
    return make_given(output, small["model"], **values)


def _run(small: dict[str, str], output: Path, **kwargs: Any) -> list[Result]:
    options = {**small, "pairs_per_batch": 30, "epochs": 2, **kwargs}
    given = _given(small, output)
    del options["model"]
    return run_align_text(*given, **options)


def _weights(output: Path) -> dict[str, torch.Tensor]:
    (path,) = output.glob("align-text-probe-*/model.safetensors")
    return safetensors.torch.load_file(path)


def _write_colour_classes(root: Path) -> Path:
    for part, copies in (("train", 1), ("val", 3)):
        for name in COLOURS:
            for i in range(copies):
                write_image(root / part / name / f"{i}.png", name, name, 500 + i)
    return root


def _colour_pairs() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Two pairs of colours that have none in common, as unlike as can be."""
    first = list(permutations(COLOURS, 2))
    return [(a, b) for a, b in zip(first, first[::-1], strict=True) if not {*a} & {*b}]


def _write_winoground(root: Path) -> Path:
    lines = []
    for i, pair in enumerate(_colour_pairs()):
        entry = {}
        for j, (left, right) in enumerate(pair):
            write_image(root / "images" / f"ex_{i}_img_{j}.png", left, right, 700 + i)
            entry[f"caption_{j}"] = f"{left} on the left and {right} on the right"
        entry |= {f"image_{j}": f"ex_{i}_img_{j}" for j in range(2)}
        lines.append(json.dumps(entry))
    (root / "examples.jsonl").write_text("\n".join(lines))
    return root


def _write_mmvp(root: Path) -> Path:
    rows = [("Question ID", "Type", "Statement")]
    for i, pair in enumerate(_colour_pairs()):
        kind = "Color and Appearance" if i % 2 else "Texts"
        for j, (left, right) in enumerate(pair):
            number = str(2 * i + j + 1)
            path = root / "MLLM_VLM Images" / kind / f"{number}.jpg"
            write_image(path, left, right, 900 + i)
            rows.append((number, kind, f"a {left} area beside a {right} one"))
    with (root / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.mark.slow
def test_align_text__every_score_above_chance(
    small: dict[str, str], tmp_path: Path
) -> None:
    sets = {
        "retrieval": write_pairs(tmp_path / "test", copies=1, seed=1000),
        "zero_shot": _write_colour_classes(tmp_path / "colours"),
        "winoground": _write_winoground(tmp_path / "winoground"),
        "mmvp": _write_mmvp(tmp_path / "mmvp"),
    }
    options = ["--text_model", small["text_model"], *run_options(tmp_path)]
    options += [f"--{name}={path}" for name, path in sets.items()]
    command = ["align-text", "--model", small["model"], *options]
    training = ["--data", small["data"], *TRAIN, "--epochs", "40", "--lr", "0.003"]
    before = load_text_tower(small["text_model"], None).sha256
    main([*command, *training])
    assert load_text_tower(small["text_model"], None).sha256 == before
    results = _stored(tmp_path / "out")
    assert len(results) == 5
    for result in results.values():
        assert result.protocol["data"] == result.data
        for name, chance in result.chance.items():
            factor = 1.15 if name.endswith("5") else 2.5
            assert result.scores[name] > factor * chance, (result.data, name)
        assert before[:16] in result.protocol["networks"][0]
        assert result.provenance["training"]["num_held_out"] == 12
    assert results["colours"].scores["num_images"] == 18
    for name in ("Winoground", "MMVP"):
        assert results[name].scores["num_images"] == len(_colour_pairs())
    (probe,) = (tmp_path / "out").glob("align-text-probe-*")
    elsewhere = tmp_path / "probe"
    shutil.copytree(probe, elsewhere)
    shutil.rmtree(tmp_path / "out")
    main([*command, "--probe", str(elsewhere)])
    again = _stored(tmp_path / "out")
    assert len(again) == 4
    for name, result in again.items():
        assert result.scores == results[name].scores
        assert result.protocol == results[name].protocol


def _stored(output: Path) -> dict[str, Result]:
    found = [Result.load(path) for path in output.glob("align-text-*/result.json")]
    return {result.data: result for result in found}


@pytest.mark.slow
def test_align_text__resumed_equals_uninterrupted(
    small: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _run(small, tmp_path / "one")
    step = Alignment.training_step

    def interrupted(self: Alignment, *args: Any) -> torch.Tensor:
        if self.current_epoch == 1:
            raise RuntimeError("power cut")
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Alignment, "training_step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            _run(small, tmp_path / "two")
    found = _run(small, tmp_path / "two")
    assert found[0].scores == expected[0].scores
    assert found[0].provenance["training"] == expected[0].provenance["training"]
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    monkeypatch.setattr(Alignment, "training_step", None)  # never trained again
    assert _run(small, tmp_path / "two")[0].scores == expected[0].scores


@pytest.mark.slow
def test_align_text__unreadable_images_are_counted(
    small: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "train"
    shutil.copytree(Path(small["data"]).parent, data)
    (data / "images" / "red_green_0.png").write_text("broken")
    (data / "images" / "red_green_1.png").unlink()
    (result,) = _run({**small, "data": str(data / "pairs.csv")}, tmp_path, epochs=1)
    training = result.provenance["training"]
    assert training["num_images"] == 120
    assert training["num_unreadable"] == 2
    assert training["num_train"] + training["num_held_out"] == 118
    assert training["num_held_out"] == result.scores["num_images"]


@pytest.mark.slow
def test_align_text__probe_of_another_model(
    small: dict[str, str], tmp_path: Path
) -> None:
    _run(small, tmp_path, epochs=1)
    (folder,) = tmp_path.glob("align-text-probe-*")
    score = {"probe": str(folder), "retrieval": small["data"]}
    with pytest.raises(ValueError, match="trained for another text tower"):
        tower = write_tower(tmp_path / "tower", seed=1)
        run_align_text(*_given(small, tmp_path), text_model=tower, **score)
    tower = small["text_model"]
    other = {**small, "model": write_model(tmp_path / "other", num_queries=3)}
    with pytest.raises(ValueError, match="trained for another encoder"):
        run_align_text(*_given(other, tmp_path), text_model=tower, **score)
    with pytest.raises(ValueError, match="trained with resize 32 and crop 32"):
        given = _given(small, tmp_path, resize=48)
        run_align_text(*given, text_model=tower, **score)


def test_align_text__bad_options(small: dict[str, str], tmp_path: Path) -> None:
    given = _given(small, tmp_path)
    with pytest.raises(ValueError, match="one of the two"):
        run_align_text(*given)
    with pytest.raises(ValueError, match="one of the two"):
        run_align_text(*given, data="x", probe="y")
    with pytest.raises(ValueError, match="nothing to score"):
        run_align_text(*given, probe="y")
    with pytest.raises(ValueError, match="epochs is for training"):
        run_align_text(*given, probe="y", mmvp="z", epochs=3)
    with pytest.raises(ValueError, match="lr must be positive, got -1"):
        run_align_text(*given, data="x", lr=-1.0)
    with pytest.raises(ValueError, match="pairs_per_batch must be positive, got 0"):
        run_align_text(*given, data="x", pairs_per_batch=0)
    with pytest.raises(FileNotFoundError, match="Winoground is not in 'nowhere'"):
        run_align_text(*given, data=small["data"], winoground="nowhere")
    tower = small["text_model"]
    with pytest.raises(FileNotFoundError, match="no trained probe in 'nowhere'"):
        run_align_text(
            *given, probe="nowhere", retrieval=small["data"], text_model=tower
        )
    with pytest.raises(ValueError, match="features must be 'auto' or one of"):
        run_align_text(*given, small["data"], features="best", text_model=tower)
