"""Which collectives does a training step of several processes make, and how large?

Runs `stellar pretrain` in two gloo processes on a CPU and lists what a step exchanges,
from the profiler of torch, which sees those of DDP too. By the sizes that follow from
the model it tells where each comes from; what it cannot tell is "not known".

    python -m benchmarks.collectives
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback
from torch.profiler import ProfilerActivity, profile

from benchmarks.launch import train_together, write_noise
from lightly_ext.pretrain.checkpoints import RunCheckpoint

NAME = re.compile(r"gloo:(\w+)$")
BATCH = 2
# Steps of the optimiser that are looked at, by what is said of them.
STEPS = {"not logged": 3, "logged": 4}
# So that no epoch ends in them.
NUM_IMAGES = 8 * 2 * BATCH
NUM_TERMS = 9  # of the loss, its total included
RESULT = "collectives.json"
# A small ViT with heads, and views, as small as they can be.
OPTIONS = (
    "--model.model.model_name=stellar_vit_tiny_patch16_224",
    "--model.model.img_size=32",
    "--model.model.embed_dim=24",
    "--model.model.depth=1",
    "--model.model.num_heads=2",
    "--model.model.decoder_dim=16",
    "--model.model.decoder_depth=1",
    "--model.model.decoder_num_heads=2",
    "--model.head.num_prototypes=48",
    "--model.mask_ratio=0.5",
    "--model.augment={gaussian_blur: 0.0}",
    "--data.transform={class_path: STELLARTransform, init_args: "
    "{global_crop_size: 32, local_crop_size: 16}}",
    f"--data.batch_size={BATCH}",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=6",
    "--trainer.log_every_n_steps=4",
    "--trainer.enable_progress_bar=false",
    f"--trainer.callbacks=[{__name__}.Look]",
)

Shape = tuple[str, tuple[int, ...]]


class Row(NamedTuple):
    """Collectives of a kind in a step."""

    step: str
    name: str
    source: str
    number: int
    num_bytes: int


class Look(Callback):
    """Profiles steps, from the start of one to that of the next, and writes a file."""

    def __init__(self) -> None:
        self._profile: Any = None
        self._found: dict[str, list[tuple[str, Any]]] = {}

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Ends the profile of the step before, and begins the next."""
        saves = next(c for c in trainer.callbacks if isinstance(c, RunCheckpoint))
        if saves._agreement._work is not None:
            saves._agreement._work.wait()  # it runs beside the next step else
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            step = next(k for k, n in STEPS.items() if n == trainer.global_step)
            events = self._profile.events()
            self._found[step] = [
                (match[1], (event.input_shapes or [[]])[0])
                for event in events
                if (match := NAME.match(event.name))
            ]
            self._profile = None
        if trainer.global_step + 1 in STEPS.values():
            activities = [ProfilerActivity.CPU]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes what was found, and the sizes that it is compared with."""
        if not trainer.is_global_zero:
            return
        head = pl_module.sparse_head.prototypes
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        sizes = {
            "gradients": sum(p.numel() for p in trained),
            "buffers": sum(b.numel() for b in pl_module.buffers()),
            "prototypes": head.out_features,
        }
        content = {"found": self._found, "sizes": sizes}
        path = Path(trainer.default_root_dir) / RESULT
        path.write_text(json.dumps(content))


def sources(found: Sequence[Shape], sizes: dict[str, int]) -> list[tuple[str, int]]:
    """Where collectives come from, and their bytes.

    Args:
        found: Name of each, and shape of what it exchanges.
        sizes: Trained weights, buffers and prototypes of a head.
    """
    known = {
        ("broadcast", (sizes["buffers"],)): ("DDP: buffers", 4),
        ("all_reduce", (sizes["prototypes"],)): ("Sinkhorn: columns", 4),
        ("all_reduce", (NUM_TERMS,)): ("logged terms of the loss", 4),
        ("all_reduce", ()): ("is all finite", 4),
        ("all_reduce", (1,)): ("signals and saves", 8),
    }
    rest = [shape for name, shape in found if (name, shape) not in known]
    # DDP's buckets: all weights together.
    whole = sum(math.prod(shape) for shape in rest) == sizes["gradients"]
    others = ("DDP: gradients" if whole else "not known", 4)
    told = [known.get(each, others) for each in found]
    return [
        (source, width * math.prod(shape))
        for (source, width), (_, shape) in zip(told, found, strict=True)
    ]


def measure(folder: Path) -> list[Row]:
    """Runs a training and counts.

    Args:
        folder: Empty folder, for images and the run.
    """
    images = write_noise(folder / "images", NUM_IMAGES, 40)
    output = folder / "run"
    train_together([*OPTIONS, f"--data.path={images}", f"--output={output}"], 2)
    content = json.loads((output / RESULT).read_text())
    rows = []
    for step, events in content["found"].items():
        found = [(name, tuple(shape)) for name, shape in events]
        counts: Counter[tuple[str, str]] = Counter()
        num_bytes: Counter[tuple[str, str]] = Counter()
        told = sources(found, content["sizes"])
        for (name, _), (source, size) in zip(found, told, strict=True):
            counts[name, source] += 1
            num_bytes[name, source] += size
        rows += [Row(step, *key, counts[key], num_bytes[key]) for key in counts]
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    print("| step | collective | from | number | bytes |\n|" + 5 * " --- |")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
