"""Between two logs nothing in a step makes the host wait for a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.gpu.training import StepWatch
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain import pretraining as pretraining_module
from tests.pretraining import (
    TINY,
    Views,
    first_view,
    fused,
    loader,
    tiny,
    tiny_mae,
    trainer,
)
from tests.tokenizer_weights import reference_tokenizer

NO_PROTOTYPES = {**TINY["head"], "num_prototypes": None, "batch_norm": True}
MODELS = {
    "dropped": {"proj_drop_rate": 0.1, "drop_path_rate": 0.1},
    "rotary": {"model_name": "vit_tiny_patch16_dinov3_qkvb"},
    "sines": {"pos_embed": "sincos"},
}
# Options of the module by what they show.
STELLAR: dict[str, dict[str, Any]] = {
    "as it is": {},
    "teacher": {"teacher_momentum": 0.9},
    "no prototypes": {"teacher_momentum": 0.9, "head": NO_PROTOTYPES},
    "no reconstruction": {"loss": {"reconstruction_weight": 0.0}},
    "reconstruction alone": {
        "loss": {
            f"{name}_weight": 0.0
            for name in (
                *("clustering", "alignment", "koleo"),
                *("cls_clustering", "cls_alignment"),
            )
        }
    },
    "identity matching": {"loss": {"matching": "identity"}},
    "head warm-up": {"head_warmup_steps": 100},
    "skip": {"on_nonfinite": "skip", "teacher_momentum": 0.9},
    "checkpointing": {"grad_checkpointing": True},
    **{name: {"model": {**TINY["model"], **model}} for name, model in MODELS.items()},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16-mixed", "gradient_clip_val": 3.0},
    "half": {"precision": "bf16-true"},
    "by value": {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_module, "AdamW", fused)


def waits(module: Any, data: Any, folder: Path, **options: Any) -> dict[str, int]:
    """What would make the host wait in steps 1 and 2 of the four of an epoch."""
    watch = StepWatch("cpu", (1, 3))
    options = {"max_epochs": 1, "log_every_n_steps": 50, **options}
    trainer(folder, callbacks=[watch], **options).fit(module, data)
    assert len(watch.ends) == 4
    return dict(watch.syncs)


QUICK = ("teacher", "no prototypes", "rotary")


def shown(options: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(value, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, value in options.items()
    ]


@pytest.mark.parametrize("options", shown(STELLAR))
def test_fit__of_every_loss(options: dict[str, Any], tmp_path: Path) -> None:
    assert not waits(tiny(**options), loader(2), tmp_path)


@pytest.mark.parametrize("options", shown(TRAINERS))
def test_fit__of_every_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    assert not waits(tiny(teacher_momentum=0.9), loader(2), tmp_path, **options)


def test_fit__codes_of_a_tokenizer(tmp_path: Path) -> None:
    torch.save(dict(reference_tokenizer().state_dict()), tmp_path / "tokenizer.bin")
    model = {**TINY["model"], "target": "tokens", "num_codes": 64}
    module = tiny(model=model, tokenizer=str(tmp_path / "tokenizer.bin"))
    assert not waits(module, loader(2), tmp_path)


def test_fit__of_mae(tmp_path: Path) -> None:
    data = DataLoader(Views(), 2, collate_fn=first_view)
    assert not waits(tiny_mae(), data, tmp_path)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
    ],
)
def test_fit__would_be_seen(
    wait: Callable[[Tensor], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = StellarPretraining.loss_terms

    def waiting(module: Any, *arguments: Any) -> Any:
        result = compute(module, *arguments)
        wait(result[0].total.detach())
        return result

    monkeypatch.setattr(StellarPretraining, "loss_terms", waiting)
    found = waits(tiny(), loader(2), tmp_path)
    assert list(found.values()) == [2]
    assert "test_host_syncs.py" in next(iter(found))
