"""Fine-tuning: the whole network is trained to classify."""

from __future__ import annotations

import math
from pathlib import Path

from lightly_ext.evaluate.classification.finetune_module import (
    FineTuning,
    images_at_once,
)
from lightly_ext.evaluate.classification.split import Split, label_chance, split_set
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.features import say_unreadable
from lightly_ext.evaluate.frozen_model import FrozenModel, check_feature_name
from lightly_ext.evaluate.options import check_positive
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.training import (
    LAST_CHECKPOINT,
    fitting_batch,
    make_trainer,
)
from stellar_plugin.protocols import FINETUNE


def check_finetune(
    results: Results,
    data: str,
    features: str,
    epochs: int | None,
    lr: float | None,
    train_batch_size: int | None,
) -> Split:
    """Checks the options and finds the data set; see `Results.required`."""
    devices = results.devices
    check_feature_name(features)
    check_positive(epochs=epochs)
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive, got {lr}.")
    size = FINETUNE.batch_sizes[0] if train_batch_size is None else train_batch_size
    if size < 1 or size % devices.world_size:
        raise ValueError(
            f"train_batch_size must be positive and a multiple of the "
            f"{devices.world_size} device(s), got {size}."
        )
    return split_set(devices, data, results.limit)


@evaluation
def run_finetune(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    features: str = "auto",
    epochs: int | None = None,
    lr: float | None = None,
    train_batch_size: int | None = None,
    resume: bool = True,
) -> Result:
    """Fine-tunes the whole network on 90 % of the training set and tests it.

    The other 10 % are watched in the log and decide on nothing: the weights after the
    last epoch are tested.

    Args:
        model:
            What to start from.
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
            Passes over the training images, instead of the protocol's 75.
        lr:
            Learning rate, instead of the protocol's.
        train_batch_size:
            Images of all devices in an optimiser step, instead of the protocol's. A
            device computes `batch_size` of them at once, or somewhat less.
        resume:
            Continue the same run where it was interrupted; false starts it anew.

    Returns:
        The result, which is stored too, beside the log and the last checkpoint.

    Raises:
        ValueError: If an option or the data set does not allow to train.
        RuntimeError: If too many images are unreadable, or the loss is not finite.
    """
    split = results.required(check_finetune)
    batch_size = train_batch_size or FINETUNE.batch_sizes[0]
    protocol = results.protocol(
        model,
        FINETUNE,
        data=split.data.name,
        train_scale=split.data.train_scale,
        features=features,
        epochs=epochs,
        lrs=None if lr is None else (lr,),
        batch_sizes=(fitting_batch(devices, batch_size, len(split.kept)),),
    )
    feature = model.resolve_feature(features)
    results.announce(model, protocol)
    module = FineTuning(model, feature, protocol, devices, split).train()
    name = split.data.name
    inputs = {"data": results.fingerprint(split.data.train, split.data.test)}
    planned = results.result(model, "finetune", name, protocol, {}, inputs)
    _fit(module, results.folder(planned), resume)
    return _tested(model, results, module, inputs)


def _fit(module: FineTuning, folder: Path, resume: bool) -> None:
    devices, protocol = module.devices, module.protocol
    (batch_size,) = protocol.batch_sizes
    at_once = images_at_once(devices, batch_size)
    accumulate = batch_size // devices.world_size // at_once
    devices.say(
        f"A batch of {batch_size}: {at_once} images at once on {devices.world_size} "
        f"device(s), gradients of {accumulate} accumulated."
    )
    steps = len(module.train_dataloader()) // accumulate
    path = folder / LAST_CHECKPOINT
    trainer = make_trainer(
        devices,
        protocol,
        folder,
        sync_batchnorm=devices.world_size > 1 and devices.device.type == "cuda",
        accumulate_grad_batches=accumulate,
        log_every_n_steps=min(50, steps),
    )
    continued = resume and path.exists()
    if continued:
        devices.say(f"Continues the training in {folder}.")
    trainer.fit(module, ckpt_path=path if continued else None, weights_only=True)
    module.to(devices.device)  # Lightning leaves it on the CPU


def _tested(
    model: FrozenModel, results: Results, module: FineTuning, inputs: dict[str, str]
) -> Result:
    """Scores the trained network and stores the result."""
    data, split = module.split.data, module.split
    held_out = data.train[split.held_out.tolist()]
    watched, guesses = module.guess(held_out), module.guess(data.test)
    unreadable = {
        "train": module.unreadable,
        "held_out": watched.unreadable,
        "test": guesses.unreadable,
    }
    for files, numbers in zip(
        (module.files, held_out, data.test), unreadable.values(), strict=True
    ):
        say_unreadable(results.devices, files, numbers)
    result = results.result(
        model,
        "finetune",
        data.name,
        module.protocol,
        {**guesses.scores, "num_test": len(guesses.labels)},
        inputs,
        label_chance(
            data.train.label_tensor[split.kept],
            guesses.labels,
            split.num_classes,
        ),
        feature=module.feature,
        num_train=len(module.files) - len(module.unreadable),
        num_held_out=len(watched.labels),
        held_out_accuracy=watched.scores["accuracy"],
        unreadable={part: len(numbers) for part, numbers in unreadable.items()},
    )
    if results.devices.rank == 0:
        guesses.save(results.folder(result))
    results.save(result)
    return result
