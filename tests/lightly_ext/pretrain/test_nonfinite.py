"""A NaN between two logged steps: it reaches no weight, and the message names it."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor

from benchmarks.gpu.training import StepWatch
from lightly_ext.checkpoint_io import DurableCheckpointIO
from lightly_ext.data import ViewBatch
from lightly_ext.pretrain import StellarPretraining, nonfinite
from lightly_ext.pretrain import pretraining as pretraining_module
from lightly_ext.pretrain.checkpoints import RunCheckpoint
from lightly_ext.pretrain.nonfinite import NonFiniteGuard
from tests import distributed
from tests.pretraining import Views, fused, tiny, trainer

HEAD = "sparse_head.prototypes.weight"


class NumberedViews(Views):
    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return *super().__getitem__(index), index


def collate(samples: list[Any]) -> ViewBatch:
    global_views, local_views, indices = zip(*samples, strict=True)
    numbers = torch.tensor(indices)
    return ViewBatch(torch.stack(global_views), torch.stack(local_views), None, numbers)


class Data(LightningDataModule):
    """Eight images, `0.png` to `7.png`, four in a batch and in this order."""

    train_dataset = SimpleNamespace(file=lambda index: Path(f"{index}.png"))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(NumberedViews(), 4, collate_fn=collate)


def poison_term(
    module: StellarPretraining, term: str, steps: set[int], batch: int | None = None
) -> None:
    """Makes a term, and the total, NaN in some steps, or one of their batches."""
    terms = module.criterion.terms

    def poisoned(**inputs: Any) -> Any:
        found = terms(**inputs)
        number = module.trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        if module.global_step not in steps or batch not in (None, number):
            return found
        bad = getattr(found, term) * torch.nan
        return found._replace(**{term: bad, "total": found.total + bad})

    module.criterion.terms = poisoned


def poison_gradient(module: StellarPretraining, steps: set[int]) -> None:
    """Makes a part of a gradient infinite in some steps; every loss stays finite."""

    def poisoned(gradient: Tensor) -> Tensor:
        if module.global_step in steps:
            gradient = gradient.clone()
            gradient[0, 0] = torch.inf
        return gradient

    module.get_parameter(HEAD).register_hook(poisoned)


class Watch(Callback):
    """Keeps weights, teacher and optimiser as they are before and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.states):
            self._keep(trainer, pl_module)

    def _keep(self, trainer: Trainer, module: Any) -> None:
        self.states.append(copy.deepcopy(state(trainer, module)))


def state(trainer: Trainer, module: StellarPretraining) -> dict[str, Any]:
    moments = trainer.optimizers[0].state_dict()["state"]
    numbers = {f"{i}.{k}": v for i, each in moments.items() for k, v in each.items()}
    return {**module.state_dict(), **numbers}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def let_the_device_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_module, "AdamW", fused)


