"""`stellar convert`: weights from one layout into another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from stellar_plugin.checkpoints import (
    HEADS_NAME,
    Checkpoint,
    load_encoder,
    read_checkpoint,
)
from stellar_plugin.checkpoints.export import timm_call, to_official, to_timm
from stellar_plugin.encoder import StellarEncoder
from stellar_plugin.model import Stellar
from stellar_plugin.onnx import export_onnx
from stellar_plugin.onnx_check import (
    HALF_TOLERANCE,
    TOLERANCE,
    check_onnx,
    made_up_photos,
    passes,
    read_photos,
    report,
    sizes_to_check,
)
from stellar_plugin.weight_files import write_tensors

LAYOUTS = {
    "official": "file of the official implementation, with decoder and heads",
    "timm": "file that timm.create_model loads strictly, of any ViT",
    "onnx": "file of the encoder for other runtimes, of any ViT",
    "stellar": "folder for Stellar.from_pretrained, with decoder and heads",
}


def main(argv: Sequence[str]) -> None:
    """Runs `stellar convert`.

    Args:
        argv:
            Arguments behind the command.

    Raises:
        ValueError: If the output cannot be what was asked for, or the weights do not
            fit.
        OSError: If there are no such weights.
    """
    arguments = _parser().parse_args(argv)
    output = Path(arguments.output)
    _check_output(output, arguments.to)
    _check_onnx_options(arguments)
    checkpoint = read_checkpoint(arguments.source, variant=arguments.variant)
    print(_convert(checkpoint, output, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stellar convert",
        usage="%(prog)s SOURCE OUTPUT --to LAYOUT",  # errors stay short
        description="Converts weights: "
        + "; ".join(f"'{name}' is a {text}" for name, text in LAYOUTS.items())
        + ".",
    )
    parser.add_argument(
        "source",
        help="file, folder, 'stellar-b16', hub repository or 'timm:NAME', of any "
        "layout",
    )
    parser.add_argument(
        "output",
        help="a .safetensors file, for --to onnx an .onnx file, for --to stellar a "
        "folder",
    )
    parser.add_argument("--to", choices=LAYOUTS, required=True)
    parser.add_argument("--variant", help="which file of a hub repository, e.g. b16")
    parser.add_argument(
        "--num-heads", type=int, help="attention heads, where the width does not tell"
    )
    parser.add_argument(
        "--model-kwargs",
        type=json.loads,
        default={},
        help="other arguments of StellarEncoder that the source does not tell, to timm "
        'and onnx: \'{"pos_antialias": false, "img_size": [32, 64]}\'',
    )
    parser.add_argument("--decoder-num-heads", type=int, help="the same of the decoder")
    onnx = parser.add_argument_group("--to onnx")
    onnx.add_argument(
        "--dynamic-size", action="store_true", help="images of any height and width"
    )
    onnx.add_argument(
        "--fp16", action="store_true", help="weights and computation in float16"
    )
    onnx.add_argument(
        "--check",
        action="store_true",
        help="compare the file with the model on images; ends with an error where they "
        "differ",
    )
    onnx.add_argument(
        "--images", help="folder of images to compare on, instead of made-up ones"
    )
    return parser


def _check_output(output: Path, layout: str) -> None:
    if layout == "stellar":
        if output.suffix or output.is_file():
            raise ValueError(f"OUTPUT must be a folder for 'stellar', got '{output}'.")
    else:
        suffix = ".onnx" if layout == "onnx" else ".safetensors"
        if output.suffix != suffix:
            raise ValueError(f"OUTPUT must end in {suffix}, got '{output}'.")
    if output.is_file() or (output / HEADS_NAME).exists():
        raise ValueError(f"'{output}' exists already.")


def _check_onnx_options(arguments: argparse.Namespace) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("dynamic_size", "fp16", "check", "images")
        if getattr(arguments, name)
    ]
    if given and arguments.to != "onnx":
        raise ValueError(f"{given[0]} is for --to onnx, got --to {arguments.to}.")
    if arguments.images and not arguments.check:
        raise ValueError("--images is what --check compares on: give that too.")
    if arguments.images and not Path(arguments.images).is_dir():
        raise FileNotFoundError(f"--images: there is no folder '{arguments.images}'.")


def _convert_to_onnx(
    checkpoint: Checkpoint,
    encoder: StellarEncoder,
    output: Path,
    arguments: argparse.Namespace,
) -> str:
    """Writes an ONNX file, and compares it if that is asked for."""
    output.parent.mkdir(parents=True, exist_ok=True)
    photos = []
    if arguments.check:  # first: an export takes a while
        folder = arguments.images
        photos = read_photos(Path(folder)) if folder else made_up_photos()
    dynamic, half = arguments.dynamic_size, arguments.fp16
    export_onnx(encoder, output, dynamic_size=dynamic, half=half)
    if photos:
        known = {**checkpoint.assumed, **checkpoint.config}
        rows = check_onnx(
            output,
            encoder,
            photos,
            sizes_to_check(encoder, dynamic),
            known.get("mean", IMAGENET_DEFAULT_MEAN),
            known.get("std", IMAGENET_DEFAULT_STD),
        )
        tolerance = HALF_TOLERANCE if half else TOLERANCE
        print(report(rows, tolerance))
        if not all(passes(row, tolerance) for row in rows):
            raise RuntimeError(
                f"'{output}' does not compute what the model does, see the table: use "
                "it with other versions of onnx and onnxruntime"
                + (", or without --fp16." if half else ".")
            )
    height, width = encoder.image_size
    size = "any size" if dynamic else f"{height} x {width} px"
    return f"{output}, for normalised images of {size}"


def _convert(
    checkpoint: Checkpoint, output: Path, arguments: argparse.Namespace
) -> str:
    """Writes the output; returns what to say about it."""
    num_heads = arguments.num_heads
    if arguments.to in ("timm", "onnx"):
        encoder, report = load_encoder(
            checkpoint, num_heads=num_heads, **arguments.model_kwargs
        )
        if report.untold:
            # The output tells it.
            print(f"Not told by the source: {', '.join(report.untold)}.")
    if arguments.to == "timm":
        state, metadata = to_timm(encoder)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(state, output, metadata)
        return f"{output}, strictly loaded by {timm_call(encoder)}"
    if arguments.to == "onnx":
        return _convert_to_onnx(checkpoint, encoder, output, arguments)
    model = Stellar.from_checkpoint(
        checkpoint,
        num_heads=num_heads,
        decoder_num_heads=arguments.decoder_num_heads,
        source=arguments.source,
    )
    if arguments.to == "official":
        state = to_official(model, checkpoint.heads)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(state, output)
        return f"{output}, in the official layout"
    model.save_pretrained(output)
    return f"{output}, for Stellar.from_pretrained"
