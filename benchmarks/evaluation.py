r"""Does evaluation keep up: features as fast as the encoder, neighbours within memory?

`features` computes, in turn, in one process:

- encoder: its forward passes alone, over the same images in memory, normalised
- features: the code of `stellar evaluate`, from image files to features in files, with
  readers, hashes and checks

Of each the seconds of the clock, and those of all processors, which other processes on
the machine hardly change. `knn` finds the neighbours of queries among a slice of a
training set as large as ImageNet's, and says what all of it takes.

    python -m benchmarks.evaluation features --data FOLDER --images 256
    python -m benchmarks.evaluation features --data FOLDER --device cuda --bf16 \
        --batch-size 256 --images 20000 --model vit_base_patch16_224
    python -m benchmarks.evaluation knn
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.measure import median_ms, random_tokens, synchronize
from benchmarks.search.build import Seconds, timed
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import POOLED, FeatureCache
from lightly_ext.evaluate.fingerprints import Contents
from lightly_ext.evaluate.images import EvaluationImages, centre_crop, folder_images
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.metrics import Voters
from lightly_ext.metrics.knn import BYTES_AT_ONCE
from stellar_plugin.protocols import KNN

TRAIN, QUERIES, CLASSES = 1_281_167, 50_000, 1000


def measure_features(arguments: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Seconds of each round, by "encoder" and "features", for all images."""
    devices = Devices(
        arguments.batch_size,
        arguments.num_workers,
        accelerator=arguments.device,
        precision="bf16-mixed" if arguments.bf16 else "32-true",
    )
    model = load_frozen_model(f"timm:{arguments.model}", untrained=True)
    model = model.to(devices.device)
    side = (model.origin.image_size or (KNN.crop,))[0]
    protocol = KNN.replace(crop=side, resize=round(side * KNN.resize / KNN.crop))
    files = folder_images(arguments.data).limited(arguments.images)
    images = EvaluationImages(files, centre_crop(protocol, model.origin.interpolation))
    batches = [
        model.normalize(devices.fabric.to_device(batch.image))
        for batch in devices.loader(images)
    ]

    def encode() -> None:
        with torch.no_grad(), devices.fabric.autocast():
            for batch in batches:
                model.backbone(batch)
        synchronize(devices.device.type)

    times: dict[str, list[Seconds]] = {"encoder": [], "features": []}
    encode()
    for _ in range(arguments.rounds):
        times["encoder"].append(timed(encode))
        with tempfile.TemporaryDirectory() as folder:
            cache = FeatureCache(model, devices, Contents(devices, Path(folder)))
            times["features"].append(
                timed(lambda c=cache: c.pooled(files, protocol, "cls").rows(POOLED))  # type: ignore[misc]
            )
    print("| what | images/s | processor-ms per image |\n|---|---|---|")
    for name, values in times.items():
        clock, processors = (statistics.median(v) for v in zip(*values, strict=True))
        speed, cost = len(files) / clock, 1000 * processors / len(files)
        print(f"| {name} | {speed:.1f} | {cost:.1f} |")
    by_clock, by_processors = (
        statistics.median(a[i] / b[i] for a, b in zip(*times.values(), strict=True))
        for i in (0, 1)
    )
    print(
        f"\nFeatures at {by_clock:.0%} of the encoder's own speed (by processor time "
        f"{by_processors:.0%}), {torch.get_num_threads()} threads, "
        f"{devices.num_workers} readers."
    )
    return times


def measure_knn(arguments: argparse.Namespace) -> float:
    """Queries per second among a slice, printed beside what all of ImageNet takes."""
    device, dim, size = arguments.device, arguments.dim, arguments.train
    train = random_tokens(size, dim, device=device)
    labels = torch.randint(CLASSES, (size,), device=device)
    queries = random_tokens(arguments.queries, dim, device=device)
    voters = Voters(train, labels, KNN.neighbours, KNN.temperature)

    def vote() -> list[Tensor]:
        return [voters.classes(part) for part in queries.split(voters.rows_at_once)]

    seconds = median_ms(vote, device, arguments.rounds, warm_up=1) / 1000
    found = arguments.queries / seconds
    pairs = arguments.queries * size / seconds
    print(
        f"{arguments.queries} queries x {size} of {dim} numbers, {device}, "
        f"{torch.get_num_threads()} threads: {found:.0f} queries/s.\n"
        f"At that speed {QUERIES} x {TRAIN} take {QUERIES * TRAIN / pairs:.0f} s, and "
        f"{knn_gib(TRAIN, dim):.1f} GiB."
    )
    return found


def knn_gib(size: int, dim: int) -> float:
    """GiB that kNN takes: features, their offsets, and what is computed at once."""
    return (2 * 4 * size * dim + 2 * BYTES_AT_ONCE) / 2**30


def main(argv: list[str] | None = None) -> None:
    """Prints a table or a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    features = commands.add_parser("features")
    features.add_argument("--data", required=True, help="folder of photos")
    features.add_argument("--model", default="vit_small_patch16_224")
    features.add_argument("--images", type=int, default=256)
    features.add_argument("--batch-size", type=int, default=64)
    features.add_argument("--num-workers", type=int)
    features.add_argument("--bf16", action="store_true")
    features.set_defaults(run=measure_features)
    knn = commands.add_parser("knn")
    knn.add_argument("--train", type=int, default=128_000)
    knn.add_argument("--queries", type=int, default=2000)
    knn.add_argument("--dim", type=int, default=768)
    knn.set_defaults(run=measure_knn)
    for command in (features, knn):
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        command.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
