"""What `stellar pretrain --help` says: the options that matter, in a moment.

Lightning's command line needs seconds to list some ninety options. A test holds these
against it.
"""

from __future__ import annotations

import textwrap

# Name and default of an option, as base.yaml and the code have it, and its purpose.
OPTIONS = {
    "The run": {
        "config NAME": "recipe: vit_base, vit_large, vit_huge, photos (your own, few),"
        " digit_boards, ablations/NAME, or a YAML file; several add up, later ones win",
        "method stellar": "what is trained: stellar, or mae, a prior for it (recipe"
        " photos_prior; `--help-all` behind that has its options)",
        "output runs/pretrain": "folder for checkpoints, logs, report and model",
        "resume": "go on from the last checkpoint in that folder",
        "from-run FOLDER": "repeat a run: its recipe, into another --output",
        "save_every_minutes 30.0": "save in between the ends of epochs; null for never",
        "save_every_steps null": "the same, counted in steps",
        "on_nonfinite stop": "stop or skip where a loss or gradient is not finite",
        "seed_everything 0": "seed of weights, order, views and masks",
    },
    "Images": {
        "data.path FOLDER": "images to train on, nested to any depth, without labels;"
        " or tars, parquet, arrow: 'shards/*.tar', hf:NAME (see docs/data.md)",
        "data.batch_size 128": "images per process and step",
        "data.num_workers null": "loaders per process; null shares the CPU cores",
        "data.shuffle_buffer 4096": "images of tars, parquet, hf: that are shuffled",
        "data.knn_train null": "bank of online kNN: a subfolder per class, or as above",
        "data.knn_val null": "its queries, of the same classes",
    },
    "Model and loss": {
        "model.model.model_name NAME": "encoder by timm's name; without it that of"
        " the prior, or stellar_vit_base_patch16_224",
        "model.model.num_queries 16": "sparse tokens per image",
        "model.head.num_prototypes 16384": "clusters of the assignment",
        "model.mask_ratio 0.8": "share of patches that masked views hide",
        "model.prior null": "what the encoder starts from: MAE, DINO, timm:NAME, ...",
        "model.weights null": "STELLAR weights to go on from, with decoder and heads",
        "model.teacher_momentum null": "momentum of a teacher, for random weights",
    },
    "Optimisation": {
        "trainer.max_epochs 150": "passes over the images; -1 for no limit",
        "trainer.max_steps -1": "optimiser steps; -1 for no limit",
        "model.lr 0.00015": "learning rate",
        "model.lr_scaling none": "how it follows the global batch: none, sqrt, linear",
        "model.warmup_fraction 0.1": "share of steps in which it rises",
        "model.min_lr 1e-06": "where its cosine ends",
        "model.weight_decay 0.04": "of matrices",
        "trainer.gradient_clip_val 3.0": "largest norm of the gradient",
        "trainer.accumulate_grad_batches 1": "batches per optimiser step",
    },
    "Machine": {
        "trainer.devices auto": "number of GPUs or processes",
        "trainer.num_nodes 1": "number of machines",
        "trainer.accelerator auto": "cpu, gpu, ...",
        "trainer.precision bf16-mixed": "16-mixed, 32-true, ...",
        "model.compile auto": "compile the transformer blocks: true, false, auto",
        "model.grad_checkpointing": "compute blocks twice: less memory, slower",
    },
}
_COLUMN = 36


def pretrain_help() -> str:
    """The help of `stellar pretrain`: options by group, with their defaults."""
    lines = [
        "usage: stellar pretrain --config vit_base --data.path FOLDER --output RUN",
        "       stellar pretrain ... --resume",
        "       stellar pretrain --from-run RUN --output NEW",
    ]
    for group, options in OPTIONS.items():
        lines += ["", f"{group}:"]
        for name, purpose in options.items():
            lines += _shown(f"  --{name}", purpose)
    lines += ["", "Each is shown with its default. `--help-all` lists every option;"]
    lines += ["`--debug` shows where an error happened."]
    return "\n".join(lines)


def _shown(option: str, purpose: str) -> list[str]:
    text = textwrap.indent(textwrap.fill(purpose, 88 - _COLUMN), " " * _COLUMN)
    if len(option) < _COLUMN:
        return [option + text[len(option) :]]
    return [option, text]
