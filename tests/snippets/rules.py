"""What of README and docs is not run, what is put behind a command, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tests.snippets.files import HEAD, MODEL, SIDE

# Commands that are not run (their options are parsed all the same), and why.
NOT_RUN = {
    r"pip install .*": "changes the environment; that there are its extras is checked",
    r"make .*": "takes minutes; that there is its target is checked",
    r"(python -m )?pytest .*": "runs tests, as this one is",
    r"(cd|git|python -m (build|venv))( .*)?": "a release: tests/test_packaging.py",
    r"sbatch .*|torchrun .*": "needs machines: pretrain/test_several_machines.py",
    r"stellar .* -?-?(trainer\.)?devices 8.*": "needs eight GPUs",
    r"docker .*|id .*": "needs Docker",
    r"stellar .* --server .*": "needs a server: search/test_server_commands.py",
    r"embedding-atlas .*": "the program of another package, which does not end",
    r"stellar demo.*": "takes minutes: lightly_ext/demo",
    r".* runs/figures/.*": "needs photos of scikit-image: docs/test_figures.py",
    r"stellar try .*": "takes minutes: lightly_ext/quick_start",
    r"stellar evaluate TASK .*": "shows the form of commands",
    r".* hf:ORG/NAME.*": "needs the hub: lightly_ext/data/streams",
    r".* --data.path saved": "needs `datasets`, which is slow: data/streams",
    r".*imagenet_shards": "1000 classes in shards: data/streams",
    r".* (timm:vit_|facebook/).*": "weights of the hub: evaluate/test_ways_in.py",
    r"stellar pretrain --config random_stage.*": "pretrain/test_random_prior.py",
    r"stellar evaluate align-text .*": "a text tower of the hub: evaluate/text",
    r"stellar evaluate .* --form .*": "trains decoders: evaluate/reconstruction",
    r"stellar evaluate .* (cocostuff27|cityscapes27).*": "evaluate/dense",
    r"stellar evaluate discover .* coco/.*": "evaluate/discovery",
    r"stellar evaluate reconstruction .* (stellar-h16|tokenizer_titok|dino.pth).*": (
        "files of the size that they are published in: evaluate/reconstruction"
    ),
    r"stellar evaluate efficiency .*": "takes its time: evaluate/test_efficiency.py",
    r"stellar evaluate rank .*": "reconstructs ImageNet: evaluate/probing/test_rank.py",
    r"mim .* (?!--).*(paper|finetune|own_data|my_data|mae|dino|dinov2)\S*.*": (
        "as the configs of STELLAR that are run, with others: tests/mm_configs"
    ),
    r"mim train mmseg (mm_configs/stellar_ade20k.py|/.*)": (
        "as the README's: with released weights, or by a path of `stellar configs`"
    ),
    r"stellar report .*work_dirs\b.*": "results of mmseg: mmseg/test_commands.py",
    r"python (-m )?benchmarks.*": "measures for minutes: tests/benchmarks",
    r"python -m tests\.parity_report": "half a minute: tests/test_parity.py",
}
# Code that is not run, by a line of it, and why.
CODE_NOT_RUN = {
    r"import faiss": "another package: search/test_export_docs.py",
    r"import lightly_studio .*": "another package: search/test_export_docs.py",
    r"from skimage import data": "another package's photos",
    r"from mmseg.apis import .*": "a trained head: tests/mm_configs/test_own_data.py",
    r"pretrained_cfg_overlay=dict\(file=\"checkpoint/.*": "a ViT-B: docs/use_timm.md",
    r"titok = TiTok\(\)": "of its published size: stellar_plugin/test_titok.py",
    r"tokenizer = MaskGITVQGAN.*": "a large file: stellar_plugin/test_tokenizer.py",
    r"export_onnx\(.*": "seconds: stellar_plugin/test_onnx.py",
    r"trainer.fit\(model, datamodule=data\)": "a run, as those of the commands",
}
# Not parsed either: a form, with words that stand for others.
FORMS = r"stellar evaluate TASK .*"

# Folders of a cluster, which tests have below the folder where commands run.
ABSOLUTE = r"(?<![\w.])/(datasets|shared)\b"
_BACKBONE = {k: v for k, v in MODEL.items() if not k.startswith("decoder")}
_PARTS = ("train", "val", "test")
# Commands, what is put behind them, and why.
APPENDED: list[tuple[str, list[str], str]] = [
    (
        r"stellar pretrain (?!.*(config.yaml|--config photos))",
        [
            *(f"--model.model.{name}={value}" for name, value in MODEL.items()),
            *(f"--model.head.{name}={value}" for name, value in HEAD.items()),
            f"--data.transform={{class_path: STELLARTransform, init_args: "
            f"{{global_crop_size: {SIDE}, local_crop_size: {SIDE // 2}}}}}",
            # The kernel of the blur is larger than these views.
            "--model.augment={gaussian_blur: 0.0}",
        ],
        "a model and views that take seconds",
    ),
    (
        r"stellar pretrain (?!.*config.yaml)",
        [
            *("--data.batch_size=4", "--data.num_workers=0"),
            *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
        ],
        "few photos, without GPU and processes that load",
    ),
    (r"stellar pretrain (?!.*--resume)", ["--trainer.max_steps=2"], "two steps"),
    (
        r"stellar pretrain .*shards/train-.*",
        ["--output=runs/second"],
        "not into the folder of the example above",
    ),
    (r"stellar pretrain .*photos.parquet", ["--output=runs/third"], "the same"),
    (r"stellar pretrain .*--resume", ["--trainer.max_steps=3"], "one more"),
    (
        r"stellar (evaluate|visualize|atlas|index) .*--model",
        ["--accelerator=cpu", "--batch_size=8", "--num_workers=0"],
        "without GPU and processes that load",
    ),
    (
        r"stellar (evaluate(?! eq)|visualize|atlas) .*--model (?!runs/demo|.* --crop)",
        [f"--resize={SIDE}", f"--crop={SIDE}"],
        "small images",
    ),
    (
        r"stellar (evaluate|visualize|atlas) .*--model",
        ["--controls=false"],
        "no second, untrained model",
    ),
    (r".* --model timm:", ["--untrained"], "weights of the hub are not here"),
    (
        r"stellar evaluate equivariance ",
        [f"--resize={SIDE + 32}", f"--crop={SIDE}"],
        "small images, with room for shifts",
    ),
    (r"stellar evaluate linear", ["--epochs=1"], "one epoch"),
    (r"stellar evaluate reconstruction ", ["--force"], "FID of few images"),
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


def small(words: Sequence[str]) -> list[str]:
    """A command with what is put behind it, below the folder where it runs."""
    text = " ".join(words)
    more = [
        w for pattern, behind, _ in APPENDED for w in behind if re.match(pattern, text)
    ]
    return [re.sub(ABSOLUTE, r"\1", word) for word in words] + more
