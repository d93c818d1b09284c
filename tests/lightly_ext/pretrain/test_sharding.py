"""Sharded processes train, save and go on as those of DDP, or as one, do."""

from __future__ import annotations

import json
import shutil
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor

from lightly_ext.loss import STELLARLoss
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain import pretraining as pretraining_module
from lightly_ext.pretrain.checkpoint_files import newest_complete, step_checkpoints
from lightly_ext.pretrain.checks import check_trainer
from lightly_ext.pretrain.cli import main
from lightly_ext.pretrain.compilation import compile_blocks
from lightly_ext.pretrain.sharding import check_strategy
from stellar_plugin import Stellar
from tests import distributed
from tests.exact_resume import GATHERED, images, write_classes
from tests.pretraining import (
    MAE_VIEW,
    TINY,
    TINY_OPTIONS,
    Views,
    fused,
    loader,
    tiny,
    tiny_mae,
    trainer,
)
from tests.tokenizer_weights import reference_tokenizer

BATCH, PROCESSES = 4, 2
TOKENIZER = "tokenizer.bin"
TWO_BLOCKS = {**TINY["model"], "depth": 2}
ROTARY = {**TWO_BLOCKS, "model_name": "vit_tiny_patch16_dinov3_qkvb"}
LEARNS = {"lr": 1e-3, "warmup_fraction": 0.0}
WITH_TEACHER = {**LEARNS, "loss": GATHERED, "teacher_momentum": 0.9}
# A run on the command line, of two steps an epoch in one or two processes.
RUN = [
    "--config=vit_base",
    *TINY_OPTIONS,
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.max_epochs=2",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.gradient_clip_val=1.0",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--model.teacher_momentum=0.9",
    "--model.head_warmup_steps=1",
    "--model.lr=1e-3",
    "--model.warmup_fraction=0",
    "--data.num_workers=0",
    "--data.transform=lightly_ext.transforms.STELLARTransform",
    "--data.transform.num_global_views=2",
    "--data.transform.num_local_views=2",
    "--data.transform.global_crop_size=32",
    "--data.transform.local_crop_size=16",
]
SHARDED = [f"--trainer.devices={PROCESSES}", "--trainer.strategy=fsdp2"]


