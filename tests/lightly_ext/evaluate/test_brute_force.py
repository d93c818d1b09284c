"""Scores of every command, against loops over what it stored or a tiny model gives.

Data have copies of images in several classes, classes that nothing readable is left of
in one part, a class with one image, unreadable images and batches that are not full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from lightly_ext.evaluate.classification.finetune import run_finetune
from lightly_ext.evaluate.classification.knn import run_knn
from lightly_ext.evaluate.classification.linear import run_linear, run_linear_paper
from lightly_ext.evaluate.dense.in_context import run_in_context
from lightly_ext.evaluate.dense.unsupervised import run_unsupervised_segmentation
from lightly_ext.evaluate.discovery.discover import run_discover
from lightly_ext.evaluate.efficiency import run_efficiency
from lightly_ext.evaluate.probing import rank
from lightly_ext.evaluate.probing.equivariance import run_equivariance
from lightly_ext.evaluate.probing.rank import run_rank
from lightly_ext.evaluate.probing.stability import run_stability
from lightly_ext.evaluate.probing.where import run_where
from lightly_ext.evaluate.reconstruction import reconstruction
from lightly_ext.evaluate.reconstruction.reconstruction import run_reconstruction
from lightly_ext.evaluate.report.report import run_report
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.retrieval.retrieval import run_retrieval
from lightly_ext.evaluate.text.align_text import run_align_text
from stellar_cli.tasks import TASKS
from tests import distributed
from tests.lightly_ext.evaluate.brute_force_loops import (
    by_guesses,
    by_votes,
    crops,
    curve,
    decodings,
    neighbours_of_patches,
    objects,
    places,
    prototypes_of_px,
    rankings,
    ratios,
    shifts,
    texts,
)
from tests.lightly_ext.evaluate.brute_force_sets import (
    SIDE,
    WINDOW,
    Scores,
    write_sets,
)
from tests.lightly_ext.evaluate.reconstruction.metric_weights import tiny_networks
from tests.lightly_ext.evaluate.small import SIZES, Given, make_given


class Case(NamedTuple):
    """A run of a command.

    Attributes:
        run: Called with what the command line gives.
        expected: Scores of each of its results; called with the same and the results.
        options: Of devices and results.
        model: One of the sets.
    """

    run: Callable[..., Any]
    expected: Callable[[Given, list[Result]], list[Scores]]
    options: Mapping[str, Any] = MappingProxyType(SIZES)
    model: str = "model"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


def _run_texts(*given: Any) -> list[Result]:
    root = Given(*given).results.output.parent
    tower = f"local-dir:{root / 'tower'}"
    sets = {name: str(root / name) for name in ("winoground", "mmvp")}
    training = {"data": str(root / "photos.csv"), "images": str(root / "photos")}
    tests = {"retrieval": training["data"], "retrieval_images": training["images"]}
    return [
        *run_align_text(
            *given,
            **training,
            text_model=tower,
            epochs=1,
            pairs_per_batch=6,
            zero_shot=str(root / "mixed"),
            **tests,
            **sets,
        ),
        *run_align_text(
            *given,
            text_model=tower,
            zero_shot=str(root / "single"),
            probe=str(next(given[2].output.glob("align-text-probe-*"))),
        ),
    ]


def _on(name: str, run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The run on one of the sets."""

    def with_data(*given: Any) -> Any:
        return run(*given, str(given[2].output.parent / name), **options)

    return with_data


def _run_where(*given: Any) -> Result:
    root = given[2].output.parent
    return run_where(*given, str(root / "photos"), str(root / "masks"))


def _run_discover(*given: Any) -> Result:
    root = given[2].output.parent
    data = {"data": str(root / "photos"), "masks": str(root / "masks")}
    # The cut of so few patches is not one alone: see its own tests.
    return run_discover(*given, **data, parts=["tokens", "clusters"])


def _run_rank(*given: Any) -> Result:
    root = given[2].output.parent
    images, other = str(root / "photos"), str(root / "other")
    return run_rank(*given, str(root / "mixed"), [other], images=images, force=True)


