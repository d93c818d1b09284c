"""What of README and docs is not run, what is put behind a command, and why."""

from __future__ import annotations

import re

from tests.snippets.files import HEAD, MODEL, SIDE

# Commands that are not run (their options are parsed all the same), and why.
NOT_RUN = {
    r"pip install .*": "changes the environment; that there are its extras is checked",
    r"make .*": "takes minutes; that there is its target is checked",
    r"sbatch .*|torchrun .*": "needs machines: pretrain/test_several_machines.py",
    r"stellar pretrain .* --trainer.devices 8.*": "needs eight GPUs",
    r"docker run .*": "needs Docker",
    r"pytest .*": "runs tests, as this one is",
    r"embedding-atlas .*": "the program of another package, which does not end",
    r"stellar evaluate TASK .*": "shows the form of commands",
    r"stellar demo.*": "takes minutes: lightly_ext/demo",
    r".* runs/figures/.*": "needs photos of scikit-image: docs/test_figures.py",
}
# Not parsed either: a form, with words that stand for others.
FORMS = r"stellar evaluate TASK .*|stellar try .*"

_BACKBONE = {k: v for k, v in MODEL.items() if not k.startswith("decoder")}
_PARTS = ("train", "val", "test")
# Commands, what is put behind them, and why.
APPENDED: list[tuple[str, list[str], str]] = [
    (
        r"stellar pretrain (?!.*config.yaml)",
        [
            *(f"--model.model.{name}={value}" for name, value in MODEL.items()),
            *(f"--model.head.{name}={value}" for name, value in HEAD.items()),
            f"--data.transform={{class_path: STELLARTransform, init_args: "
            f"{{global_crop_size: {SIDE}, local_crop_size: {SIDE // 2}}}}}",
            # The kernel of the blur is larger than these views.
            "--model.augment={gaussian_blur: 0.0}",
            *("--data.batch_size=4", "--data.num_workers=0"),
            *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
        ],
        "a model and views that take seconds, without GPU",
    ),
    (r"stellar pretrain (?!.*--resume)", ["--trainer.max_steps=2"], "two steps"),
    (r"stellar pretrain .*--resume", ["--trainer.max_steps=3"], "one more"),
    (
        r"stellar (evaluate|visualize|atlas|index) .*--model",
        ["--accelerator=cpu", "--batch_size=8", "--num_workers=0"],
        "without GPU and processes that load",
    ),
    (
        r"stellar (evaluate|visualize|atlas) .*--model (?!.* --crop)",
        [f"--resize={SIDE}", f"--crop={SIDE}"],
        "small images",
    ),
    (
        r"stellar (evaluate|visualize|atlas) .*--model",
        ["--controls=false"],
        "no second, untrained model",
    ),
    (r".* --model timm:", ["--untrained"], "weights of the hub are not here"),
    (r"stellar evaluate linear ", ["--epochs=1"], "one epoch"),
    (
        r"mim (train|test) ",
        [
            *(f"model.backbone.{name}={value}" for name, value in _BACKBONE.items()),
            f"model.decode_head.in_channels={MODEL['embed_dim']}",
            *(f"{part}_dataloader.num_workers=0" for part in _PARTS),
            *(f"{part}_dataloader.persistent_workers=False" for part in _PARTS),
            "train_dataloader.batch_size=2",
            "train_cfg.val_interval=2",
            "default_hooks.checkpoint.interval=2",
        ],
        "the size of the checkpoint, and few images",
    ),
    (r"mim train (?!.*--resume)", ["train_cfg.max_iters=2"], "two steps"),
    (r"mim train .*--resume", ["train_cfg.max_iters=4"], "two more"),
]


def reason_not_to_run(text: str) -> str:
    """Why a command is not run, empty for one that is."""
    reasons = (why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, text))
    return next(reasons, "")


def appended(text: str) -> list[str]:
    """What is put behind a command."""
    return [
        w for pattern, words, _ in APPENDED for w in words if re.match(pattern, text)
    ]
