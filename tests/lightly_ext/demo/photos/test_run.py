from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightly_ext.data import SingleViewTransform, read_image
from lightly_ext.demo.photos import training
from lightly_ext.demo.photos.page import charts
from lightly_ext.demo.photos.run import run_photo_demo
from lightly_ext.demo.photos.training import PRIOR, STELLAR, read_stage
from lightly_ext.pages.charts import HEIGHT, WIDTH
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


class Demo(NamedTuple):
    """A demo that is done."""

    output: Path
    scores: dict[str, dict[str, float]]
    page: str


def run(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 2
) -> Demo:
    """Runs the demo for some steps of each stage."""
    # As if the trial had found a pace in which so many fit into the time.
    pace = 60 * training.TRAIN_SHARE * 0.5 / steps
    monkeypatch.setattr(training, "_pace", lambda *_: (8, pace))
    monkeypatch.setattr(training, "SHARES", dict.fromkeys((PRIOR, STELLAR), 0.5))
    monkeypatch.setattr(training, "READ_SHARE", 100.0)
    scores = run_photo_demo(folder, output, 3, minutes=1.0, options=OPTIONS)
    return Demo(output, scores, (output / "index.html").read_text())


@pytest.mark.slow
class TestRunPhotoDemo:
    @pytest.fixture(scope="class")
    def demo(self, tmp_path_factory: pytest.TempPathFactory) -> Demo:
        folder = tmp_path_factory.mktemp("demo")
        for i, name in enumerate(("cat", "dog", "eel")):
            write_images(folder / "photos" / "train" / name, 70, seed=i)
            write_images(folder / "photos" / "val" / name, 12, seed=10 + i)
        (folder / "photos" / "train" / "cat" / "0000.png").write_bytes(b"broken")
        (folder / "out" / "stellar").mkdir(parents=True)
        (folder / "out" / "stellar" / "config.yaml").touch()  # of one that was killed
        (folder / "out" / ".stellar_demo").touch()
        with pytest.MonkeyPatch.context() as monkeypatch:
            return run(folder / "photos", folder / "out", monkeypatch)

    def test_run_photo_demo__rows_equal_brute_force(self, demo: Demo) -> None:
        model = Stellar.from_pretrained(demo.output / "stellar" / "model")
        view = SingleViewTransform(32)
        features, labels = {}, {}
        for part in ("train", "val"):
            files = sorted((demo.output / "photos" / part).rglob("*.png"))
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
        scores = demo.scores["trained"]
        for name, train in features["train"].items():
            test = features["val"][name]
            hits = [
                _vote(train, labels["train"], query) == label
                for query, label in zip(test, labels["val"], strict=True)
            ]
            assert scores[f"knn_{name}"] == pytest.approx(np.mean(hits)), name
            scaler = StandardScaler().fit(train)
            probe = LogisticRegression(max_iter=300)
            probe.fit(scaler.transform(train), labels["train"])
            accuracy = probe.score(scaler.transform(test), labels["val"])
            assert scores[f"linear_{name}"] == pytest.approx(accuracy, abs=0.03), name

    def test_run_photo_demo__what_is_written(self, demo: Demo) -> None:
        table = json.loads((demo.output / "table.json").read_text())
        assert table["scores"] == demo.scores
        assert table["chance"] == pytest.approx(1 / 3)
        assert table["left out"] == "1 unreadable"
        assert "209 to learn from, 36 to test with" in table["photos"]
        prior = demo.scores["prior (MAE)"]
        assert {"knn_cls", "knn_dense", "rank_dense"} <= prior.keys()
        assert not {"knn_sparse", "psnr", "share"} & prior.keys()
        markdown = (demo.output / "table.md").read_text()
        value = f"{100 * demo.scores['trained']['knn_sparse']:.1f}"
        assert f"| trained | {value} |" in markdown
        assert not (demo.output / "trial").exists()
        starts = json.loads((demo.output / "stellar" / "run.json").read_text())
        assert str(demo.output / "prior" / "model") in starts["sessions"][0]["command"]

    def test_run_photo_demo__page(self, demo: Demo) -> None:
        page = Page(demo.page)
        assert all(a.startswith("data:image/jpeg;base64,") for a in page.addresses)
        assert max(picture.size for _, picture in page.decoded()) <= (128, 128)
        assert len(demo.page) < 3e6
        text = " ".join(page.text.split())
        assert "(2 + 2 steps) on 209 photos of 32 px" in text
        assert "all tokens are the sparse ones one behind the other" in text
        assert "best feature of each, chosen on these test photos" in text
        assert "209 photos are few: recipes are made for 1000 or more" in text
        assert "36 test photos of 3 classes" in text
        assert "prior (MAE)" in text and "There is no accuracy" not in text
        assert not {"script", "link"} & page.tags

    def test_run_photo_demo__points_are_those_of_the_metrics(self, demo: Demo) -> None:
        stages = [read_stage(demo.output / name) for name in (PRIOR, STELLAR)]
        found = {chart.title: chart for chart in charts(stages, {})}
        logged = []
        for stage in stages:
            path = stage.folder / "csv" / "version_0" / "metrics.csv"
            rows = list(csv.DictReader(path.open()))
            knn = [float(row["knn_top1"]) for row in rows if row["knn_top1"]]
            before = json.loads((stage.folder / "run.json").read_text())["knn"]
            logged.append([before["untrained"], *knn])
            assert len(knn) == 2
        chart = found["online kNN accuracy"]
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
        minutes = [stage.minutes for stage in stages]
        assert switch == pytest.approx(WIDTH * minutes[0] / sum(minutes), rel=0.2)
        assert "loss of the prior" in found and "loss of STELLAR" in found


@pytest.mark.slow
def test_run_photo_demo__without_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos", 250)
    demo = run(photos, tmp_path / "out", monkeypatch, steps=1)
    assert not any(name.startswith("knn") for name in demo.scores["trained"])
    assert {"psnr", "share", "blur", "rank_sparse"} <= demo.scores["trained"].keys()
    text = " ".join(Page(demo.page).text.split())
    assert "There is no accuracy: The photos do not all lie in subfolders" in text
    assert json.loads((tmp_path / "out" / "table.json").read_text())["chance"] is None


@pytest.mark.slow
def test_pace__of_real_steps(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 200)
    options = [f"--data.path={photos}", "--trainer.max_epochs=-1", *OPTIONS[PRIOR]]
    images, seconds = training._pace(
        tmp_path / "trial", ["--config=photos_prior", *options], 3
    )
    assert images == 8
    assert 0 < seconds < 1  # without what the start takes
    assert not (tmp_path / "trial").exists()


def _vote(bank: np.ndarray, labels: np.ndarray, query: np.ndarray) -> str:
    cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    votes: dict[str, float] = {}
    for i in np.argsort(-cosines)[:20]:
        votes[labels[i]] = votes.get(labels[i], 0) + np.exp(cosines[i] / 0.07)
    return max(sorted(votes), key=lambda name: votes[name])
