from __future__ import annotations

import contextlib
import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.utils import counters

from lightly_ext.pretrain import StellarPretraining, compilation
from lightly_ext.pretrain import pretraining as pretraining_module
from lightly_ext.pretrain.compilation import (
    CompilationReport,
    compile_blocks,
    compiler_error,
)
from stellar_plugin import Stellar
from tests.pretraining import (
    StopAfterTwoEpochs,
    assert_same_training,
    loader,
    tiny,
    trainer,
)

CPU = torch.device("cpu")
SAID = (
    r"The first step took (\S+) s, with compilation\. A block of the encoder takes "
    r"(\S+) ms instead of (\S+) \(masked views, forward and backward\): (\S+) times"
)


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and run, without the minutes that a C++ compiler takes."""
    without = partial(compile_blocks, backend="aot_eager")
    monkeypatch.setattr(pretraining_module, "compile_blocks", without)
    monkeypatch.setattr(pretraining_module, "compiler_error", lambda _: None)


def nothing(*_: Any) -> None:
    pass


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


class TestCompile:
    @pytest.mark.slow
    def test_fit__like_the_plain_step(
        self,
        tmp_path: Path,
        request: pytest.FixtureRequest,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if compiler_error(CPU) is not None:
            request.getfixturevalue("graphs_alone")
        torch.compiler.reset()
        counters.clear()
        runs = []
        for choice in (False, True):
            module = tiny(compile=choice, teacher_momentum=0.9)
            fit = trainer(tmp_path, max_steps=1)
            fit.fit(module, loader())
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            runs.append((fit.callback_metrics["loss"], gradients))
        assert num_graphs() == 5 + 1  # and the trial of the compiler
        assert not counters["graph_break"]
        said = re.findall(SAID, capsys.readouterr().out)
        assert len(said) == 1  # of the compiled one
        seconds, compiled_ms, plain_ms, gain = map(float, said[0])
        assert seconds > 1
        assert gain == pytest.approx(plain_ms / compiled_ms, rel=0.02)
        (plain, expected), (compiled, gradients) = runs
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)
        for ours, theirs in zip(gradients, expected, strict=True):
            tolerance = max(1e-4 * theirs.abs().max().item(), 1e-5)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)

    @pytest.mark.slow
    def test_fit__a_graph_for_each_pass(
        self, graphs_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = torch.randint(256, (22, 3, 32, 32), dtype=torch.uint8)
        labelled = torch.utils.data.TensorDataset(images, torch.arange(22) % 2)
        # Four sizes: the last batches are smaller.
        validation = [torch.utils.data.DataLoader(labelled, size) for size in (8, 5)]
        module = tiny(
            model={**tiny().hparams["model"], "depth": 3, "decoder_depth": 2},
            compile=True,
            teacher_momentum=0.9,
        )
        fit = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
        fit.fit(module, loader(), validation)
        # Target, masked and local views, decoder, teacher; the validation runs plain.
        assert num_graphs() == 5
        assert not counters["graph_break"]
        assert "Transformer blocks are compiled" in capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.parametrize("choice", [False, True])
    def test_fit__resumed_the_other_way(
        self, graphs_alone: None, choice: bool, tmp_path: Path
    ) -> None:
        whole, first, second = (
            tiny(compile=x, teacher_momentum=0.9) for x in (False, choice, not choice)
        )
        trainer(tmp_path, max_epochs=4).fit(whole, loader())
        fit = trainer(tmp_path, max_epochs=4, callbacks=[StopAfterTwoEpochs()])
        fit.fit(first, loader())
        fit.save_checkpoint(tmp_path / "half.ckpt")
        loaded = StellarPretraining.load_from_checkpoint(tmp_path / "half.ckpt")
        assert_same_training(loaded, first)
        first.model.save_pretrained(tmp_path / "model")
        exported = Stellar.from_pretrained(tmp_path / "model")
        assert_same_training(exported, first.model)
        half = {"ckpt_path": tmp_path / "half.ckpt"}
        trainer(tmp_path, max_epochs=4).fit(second, loader(), **half)
        assert num_graphs() == 5
        assert_same_training(second, whole)

    @pytest.mark.slow
    def test_fit__measuring_changes_nothing(
        self, graphs_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drops = {**tiny().hparams["model"], "proj_drop_rate": 0.2}
        states = []
        for measured in (True, False):
            if not measured:
                monkeypatch.setattr(CompilationReport, "on_train_batch_end", nothing)
            module = tiny(model=drops, compile=True)
            trainer(tmp_path, max_epochs=2).fit(module, loader())
            states.append((module.state_dict(), torch.get_rng_state()))
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)

    @pytest.mark.slow
    def test_fit__rotary_blocks(
        self, graphs_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = {
            **tiny().hparams["model"],
            "model_name": "vit_tiny_patch16_dinov3_qkvb",
        }
        runs = []
        for choice in (False, True):
            module = tiny(model=model, compile=choice)
            trainer(tmp_path, max_steps=1).fit(module, loader())
            runs.append(module)
        assert_same_training(*runs)
        assert num_graphs() == 4
        assert not counters["graph_break"]
        assert re.search(r"took \S+ s, with compilation\.\n", capsys.readouterr().out)

    @pytest.mark.parametrize(
        ("compiled", "plain", "end"),
        [
            (
                2.0,
                3.0,
                "takes 2 ms instead of 3 (masked views, forward and backward): "
                "1.50 times as fast.",
            ),
            (
                3.0,
                1.5,
                "0.50 times as fast. Set --model.compile=false: small blocks "
                "gain nothing by it.",
            ),
        ],
    )
    def test_report__what_a_block_wins(
        self, compiled: float, plain: float, end: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = compilation, "_block_ms", lambda *_: (compiled, plain)
        monkeypatch.setattr(*found)
        module, said = tiny(), []
        monkeypatch.setattr(StellarPretraining, "print", lambda _, x: said.append(x))
        run = Mock(callbacks=[])
        run.precision_plugin.forward_context = contextlib.nullcontext
        report, batch = module.compilation, next(iter(loader()))
        report.wanted = True
        for _ in range(2):  # said once
            report.on_train_batch_start(run, module, batch, 0)
            report.on_train_batch_end(run, module, None, batch, 0)
        (text,) = said
        assert text.startswith("The first step took 0.0 s, with compilation. A block")
        assert text.endswith(end)

    def test_fit__auto_is_off_on_a_cpu(self, tmp_path: Path) -> None:
        trainer(tmp_path, max_steps=1).fit(tiny(), loader())
        assert num_graphs() == 0

    @pytest.mark.parametrize("error", [None, "No Triton"])
    @pytest.mark.slow
    def test_on_fit_start__auto_on_a_gpu(
        self, error: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, compiled, said = tiny(), [], []
        monkeypatch.setattr(StellarPretraining, "device", torch.device("cuda"))
        monkeypatch.setattr(StellarPretraining, "print", lambda _, x: said.append(x))
        monkeypatch.setattr(pretraining_module, "compiler_error", lambda _: error)
        monkeypatch.setattr(pretraining_module, "compile_blocks", compiled.append)
        module.on_fit_start()
        assert compiled == ([] if error else [module])
        text = f"are not compiled. {error}" if error else "are compiled: the first"
        assert said[0].startswith(f"Transformer blocks {text}")

    def test_fit__compiler_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def compile_nothing(*_: Any, **__: Any) -> None:
            raise RuntimeError("No compiler found\nTraceback")

        monkeypatch.setattr(torch, "compile", compile_nothing)
        assert compiler_error(CPU) == "RuntimeError: No compiler found"
        with pytest.raises(
            RuntimeError, match=r"--model.compile=false\. .*No compiler"
        ):
            trainer(tmp_path).fit(tiny(compile=True), loader())
