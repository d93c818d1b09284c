"""The demo, stage by stage: boards, pretraining, scores, mmseg, pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pytorch_lightning import seed_everything
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from lightly_ext.demo.boards import BoardSets, make_board_sets
from lightly_ext.demo.export import export_image_folders, export_segmentation_set
from lightly_ext.demo.metrics import Scores, model_free_scores, model_scores
from lightly_ext.demo.mmseg_probe import find_mim, run_mmseg_probes
from lightly_ext.demo.report import (
    NUM_BOARDS,
    NUM_TOKEN_BOARDS,
    before_after_gallery,
    render_page,
    token_gallery,
)
from lightly_ext.demo.stages import start_output
from lightly_ext.demo.table import (
    HEADER,
    NO_MODEL,
    RANDOM,
    TRAINED,
    table_rows,
    to_json,
    to_markdown,
)
from lightly_ext.pretrain import StellarPretraining
from lightly_ext.pretrain import cli as pretrain_cli
from lightly_ext.quick_start.stages import Stages

RECIPE = "digit_boards"


# A model this small gains little from a second thread, and where threads outnumber free
# cores they wait for each other: 20 times slower was seen.
@threadpool_limits.wrap(limits=1)
def run_demo(
    output: Path | str = "runs/demo",
    seed: int = 0,
    num_boards: Mapping[str, int] | None = None,
    pretrain_options: Sequence[str] = (),
    mmseg_options: Mapping[str, object] | None = None,
) -> dict[str, Scores]:
    """Pretrains a small STELLAR on digit boards, evaluates it and shows the result.

    Args:
        output:
            Folder for everything; what an earlier demo left there is replaced.
        seed:
            Decides on boards and weights.
        num_boards:
            Sizes of the sets, arguments of `make_board_sets`.
        pretrain_options:
            More options of `stellar pretrain`.
        mmseg_options:
            More overrides of the mmseg config, as for --cfg-options.

    Returns:
        Scores by column of the table.

    Raises:
        FileExistsError: If something else than a demo is in `output`.
        RuntimeError: If mmsegmentation is not installed, or its probe fails.
    """
    find_mim()
    output = Path(output)
    start_output(output)
    stages = Stages()
    with stages("boards"):
        sets = make_board_sets(seed, **(num_boards or {}))
        export_image_folders(sets, output / "boards")
        export_segmentation_set(sets, output / "ade20k")
    with stages("pretraining, without labels"):
        trained = _pretrain(output, seed, pretrain_options)
        untrained = _fresh(trained, seed)
        modules = {TRAINED: trained, RANDOM: untrained}
        checkpoints = _save(output, modules)
    with stages("scores"):
        scores = _score(sets, modules)
    with stages("linear probes of mmsegmentation"):
        miou = run_mmseg_probes(
            checkpoints, output / "ade20k", output / "mmseg", mmseg_options
        )
        for column, value in miou.items():
            scores[column]["mmseg_miou"] = value
    with stages("pictures and page"):
        _write_report(output, sets, trained, untrained, scores, seed, stages)
    _print_table(stages.console, scores)
    total = sum(stages.seconds.values())
    stages.console.print(f"{total:.0f} s in all. Open {output / 'index.html'}.")
    return scores


def _pretrain(output: Path, seed: int, options: Sequence[str]) -> StellarPretraining:
    """Runs `stellar pretrain` on the exported boards."""
    shutil.rmtree(output / "pretrain", ignore_errors=True)
    boards = output / "boards"
    trainer = pretrain_cli.main(
        [
            f"--config={RECIPE}",
            f"--seed_everything={seed}",
            f"--output={output / 'pretrain'}",
            f"--data.path={boards / 'train'}",
            f"--data.knn_train={boards / 'single' / 'train'}",
            f"--data.knn_val={boards / 'single' / 'test'}",
            *options,
        ]
    )
    module = trainer.lightning_module
    assert isinstance(module, StellarPretraining)
    return module.eval()


def _fresh(trained: StellarPretraining, seed: int) -> StellarPretraining:
    """The same model and heads with random weights."""
    seed_everything(seed, verbose=False)
    # Lightning's command line adds an argument of its own, with an underscore.
    arguments = {k: v for k, v in trained.hparams.items() if not k.startswith("_")}
    return StellarPretraining(**arguments).eval()


def _save(output: Path, modules: Mapping[str, StellarPretraining]) -> dict[str, Path]:
    """Saves the models, the trained one where the mmseg config expects it."""
    folders = {TRAINED: output / "checkpoint", RANDOM: output / "checkpoint_random"}
    for name, module in modules.items():
        module.model.save_pretrained(folders[name])
    return folders


def _score(
    sets: BoardSets, modules: Mapping[str, StellarPretraining]
) -> dict[str, Scores]:
    scores = {NO_MODEL: model_free_scores(sets)}
    for name, module in modules.items():
        assert module.sparse_head is not None
        scores[name] = model_scores(module.model, module.sparse_head, sets)
    return scores


def _write_report(
    output: Path,
    sets: BoardSets,
    trained: StellarPretraining,
    untrained: StellarPretraining,
    scores: Mapping[str, Scores],
    seed: int,
    stages: Stages,
) -> None:
    before_after = before_after_gallery(
        untrained.model, trained.model, sets.test[:NUM_BOARDS]
    )
    before_after.save(output / "pictures" / "before_after.png")
    tokens = token_gallery(trained.model, sets.test[:NUM_TOKEN_BOARDS])
    tokens.save(output / "pictures" / "tokens.png")
    facts = _facts(sets, trained, seed)
    (output / "table.md").write_text(to_markdown(scores))
    times = {name: round(value, 1) for name, value in stages.seconds.items()}
    (output / "table.json").write_text(to_json(scores, {**facts, "seconds": times}))
    rows = {**facts, **{f"time, {k}": f"{v} s" for k, v in times.items()}}
    (output / "index.html").write_text(render_page(scores, before_after, tokens, rows))


def _facts(sets: BoardSets, trained: StellarPretraining, seed: int) -> dict[str, str]:
    parameters = sum(p.numel() for p in trained.model.parameters())
    trainer = trained.trainer
    loader = trainer.train_dataloader
    assert loader is not None
    seen = trainer.global_step * loader.batch_size
    return {
        "seed": str(seed),
        "boards": ", ".join(f"{len(v)} {k}" for k, v in vars(sets).items()),
        "model": f"{parameters / 1e6:.2f} million parameters, "
        f"{trained.model.encoder.num_queries} tokens, no pretrained weights",
        "pretraining": f"{trainer.global_step} steps, {seen} boards seen",
        "machine": f"CPU, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def _print_table(console: Console, scores: Mapping[str, Scores]) -> None:
    table = Table(*HEADER, title="STELLAR on digit boards: a toy, not a benchmark")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in table_rows(scores):
        table.add_row(*row)
    console.print(table)
