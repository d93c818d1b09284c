from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import lightly_steps
from benchmarks.gpu.sizes import TINY
from benchmarks.lightly_steps import (
    METHODS,
    Row,
    Tokens,
    make_step,
    measure,
    method_tokens,
    table,
)
from benchmarks.step import BASE

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
BATCH = 2


def passed_tokens(step: Any) -> Tokens:
    """Tokens of an image that pass the encoders of a step."""
    counts = {True: 0, False: 0}

    def count(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        counts[torch.is_grad_enabled()] += inputs[0].shape[:2].numel()

    method = step.module.model.encoder if hasattr(step, "module") else step.method
    for name, module in method.named_modules():
        if name.endswith("blocks.0") and "predictor" not in name:
            module.register_forward_pre_hook(count)
    step()
    return Tokens(counts[True] // BATCH, counts[False] // BATCH)


@pytest.mark.parametrize("name", METHODS)
def test_make_step__tokens_are_those_that_pass(name: str) -> None:
    step = make_step(name, TINY, BATCH, "cpu", bf16=False)
    tokens = passed_tokens(step)
    assert tokens == method_tokens(name, TINY)
    assert tokens.trained > 0


@pytest.mark.parametrize(
    ("name", "tokens", "work"),
    [
        ("STELLAR", (213 + 8 * 56 + 8 * 53, 0), 1085),
        ("DINO", (2 * 197 + 8 * 37, 2 * 197), 690 + 394 / 3),
        ("CAPI", (1 + 196 - 127, 197), 70 + 197 / 3),
    ],
)
def test_method_tokens__vit_b(name: str, tokens: tuple[int, int], work: float) -> None:
    found = method_tokens(name, BASE)
    assert found == tokens
    assert found.work == pytest.approx(work)


@pytest.mark.parametrize("name", ["DINO", "CAPI"])
def test_lightly_step__trains_all_but_the_teacher(name: str) -> None:
    step: Any = make_step(name, TINY, BATCH, "cpu", bf16=False)
    before = {n: p.clone() for n, p in step.method.named_parameters()}
    losses = [step().item() for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, parameter in step.method.named_parameters():
        # The token of masked patches is one that no masked image is encoded with.
        trained = parameter.requires_grad and name != "student.mask_token"
        assert (parameter.grad is not None) == trained
    changed = "teacher.vit.blocks.0.attn.qkv.weight"
    assert not step.method.get_parameter(changed).equal(before[changed])


def test_measure__a_row_for_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def get_context(self, _: str) -> Here:
            return self

        def Pool(self, _: int) -> Here:
            return self

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

        def apply(self, function: Any, arguments: Any) -> float:
            return function(*arguments)

    monkeypatch.setattr(lightly_steps, "multiprocessing", Here())
    rows = measure("cpu", TINY, BATCH, bf16=False, rounds=1)
    assert [row.method for row in rows] == list(METHODS)
    assert all(row.ms > 0 and row.gib > 0.1 for row in rows)


def test_table__of_a_row() -> None:
    row = Row("DINO", Tokens(60, 30), 140.0, 1.5)
    assert table([row]).splitlines()[-1] == "| DINO | 60 | 30 | 140 | 2000 | 1.50 |"