class Losses(Callback):
    """The losses that the first process logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                name: float(value)
                for name, value in metrics.items()
                if name.startswith("train/") or name == "health/gradient_norm"
            }
        )


class PoisonedRank(StellarPretraining):
    """The loss of process 1 is not finite in the second step."""

    def training_step(self, *arguments: Any) -> Tensor:
        poison = self.global_step == 1 and self.global_rank == 1
        return super().training_step(*arguments) * (torch.nan if poison else 1.0)


def poisoned(**kwargs: Any) -> StellarPretraining:
    module = tiny(on_nonfinite="skip", **kwargs)
    module.__class__ = PoisonedRank
    return module


CHECKPOINTED = {**WITH_TEACHER, "model": TWO_BLOCKS, "grad_checkpointing": True}
# Modules to train, and options of the trainer.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "checkpointed": (
        partial(tiny, **CHECKPOINTED),
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ),
    "compiled": (
        partial(tiny, compile=True, **CHECKPOINTED),
        {"precision": "bf16-mixed"},
    ),
    "rotary": (
        partial(
            tiny,
            model=ROTARY,
            head={**TINY["head"], "num_prototypes": None, "batch_norm": True},
            **WITH_TEACHER,
        ),
        {},
    ),
    "poisoned": (partial(poisoned, **WITH_TEACHER), {"gradient_clip_val": 1.0}),
    "poisoned, fused": (partial(poisoned, **WITH_TEACHER), {}),
    "half": (partial(tiny, **WITH_TEACHER), {"precision": "bf16-true"}),
    "mae": (partial(tiny_mae, **LEARNS), {}),
    "codes": (
        partial(tiny, model={**TINY["model"], "target": "tokens", "num_codes": 64}),
        {},
    ),
}
Run = tuple[list[dict[str, float]], dict[str, Tensor]]


def fit(folder: Path, case: str, strategy: str) -> Run:
    """Trains three steps; returns losses and whole weights (of the first process)."""
    make, options = CASES[case]
    losses = Losses()
    run = trainer(
        folder,
        strategy=strategy,
        devices=PROCESSES,
        log_every_n_steps=1,
        callbacks=[losses],
        **options,
    )
    views = {"transform": MAE_VIEW} if case == "mae" else {}
    data = images(folder / "images", batch_size=BATCH // PROCESSES, **views)
    frozen = {"tokenizer": str(folder / TOKENIZER)} if case == "codes" else {}
    run.fit(make(**frozen), datamodule=data)
    return losses.rows, dict(run.strategy.lightning_module_state_dict())


def in_processes(folder: Path, rank: int, world_size: int) -> dict[Any, Run]:
    """Every case by DDP and in shards, and the runs of the command line."""
    distributed.say_as_torchrun(rank, world_size)
    found = {}
    compiled = partial(compile_blocks, backend="eager")
    for case in CASES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretraining_module, "compile_blocks", compiled)
            patch.setattr(pretraining_module, "compiler_error", lambda _: None)
            if case == "poisoned, fused":
                patch.setattr(pretraining_module, "AdamW", fused)
            for strategy in ("ddp", "fsdp2"):
                found[case, strategy] = fit(folder, case, strategy)
    batch = f"--data.batch_size={BATCH // PROCESSES}"
    main([*RUN, *given(folder), batch, *SHARDED, f"--output={folder}/sharded"])
    main(
        [
            *RUN,
            *given(folder),
            batch,
            *SHARDED,
            f"--output={folder}/goes_on",
            "--resume",
        ]
    )
    return found


def given(folder: Path) -> list[str]:
    labelled = folder / "labelled"
    names = ("data.path", "data.knn_train", "data.knn_val")
    paths = (folder / "images", labelled, labelled)
    return [f"--{name}={path}" for name, path in zip(names, paths, strict=True)]


def first_half(run: Path, folder: Path) -> Path:
    """A run as it was behind its first epoch."""
    shutil.copytree(run, folder, symlinks=True)
    newest, oldest = step_checkpoints(folder / "checkpoints")
    newest.unlink()
    assert oldest.name.startswith("step_00000002")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Run]]:
    """Folder and results of the first process, as their start takes the most time."""
    folder = tmp_path_factory.mktemp("runs")
    write_classes(folder / "images", 14)
    write_classes(folder / "labelled", 23)
    torch.save(dict(reference_tokenizer().state_dict()), folder / TOKENIZER)
    batch = f"--data.batch_size={BATCH}"
    main([*RUN, *given(folder), batch, f"--output={folder}/one"])
    first_half(folder / "one", folder / "goes_on")
    (folder / "meet").mkdir()
    found, others = distributed.run(partial(in_processes, folder), folder / "meet")
    assert all(others[case, "fsdp2"][1] == {} for case in CASES)
    back = first_half(folder / "sharded", folder / "goes_back")
    main([*RUN, *given(folder), batch, f"--output={back}", "--resume"])
    return folder, found


def checkpoint(run: Path) -> dict[str, Any]:
    path = newest_complete(run / "checkpoints")
    return torch.load(path, weights_only=True)


def assert_close(
    state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert list(state) == list(expected)
    for name, value in expected.items():
        if not name.endswith("qkv.bias"):  # Adam makes steps of rounding noise there
            difference = (state[name] - value).abs().max()
            assert difference <= tolerance, name


@pytest.mark.slow
class TestShardedStrategy:
    @pytest.mark.parametrize("case", CASES)
    def test_fit__like_ddp(self, case: str, runs: tuple[Path, dict[Any, Run]]) -> None:
        (losses, state), (others, expected) = (
            runs[1][case, strategy] for strategy in ("fsdp2", "ddp")
        )
        tolerance = 2**-6 if case == "half" else 1e-5  # a bfloat16 has eight bits
        assert len(losses) == 3
        for row, other in zip(losses, others, strict=True):
            assert row == pytest.approx(other, rel=tolerance, nan_ok=True)
        assert_close(state, expected, tolerance)

    @pytest.mark.parametrize("name", ["sharded", "goes_on", "goes_back"])
    def test_main__like_one_process(
        self, name: str, runs: tuple[Path, dict[Any, Run]]
    ) -> None:
        one, run = runs[0] / "one", runs[0] / name
        ours, theirs = checkpoint(run), checkpoint(one)
        assert list(ours) == list(theirs)
        assert_close(ours["state_dict"], theirs["state_dict"])
        (moments,), (expected,) = ours["optimizer_states"], theirs["optimizer_states"]
        assert moments["param_groups"] == expected["param_groups"]
        assert list(moments["state"]) == list(expected["state"])
        for number, state in expected["state"].items():
            for key, value in state.items():
                found = moments["state"][number][key]
                torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("name", ["sharded", "goes_on", "goes_back"])
    def test_main__exports_like_one_process(
        self, name: str, runs: tuple[Path, dict[Any, Run]]
    ) -> None:
        one, run = runs[0] / "one" / "model", runs[0] / name / "model"
        assert sorted(f.name for f in run.iterdir()) == sorted(
            f.name for f in one.iterdir()
        )
        assert (run / "config.json").read_text() == (one / "config.json").read_text()
        for file in run.glob("*.safetensors"):
            assert_close(load_file(file), load_file(one / file.name))
        Stellar.from_pretrained(run)

    def test_main__draws_samples_and_measures_knn(
        self, runs: tuple[Path, dict[Any, Run]]
    ) -> None:
        one, run = (
            json.loads((runs[0] / name / "run.json").read_text())
            for name in ("one", "sharded")
        )
        assert run["knn"] == one["knn"]
        assert list(run["samples"]["moments"]) == list(one["samples"]["moments"])
        for file in run["samples"]["moments"].values():
            ours, theirs = (
                np.asarray(Image.open(runs[0] / name / file), dtype=np.int64)
                for name in ("sharded", "one")
            )
            assert abs(ours - theirs).max() <= 4  # of a JPEG


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_fit__cuda(compiled: bool, tmp_path: Path) -> None:
    """One shard, with NCCL and the fused AdamW, is like one process of DDP."""
    runs = []
    for strategy in ("ddp", "fsdp2"):
        module = tiny(compile=compiled, **WITH_TEACHER)
        options = {"accelerator": "gpu", "devices": 1, "gradient_clip_val": 1.0}
        run = trainer(tmp_path, strategy=strategy, **options)
        run.fit(module, loader())
        runs.append(run.strategy.lightning_module_state_dict())
    torch.distributed.destroy_process_group()
    plain = {name: tensor.cpu() for name, tensor in runs[0].items()}
    assert_close(runs[1], plain, tolerance=1e-4)


# DDP waits for every gradient, and finds no unused parameters by default.
@pytest.mark.parametrize(
    "term, teacher",
    [
        ("reconstruction", None),
        ("clustering", None),
        ("clustering", 0.9),
        ("alignment", None),
        ("alignment", 0.9),
        ("cls_clustering", None),
        ("cls_alignment", None),
        ("koleo", None),
    ],
)
def test_loss__each_term_alone_reaches_every_parameter(
    term: str, teacher: float | None
) -> None:
    names = signature(STELLARLoss).parameters
    weights = {name: 0.0 for name in names if name.endswith("_weight")}
    module = tiny(loss={**weights, f"{term}_weight": 1.0}, teacher_momentum=teacher)
    views = module.augment(*(x[:2] for x in Views().views))
    keep = torch.arange(4).expand(2, 2, -1)
    terms, *_ = module.loss_terms(views, keep)
    terms.total.backward()
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None] == []


class TestCheckStrategy:
    @pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_fork", "fsdp2"])
    def test_check_strategy(self, strategy: str) -> None:
        check_strategy(strategy)

    @pytest.mark.parametrize(
        "strategy",
        ["fsdp", "fsdp_cpu_offload", "deepspeed", "DDP", ModelParallelStrategy()],
    )
    def test_check_strategy__not_supported(self, strategy: Any) -> None:
        name = strategy if isinstance(strategy, str) else "ModelParallelStrategy"
        with pytest.raises(ValueError, match=f"{name} is not supported: .* fsdp2"):
            check_strategy(strategy)

    def test_main__names_the_way_out(self, tmp_path: Path) -> None:
        write_classes(tmp_path / "images", 4)
        options = [f"--data.path={tmp_path}/images", f"--output={tmp_path}/run"]
        with pytest.raises(ValueError, match=r"--trainer\.strategy fsdp is not"):
            main([*RUN, *options, "--trainer.strategy=fsdp"])

    def test_fit__scaler(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, strategy="fsdp2", devices=1)
        run.strategy.connect(tiny())
        run.precision_plugin.precision = "16-mixed"
        with pytest.raises(ValueError, match=r"16-mixed does not go with .* fsdp2"):
            check_trainer(run)
