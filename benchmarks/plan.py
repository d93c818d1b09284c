"""What would a training on 8 to 256 GPUs take? On paper.

Arithmetic on measured constants, whose sources stand beside them; nothing here was run
on more than one GPU. The tables are those of docs/multi_node.md.

    python benchmarks/plan.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPUS = (8, 16, 64, 256)
GPUS_OF_A_MACHINE = 8
BATCH = 128
QUERIES = 16
PROTOTYPES = 16384
JPEG_BYTES = 110e3  # a photo of ImageNet
LOADER_MS = 4.5  # of one core, a photo of 500 x 375 to views: docs/performance.md
NAME_BYTES = 42  # names of 32 characters in one piece, ends, states: in every process
LISTING_BYTES = 182  # the same while a folder is listed
# Assumptions, to be replaced by what `all_reduce_perf` of nccl-tests shows.
BANDWIDTH = {True: 300e9, False: 40e9}  # bytes/s of a GPU: one machine, 400 Gb/s each
LATENCY = 10e-6  # seconds of a stage of a tree
# Two heads, of which each needs the largest entry of a column and three sums.
SINKHORN_COLLECTIVES = 2 * (1 + 3)
LIMIT = 0.03  # of a step


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        name: Name.
        images_per_s: Images per second of one H100, docs/performance.md.
        parameters: Weights that are trained.
        epochs: Epochs of the paper.
    """

    name: str
    images_per_s: float
    parameters: int
    epochs: int

    @property
    def step_seconds(self) -> float:
        """Time of a step of one GPU."""
        return BATCH / self.images_per_s


MODELS = (
    Model("ViT-B", 494, 119_281_155, 150),
    Model("ViT-L", 145, 338_885_635, 100),
)
IMAGES = {"1.28 M": 1_281_167, "1 billion": 1_000_000_000}


def ring_seconds(size: float, gpus: int) -> float:
    """Time of an all-reduce of so many bytes that nothing hides."""
    bandwidth = BANDWIDTH[gpus <= GPUS_OF_A_MACHINE]
    return 2 * (gpus - 1) / gpus * size / bandwidth


def sinkhorn_seconds(gpus: int) -> float:
    """Time of the collectives of both heads' balance in a step."""
    stages = 2 * math.ceil(math.log2(gpus))  # up the tree and down
    each = stages * LATENCY + ring_seconds(4 * PROTOTYPES, gpus)
    return SINKHORN_COLLECTIVES * each


def latency_at_limit(model: Model, gpus: int) -> float:
    """Seconds of a stage at which they would take more than 3 % of a step."""
    stages = 2 * math.ceil(math.log2(gpus))
    each = LIMIT * model.step_seconds / SINKHORN_COLLECTIVES
    return (each - ring_seconds(4 * PROTOTYPES, gpus)) / stages


def hours(model: Model, images: int, epochs: int, gpus: int) -> float:
    """Time of a training, if nothing but the steps takes any."""
    return images * epochs / (model.images_per_s * gpus) / 3600


def training_table() -> str:
    """Time, storage and cores by model and GPUs."""
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            rate = model.images_per_s * gpus
            storage = rate * JPEG_BYTES / 1e9
            small, large = IMAGES.values()
            rows.append(
                f"| {model.name}, {gpus} | {BATCH * gpus} | {rate:,.0f} | "
                f"{hours(model, small, model.epochs, gpus):,.1f} | "
                f"{hours(model, large, 1, gpus):,.1f} | {storage:.2f} | "
                f"{rate * LOADER_MS / 1000:,.0f} |"
            )
    head = (
        "| model, GPUs | global batch | images/s | hours, 1.28 M, all epochs | hours, "
        "1 billion, once | storage, GB/s | CPU cores |"
    )
    return "\n".join([head, "|" + 7 * " --- |", *rows])


def exchange_table() -> str:
    """What processes exchange in a step, by model and GPUs."""
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            gradients = ring_seconds(4 * model.parameters, gpus)
            sinkhorn, step = sinkhorn_seconds(gpus), model.step_seconds
            rows.append(
                f"| {model.name}, {gpus} | {step * 1000:.0f} | "
                f"{gradients * 1000:.1f} ({gradients / step:.1%}) | "
                f"{sinkhorn * 1000:.2f} ({sinkhorn / step:.2%}) | "
                f"{latency_at_limit(model, gpus) * 1e6:.0f} |"
            )
    head = (
        "| model, GPUs | step, ms | gradients, ms | Sinkhorn's collectives, ms | stage "
        "at which these are 3 %, us |"
    )
    return "\n".join([head, "|" + 5 * " --- |", *rows])


def memory_table() -> str:
    """Memory of names and of Sinkhorn."""
    rows = [
        f"| names of {name} images, each process | {count * NAME_BYTES / 1e9:.2f} GB, "
        f"{count * LISTING_BYTES / 1e9:.2f} while a folder is listed |"
        for name, count in IMAGES.items()
    ]
    own = BATCH * QUERIES * PROTOTYPES * 4
    rows += [
        f"| logits of Sinkhorn, sparse head, each GPU | {own / 1e6:.0f} MB |",
        f"| the same of {GPUS[-1]} GPUs, which exists nowhere | "
        f"{own * GPUS[-1] / 1e9:.1f} GB |",
    ]
    return "\n".join(["| what | memory |", "| --- | --- |", *rows])


def main() -> None:
    print("\n\n".join([training_table(), exchange_table(), memory_table()]))


if __name__ == "__main__":
    main()