GRID: dict[str, Any] = {"lrs": [1e-3, 3e-2], "batch_sizes": [6], "epochs": 2}
LARGE = {"resize": WINDOW, "crop": SIDE}
CASES: dict[str, dict[str, Case]] = {
    "knn": {
        name: Case(_on(name, run_knn, neighbours=k), partial(by_votes, name, k))
        for name, k in (("mixed", 4), ("missing", 3), ("single", 3))
    },
    "linear": {
        name: Case(_on(name, run_linear, **GRID), partial(by_guesses, name))
        for name in ("mixed", "missing")
    },
    "linear-paper": {
        "mixed": Case(
            _on("mixed", run_linear_paper, **GRID), partial(by_guesses, "mixed")
        )
    },
    "finetune": {
        "mixed": Case(
            _on("mixed", run_finetune, epochs=2, train_batch_size=6, lr=1e-3),
            partial(by_guesses, "mixed"),
        )
    },
    "reconstruction": {
        "pretrained": Case(_on("photos", run_reconstruction, force=True), decodings)
    },
    "equivariance": {"large": Case(_on("large", run_equivariance), shifts, LARGE)},
    "stability": {"large": Case(_on("large", run_stability), crops, LARGE)},
    "where": {"photos": Case(_run_where, places)},
    "discover": {"photos": Case(_run_discover, objects)},
    "unsupervised-segmentation": {
        "prototypes": Case(
            _on("scenes", run_unsupervised_segmentation, prototypes=True),
            prototypes_of_px,
        )
    },
    "in-context": {
        "scenes": Case(
            _on("scenes", run_in_context, neighbours=4),
            partial(neighbours_of_patches, 4),
        )
    },
    "retrieval": {
        name: Case(_on(name, run_retrieval, clusters=3), partial(rankings, name, 3))
        for name in ("mixed", "missing")
    },
    "efficiency": {
        "two sizes": Case(
            partial(run_efficiency, batch_sizes=(1, 2), max_seconds=0.02),
            ratios,
            {},
            "fine",
        )
    },
    "rank": {"two models": Case(_run_rank, curve)},
    "align-text": {"all sets": Case(_run_texts, texts)},
}
# They make pictures and pages, and score nothing.
NO_SCORES = {"visualize", "atlas"}
SLOW = {"align-text", "efficiency", "finetune", "rank"}
CACHED = {
    *("knn", "in-context", "linear", "linear-paper", "finetune", "align-text"),
    *("retrieval", "unsupervised-segmentation"),
}
# What several processes do here, others in test_processes.py and the decoder's tests.
TOGETHER = ("knn", "in-context", "linear-paper", "finetune", "align-text")


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reconstruction, rank):
        monkeypatch.setattr(module, "load_networks", tiny_networks)


def _run(
    sets: Path, case: Case, output: str, **options: Any
) -> tuple[Given, list[Result]]:
    options = {**case.options, "batch_size": 5, **options}
    given = make_given(
        sets, str(sets / case.model), output=str(sets / output), **options
    )
    results = case.run(*given)
    return given, results if isinstance(results, list) else [results]


def _flat(scores: Any) -> dict[str, float]:
    """Numbers by the names on the way to them."""
    if not isinstance(scores, dict):
        return {"": scores}
    return {
        f"{name} {inner}".strip(): value
        for name, values in scores.items()
        for inner, value in _flat(values).items()
        if name != "chance" and value is not None
    }


def _assert_equal(found: list[Scores], expected: list[Scores]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert _flat(ours) == pytest.approx(_flat(theirs), rel=2e-4, abs=2e-6)


def test_every_command_is_here() -> None:
    """A new one needs a brute force, or has no score."""
    assert set(TASKS) == CASES.keys() | NO_SCORES | {"report"}


@pytest.mark.parametrize(
    ("task", "name"),
    [
        pytest.param(task, name, marks=[pytest.mark.slow] * (task in SLOW))
        for task, cases in CASES.items()
        for name in cases
    ],
)
@pytest.mark.slow
def test_scores(task: str, name: str, sets: Path) -> None:
    case = CASES[task][name]
    given, results = _run(sets, case, f"one-{task}")
    found = [dict(result.scores) for result in results]
    with torch.no_grad():
        _assert_equal(found, case.expected(given, results))
    if task in CACHED:
        again = _run(sets, case, f"one-{task}")[1]
        assert [dict(result.scores) for result in again] == found
        reused = [result.provenance.get("num_reused", 0) for result in again]
        assert task == "finetune" or any(reused)


def test_report(tmp_path: Path) -> None:
    """Numbers of a table are those of result.json, in percent."""
    for model, accuracy in (("a", 2 / 3), ("b", 0.125)):
        card = {"name": "knn", "data": "set"}
        scores = {"accuracy": accuracy, "num_test": 24}
        Result("knn", model, "set", scores, card, {}).save(tmp_path / model)
    text = (run_report(str(tmp_path)) / "report.md").read_text()
    assert "66.67" in text and "12.50" in text


@pytest.mark.slow
def test_scores__two_processes_as_one(sets: Path, tmp_path: Path) -> None:
    found = distributed.run(partial(_of_process, sets), tmp_path)
    assert found[0] == found[1]
    for task, cases in CASES.items():
        for name, case in cases.items() if task in TOGETHER else ():
            alone = [dict(result.scores) for result in _run(sets, case, "alone")[1]]
            if task in ("knn", "in-context", "linear-paper"):
                assert found[0][task][name] == alone
            _assert_equal(found[0][task][name], alone)


def _of_process(sets: Path, rank: int, world_size: int) -> dict[str, Any]:
    distributed.say_as_torchrun(rank, world_size)
    found: dict[str, Any] = {}
    for task in TOGETHER:
        for name, case in CASES[task].items():
            results = _run(sets, case, "two", devices=world_size)[1]
            scores = [dict(result.scores) for result in results]
            found.setdefault(task, {})[name] = scores
    return found
