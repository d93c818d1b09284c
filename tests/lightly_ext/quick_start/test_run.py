from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console

from lightly_ext.data import SingleViewTransform, read_image
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.pages.charts import HEIGHT, WIDTH
from lightly_ext.quick_start import plan, run
from lightly_ext.quick_start.files import PhotoSets
from lightly_ext.quick_start.page import charts, verdict
from lightly_ext.quick_start.run import check_apart, run_try
from lightly_ext.quick_start.scores import FIRST, RAW, TRAINED, UNTRAINED
from lightly_ext.quick_start.scores import PRIOR as PRIOR_ROW
from lightly_ext.quick_start.training import (
    PRIOR,
    STELLAR,
    Pretrainings,
    Steps,
    read_stage,
)
from stellar_plugin import Stellar
from tests.lightly_ext.evaluate.small import write_images
from tests.page import Page

OPTIONS = {
    PRIOR: [
        "--model.model.img_size=32",
        "--model.model.embed_dim=24",
        "--model.model.depth=1",
        "--model.model.num_heads=2",
        "--model.model.decoder_dim=16",
        "--model.model.decoder_depth=1",
        "--model.model.decoder_num_heads=2",
        "--data.transform.init_args.global_crop_size=32",
        "--data.batch_size=8",
        "--data.num_workers=0",
    ],
    STELLAR: [
        "--model.model.decoder_dim=16",
        "--model.model.decoder_depth=1",
        "--model.model.decoder_num_heads=2",
        "--model.head.hidden_dim=16",
        "--model.head.output_dim=8",
        "--model.head.num_prototypes=12",
        "--data.batch_size=8",
        "--data.num_workers=0",
    ],
}


class Tried(NamedTuple):
    """A try that was stopped in STELLAR's stage, and typed again.

    Attributes:
        output: Its folder.
        scores: What came of it.
        pages: The page after each time that it was written.
        printed: What was printed before it was stopped, and after.
    """

    output: Path
    scores: dict[str, dict[str, float]]
    pages: list[str]
    printed: list[str]


def few_steps(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """So many steps in each stage, whatever the machine does."""
    seconds = {PRIOR: 100.0, STELLAR: 200.0}
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 1.0)
    monkeypatch.setattr(plan, "training_seconds", lambda *_: seconds)
    monkeypatch.setattr(run, "steps_within", lambda *_: Steps(steps, 1, steps))


