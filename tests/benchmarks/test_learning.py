from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import learning
from benchmarks.learning_runs.baselines import DINO, MAE
from benchmarks.learning_runs.method import Method, masked_vit, new_encoder
from benchmarks.learning_runs.options import Options
from benchmarks.learning_runs.photos import load_sets
from benchmarks.learning_runs.report import best_curves, markdown, write_report
from benchmarks.learning_runs.runs import (
    BASELINES,
    Run,
    Setting,
    prior_path,
    read_runs,
    run_all,
)
from benchmarks.learning_runs.scores import (
    centre_box,
    corloc,
    feature_scores,
    linear_accuracy,
    map_boxes,
)
from benchmarks.learning_runs.stellar import STELLAR, QueuedLoss
from benchmarks.learning_runs.training import (
    Clock,
    Stage,
    Step,
    learning_rate,
    optimizer_groups,
    train,
)
from benchmarks.learning_runs.views import Views
from lightly_ext.demo import probes
from lightly_ext.loss import STELLARLoss
from stellar_plugin.protocols import KNN

TINY = {
    **{"width": 16, "depth": 2, "heads": 2, "size": 16, "patch": 4, "local_size": 8},
    **{"batch_size": 8, "decoder_depth": 1, "queries": 3, "prototypes": 12},
    **{"head_hidden": 16, "head_output": 8, "dino_prototypes": 16},
    **{"swav_prototypes": 8},
}
OPTIONS = Options().changed(TINY)
COLOURS = ((200, 40, 40), (40, 40, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise on red and blue, 20 px high and 24 px wide."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = ["file,x0,y0,x1,y1"]
    for part, number in (("train", 25), ("val", 4)):
        for label, colour in zip("ab", COLOURS, strict=True):
            (root / part / label).mkdir(parents=True)
            for i in range(number):
                pixels = np.array(colour) + rng.integers(-30, 30, (20, 24, 3))
                name = f"{part}/{label}/{i:02}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(root / name)
                rows.append(f"{name},2,0,21,9")
    (root / "boxes.csv").write_text("\n".join(rows))
    return root


def setting(output: Path, steps: float = 10, **others: Any) -> Setting:
    return Setting(output, output / "priors", "cpu", "steps", steps, **others)


def lines(output: Path, file: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / file).read_text().splitlines()]


class TestPhotos:
    def test_load_sets__moves_boxes_and_splits_each_class(self, folder: Path) -> None:
        sets = load_sets(folder, 10, tuning=True)
        assert sets.train.labels.bincount().tolist() == [20, 20]
        assert sets.test.labels.tolist() == [0] * 5 + [1] * 5
        # Halved to 12 x 10, of which one px is cut off on each side.
        assert sets.test.boxes.unique(dim=0).tolist() == [[0, 0, 10, 5]]
        red = sets.test.images.float().mean(dim=(2, 3))[:, 0]
        assert (red[:5] > 150).all() and (red[5:] < 90).all()
        assert len(load_sets(folder, 10, tuning=False).test.labels) == 8


class TestScores:
    def test_feature_scores__knn_as_by_brute_force(self, folder: Path) -> None:
        sets = load_sets(folder, 16, tuning=True)
        torch.manual_seed(0)
        train, test = torch.randn(40, 5), torch.randn(10, 5)
        train[:20, 0] += 2.0
        test[:5, 0] += 2.0
        similarity = F.normalize(test) @ F.normalize(train).T
        right = 0
        for row, label in zip(similarity, sets.test.labels, strict=True):
            votes = [0.0, 0.0]
            for i in row.argsort(descending=True)[:20].tolist():
                vote = (row[i] / KNN.temperature).exp()
                votes[int(sets.train.labels[i])] += float(vote)
            right += int(votes[1] > votes[0]) == int(label)
        scores = feature_scores({"cls": train}, {"cls": test}, sets)
        assert 5 < right <= 10
        assert scores["knn_cls"] == pytest.approx(right / 10)

    def test_linear_accuracy__as_sklearn(self) -> None:
        torch.manual_seed(0)
        centres = torch.randn(4, 10)
        labels = torch.arange(400) % 4
        features = centres[labels] + 1.5 * torch.randn(400, 10)
        parts = (features[:300], labels[:300], features[300:], labels[300:])
        expected = probes.linear_accuracy(*(part.numpy() for part in parts))
        assert 0.5 < expected < 0.95
        assert linear_accuracy(*parts) == pytest.approx(expected, abs=0.011)

    def test_corloc__closed_form(self) -> None:
        truth = torch.tensor([[0.0, 0, 4, 4]] * 2 + [[torch.nan] * 4])
        # IoU 1/2 and 1/3, then 3/8 and 1.
        boxes = torch.tensor(
            [[[0.0, 0, 4, 2], [2, 0, 6, 4]], [[0, 0, 2, 3], [0, 0, 4, 4]]]
        )
        boxes = torch.cat([boxes, torch.zeros(1, 2, 4)])
        assert corloc(boxes, truth).tolist() == [0.5, 0.5, 1.0]
        assert centre_box(truth, 8).tolist() == [2, 2, 6, 6]

    def test_map_boxes__largest_connected_part(self) -> None:
        grid = torch.zeros(4, 5)
        grid[0, 0] = 1.0
        grid[1:3, 2:5] = 0.9
        maps = torch.stack([grid.flatten(), 1 - grid.flatten()], dim=1)[None]
        assert map_boxes(maps, (4, 5), 8).tolist() == [
            [[16, 8, 40, 24], [0, 0, 40, 32]]
        ]


class TestViews:
    def test_crops__whole_image_is_the_image_or_its_mirror(self) -> None:
        torch.manual_seed(0)
        images = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
        # Ratios of sides are clamped to the image, so few crops are whole.
        crops = Views().crops(images, 200, 8, (1.0, 1.0))[0]
        whole = images[0] / 255
        kinds = [
            sum(bool(torch.allclose(c, w, atol=0.2)) for c in crops)
            for w in (whole, whole.flip(2))
        ]
        assert min(kinds) > 0
        assert crops.min() >= 0 and crops.max() <= 1

    def test_coloured__each_view_by_its_own_draws(self) -> None:
        torch.manual_seed(0)
        crops = torch.rand(1, 3, 8, 8).expand(500, 1, 3, 8, 8)
        views = Views().coloured(crops)
        gray = (views.amax(dim=2) - views.amin(dim=2)).amax(dim=(1, 2, 3)) < 1e-5
        same = (views - crops).abs().amax(dim=(1, 2, 3, 4)) < 1e-5
        assert float(gray.float().mean()) == pytest.approx(0.2, abs=0.05)
        assert float(same.float().mean()) == pytest.approx(0.2 * 0.8, abs=0.05)
        assert torch.equal(Views(jitter=0.0, gray=0.0).coloured(crops) > 0, crops > 0)


class TestMethods:
    def test_mae__lightlys_encoder_is_the_one_that_is_scored(self) -> None:
        encoder = new_encoder(OPTIONS).eval()
        images = torch.randn(2, 3, 16, 16)
        tokens = masked_vit(encoder, "skip").encode(images)
        torch.testing.assert_close(tokens, encoder.forward_features(images))

    @pytest.mark.parametrize("name", [*BASELINES, "stellar"])
    def test_losses__finite_and_reach_the_whole_encoder(self, name: str) -> None:
        torch.manual_seed(0)
        method = STELLAR(OPTIONS) if name == "stellar" else BASELINES[name](OPTIONS)
        images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
        method.before_step(0.5)
        total = method.losses(images, torch.zeros(8, dtype=torch.int64))["total"]
        total.backward()
        assert total.isfinite() and total.shape == ()
        unused = [n for n, p in method.encoder.named_parameters() if p.grad is None]
        assert unused == []

    def test_dino__teacher_follows_by_its_schedule(self) -> None:
        method = DINO(OPTIONS)
        before = method.teacher.vit.cls_token.clone()
        with torch.no_grad():
            method.encoder.vit.cls_token.add_(1.0)
        method.before_step(0.0)
        method.after_update()
        torch.testing.assert_close(method.teacher.vit.cls_token, before + 0.01)
        method.before_step(1.0)
        assert method.momentum == 1.0 and method.temperature == pytest.approx(0.07)


class TestSTELLAR:
    def prior(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return new_encoder(OPTIONS).state_dict()

    def test_init__prior_reaches_encoder_and_teacher(self) -> None:
        prior = self.prior()
        method = STELLAR(OPTIONS.changed({"teacher": 0.9}), prior)
        assert method.from_prior == set(prior)
        for part in (method.encoder, method.module.teacher["encoder"]):
            for name, value in prior.items():
                assert torch.equal(part.state_dict()[name], value)

    def test_lr_scales__prior_alone_and_by_layer(self) -> None:
        options = OPTIONS.changed({"encoder_lr_scale": 0.5, "layer_decay": 0.1})
        method = STELLAR(options, self.prior())
        scale = {
            id(p): group["scale"]
            for group in optimizer_groups(method, options)
            for p in group["params"]
        }
        vit = method.encoder.vit
        assert scale[id(vit.norm.weight)] == 0.5
        assert scale[id(vit.blocks[1].mlp.fc1.weight)] == 0.5
        assert scale[id(vit.blocks[0].mlp.fc1.weight)] == pytest.approx(0.05)
        assert scale[id(vit.patch_embed.proj.weight)] == pytest.approx(0.005)
        assert scale[id(vit.reg_token)] == 1.0
        assert scale[id(method.module.sparse_head.prototypes.weight)] == 1.0

    def test_before_update__prior_rests_at_first(self) -> None:
        method = STELLAR(OPTIONS.changed({"heads_first": 0.3}), self.prior())
        for progress, rests in ((0.2, True), (0.4, False)):
            for p in method.parameters():
                p.grad = torch.ones_like(p)
            method.before_update(progress)
            assert (method.encoder.vit.cls_token.grad is None) == rests
            assert method.encoder.vit.reg_token.grad is not None

    def test_target__coloured_is_what_is_reconstructed(self) -> None:
        images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
        for target in ("clean", "coloured"):
            torch.manual_seed(0)
            method = STELLAR(OPTIONS.changed({"target": target}))
            torch.manual_seed(0)
            views = method._stellar_views(images)
            torch.manual_seed(0)
            crop = method.views.crops(images, 2, 16, (0.36, 1.0))[:, 0]
            assert torch.equal(views.images, crop) == (target == "clean")
            std = views.target.std() / views.images.std()
            assert 4 < std < 4.7  # of ImageNet, 0.225

    def test_prototypes__std_and_length(self) -> None:
        small = STELLAR(OPTIONS.changed({"prototype_std": 0.1, "prototypes": 2000}))
        weight = small.module.sparse_head.prototypes.weight
        assert float(weight.detach().std()) == pytest.approx(0.1, rel=0.05)
        unit = STELLAR(OPTIONS.changed({"unit_prototypes": True}))
        with torch.no_grad():
            unit.module.cls_head.prototypes.weight.mul_(3.0)
        unit.after_update()
        length = unit.module.cls_head.prototypes.weight.norm(dim=1)
        torch.testing.assert_close(length, torch.ones(12))

    def test_before_step__temperature_falls(self) -> None:
        method = STELLAR(OPTIONS.changed({"target_temperature_start": 0.12}))
        seen = []
        for progress in (0.0, 1 / 6, 0.5):
            method.before_step(progress)
            seen.append(method.module.criterion.target_temperature)
        assert seen == pytest.approx([0.12, 0.09, 0.06])

    def test_queue__balances_as_the_big_batch(self) -> None:
        torch.manual_seed(0)
        plain = STELLARLoss()
        queued = QueuedLoss(plain, batches=1)
        prototypes = torch.randn(12, 8)
        first, second = F.normalize(torch.randn(2, 4, 3, 8), dim=-1)
        queued._target(first, prototypes, prototypes)
        target = queued._target(second, prototypes, prototypes)
        both = torch.cat([second, first])
        expected = plain._target(both, prototypes, prototypes).embedding[:4]
        torch.testing.assert_close(target.embedding, expected)
        assert queued.earlier[3].shape == (12, 8)


class TestTraining:
    def test_learning_rate__warm_up_and_cosine_by_batch_size(self) -> None:
        options = Options(batch_size=256, lr=1e-3, warmup=0.1)
        rates = [learning_rate(options, x) for x in (0.05, 0.1, 0.55, 1.0)]
        assert rates == pytest.approx([1e-3, 2e-3, 1.0005e-3, 1e-6])

    def test_train__ends_by_cpu_seconds_without_those_of_scores(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seconds = itertools.count(step=0.01)  # every look at the clock takes one

        def process_time() -> float:
            return next(seconds)

        monkeypatch.setattr(time, "process_time", process_time)
        sets = load_sets(folder, 16, tuning=True)
        shares: list[float] = []

        def score(share: float, last: bool) -> None:
            shares.append(share)
            assert last == (share == 1)
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass

        clock = Clock("cpu")
        stage = Stage(0.0, 0.4, [0.5], score, lambda *_: None)
        train(MAE(OPTIONS), sets.train, OPTIONS, clock, stage, bf16=False)
        # A step behind the end, at most.
        assert 0.4 <= clock.used < 0.5
        assert shares == [pytest.approx(0.5, abs=0.2), 1.0]
        assert clock.images == 8 * clock.steps

    def test_train__ends_by_operations(self, folder: Path) -> None:
        sets = load_sets(folder, 16, tuning=True)

        class Linear(Method):
            """Two products of 8 x 10 and 10 x 4 matrices, forward and for weights."""

            def __init__(self) -> None:
                super().__init__(OPTIONS)
                self.linear = torch.nn.Linear(10, 4, bias=False)
                self.encoder = new_encoder(OPTIONS).requires_grad_(False)

            def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
                x = images.flatten(1)[:, :10].float()
                return {"total": self.linear(x).square().mean()}

        method, clock = Linear(), Clock("tflop")
        before = method.linear.weight.clone()
        of_step = 2 * 2 * 8 * 10 * 4 / 1e12
        stage = Stage(0.0, 3.5 * of_step, [], lambda *_: None, lambda *_: None)
        train(method, sets.train, OPTIONS, clock, stage, bf16=False)
        assert (clock.steps, clock.images) == (4, 32)
        assert clock.used == pytest.approx(4 * of_step)
        assert not torch.equal(method.linear.weight, before)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_step__graph_as_without(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sets = load_sets(folder, 16, tuning=True)
        photos, losses = sets.train.to("cuda"), []
        for graphed in (True, False):
            monkeypatch.setattr(STELLAR, "is_static", lambda _, x=graphed: x)
            torch.manual_seed(0)
            method = STELLAR(OPTIONS.changed({"teacher": 0.9})).to("cuda")
            step = Step(method, photos, OPTIONS, bf16=False)
            step.set_lr(1e-3)
            index = torch.arange(8, device="cuda")
            losses.append([float(step(index, 0.5)["total"]) for _ in range(40)])
            assert (step.graph is not None) == graphed
        # Other draws behind the first steps, but the same training.
        assert losses[0][:4] == pytest.approx(losses[1][:4], rel=1e-4)
        ends = [sum(x[-10:]) / 10 for x in losses]
        assert ends[0] == pytest.approx(ends[1], rel=0.05)

    def test_clock__deadline_ends_a_stage(self, folder: Path) -> None:
        sets = load_sets(folder, 16, tuning=True)
        clock = Clock("steps", deadline=time.time() - 1)
        shares: list[float] = []
        stage = Stage(0, 5, [0.5], lambda x, _: shares.append(x), lambda *_: None)
        train(MAE(OPTIONS), sets.train, OPTIONS, clock, stage, bf16=False)
        assert clock.steps == 0 and shares == [0.0]


class TestRuns:
    def test_run_all__equal_budgets_with_the_prior_and_its_scores(
        self, folder: Path, tmp_path: Path
    ) -> None:
        sets = load_sets(folder, 16, tuning=True)
        runs = [Run(m, m, 0, TINY) for m in ("raw", "mae", "stellar")]
        runs.append(Run("teacher", "stellar", 0, {**TINY, "teacher": 0.9}))
        run_all(runs, sets, setting(tmp_path))
        found = lines(tmp_path)
        assert not [line["error"] for line in found if "error" in line]
        last = {line["run"]: line for line in found}
        # One prior for both, of 40 % of the steps.
        assert [len(list((tmp_path / "priors").iterdir())), last["prior"]["used"]] == [
            1,
            4,
        ]
        for name in ("mae", "stellar", "teacher"):
            assert (last[name]["used"], last[name]["images"]) == (10, 80)
            shares = [line["fraction"] for line in found if line["run"] == name]
            start = [0.2] if name == "mae" else []
            assert shares == [*start, 0.4, 0.6, 0.8, 1.0]
        at_switch = next(line for line in found if line["run"] == "teacher")
        assert at_switch["scores"] == last["prior"]["scores"]
        assert at_switch["images"] == 32
        assert last["stellar"]["scores"] != last["teacher"]["scores"]
        # The true boxes are no squares in the centre.
        assert last["raw"]["scores"]["corloc"] == 0.0
        assert last["raw"]["scores"]["knn_dense"] == 1.0
        losses = [x for x in lines(tmp_path, "losses.jsonl") if x["run"] == "stellar"]
        assert [x["fraction"] for x in losses] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]

    def test_run_all__same_seed_same_scores(self, folder: Path, tmp_path: Path) -> None:
        sets = load_sets(folder, 16, tuning=True)
        scores = []
        for name in "ab":
            output = tmp_path / name
            run_all([Run("s", "stellar", 1, TINY)], sets, setting(output, steps=4))
            scores.append([line["scores"] for line in lines(output)])
        assert scores[0] == scores[1]

    def test_carry_out__error_is_a_line_and_stops_no_other(
        self, folder: Path, tmp_path: Path
    ) -> None:
        sets = load_sets(folder, 16, tuning=True)
        runs = [
            Run("bad", "stellar", 0, {**TINY, "prior_share": 0, "mask_ratio": 0.99}),
            Run("good", "untrained", 0, TINY),
        ]
        run_all(runs, sets, setting(tmp_path))
        bad, good = lines(tmp_path)
        assert "mask_ratio 0.99 keeps none" in bad["error"]
        assert good["scores"]["rank_cls"] >= 1.0
        assert "bad, seed 0: Traceback" in write_report(tmp_path)

    def test_run_all__a_prior_cut_off_is_no_prior(
        self, folder: Path, tmp_path: Path
    ) -> None:
        sets, runs = load_sets(folder, 16, tuning=True), [Run("s", "stellar", 0, TINY)]
        run_all(runs, sets, setting(tmp_path, deadline=time.time() - 1))
        _, cut_off, waited = lines(tmp_path)
        assert "The deadline came before the prior's end" in cut_off["error"]
        assert "did not come" in waited["error"]
        # Tried again, by a call with time: the failure is not remembered.
        run_all(runs, sets, setting(tmp_path))
        assert lines(tmp_path)[-1]["fraction"] == 1.0
        others = sets._replace(train=sets.train.select(torch.arange(9)))
        assert others.sha256 != sets.sha256
        assert prior_path(runs[0], setting(tmp_path, photos=others.sha256)) not in set(
            (tmp_path / "priors").iterdir()
        )

    def test_main__keeps_results(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "results.jsonl").touch()
        with pytest.raises(FileExistsError, match="holds results already"):
            learning.main([str(folder), "--output", str(tmp_path)])

    def test_read_runs__first_seeds_first(self, tmp_path: Path) -> None:
        path = tmp_path / "runs.json"
        entries = [
            {"name": "a", "method": "mae", "seeds": [0, 1]},
            {"name": "b", "method": "stellar", "set": {"teacher": 0.99}},
        ]
        path.write_text(json.dumps(entries))
        runs = read_runs(path)
        assert [(run.name, run.seed) for run in runs] == [("a", 0), ("b", 0), ("a", 1)]
        assert runs[1].options.teacher == 0.99

    def test_options__unknown_and_wrong(self) -> None:
        with pytest.raises(ValueError, match="Unknown options"):
            Options().changed({"momentum": 1})
        with pytest.raises(ValueError, match="batch_size='x'"):
            Options().changed({"batch_size": "x"})
        changed = Options().changed({"teacher": "none", "unit_prototypes": "true"})
        assert changed.changes() == {"unit_prototypes": True}


class TestReport:
    def line(self, run: str, seed: int, fraction: float, **scores: float) -> Any:
        return {
            **{"run": run, "method": "stellar", "seed": seed, "fraction": fraction},
            **{"used": 10.0, "images": 50, "scores": scores, "set": {}},
        }

    def test_markdown__means_over_seeds_and_scores_at_the_switch(self) -> None:
        found = [
            self.line("s", seed, fraction, knn_cls=knn, linear_cls=0.5, **more)
            for seed in (0, 1)
            for fraction, knn, more in (
                (0.4, 0.2 + 0.1 * seed, {}),
                (1.0, 0.4 + 0.1 * seed, {"knn_sparse": 0.6, "linear_sparse": 0.7}),
            )
        ]
        rows = [row.split(" | ") for row in markdown(found).splitlines()[2:]]
        assert [row[:4] for row in rows] == [
            ["| s", "2", "60.0 / 70.0", "45.0 / 50.0"],
            ["| s, at its prior's end", "2", "", "25.0 / 50.0"],
        ]
        found.append(self.line("s", 2, 0.6, knn_cls=0.9, linear_cls=0.5))
        found.append(self.line("prior", 2, 0.4, knn_cls=0.9, linear_cls=0.5))
        text = markdown(found)
        assert "| s | 2 | 60.0 / 70.0 | 45.0 / 50.0 |" in text
        assert "| s, cut off at 60% | 1 |  | 90.0 / 50.0 |" in text
        assert "| prior | 1 |  | 90.0 / 50.0 |" in text
        curve = best_curves(found[:4], "knn")["s"]
        assert curve == {0.4: pytest.approx(25.0), 1.0: pytest.approx(60.0)}


@pytest.mark.slow
class TestMain:
    def test_main__many_at_a_time(self, folder: Path, tmp_path: Path) -> None:
        runs = tmp_path / "runs.json"
        runs.write_text(json.dumps([{"name": "STELLAR", "method": "stellar"}]))
        output = tmp_path / "out"
        options = [f"{name}={value}" for name, value in TINY.items()]
        arguments = f"{folder} --steps 4 --tune --jobs 2 --runs {runs} --set".split()
        learning.main([*arguments, *options, "--output", str(output)])
        last = {line["run"]: line for line in lines(output)}
        images = {name: line["images"] for name, line in last.items()}
        assert images == {"prior": 16, "STELLAR": 32}
        table = (output / "table.md").read_text()
        assert "| STELLAR, at its prior's end | 1 |" in table
        names = ("knn.png", "linear.png", "losses.png", "scores.csv")
        assert all((output / name).exists() for name in names)
