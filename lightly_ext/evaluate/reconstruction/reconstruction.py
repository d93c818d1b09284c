"""`stellar evaluate reconstruction`: how good images decoded from the latent are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightly_ext.evaluate.datasets import find_images
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.numerics import numerics
from lightly_ext.evaluate.options import check_files, check_positive
from lightly_ext.evaluate.reconstruction.autoencoder import (
    Autoencoder,
    Latent,
    Target,
    build_autoencoder,
    own_latent,
)
from lightly_ext.evaluate.reconstruction.decoder_files import (
    check_stored,
    load_decoder,
    read_config,
)
from lightly_ext.evaluate.reconstruction.decoder_training import train_decoder
from lightly_ext.evaluate.reconstruction.metric_networks import load_networks
from lightly_ext.evaluate.reconstruction.native import NativeAutoencoder, is_native
from lightly_ext.evaluate.reconstruction.scores import save_pictures, score_images
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.results import Results, evaluation
from lightly_ext.evaluate.training import fitting_batch
from stellar_plugin.hashes import weights_sha256
from stellar_plugin.protocols import (
    FID_IMAGES,
    RECONSTRUCTION,
    RECONSTRUCTION_FINETUNED,
    RECONSTRUCTION_NATIVE,
    RECONSTRUCTION_SCRATCH,
    DecoderProtocol,
    ReconstructionProtocol,
)

Form = Literal["pretrained", "finetuned", "scratch"]
PROTOCOLS: dict[Form, ReconstructionProtocol] = {
    "pretrained": RECONSTRUCTION,
    "finetuned": RECONSTRUCTION_FINETUNED,
    "scratch": RECONSTRUCTION_SCRATCH,
}
# What a decoder that is trained already brings into the card.
TRAINING_FIELDS = (
    *("split", "train_views", "train_scale", "optimizer", "lrs", "batch_sizes"),
    *("weight_decay", "clip", "epochs", "schedule"),
)
TrainingSet = tuple[str, ImageFiles]  # with its name
NOT_COMPARABLE = (
    "The published numbers are of random crops and flips, these of resized centre "
    "crops: the two cannot be compared one to one."
)
NOT_COMPARABLE_NATIVE = (
    "The published numbers do not tell their crops, these are of resized centre crops: "
    "the two cannot be compared one to one."
)


def check_reconstruction(
    results: Results,
    data: str,
    form: Form,
    train: str | None,
    tokenizer: str | None,
    decoder: str | None,
    epochs: int | None,
    inception: str | None,
    lpips_net: str | None,
    force: bool,
) -> tuple[str, ImageFiles, TrainingSet | None]:
    """Finds images, their name and the training set; see `Results.required`."""
    _check_options(form, train, decoder, epochs)
    check_files(tokenizer=tokenizer, inception=inception, lpips_net=lpips_net)
    if decoder is not None:
        read_config(Path(decoder))
    name, files = find_images(data, limit=results.limit)
    _check_number(len(files), results.devices.world_size, force)
    return name, files, _training_set(train, files, results.limit)


@evaluation
def run_reconstruction(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    form: Form = "pretrained",
    latent: Latent | None = None,
    target: Target | None = None,
    train: str | None = None,
    tokenizer: str | None = None,
    decoder: str | None = None,
    epochs: int | None = None,
    inception: str | None = None,
    lpips_net: str | None = None,
    force: bool = False,
) -> Result:
    """Decodes images from a frozen latent, and scores and shows them.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Folder of the images to score, nested to any depth, or tars, parquet or
            hf:NAME of the hub.
        form:
            The decoder: as pretrained, fine-tuned on the frozen latent, or trained on
            it from scratch (for any encoder). Scores of two forms are never compared,
            nor are those of TiTok's decoder, which is pretrained and a full ViT.
        latent:
            What the decoder reads: "lowrank" (STELLAR alone) or "dense". None takes
            "lowrank" where the model has it; TiTok's decoder reads its tokens.
        target:
            What a decoder from scratch predicts, "tokens" by default.
        train:
            Folder of images to train the decoder on, or as for `data`.
        tokenizer:
            File of the frozen tokenizer for the target "tokens", where the model does
            not hold it.
        decoder:
            Folder of a decoder that an earlier run trained, to score it again.
        epochs:
            Passes over the training images, instead of the protocol's.
        inception:
            File with the weights of FID's network. None takes torch.hub's, or downloads
            it.
        lpips_net:
            File with AlexNet's weights for LPIPS. None takes torch.hub's, or downloads
            it.
        force:
            Score fewer than 2048 images too, with a FID that means little.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If options do not fit the model or each other.
        RuntimeError: If too many images are unreadable.
    """
    name, files, training_set = results.required(check_reconstruction)
    chosen = latent or own_latent(model, form != "scratch")
    results = results.settled(latent=chosen)
    if decoder is not None and form == "scratch":
        target = target or read_config(Path(decoder))["target"]
    protocol = _published_protocol(model, form)
    protocol = results.protocol(model, protocol, data=name, epochs=epochs)
    if training_set and isinstance(protocol, DecoderProtocol):
        size = fitting_batch(devices, protocol.batch_sizes[0], len(training_set[1]))
        protocol = protocol.replace(batch_sizes=(size,))
    autoencoder = build_autoencoder(
        model, devices, form != "scratch", chosen, target, tokenizer, protocol.crop
    )
    networks = load_networks(devices, inception, lpips_net)
    protocol = protocol.replace(
        networks=networks.identity, target=_target_name(autoencoder, protocol.crop)
    )
    inputs = {"data": results.fingerprint(files)}
    protocol, provenance = _prepare(
        results, form, autoencoder, protocol, training_set, decoder, inputs
    )
    scores, chance, num_unreadable = score_images(
        devices, autoencoder, files, protocol, networks
    )
    _check_number(scores["num_images"], 1, force)
    provenance |= {"form": form, "num_unreadable": num_unreadable}
    result = _result(
        results, autoencoder, protocol, scores, inputs, chance, **provenance
    )
    folder = results.save(result)
    if devices.rank == 0:
        save_pictures(devices, autoencoder, files, protocol, folder)
    devices.fabric.barrier()
    return result


def _published_protocol(model: FrozenModel, form: Form) -> ReconstructionProtocol:
    if not is_native(model) or form == "scratch":
        return PROTOCOLS[form]
    if form == "finetuned":
        raise ValueError(
            f"The decoder of '{model.origin.label}' is scored as it was published: "
            "leave --form finetuned and --train out."
        )
    return RECONSTRUCTION_NATIVE


def _check_options(
    form: Form, train: str | None, decoder: str | None, epochs: int | None
) -> None:
    if form == "pretrained" and (train or decoder or epochs):
        raise ValueError(
            "--form pretrained trains nothing: --train, --decoder and --epochs are for "
            "--form finetuned and scratch."
        )
    if form != "pretrained" and not train and not decoder:
        raise ValueError(
            f"--form {form} trains a decoder: name its images with --train FOLDER, or "
            "a decoder that is trained already with --decoder FOLDER."
        )
    if decoder and (train or epochs):
        raise ValueError(
            "--decoder is trained already: leave --train and --epochs out."
        )
    check_positive(epochs=epochs)


def _check_number(num_images: int, world_size: int, force: bool) -> None:
    if num_images < max(2, world_size):
        raise ValueError(
            f"FID needs an image for every device and two at least, got {num_images}."
        )
    if num_images < FID_IMAGES and not force:
        raise ValueError(
            f"There are {num_images} images, FID needs {FID_IMAGES}: with fewer the "
            "covariance of its 2048 features is singular, and the score says little. "
            "Name a larger folder, or add --force."
        )


def _training_set(
    train: str | None, scored: ImageFiles, limit: int | None
) -> TrainingSet | None:
    """Name and images of the training set, none of which is scored."""
    if train is None:
        return None
    name, files = find_images(train, "train", limit)
    shared = _paths(files) & _paths(scored)
    if shared:
        raise ValueError(
            f"{len(shared)} images are in the training set and scored too, for example "
            f"'{min(shared)}': name other folders."
        )
    return name, files


def _paths(files: ImageFiles) -> set[str]:
    if files.rows is not None:
        return {os.path.abspath(files.shown(i)) for i in range(len(files))}
    root = files.root.resolve()
    return {os.path.join(root, name) for name in files.names}


def _note(autoencoder: Autoencoder) -> str:
    native = isinstance(autoencoder, NativeAutoencoder)
    return NOT_COMPARABLE_NATIVE if native else NOT_COMPARABLE


def _target_name(autoencoder: Autoencoder, crop: int) -> str:
    if isinstance(autoencoder, NativeAutoencoder):
        return autoencoder.target_name
    if autoencoder.tokenizer is None:
        return "pixels, mean squared error"
    side = autoencoder.grid_size(crop)[0] * autoencoder.tokenizer.downsample_factor
    # Of a coarse map: the codes themselves have seen less than the scores do.
    smaller = f" to {side} px" if side < crop else ""
    digest = weights_sha256(autoencoder.tokenizer)
    return (
        f"cross-entropy with the codes of the image resized (bicubic){smaller} so that "
        f"both grids agree; tokenizer sha256 {digest}"
    )


def _prepare(
    results: Results,
    form: Form,
    autoencoder: Autoencoder,
    protocol: ReconstructionProtocol,
    training_set: TrainingSet | None,
    decoder: str | None,
    inputs: dict[str, str],
) -> tuple[ReconstructionProtocol, dict[str, Any]]:
    """Prints the card; trains the decoder, or loads it, or leaves it as it is.

    Adds the training set to `inputs`.

    Returns:
        The protocol with all that decides on the decoder, and its provenance.
    """
    devices = results.devices
    identity: dict[str, Any] = {
        "form": form,
        "latent": autoencoder.latent,
        "target": autoencoder.target,
        "predicts": protocol.target,
        "encoder": autoencoder.model.origin.sha256,
        "crop": protocol.crop,
    }
    if decoder is not None:
        stored = read_config(Path(decoder))
        check_stored(stored, identity, decoder)
        protocol = protocol.replace(**stored["training"])
    elif training_set is not None:
        trained_on = f"{training_set[0]}, {len(training_set[1])} images"
        protocol = protocol.replace(split=f"decoder: {trained_on}; {protocol.split}")
    results.announce(autoencoder.model, protocol)
    devices.say(_note(autoencoder))
    _say_grids(devices, autoencoder, protocol)
    if isinstance(autoencoder, NativeAutoencoder):
        return protocol, {}
    if decoder is not None:
        load_decoder(autoencoder, Path(decoder))
        return protocol, {"num_unreadable_train": stored["num_unreadable"]}
    if training_set is None or not isinstance(protocol, DecoderProtocol):
        return protocol, {}
    files = training_set[1]
    inputs["train"] = results.fingerprint(files)
    planned = _result(results, autoencoder, protocol, {}, inputs)
    folder = results.folder(planned) / "decoder"
    identity |= {
        "training": {name: getattr(protocol, name) for name in TRAINING_FIELDS},
        "images": inputs["train"],
        "numerics": numerics(autoencoder.model, devices),
    }
    num_unreadable = train_decoder(
        devices, autoencoder, files, protocol, folder, identity
    )
    return protocol, {"num_unreadable_train": num_unreadable}


def _say_grids(
    devices: Devices, autoencoder: Autoencoder, protocol: ReconstructionProtocol
) -> None:
    height, width = autoencoder.grid_size(protocol.crop)
    if isinstance(autoencoder, NativeAutoencoder):
        devices.say(f"The latent is {width} codes, which the model decodes by itself.")
        return
    text = f"The latent is a grid of {height} x {width}."
    if autoencoder.tokenizer is not None:
        factor = autoencoder.tokenizer.downsample_factor
        text += (
            f" The tokenizer works on {height * factor} x {width * factor} px, the "
            f"scores are of {protocol.crop} x {protocol.crop} px; its own stand beside "
            "them."
        )
    devices.say(text)


def _result(
    results: Results,
    autoencoder: Autoencoder,
    protocol: ReconstructionProtocol,
    scores: dict[str, Any],
    inputs: dict[str, str],
    chance: dict[str, float] | None = None,
    **provenance: Any,
) -> Result:
    """A result; another latent than the model's own makes another row."""
    model = autoencoder.model
    result = results.result(
        model,
        "reconstruction",
        protocol.data,
        protocol,
        scores,
        inputs,
        chance,
        latent=autoencoder.latent,
        grid=list(autoencoder.grid_size(protocol.crop)),
        decoder_sha256=weights_sha256(autoencoder.decoder),
        note=_note(autoencoder),
        **provenance,
    )
    if model.num_queries and autoencoder.latent == "dense":
        return replace(result, model=f"{result.model} (dense)")
    return result