@pytest.mark.slow
class TestRunTry:
    @pytest.fixture(scope="class")
    def tried(self, tmp_path_factory: pytest.TempPathFactory) -> Tried:
        folder = tmp_path_factory.mktemp("try")
        for i, name in enumerate(("cat", "dog", "eel")):
            write_images(folder / "photos" / "train" / name, 70, seed=i)
            write_images(folder / "photos" / "val" / name, 12, seed=10 + i)
        (folder / "photos" / "train" / "cat" / "0000.png").write_bytes(b"broken")
        pages: list[str] = []
        replace_text, train = run.replace_text, Pretrainings.train

        def noted(path: Path, text: str) -> None:
            replace_text(path, text)
            pages.extend([text] if path.name == "index.html" else [])

        def stopped(self: Pretrainings, name: str, *rest: Any) -> Any:
            if name == STELLAR:
                raise KeyboardInterrupt
            return train(self, name, *rest)

        def attempt() -> dict[str, dict[str, float]]:
            return run_try(folder / "photos", folder / "out", 3, 5.0, options=OPTIONS)

        printed = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            few_steps(monkeypatch, 2)
            monkeypatch.setattr(run, "replace_text", noted)
            console = Console(width=200)
            monkeypatch.setattr(run, "Stages", _recording(run.Stages, console))
            monkeypatch.setattr(Pretrainings, "train", stopped)
            with console.capture() as capture, pytest.raises(KeyboardInterrupt):
                attempt()
            printed.append(capture.get())
            monkeypatch.setattr(Pretrainings, "train", train)
            # A prior is not lost because time is short.
            monkeypatch.setattr(plan, "check_minutes", pytest.fail)
            with console.capture() as capture:
                scores = attempt()
            printed.append(capture.get())
        return Tried(folder / "out", scores, pages, printed)

    def test_run_try__rows_equal_brute_force(self, tried: Tried) -> None:
        model = Stellar.from_pretrained(tried.output / "model")
        view = SingleViewTransform(32)
        features, labels = {}, {}
        for part in ("train", "val"):
            files = sorted((tried.output / "photos" / part).rglob("*.png"))
            images = torch.stack([view(read_image(path)) for path in files]) / 255
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
            with torch.no_grad():
                result = model((images - mean) / std)
            features[part] = {
                "sparse": result.sparse.mean(dim=1).numpy(),
                "tokens": result.sparse.flatten(1).numpy(),
                "cls": result.cls.numpy(),
                "dense": result.dense.mean(dim=1).numpy(),
            }
            labels[part] = np.array([path.parent.name for path in files])
        assert (len(labels["train"]), len(labels["val"])) == (209, 36)
        scores = tried.scores["trained"]
        for name, train in features["train"].items():
            hits = [
                _vote(train, labels["train"], query) == label
                for query, label in zip(
                    features["val"][name], labels["val"], strict=True
                )
            ]
            assert scores[f"knn_{name}"] == pytest.approx(np.mean(hits)), name

    def test_run_try__what_is_written(self, tried: Tried) -> None:
        table = json.loads((tried.output / "table.json").read_text())
        assert table["scores"] == tried.scores
        assert table["chance"] == pytest.approx(1 / 3)
        assert "209 to learn from, 36 to test with" in table["photos"]
        assert "1 unreadable" in table["photos"]
        prior = tried.scores["prior (MAE)"]
        assert {"knn_cls", "knn_dense", "rank_dense"} <= prior.keys()
        assert not {"knn_sparse", "psnr", "share"} & prior.keys()
        value = tried.scores["trained"]["knn_sparse"]
        shown = f"{100 * value:.1f} ± {100 * np.sqrt(value * (1 - value) / 36):.1f}"
        assert f"| trained | {shown} |" in (tried.output / "table.md").read_text()
        assert shown in tried.pages[-1]
        assert not (tried.output / "trial").exists()
        starts = json.loads((tried.output / "stellar" / "run.json").read_text())
        assert str(tried.output / "prior" / "model") in starts["sessions"][0]["command"]

    def test_run_try__page_from_the_start_on(self, tried: Tried) -> None:
        assert (tried.output / "index.html").read_text() == tried.pages[-1]
        texts = [" ".join(Page(page).text.split()) for page in tried.pages]
        early, last = texts[:-1], texts[-1]
        assert all("Not the end yet." in text for text in early)
        assert not any("What to do next" in text for text in early)
        # Before the prior and behind it, and the same once more, with the prior kept.
        priors = ["prior (MAE)" in text for text in texts]
        assert priors == [False, False, True, False, False, True, True]
        assert "Not the end yet." not in last
        assert "untrained" in early[0] and "tokens of the untrained model" in early[0]
        assert "tokens of the trained model" in last

    def test_run_try__last_page(self, tried: Tried) -> None:
        page = Page(tried.pages[-1])
        assert all(a.startswith("data:image/jpeg;base64,") for a in page.addresses)
        assert {picture.size for _, picture in page.decoded()} == {(144, 144)}
        assert min(np.asarray(p.convert("L")).mean() for _, p in page.decoded()) > 25
        assert len(tried.pages[-1]) < 3e6
        assert len({image["alt"] for image in page.images}) == len(page.images)
        assert not {"script", "link"} & page.tags
        text = " ".join(page.text.split())
        titles = [
            *("What was chosen", "Loss and health", "Token by token"),
            *("Strongest token per patch", "Patch features", "Reconstruction"),
            *("Nearest images", "Numbers", "What to do next", "The run"),
        ]
        places = [text.index(title) for title in titles]
        assert places == sorted(places)
        assert "209 photos are few: recipes are made for 1000 or more" in text
        assert "There is no accuracy" not in text
        model = tried.output / "model"
        assert f"stellar evaluate knn --model {model} --data" in text

    def test_run_try__plan_is_printed(self, tried: Tried) -> None:
        first = " ".join(tried.printed[0].split())
        for text in (
            "photos_prior, then photos",
            "8 photos",
            "36 to test with",
            "5 minutes",
        ):
            assert text in first
        assert "the end is at about" in first
        assert "steps, prior" in first and "steps, stellar" in first

    def test_run_try__finished_prior_is_kept(self, tried: Tried) -> None:
        assert "The prior is finished and kept" in tried.printed[0]
        assert "its prior is finished and kept" in tried.printed[1]
        record = json.loads((tried.output / "prior" / "run.json").read_text())
        assert len(record["sessions"]) == 1
        assert tried.printed[1].count("prior, without labels") == 0
        state = json.loads((tried.output / ".stellar_try").read_text())
        assert state["complete"] and set(state["seconds"]) == {"prior", "stellar"}

    def test_run_try__points_are_those_of_the_metrics(self, tried: Tried) -> None:
        runs = {name: read_stage(tried.output / name) for name in (PRIOR, STELLAR)}
        found = {chart.title: chart for chart in charts(runs, {})}
        logged = []
        for stage in runs.values():
            path = stage.folder / "csv" / "version_0" / "metrics.csv"
            rows = list(csv.DictReader(path.open()))
            knn = [float(row["knn_top1"]) for row in rows if row["knn_top1"]]
            before = json.loads((stage.folder / "run.json").read_text())["knn"]
            logged.append([before["untrained"], *knn])
            assert len(knn) == 2
        chart = found["online kNN accuracy, 0 to 1"]
        values = [v for part in logged for v in part]
        low, high = min(values), max(values)
        for line, part in zip(chart.lines, logged, strict=True):
            heights = [float(point.split(",")[1]) for point in line.split()]
            shares = [HEIGHT * (high - v) / (high - low) for v in part]
            assert heights == pytest.approx(shares, abs=0.06)
        # The second part begins where the first one ends, at the mark.
        switch = chart.marks["STELLAR"]
        assert float(chart.lines[0].split()[-1].split(",")[0]) == switch
        assert float(chart.lines[1].split(",")[0]) == switch
        minutes = [stage.minutes for stage in runs.values()]
        assert switch == pytest.approx(WIDTH * minutes[0] / sum(minutes), rel=0.2)
        assert "loss of the prior, squared error" in found


