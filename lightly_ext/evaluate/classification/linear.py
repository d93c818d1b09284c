"""Linear probes: a grid of heads on frozen features, chosen on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch

from lightly_ext.data import epoch_order
from lightly_ext.evaluate.classification.guesses import (
    Guesses,
    best_guesses,
    collect_guesses,
)
from lightly_ext.evaluate.classification.probe_data import (
    BLOCK,
    Block,
    FeatureRows,
    ViewFeatures,
    cached_rows,
)
from lightly_ext.evaluate.classification.probe_heads import HeadOptions, ProbeHeads
from lightly_ext.evaluate.classification.probe_training import ProbeTraining
from lightly_ext.evaluate.classification.split import (
    Split,
    label_chance,
    split_set,
)
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import FeatureCache
from lightly_ext.evaluate.frozen_model import FrozenModel, check_feature_name
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.reduction import reduce_sum
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.training import fitting_batch
from stellar_plugin.protocols import (
    LINEAR,
    LINEAR_PAPER,
    ClassifierProtocol,
    RandomCropProtocol,
)


def check_linear(
    results: Results,
    data: str,
    features: str,
    epochs: int | None,
    lrs: list[float] | None,
    batch_sizes: list[int] | None,
) -> Split:
    """Checks the options and finds the data set; see `Results.required`."""
    check_feature_name(features)
    _check_options(**_fields(epochs, lrs, batch_sizes))
    return split_set(results.devices, data, results.limit)


@evaluation
def run_linear(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    features: str = "auto",
    epochs: int | None = None,
    lrs: list[float] | None = None,
    batch_sizes: list[int] | None = None,
    protocol: ClassifierProtocol = LINEAR,
) -> Result:
    """Linear probe on frozen features.

    These are of centre crops and computed once, or, as in the paper, of augmented views
    that are encoded anew in every epoch; held-out and test images are centre crops.

    Every learning rate is trained with every batch size on 90 % of the training set;
    the head with the best accuracy on the other 10 % is tested, as it is. Of equal
    heads the one with the smaller batch size, then with the lower learning rate.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder with `train` and `val` or `test`, each with a folder of images per
            class, or of labelled tars or parquet; hf:NAME of the hub; or the name of a
            known set.
        features:
            "auto", where the objective of the method acts, or one of sparse, dense,
            cls, cls+dense and lowrank.
        epochs:
            Passes over the training images, instead of the protocol's 30.
        lrs:
            Learning rates to choose from, instead of the protocol's, as in
            "[0.001,0.01]".
        batch_sizes:
            Batch sizes to choose from, instead of the protocol's; all divide the
            largest. Those that the training set cannot fill are left out.
        protocol:
            Says which of the two; views where it cuts at random.

    Returns:
        The result, which is stored too.

    Raises:
        ValueError: If an option or the data set does not allow to train.
        RuntimeError: If too many images are unreadable, or features are not finite.
    """
    split = results.required(check_linear)
    protocol = results.protocol(
        model,
        protocol,
        data=split.data.name,
        features=features,
        **_fields(epochs, lrs, batch_sizes),
    )
    if isinstance(protocol, RandomCropProtocol):
        protocol = protocol.replace(train_scale=split.data.train_scale)
    protocol, grid = _grid(devices, protocol, len(split.kept))
    feature = model.resolve_feature(features)
    results.announce(model, protocol)
    cache = FeatureCache(model, devices, results.contents)
    files = split.data.train
    digest = results.fingerprint(files, split.data.test)
    run = _Run(cache, results, protocol, split, feature, grid, digest)
    if isinstance(protocol, RandomCropProtocol):
        kept, held_out = (files[i.tolist()] for i in (split.kept, split.held_out))
        views = ViewFeatures(model, devices, kept, protocol, feature)
        rows = cached_rows(cache, held_out, protocol, feature)
        return _probe(run, lambda epoch: views.blocks(epoch, run.block), rows)
    cached = cached_rows(cache, files, protocol, feature)
    rows = cached.among(split.kept)

    def blocks(epoch: int) -> Iterable[Block]:
        return rows.blocks(run.block, epoch_order(len(rows), devices.seed, epoch))

    return _probe(run, blocks, cached.among(split.held_out))


# The command line reads names and documentation.
run_linear_paper = update_wrapper(
    partial(run_linear, protocol=LINEAR_PAPER), run_linear
)
check_linear_paper = check_linear


@dataclass(frozen=True)
class _Run:
    """A probe that is ready to start.

    Attributes:
        cache: Features of the model, on the devices.
        results: Where results are kept.
        protocol: As it is run.
        split: The images.
        feature: What the heads read, never "auto".
        grid: Options of the heads, by batch size, then by learning rate.
        fingerprint: Of the images.
    """

    cache: FeatureCache
    results: Results
    protocol: ClassifierProtocol
    split: Split
    feature: str
    grid: list[HeadOptions]
    fingerprint: str

    @property
    def block(self) -> int:
        """Images that are loaded at once: whole batches of every size."""
        largest = self.grid[-1].batch_size
        return largest * max(1, BLOCK // largest)

    def result(
        self, scores: dict[str, Any], chance: dict[str, float], **provenance: Any
    ) -> Result:
        """The result of the run."""
        return self.results.result(
            self.cache.model,
            self.protocol.name,
            self.split.data.name,
            self.protocol,
            scores,
            {"data": self.fingerprint},
            chance,
            feature=self.feature,
            **provenance,
        )


def _fields(
    epochs: int | None, lrs: list[float] | None, batch_sizes: list[int] | None
) -> dict[str, Any]:
    """Fields of a protocol that options change, None where they do not."""
    return {
        "epochs": epochs,
        "lrs": None if lrs is None else tuple(sorted(set(lrs))),
        "batch_sizes": None if batch_sizes is None else tuple(sorted(set(batch_sizes))),
    }


def _check_options(
    epochs: int | None,
    lrs: tuple[float, ...] | None,
    batch_sizes: tuple[int, ...] | None,
) -> None:
    check_positive(epochs=epochs)
    for name, values in (("lrs", lrs), ("batch_sizes", batch_sizes)):
        if values == ():
            raise ValueError(f"{name} needs at least one value, got none.")
    if lrs and not all(0 < lr < math.inf for lr in lrs):
        raise ValueError(f"lrs must be positive, got {lrs}.")
    sizes = batch_sizes
    if sizes and (sizes[0] < 1 or any(sizes[-1] % size for size in sizes)):
        raise ValueError(
            f"batch_sizes must be positive and divide the largest, got {sizes}."
        )


def _grid(
    devices: Devices, protocol: ClassifierProtocol, num_images: int
) -> tuple[ClassifierProtocol, list[HeadOptions]]:
    """The heads whose batches the training set can fill, at least one of each lr."""
    if min(protocol.batch_sizes) > num_images:
        size = fitting_batch(devices, min(protocol.batch_sizes), num_images, 1)
        protocol = protocol.replace(batch_sizes=(size,))
    too_large = [size for size in protocol.batch_sizes if size > num_images]
    if too_large:
        devices.say(
            f"Left out: batch sizes {', '.join(map(str, too_large))}, more than the "
            f"{num_images} images to train on."
        )
    sizes = [size for size in protocol.batch_sizes if size <= num_images]
    return protocol, [HeadOptions(size, lr) for size in sizes for lr in protocol.lrs]


def _probe(
    run: _Run, blocks: Callable[[int], Iterable[Block]], held_out: FeatureRows
) -> Result:
    """Trains the grid, chooses a head and tests it."""
    devices, protocol = run.cache.devices, run.protocol
    if not len(held_out):
        raise ValueError("None of the held-out images is readable: repair them.")
    test = cached_rows(run.cache, run.split.data.test, protocol, run.feature)
    heads = ProbeHeads(
        run.grid,
        held_out.dim,
        run.split.num_classes,
        protocol.weight_decay,
        protocol.clip,
        devices.seed,
        range(devices.rank, len(run.grid), devices.world_size),
        devices.device,
    )
    folder = run.results.folder(run.result({}, {}))
    training = ProbeTraining(devices, heads, folder)
    num_blocks = math.ceil(len(run.split.kept) / run.block)
    history = training.run(blocks, num_blocks, held_out, protocol.epochs)
    held_out_accuracies = history[-1]["held_out"]
    # The first of equal ones.
    best = held_out_accuracies.index(max(held_out_accuracies))
    guesses = _test(devices, heads, best, test, run.split.data.test)
    result = run.result(
        {**guesses.scores, "num_test": len(test)},
        label_chance(
            run.split.data.train.label_tensor[run.split.kept],
            guesses.labels,
            run.split.num_classes,
        ),
        num_train=history[-1]["num_images"],
        num_held_out=len(held_out),
        num_reused=held_out.num_reused + test.num_reused,
        unreadable={
            "train": len(run.split.kept) - history[-1]["num_images"],
            "held_out": len(run.split.held_out) - len(held_out),
            "test": len(run.split.data.test) - len(test),
        },
        **_choice(run, held_out_accuracies, best),
    )
    if devices.rank == 0:
        guesses.save(run.results.folder(result))
    run.results.save(result)
    training.finish()
    return result


def _test(
    devices: Devices, heads: ProbeHeads, best: int, test: FeatureRows, files: ImageFiles
) -> Guesses:
    """Guesses of a head, to which every process contributes a share of the images."""
    head = heads.module(best)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(reduce_sum(devices, parameter))
        share = torch.arange(devices.rank, len(test), devices.world_size)
        blocks = zip(
            test.rows[share].split(BLOCK), test.blocks(order=share), strict=True
        )
        found = [(numbers, best_guesses(head(x))) for numbers, (x, _) in blocks]
    return collect_guesses(devices, files, found)


def _choice(run: _Run, accuracies: Sequence[float], best: int) -> dict[str, Any]:
    """What was chosen among what, and whether it lies at the border of the grid."""
    table: dict[str, dict[str, float]] = {}
    for (batch_size, lr), accuracy in zip(run.grid, accuracies, strict=True):
        table.setdefault(str(batch_size), {})[f"{lr:g}"] = accuracy
    chosen = run.grid[best]
    notes = []
    equal = accuracies.count(accuracies[best])
    if equal > 1:
        notes.append(
            f"{equal} of {len(run.grid)} heads are equally good on the held-out "
            "images: the first is taken, and another may differ on the test images."
        )
    for name in HeadOptions._fields:
        values = sorted({getattr(options, name) for options in run.grid})
        value = getattr(chosen, name)
        if len(values) > 1 and value in (values[0], values[-1]):
            notes.append(
                f"The best {name}, {value:g}, lies at the border of {values}: a wider "
                "grid may have a better one."
            )
    for note in notes:
        run.cache.devices.say(note)
    return {
        "chosen_batch_size": chosen.batch_size,
        "chosen_lr": chosen.lr,
        "held_out_accuracy": accuracies[best],
        "held_out_accuracies": table,
        "notes": notes,
    }
