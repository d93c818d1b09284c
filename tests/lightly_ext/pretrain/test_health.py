"""Each sickness by a training that has it, and none by one that is well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pytorch_lightning import Callback, LightningModule

from lightly_ext.loss import SparseViews, STELLARLossTerms
from lightly_ext.pretrain import StellarPretraining, health
from lightly_ext.pretrain.health import PATIENCE, HealthMonitor, training_figures
from tests.pretraining import loader, tiny, tiny_mae, trainer


def fit(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    module: LightningModule,
    steps: int = 30,
    data: Any = None,
    **options: Any,
) -> tuple[dict[str, float], list[str]]:
    """Figures of the last step, and what was said."""
    options = {"max_steps": steps, "max_epochs": -1, "log_every_n_steps": 1, **options}
    run = trainer(folder, **options)
    run.fit(module, loader() if data is None else data)
    figures = {
        name.removeprefix("health/"): value.item()
        for name, value in run.callback_metrics.items()
        if name.startswith("health/")
    }
    lines = capsys.readouterr().out.splitlines()
    return figures, [x for x in lines if x.startswith(("Warning", "Well again"))]


def fast(**arguments: Any) -> StellarPretraining:
    rates = {"lr": 1e-2, "min_lr": 1e-2, "warmup_fraction": 0.0}
    return tiny(**{**rates, **arguments})


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a few steps are judged."""
    monkeypatch.setattr(health, "MIN_STEPS", 5)


