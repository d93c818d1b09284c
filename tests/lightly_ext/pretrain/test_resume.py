"""Runs that are continued with other options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightly_ext.pretrain.resume import without_start
from lightly_ext.randomness import run_seed
from tests.exact_resume import Run, SaveAlways, assert_equal_states, images
from tests.pretraining import TINY, trainer

STEPS = {"max_epochs": -1, "max_steps": 4}
# Behind two batches of the first epoch, which has three.
HALF = "batch-2"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of four steps, with checkpoints of all of them."""
    folder = tmp_path_factory.mktemp("run")
    Run(folder, callbacks=[SaveAlways(folder)], **STEPS)
    return folder


# Images of the batches of a run of five steps.
STRAIGHT = [[5, 3], [0, 4], [3, 1], [1, 5], [3, 0]]


def rates(run: Run) -> dict[int, list[float]]:
    """Learning rates of the logged steps."""
    return {
        step: list(values.values())
        for step, values in run.rows
        if all(name.startswith("lr-") for name in values)
    }


def settings(run: Run) -> list[dict[str, Any]]:
    groups = run.trainer.optimizers[0].param_groups
    return [{k: v for k, v in g.items() if k != "params"} for g in groups]


class TestChangedOptions:
    @pytest.mark.parametrize(
        ("module", "trainer", "text"),
        [
            ({}, {"max_steps": 9}, "trainer.max_steps 4 -> 9"),
            (
                {},
                {"max_steps": -1, "max_epochs": 3},
                "trainer.max_epochs -1 -> 3, trainer.max_steps 4 -> -1",
            ),
            (
                {"lr": 0.5, "min_lr": 0.1, "lr_scaling": "sqrt"},
                {},
                "model.lr 0.01 -> 0.5, model.lr_scaling none -> sqrt, "
                "model.min_lr 1e-06 -> 0.1",
            ),
            (
                {"warmup_fraction": 0.75, "weight_decay": 0.5, "betas": (0.5, 0.6)},
                {},
                "model.warmup_fraction 0.2 -> 0.75, model.weight_decay 0.04 -> 0.5, "
                "model.betas [0.9, 0.999] -> [0.5, 0.6]",
            ),
        ],
    )
    @pytest.mark.slow
    def test_fit__as_in_a_straight_run_from_there_on(
        self,
        module: dict[str, Any],
        trainer: dict[str, Any],
        text: str,
        half: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = {"module": module, **STEPS, **trainer}
        straight = Run(half, **options)
        capsys.readouterr()
        resumed = Run(half, half / f"{HALF}.ckpt", **options)
        assert f"Goes on behind step 2, in epoch 1, with {text}.\n" in (
            capsys.readouterr().out
        )
        expected = rates(straight)
        assert rates(resumed) == {k: v for k, v in expected.items() if k >= 2}
        assert len(expected) > 2
        assert settings(resumed) == settings(straight)
        assert resumed.seen.batches == straight.seen.batches[2:]

    def test_fit__dropout_changes_no_weight(
        self, half: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = {**TINY["model"], "drop_path_rate": 0.5, "attn_drop_rate": 0.1}
        run = Run(half, half / f"{HALF}.ckpt", module={"model": model}, **STEPS)
        said = "model.model.drop_path_rate None -> 0.5, model.model.attn_drop_rate None"
        assert said in capsys.readouterr().out
        assert run.module.model.encoder.vit.blocks[0].attn.attn_drop.p == 0.1

    def test_fit__nothing_changed_nothing_said(
        self, half: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Run(half, half / f"{HALF}.ckpt", **STEPS)
        assert "Goes on behind step 2, in epoch 1.\n" in capsys.readouterr().out

    def test_fit__other_losses_colours_precision_seed_and_images(
        self,
        half: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        images(tmp_path / "images")
        (tmp_path / "images" / "1" / "1.png").unlink()
        seed = run_seed  # of `tiny`
        monkeypatch.setattr("lightly_ext.pretrain.resume.run_seed", lambda: seed() + 5)
        Run(
            tmp_path,
            half / f"{HALF}.ckpt",
            module={
                "mask_ratio": 0.25,
                "augment": {"cj_prob": 0.5, "gaussian_blur": 0.0},
                "loss": {"koleo_weight": 0.2, "gather_distributed": True},
            },
            precision="bf16-mixed",
            **STEPS,
        )
        said = capsys.readouterr().out
        for text in (
            "model.mask_ratio 0.5 -> 0.25",
            "model.augment.cj_prob 0.8 -> 0.5",
            "model.loss.koleo_weight 0.1 -> 0.2",
            "trainer.precision 32-true -> bf16-mixed",
            "seed_everything 0 -> 5",
            f"data.path {half}/images -> {tmp_path}/images",
        ):
            assert text in said
        assert re.search(r"data.images 7 images \(.*\) -> 6 images \(", said)

    @pytest.mark.parametrize(
        ("changed", "batches", "passed_over"),
        [
            # Four of the seven images are seen. Lengths of the batches that follow.
            ({"data": {"batch_size": 1}}, [3, 7], 0),
            ({"data": {"batch_size": 3}}, [0, 2], 2),
            ({"accumulate_grad_batches": 2}, [1, 3], 0),
            ({"accumulate_grad_batches": 3}, [0, 3], 2),
        ],
    )
    @pytest.mark.slow
    def test_fit__another_batch_in_mid_epoch(
        self,
        changed: dict[str, Any],
        batches: list[int],
        passed_over: int,
        half: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run = Run(half, half / f"{HALF}.ckpt", max_epochs=2, **changed)
        assert len(run.seen.batches) == sum(batches)
        said = f"{passed_over} images are passed over, for whole batches"
        assert (said in capsys.readouterr().out) == (passed_over > 0)
        at_once = changed.get("accumulate_grad_batches", 1)
        steps = 2 + sum(-(-count // at_once) for count in batches)
        assert run.trainer.global_step == steps
        schedule = run.trainer.lr_scheduler_configs[0].scheduler
        assert schedule.max_epochs == steps
        assert settings(run)[0]["lr"] == pytest.approx(1e-6)

    @pytest.mark.parametrize(
        ("module", "text"),
        [
            (
                {"model": {**TINY["model"], "num_queries": 4}},
                "--model.model.num_queries from 3 to 4",
            ),
            (
                {"model": {**TINY["model"], "embed_dim": 36, "depth": 2}},
                "--model.model.embed_dim from 24 to 36, --model.model.depth from 1 to",
            ),
            (
                {"model": {**TINY["model"], "num_heads": 3}},
                "--model.model.num_heads from 2 to 3: its weights were learned with",
            ),
            (
                {"model": {**TINY["model"], "norm_eps": 0.5}},
                "--model.model.norm_eps from None to 0.5: its weights were learned",
            ),
            (  # which leaves no place for the mask
                {"model": {**TINY["model"], "patch_size": 32}},
                "--model.model.patch_size from 8 to 32: its weights would not fit.",
            ),
            (
                {"head": {**TINY["head"], "num_prototypes": 5}},
                "--model.head.num_prototypes from 12 to 5: its weights would not fit.",
            ),
            ({"teacher_momentum": 0.9}, "--model.teacher_momentum from None to 0.9"),
            (
                {"loss": {"reconstruction_weight": 0.0}},
                "--model.loss.reconstruction_weight from None to 0.0",
            ),
            (
                {"loss": {"cls_clustering_weight": 0, "cls_alignment_weight": 0}},
                "--model.loss.cls_clustering_weight from 1.0 to 0, "
                "--model.loss.cls_alignment_weight from 1.0 to 0",
            ),
        ],
    )
    def test_fit__what_other_weights_need_is_refused(
        self, module: dict[str, Any], text: str, half: Path
    ) -> None:
        with pytest.raises(ValueError, match=f"cannot change {re.escape(text)}"):
            Run(half, half / f"{HALF}.ckpt", module=module, **STEPS)

    @pytest.mark.parametrize(
        ("name", "end", "text"),
        [
            ("batch-4", {"max_epochs": 1}, "max_epochs 1 .* 2 epochs are begun"),
            ("batch-4", {**STEPS, "max_steps": 3}, "max_steps 3 .* 4 steps are done"),
            ("epoch-1", {**STEPS, "max_steps": 2}, "max_steps 2 .* 3 steps are done"),
        ],
    )
    def test_fit__less_than_is_done(
        self, name: str, end: dict[str, int], text: str, half: Path
    ) -> None:
        with pytest.raises(ValueError, match=f"--trainer.{text}"):
            Run(half, half / f"{name}.ckpt", **end)

    @pytest.mark.parametrize(
        ("name", "end", "text", "again"),
        [
            ("batch-3", {"max_steps": 3}, "max_steps (3)", ["epoch-1"]),
            ("epoch-1", {"max_steps": 3}, "max_steps (3)", []),
            ("batch-4", {}, "max_steps (4)", ["epoch-2"]),
            ("epoch-1", {"max_steps": -1, "max_epochs": 1}, "max_epochs (1)", []),
            (
                "epoch-1",
                {"max_steps": 3, "max_epochs": 1},
                "max_epochs (1) and --trainer.max_steps (3)",
                [],
            ),
        ],
    )
    @pytest.mark.slow
    def test_fit__complete(
        self,
        name: str,
        end: dict[str, int],
        text: str,
        again: list[str],
        half: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        save, checkpoint = SaveAlways(tmp_path), half / f"{name}.ckpt"
        run = Run(half, checkpoint, callbacks=[save], **{**STEPS, **end})
        assert run.seen.batches == []
        steps = run.trainer.global_step
        said = f"is complete: {steps} steps are done. To train on, raise --trainer."
        assert f"{said}{text}.\n" in capsys.readouterr().out
        content = torch.load(checkpoint, weights_only=True)
        assert content["global_step"] == steps
        assert_equal_states(run.state, content["state_dict"])
        # What follows the last step is done again if it was not.
        assert list(save.saved) == again
        for saved in again:
            content = torch.load(tmp_path / f"{saved}.ckpt", weights_only=True)
            assert content["options"]["trainer.max_steps"] == steps
            more = Run(half, tmp_path / f"{saved}.ckpt", **{**STEPS, "max_steps": 5})
            assert more.seen.batches == STRAIGHT[steps:]

    def test_fit__no_end(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="needs an end"):
            Run(tmp_path, max_epochs=-1)

    def test_fit__from_the_start_again(self, half: Path) -> None:
        # What one `fit` was told of a checkpoint does not stay for the next.
        first = Run(half, half / f"{HALF}.ckpt", **STEPS)
        again = trainer(half, max_epochs=1)
        again.fit(first.module, datamodule=first.data)
        assert again.global_step == 3
        assert first.module.continuation.total_steps(again) == 3

    def test_fit__checkpoint_without_options(self, half: Path, tmp_path: Path) -> None:
        content = torch.load(half / f"{HALF}.ckpt", weights_only=False)
        del content["options"]
        torch.save(content, tmp_path / "old.ckpt")
        with pytest.raises(ValueError, match="written by an earlier version"):
            Run(half, tmp_path / "old.ckpt", **STEPS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prior": "b", "weights": None}, ""),
        ({"prior": None, "weights": None}, ""),
        (
            {"prior": "c", "weights": None},
            "--model.prior c is not read: the run goes on from its checkpoint.\n",
        ),
        (
            {"prior": None, "weights": "b"},
            "--model.weights b is not read: the run goes on from its checkpoint.\n",
        ),
    ],
)
def test_without_start__other_weights_are_not_read(
    given: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text("model: {prior: b, weights: null}")
    checkpoint = tmp_path / "checkpoints" / "a.ckpt"
    checkpoint.parent.mkdir()
    torch.save({"hyper_parameters": {"model": {}}}, checkpoint)
    began = without_start({**given, "model": {}}, checkpoint)
    # For config.yaml, also where nothing was asked for again.
    assert began == {k: {"prior": "b", "weights": None}[k] for k in given}
    assert capsys.readouterr().out == said


def test_without_start__what_the_files_had_told_is_kept(tmp_path: Path) -> None:
    told = {"norm_eps": 0.5, "tokenizer": {"width": 8}, "embed_dim": 24}
    torch.save({"hyper_parameters": {"model": told}}, tmp_path / "a.ckpt")
    named = {"model_name": "vit", "depth": 1}
    model = {"prior": "gone", "weights": "gone", "lr": 1.0, "model": named}
    without_start(model, tmp_path / "a.ckpt")
    kept = {"norm_eps": 0.5, "tokenizer": {"width": 8}, **named}
    assert model == {"prior": None, "weights": None, "lr": 1.0, "model": kept}
    # Where no model is named, it was that of the prior.
    model = {"prior": "gone", "weights": None, "model": {"depth": 1}}
    without_start(model, tmp_path / "a.ckpt")
    assert model["model"] == {**told, "depth": 1}
