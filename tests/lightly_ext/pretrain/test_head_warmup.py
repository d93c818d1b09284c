"""Heads that learn first, while the encoder stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from lightly_ext.pretrain import StellarPretraining
from tests import distributed
from tests.pretraining import loader, tiny, trainer

# Every step is a large one.
LARGE = {
    "lr": 1e-2,
    "min_lr": 1e-2,
    "warmup_fraction": 0.0,
    "weight_decay": 0.5,
}


class Recorder(Callback):
    """State before the first and after every optimiser step, and gradient norms."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._record(module)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        self.norms.append(norms.norm().item())
        self._record(module)

    def _record(self, module: StellarPretraining) -> None:
        self.states.append(copy.deepcopy(module.state_dict()))


def fit(module: StellarPretraining, tmp_path: Path, **kwargs: Any) -> Recorder:
    recorder = Recorder()
    settings = {"max_steps": 4, "max_epochs": -1, "callbacks": [recorder], **kwargs}
    trainer(tmp_path, **settings).fit(module, loader())
    return recorder


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_encoder(name: str) -> bool:
    return name.startswith("model.encoder.")


class MovesFromStep(Callback):
    """Checks in every process that the heads move, and the encoder from a step on."""

    def __init__(self, start: dict[str, Tensor], step: int) -> None:
        self.start = start
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        names = changed(self.start, module.state_dict())
        assert any(map(is_encoder, names)) == (trainer.global_step >= self.step)
        assert any(name.startswith("sparse_head.") for name in names)


class TestHeadWarmup:
    def test_fit__encoder_stays_then_learns(self, tmp_path: Path) -> None:
        module = tiny(head_warmup_steps=2, **LARGE)
        recorder = fit(module, tmp_path)
        states = recorder.states
        trainable = {name for name, _ in module.named_parameters()}
        others = {name for name in trainable if not is_encoder(name)}
        assert changed(states[0], states[1]) == others
        assert changed(states[1], states[2]) == others
        assert changed(states[2], states[3]) == trainable

    def test_fit__moments_of_the_encoder_start_after_the_warmup(
        self, tmp_path: Path
    ) -> None:
        module = tiny(head_warmup_steps=3, **LARGE)
        fit(module, tmp_path)
        state = module.trainer.optimizers[0].state
        for name, parameter in module.named_parameters():
            assert state[parameter]["step"] == (1 if is_encoder(name) else 4), name

    @pytest.mark.slow
    def test_fit__heads_learn_as_beside_a_frozen_encoder(self, tmp_path: Path) -> None:
        # With clipping, whose norm must not count the encoder.
        warm = tiny(head_warmup_steps=4, **LARGE)
        frozen = tiny(**LARGE)
        frozen.model.encoder.requires_grad_(False)
        clip = {"gradient_clip_val": 0.05}
        recorders = [fit(module, tmp_path, **clip) for module in (warm, frozen)]
        assert recorders[0].norms == pytest.approx([0.05] * 4, rel=1e-4)
        for name, value in frozen.state_dict().items():
            ours = warm.state_dict()[name]
            torch.testing.assert_close(ours, value, rtol=0, atol=1e-5, msg=name)

    def test_fit__counts_optimizer_steps(self, tmp_path: Path) -> None:
        module = tiny(head_warmup_steps=1, **LARGE)
        recorder = fit(module, tmp_path, max_steps=2, accumulate_grad_batches=2)
        encoder = [
            any(map(is_encoder, changed(before, after)))
            for before, after in zip(recorder.states, recorder.states[1:], strict=False)
        ]
        assert encoder == [False, False, False, True]

    def test_fit__teacher_keeps_the_encoder_too(self, tmp_path: Path) -> None:
        module = tiny(head_warmup_steps=2, teacher_momentum=0.5, **LARGE)
        first, *_, last = fit(module, tmp_path, max_steps=2).states
        moved = {name for name in changed(first, last) if name.startswith("teacher.")}
        assert moved and not any("teacher.encoder" in name for name in moved)

    def test_fit__resumed_run_goes_on_counting(self, tmp_path: Path) -> None:
        module = tiny(head_warmup_steps=3, **LARGE)
        fit(module, tmp_path, max_steps=2)
        module.trainer.save_checkpoint(tmp_path / "two.ckpt")
        again, recorder = tiny(head_warmup_steps=3, **LARGE), Recorder()
        resumed = trainer(tmp_path, max_steps=4, max_epochs=-1, callbacks=[recorder])
        resumed.fit(again, loader(), ckpt_path=tmp_path / "two.ckpt")
        third, fourth = (
            any(map(is_encoder, changed(*recorder.states[i : i + 2]))) for i in (0, 1)
        )
        assert (third, fourth) == (False, True)

    @pytest.mark.slow
    def test_fit__two_processes(self, tmp_path: Path) -> None:
        for before, after in distributed.run(fit_in_two_processes, tmp_path):
            assert any(map(is_encoder, changed(before, after)))

    def test_init__negative(self) -> None:
        with pytest.raises(ValueError, match="head_warmup_steps must be 0 or more"):
            tiny(head_warmup_steps=-1)


def fit_in_two_processes(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """States before and after."""
    distributed.say_as_torchrun(rank, world_size)
    module = tiny(head_warmup_steps=2, **LARGE)
    before = copy.deepcopy(module.state_dict())
    # Four images per process in two batches.
    options: Any = {"strategy": "ddp", "devices": world_size, "max_epochs": -1}
    options["callbacks"] = [MovesFromStep(before, 3)]
    run = trainer(Path(), max_steps=3, **options)
    run.fit(module, loader(batch_size=2))
    assert run.world_size == 2
    return [before, dict(module.state_dict())]


def test_fit__nothing_reads_the_encoder_but_koleo(tmp_path: Path) -> None:
    terms = ("reconstruction", "clustering", "alignment")
    terms += ("cls_clustering", "cls_alignment")
    loss = {f"{name}_weight": 0.0 for name in terms}
    module = tiny(loss=loss, head_warmup_steps=2, **LARGE)

    class Weights(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            states.append(copy.deepcopy(module.state_dict()))

    states = [copy.deepcopy(module.state_dict())]
    trainer(tmp_path, max_steps=3, max_epochs=-1, callbacks=[Weights()]).fit(
        module, loader()
    )
    start, first, second, third = states
    assert not changed(start, first)
    assert not changed(first, second)
    assert changed(second, third)