@pytest.mark.usefixtures("early")
class TestSickTrainings:
    def test_fit__collapse_of_tokens(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        off = {"alignment_weight": 0.0, "cls_alignment_weight": 0.0}
        off |= {"reconstruction_weight": 0.0, "koleo_weight": 0.0}
        module = fast(loss=off, lr=1.0, min_lr=1.0)
        figures, said = fit(tmp_path, capsys, module)
        assert figures["token_cosine"] > 0.99 and figures["token_rank"] < 1.2
        assert figures["prototypes_used"] == 1 and figures["prototype_usage"] == 0
        collapsed = " ".join(x for x in said if "The tokens collapse" in x)
        for name in ("token_cosine", "token_rank", "token_distance"):
            assert collapsed.count(name) == 1
        assert any("A few prototypes take nearly all" in x for x in said)

    def test_fit__queries_that_are_copies(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # KoLeo would tell them apart.
        module = fast(loss={"koleo_weight": 0.0})
        queries = module.model.encoder.vit.reg_token.data
        queries.copy_(queries[:, :1].expand_as(queries))
        figures, said = fit(tmp_path, capsys, module, steps=12)
        assert figures["token_cosine"] == pytest.approx(1.0, abs=1e-3)
        assert figures["localization_entropy"] == pytest.approx(1.0, abs=1e-3)
        assert figures["matching_collisions"] > 0.5
        assert any("does not tell tokens apart" in x for x in said)
        assert any("nothing is localized" in x for x in said)

    @pytest.mark.slow
    def test_fit__targets_that_say_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Beyond this temperature every balanced target is uniform.
        module = fast(loss={"target_temperature": 10.0}, lr=3e-2, min_lr=3e-2)
        figures, said = fit(tmp_path, capsys, module, steps=60)
        for name in ("clustering", "alignment", "cls_clustering", "cls_alignment"):
            assert figures[f"{name}_over_ln_k"] == pytest.approx(1.0, abs=0.02)
        assert sum("no better than one that knows nothing" in x for x in said) == 1
        assert not any("Well" in x and "over_ln_k" in x for x in said)

    def test_fit__heads_that_do_not_learn(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = fast(lr=1e-9, min_lr=1e-9)
        figures, said = fit(tmp_path, capsys, module, steps=10)
        assert figures["clustering_over_ln_k"] > 3
        (line,) = (x for x in said if "no better than one that knows nothing" in x)
        for name in health.CROSS_ENTROPIES:
            assert f"health/{name}_over_ln_k" in line

    def test_fit__hidden_patches_that_cannot_be_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Of noise nothing is better than the mean.
        module = tiny_mae(lr=1e-3, warmup_fraction=0.0)
        figures, said = fit(tmp_path, capsys, module, steps=12)
        assert figures["reconstruction_over_mean"] > 0.99
        (line,) = (x for x in said if "no better than the mean of each" in x)
        assert "health/reconstruction_over_mean" in line

    @pytest.mark.slow
    def test_fit__one_token_takes_images_of_noise(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = loader(batch_size=1, length=2)
        figures, said = fit(tmp_path, capsys, fast(), steps=60, data=data)
        assert figures["localization_usage"] < 0.01
        assert any("One token takes all patches" in x for x in said)

    def test_fit__identity_matching(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # A figure without a warning: small trainings that are well match so, too.
        module = fast(loss={"matching": "identity"})
        figures, _ = fit(tmp_path, capsys, module, steps=2)
        assert figures["non_identity_matches"] == figures["matching_collisions"] == 0

    @pytest.mark.slow
    def test_fit__exploding_gradient(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Raise(Callback):
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step >= 20:
                    for group in trainer.optimizers[0].param_groups:
                        group["lr"] = 10.0

        module = fast(on_nonfinite="skip", nonfinite_limit=100)
        _, said = fit(tmp_path, capsys, module, callbacks=[Raise()])
        (line,) = (x for x in said if "The gradient explodes" in x)
        assert "gradient_norm_over_median" in line and "(above 100)" in line
        assert int(line.split(":")[0].split()[-1]) + 1 >= 21 + PATIENCE


class TestWellTrainings:
    @pytest.mark.slow
    @pytest.mark.parametrize("batch_size", [4, 2])
    def test_fit__says_nothing(
        self, batch_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Two CLS tokens balanced over twelve prototypes do stand at ln K.
        off = {"cls_clustering_weight": 0.0, "cls_alignment_weight": 0.0}
        module = fast(warmup_fraction=0.1, loss=off if batch_size == 2 else {})
        data = loader(batch_size=batch_size)
        _, said = fit(tmp_path, capsys, module, steps=health.MIN_STEPS + 15, data=data)
        assert said == []


class TestTrainingFigures:
    def test_training_figures__parts_of_ln_k(self) -> None:
        tokens = torch.randn(2, 3, 4)
        terms = STELLARLossTerms(
            torch.tensor(9.0),
            clustering=torch.tensor(math.log(5)),
            cls_alignment=torch.tensor(2 * math.log(5)),
            matching_collisions=torch.tensor(0.25),
        )
        sparse = SparseViews(tokens, tokens[:, None], prototypes=torch.randn(5, 4))
        figures = training_figures(terms, sparse, None, 25)
        tokens_alone = {"token_rank", "token_cosine", "token_distance"}
        assert {k: v for k, v in figures.items() if k not in tokens_alone} == {
            "clustering_over_ln_k": pytest.approx(1.0),
            "cls_alignment_over_ln_k": pytest.approx(1.0),
            "matching_collisions": 0.25,
        }
        assert figures.keys() >= tokens_alone
        sparse = sparse._replace(prototypes=None)
        assert not any("ln_k" in k for k in training_figures(terms, sparse, None, None))


def monitored(
    monitor: HealthMonitor, figures: list[dict[str, float]]
) -> list[tuple[int, str]]:
    """What a monitor says of logged steps from 201 on, with the steps."""
    said: list[tuple[int, str]] = []
    module = Mock(device=torch.device("cpu"), global_step=201)
    module.trainer.callbacks = []
    module.print = lambda text: said.append((module.global_step, text))
    for values in figures:
        module.global_step += 1
        noted = {"gradient_norm": 1.0, **values}
        monitor.note({name: torch.tensor(value) for name, value in noted.items()})
        monitor.step_ended(module)
    return said


class TestHealthMonitor:
    def test_step_ended__once_and_once_more(self) -> None:
        sick, well = {"token_cosine": 0.97}, {"token_cosine": 0.9}
        several = [sick] * (PATIENCE - 1) + [well] + [sick] * 9 + [well] * 9
        said = monitored(HealthMonitor(), several)
        assert [step for step, _ in said] == [207, 216]
        warning = "Warning at step 206: health/token_cosine 0.97 (above 0.95). The"
        assert said[0][1].startswith(warning)
        assert said[1][1] == "Well again at step 215: health/token_cosine 0.9."

    def test_step_ended__one_sentence_for_one_cause(self) -> None:
        sick = {"token_cosine": 0.99, "token_distance": 0.01, "token_rank": 2.0}
        sick["prototype_usage"] = 0.01
        said = monitored(HealthMonitor(), [sick] * 9)
        assert len(said) == 2
        both = "token_cosine 0.99 (above 0.95), health/token_distance 0.01 (below 0.02)"
        assert both in said[0][1]

    def test_step_ended__what_is_not_finite_is_left_to_the_guard(self) -> None:
        figures = {"token_cosine": math.nan, "gradient_norm": math.inf}
        assert monitored(HealthMonitor(), [figures] * 9) == []

    def test_step_ended__gradient_against_the_median(self) -> None:
        norms = [3.0, 1.0, 2.0, 1e9, *[201.0] * PATIENCE]
        said = monitored(HealthMonitor(), [{"gradient_norm": x} for x in norms])
        # The median is 2, then 2.5, then 3; no three in a row are beyond it 100 times.
        assert said == []
        norms[4:] = [500.0] * 4
        (line,) = monitored(HealthMonitor(), [{"gradient_norm": x} for x in norms])
        # 1e9 / 2, 500 / 2.5, 500 / 3, each over the median before it.
        assert line[0] == 207 and "over_median 167 (above 100)" in line[1]

    @pytest.mark.parametrize(
        "steps, fraction, start", [(50, 0.5, 100), (900, 0.5, 450)]
    )
    def test_on_train_start__judges_behind_the_warm_up(
        self, steps: int, fraction: float, start: int
    ) -> None:
        monitor = HealthMonitor()
        module = Mock(hparams={"warmup_fraction": fraction})
        module.continuation.total_steps.return_value = steps
        monitor.on_train_start(Mock(), module)
        monitor._turns = Mock(return_value=False)
        module.device = torch.device("cpu")
        for step in (start, start + 1):
            module.global_step = step
            one = torch.tensor(1.0)
            monitor.note({"token_cosine": one, "gradient_norm": one})
            monitor.step_ended(module)
            assert monitor._turns.called == (step > start)
