"""The tasks of `stellar evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stellar_cli.errors import OptionError, did_you_mean

# Module below `lightly_ext.evaluate` and purpose of each task, which is the function
# `run_TASK` there; imported only when the task runs. Beside it, `check_TASK` finds all
# that the task needs but the model, or raises: before a model is loaded, and an image
# read.
TASKS = {
    "knn": ("classification.knn", "k nearest neighbours of frozen features"),
    "linear": ("classification.linear", "linear probe on cached features"),
    "linear-paper": ("classification.linear", "linear probe on augmented views"),
    "finetune": ("classification.finetune", "the whole network, fine-tuned"),
    "reconstruction": (
        "reconstruction.reconstruction",
        "FID, LPIPS, PSNR, SSIM",
    ),
    "equivariance": ("probing.equivariance", "S and L under shifts"),
    "stability": ("probing.stability", "features under random crops"),
    "rank": ("probing.rank", "number of tokens against FID and accuracy"),
    "where": ("probing.where", "localization against ground-truth masks"),
    "in-context": ("dense.in_context", "segmentation by labelled patches"),
    "unsupervised-segmentation": (
        "dense.unsupervised",
        "clusters of patches matched to classes",
    ),
    "retrieval": ("retrieval.retrieval", "images that find images, and where"),
    "discover": ("discovery.discover", "objects: mBO, foreground ARI, CorLoc"),
    "efficiency": ("efficiency", "time of each part"),
    "align-text": ("text.align_text", "a probe towards a text tower"),
    "visualize": ("pictures.visualize", "localization, PCA, reconstruction"),
    "atlas": ("atlas.atlas", "what is in a folder of images, as a page to walk"),
    "report": ("report.report", "stored results as the paper's tables"),
}


def check_task(arguments: Sequence[str]) -> None:
    """Shows the tasks and ends the process, unless the first argument is one.

    Args:
        arguments:
            Arguments behind `stellar evaluate`.

    Raises:
        OptionError: If there is no such task.
    """
    if arguments and arguments[0] in TASKS:
        return
    if arguments and arguments[0] not in ("-h", "--help"):
        name = arguments[0]
        raise OptionError(f"There is no task '{name}'.{did_you_mean(name, TASKS)}")
    width = max(map(len, TASKS))
    text = "\n".join(f"  {name:{width}} {what}" for name, (_, what) in TASKS.items())
    print(f"usage: stellar evaluate TASK --model SOURCE ...\n\nTasks:\n{text}")
    print("\n`stellar evaluate TASK --help` lists the options of a task.")
    sys.exit(0 if arguments else 2)
