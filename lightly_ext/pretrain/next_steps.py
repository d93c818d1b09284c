"""What to type after a pretraining."""

from __future__ import annotations

import shlex
from pathlib import Path

from lightly_ext.data import StellarDataModule


def next_steps(output: Path, data: StellarDataModule, method: str) -> dict[str, str]:
    """Commands that use the model of a run.

    Args:
        output:
            Folder of the run.
        data:
            What it was trained on.
        method:
            By what, see `Pretraining.METHOD`.

    Returns:
        Command by its purpose. FOLDER in it is for the user to fill in.
    """
    model = shlex.quote(str(output / "model"))
    file = shlex.quote(str(output / "timm.safetensors"))
    images = shlex.quote(str(data.path))
    labelled = _labelled(data.knn_paths)
    first = {"look at it": f"stellar visualize --model {model} --data {images}"}
    if method == "mae":
        after = shlex.quote(f"{output}_stellar")
        first = {
            "train STELLAR from it": f"stellar pretrain --config photos --data.path "
            f"{images} --model.prior {model} --output {after}"
        }
    return {
        **first,
        "measure it"
        + ("" if labelled else ", FOLDER having train/CLASS and val/CLASS"): (
            f"stellar evaluate knn --model {model} --data {labelled or 'FOLDER'}"
        ),
        "use it in timm": f"stellar convert {model} {file} --to timm",
    }


def _labelled(folders: list[Path]) -> str | None:
    """The folder of bank and queries, where evaluation finds them too."""
    parents = {folder.parent for folder in folders}
    names = [folder.name for folder in folders]
    if len(parents) == 1 and names in (["train", "val"], ["train", "test"]):
        return shlex.quote(str(parents.pop()))
    return None