@pytest.fixture(params=["host", "device"])
def decided_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who leaves the update out: a fused AdamW does it on the device, as on a GPU."""
    if request.param == "device":
        let_the_device_decide(monkeypatch)
    return request.param


def fit(module: StellarPretraining, folder: Path, **options: Any) -> Watch:
    watch = Watch()
    options = {"max_epochs": 4, "log_every_n_steps": 50, **options}
    options["callbacks"] = [watch, *options.get("callbacks", [])]
    trainer(folder, **options).fit(module, datamodule=Data())
    return watch


class TestStop:
    @pytest.mark.parametrize(
        "poisoned, clip",
        [("alignment", "norm"), ("gradient", "value"), ("gradient", None)],
    )
    @pytest.mark.slow
    def test_fit__ends_with_the_state_before(
        self, poisoned: str, clip: str | None, decided_by: str, tmp_path: Path
    ) -> None:
        module, watch = tiny(teacher_momentum=0.9), Watch()
        if poisoned == "gradient":
            poison_gradient(module, {3})
            told = rf"The gradient is not finite \(first in {HEAD}\) at step 3"
        else:
            poison_term(module, poisoned, {3})
            told = r"The loss is not finite \(total, alignment\) at step 3"
        options: dict[str, Any] = {"callbacks": [watch]}
        if clip:
            options |= {"gradient_clip_val": 1.0, "gradient_clip_algorithm": clip}
        with pytest.raises(RuntimeError, match=told) as error:
            fit(module, tmp_path, **options)
        assert_same(state(module.trainer, module), watch.states[3])
        # A device is read two steps later, but for the last steps.
        assert len(watch.states) == (4 if decided_by == "host" else 6)
        # Odd steps have the second half of the images.
        files = ["4.png", "5.png", "6.png", "7.png"]
        listed = tmp_path / nonfinite.LIST
        assert "'4.png', '5.png', '6.png' and 1 more" in str(error.value)
        assert f"listed in '{listed}'" in str(error.value)
        assert listed.read_text().split("\n  ")[1:] == [*files[:3], "7.png\n"]
        assert "--on_nonfinite=skip" in str(error.value)

    @pytest.mark.slow
    def test_fit__names_the_images_whose_tokens_are_not_finite(
        self, decided_by: str, tmp_path: Path
    ) -> None:
        module = tiny()
        encode = module.model.forward

        def poisoned(images: Tensor, *arguments: Any) -> Any:
            if module.global_step == 2 and not arguments:
                images = images.clone()
                images[1] = torch.nan
            return encode(images, *arguments)

        module.model.forward = poisoned
        with pytest.raises(RuntimeError, match="at step 2") as error:
            fit(module, tmp_path)
        assert "Its images: '1.png', listed" in str(error.value)
        for term in ("total", "reconstruction", "clustering", "koleo"):
            assert term in str(error.value)

    def test_fit__one_of_the_accumulated_batches(
        self, decided_by: str, tmp_path: Path
    ) -> None:
        module, watch = tiny(), Watch()
        poison_term(module, "koleo", {1}, batch=0)
        options = {"accumulate_grad_batches": 2, "callbacks": [watch]}
        with pytest.raises(RuntimeError, match=r"\(total, koleo\) at step 1") as error:
            fit(module, tmp_path, **options)
        assert_same(state(module.trainer, module), watch.states[1])
        assert "'0.png', '1.png', '2.png' and 1 more" in str(error.value)

    def test_fit__settled_before_a_checkpoint(
        self, decided_by: str, tmp_path: Path
    ) -> None:
        class SaveAlways(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                folder = tmp_path / "checkpoints"
                trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")
                (folder / "last.ckpt").unlink(missing_ok=True)
                (folder / "last.ckpt").symlink_to(f"{trainer.global_step}.ckpt")

        module = tiny()
        poison_term(module, "clustering", {2})
        with pytest.raises(RuntimeError, match="at step 2") as error:
            fit(module, tmp_path, callbacks=[SaveAlways()])
        saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert saved == ["1.ckpt", "2.ckpt", "last.ckpt"]
        last = f"from '{tmp_path / 'checkpoints' / '2.ckpt'}': stellar pretrain"
        assert last in str(error.value) and "--resume" in str(error.value)

    def test_fit__a_save_does_not_hide_what_happened(
        self, decided_by: str, tmp_path: Path
    ) -> None:
        module = tiny()
        poison_term(module, "clustering", {1})
        options = {"plugins": [DurableCheckpointIO()], "enable_checkpointing": True}
        with pytest.raises(RuntimeError, match=r"^The loss is not finite .* at step 1"):
            fit(module, tmp_path, callbacks=[RunCheckpoint(tmp_path, 1)], **options)
        saved = {path.name[:13] for path in (tmp_path / "checkpoints").iterdir()}
        assert saved == {"step_00000001", "last.ckpt"}

    def test_fit__settled_before_a_validation(
        self, decided_by: str, tmp_path: Path
    ) -> None:
        module, data, validated = tiny(), Data(), []
        data.val_dataloader = lambda: torch.utils.data.DataLoader([0])
        module.configure_callbacks = lambda: [module.nonfinite]
        module.validation_step = lambda *_: validated.append(module.global_step)
        poison_term(module, "total", {3})
        run = trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0)
        with pytest.raises(RuntimeError, match="at step 3"):
            run.fit(module, datamodule=data)
        assert validated == [2]

    def test_fit__another_training_starts_anew(
        self, decided_by: str, tmp_path: Path
    ) -> None:
        module = tiny()
        poison_gradient(module, {1})
        with pytest.raises(RuntimeError, match="at step 1"):
            fit(module, tmp_path)
        module.get_parameter(HEAD)._backward_hooks.clear()
        states = fit(module, tmp_path, max_epochs=1).states
        assert len(states) == 3
        for before, after in pairwise(states):
            assert not torch.equal(after[HEAD], before[HEAD])

    def test_fit__settled_at_the_end(self, decided_by: str, tmp_path: Path) -> None:
        module = tiny()
        poison_term(module, "total", {7})
        with pytest.raises(RuntimeError, match=r"\(total\) at step 7"):
            fit(module, tmp_path)


class TestSkip:
    @pytest.mark.parametrize("poisoned", ["alignment", "gradient"])
    @pytest.mark.slow
    def test_fit__goes_on_without_the_step(
        self,
        poisoned: str,
        decided_by: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        module = tiny(teacher_momentum=0.9, on_nonfinite="skip")
        if poisoned == "gradient":
            poison_gradient(module, {2, 3, 6})
        else:
            poison_term(module, poisoned, {2, 3, 6})
        watch = fit(module, tmp_path)
        assert len(watch.states) == 9
        for step, after in enumerate(watch.states[1:]):
            before = watch.states[step]
            assert all(value.isfinite().all() for value in after.values())
            if step in (2, 3, 6):
                assert_same(after, before)
            else:
                for name in (HEAD, f"teacher.{HEAD}"):
                    assert not torch.equal(after[name], before[name])
        said = [x for x in capsys.readouterr().out.split("\n") if "is skipped" in x]
        counts = [line.partition(" in a row")[0][-1] for line in said]
        assert counts == ["1", "2", "1"]
        assert [x.partition("at step ")[2][0] for x in said] == ["2", "3", "6"]

    def test_fit__ends_at_the_limit(self, decided_by: str, tmp_path: Path) -> None:
        module, watch = tiny(on_nonfinite="skip", nonfinite_limit=3), Watch()
        poison_term(module, "koleo_views", {0, 1, 3, 4, 5})
        with pytest.raises(RuntimeError, match=r"step 5; .* It is number 3 in a row"):
            fit(module, tmp_path, callbacks=[watch])
        assert_same(state(module.trainer, module), watch.states[3])


class TestNoWaiting:
    def test_fit__the_device_decides_and_the_host_reads_later(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        let_the_device_decide(monkeypatch)
        module, watch = tiny(teacher_momentum=0.9), StepWatch("cpu", (2, 6))
        poison_gradient(module, {4})
        options = {"gradient_clip_val": 3.0, "log_every_n_steps": 50}
        with pytest.raises(RuntimeError, match="at step 4"):
            fit(module, tmp_path, callbacks=[watch], **options)
        assert len(watch.ends) == 6
        # The loader works in this process, and what poisons is no part of a step.
        own = ("pytorch_light", "tests/")
        assert [line for line in watch.syncs if not line.startswith(own)] == []


def scaled(**options: Any) -> dict[str, Any]:
    """A trainer with the scaler of fp16, on a CPU and with float32."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))
    plugin.forward_context = torch.enable_grad
    return {"plugins": [plugin]}