@pytest.mark.slow
def test_run_try__without_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos", 250)
    few_steps(monkeypatch, 1)
    scores = run_try(photos, tmp_path / "out", 3, 5.0, options=OPTIONS)
    assert not any(name.startswith("knn") for name in scores["trained"])
    assert {"psnr", "share", "blur", "rank_sparse", "again_sparse"} <= scores[
        "trained"
    ].keys()
    text = " ".join(Page((tmp_path / "out" / "index.html").read_text()).text.split())
    assert "There is no accuracy. The photos do not all lie in subfolders" in text
    assert "finding a photo again by another crop of it" in text
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["chance"] == 1 / 50


@pytest.mark.parametrize(
    ("trained", "untrained", "prior", "first", "number"),
    [
        (0.8, 0.5, 0.6, "It has learned: in telling 2 classes apart", 1),
        (0.6, 0.58, 0.3, "Perhaps it has learned", 1),
        (0.5, 0.6, 0.7, "It has not learned what helps here", 2),
        (1.0, 0.99, 1.0, "This was too easy to say what it has learned", 1),
    ],
)
def test_verdict__against_the_best_without_training(
    trained: float, untrained: float, prior: float, first: str, number: int
) -> None:
    files = ImageFiles(Path(), ["a"] * 50, [0, 1] * 25, ["cat", "dog"])
    photos = PhotoSets(Path(), files, files, "", "", {})
    values = {TRAINED: trained, UNTRAINED: untrained, PRIOR_ROW: prior, RAW: 0.5}
    scores = {name: {f"knn_{FIRST[name]}": x} for name, x in values.items()}
    sentences = verdict(photos, scores)
    assert sentences[0].startswith(first) and len(sentences) == number
    assert sentences[0].endswith(
        f"{100 * max(untrained, 0.5):.1f} % of random weights (chance 50.0 %)."
    )


class TestCheckApart:
    def test_check_apart__one_in_the_other(self, tmp_path: Path) -> None:
        inside = tmp_path / "photos"
        check_apart(inside, tmp_path / "out")
        for pair in ((tmp_path, inside), (inside, tmp_path), (inside, inside)):
            with pytest.raises(ValueError, match="lie in one another"):
                check_apart(*pair)


def _recording(kind: Any, console: Any) -> Any:
    """Stages that print into a console."""
    return lambda: kind(console)


def _vote(bank: np.ndarray, labels: np.ndarray, query: np.ndarray) -> str:
    cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    votes: dict[str, float] = {}
    for i in np.argsort(-cosines)[:20]:
        votes[labels[i]] = votes.get(labels[i], 0) + np.exp(cosines[i] / 0.07)
    return max(sorted(votes), key=lambda name: votes[name])