class TestScalerOfFP16:
    def test_fit__an_infinite_gradient_is_normal(self, tmp_path: Path) -> None:
        module, options = tiny(teacher_momentum=0.9), scaled()
        poison_gradient(module, {2})
        watch = fit(module, tmp_path, **options)
        assert options["plugins"][0].scaler.get_scale() == 2.0**15
        assert_same(watch.states[3], watch.states[2])
        assert not torch.equal(watch.states[4][HEAD], watch.states[3][HEAD])

    def test_fit__an_infinite_loss_is_not(self, tmp_path: Path) -> None:
        module, watch = tiny(), Watch()
        poison_term(module, "alignment", {2})
        with pytest.raises(RuntimeError, match=r"loss .* \(total, alignment\) at step"):
            fit(module, tmp_path, callbacks=[watch], **scaled())
        assert_same(state(module.trainer, module), watch.states[2])

    def test_fit__the_scale_has_fallen(self, tmp_path: Path) -> None:
        module = tiny()
        poison_gradient(module, set(range(99)))
        told = r"scaler of fp16 fell to 6.1e-05: gradients overflow at step 3"
        with pytest.raises(RuntimeError, match=told):
            fit(module, tmp_path, **scaled(init_scale=2.0**-11))


class PoisonedRank(StellarPretraining):
    """Process 1 sees a loss that is not finite, whose gradient is."""

    def loss_terms(self, *arguments: Any) -> Any:
        terms, *rest = super().loss_terms(*arguments)
        if self.global_step in (1, 3, 4) and self.global_rank == 1:
            bad = terms.koleo.detach() * torch.nan
            terms = terms._replace(total=terms.total + bad, koleo=bad)
        return terms, *rest


def fit_poisoned(folder: Path, rank: int, world_size: int) -> tuple[list[Any], str]:
    """States of a process, up to that with which it ends, and the error."""
    distributed.say_as_torchrun(rank, world_size)
    module, watch = tiny(on_nonfinite="skip", nonfinite_limit=2), Watch()
    module.__class__ = PoisonedRank
    options: dict[str, Any] = {"strategy": "ddp", "devices": world_size}
    run = trainer(folder, max_epochs=8, callbacks=[watch], **options)
    with pytest.raises(RuntimeError, match="not finite") as error:
        run.fit(module, datamodule=Data())
    return [*watch.states, state(run, module)], str(error.value)


@pytest.mark.slow
class TestTwoProcesses:
    def test_fit__one_of_them_is_not_finite(self, tmp_path: Path) -> None:
        (tmp_path / "meet").mkdir()
        ends = distributed.run(partial(fit_poisoned, tmp_path), tmp_path / "meet")
        for states, error in ends:
            # Before the first step and behind steps 0 to 3; when step 4 ends it.
            assert len(states) == 6
            for step, untouched in enumerate((False, True, False, True, True)):
                same = torch.equal(states[step + 1][HEAD], states[step][HEAD])
                assert same == untouched
            assert_same(states[2], states[1])
            assert_same(states[5], states[3])
            assert "not finite (total, koleo) at step 4" in error
            assert "number 2 in a row" in error
        # Of three steps the images of process 1.
        assert (tmp_path / nonfinite.LIST).read_text().count(".png") == 12
        assert_same(*(states[-1] for states, _ in ends))


class TestNonFiniteGuard:
    @pytest.mark.parametrize(
        "arguments, match",
        [(("ignore", 1), "'stop' or 'skip', got 'ignore'"), (("skip", 0), "1 or more")],
    )
    def test_init__bad_argument(self, arguments: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            NonFiniteGuard(*arguments)
