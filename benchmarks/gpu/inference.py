"""Features of images and nearest neighbours: how many per second."""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from torch import Tensor

from benchmarks.gpu.flops import block_flops, encoder_flops, mfu
from benchmarks.gpu.measure import extra_gib, median_ms, random_tokens
from benchmarks.gpu.results import Cell, Report
from benchmarks.gpu.sizes import base
from benchmarks.step import BareBlocks, Sizes
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.metrics.knn import Voters
from stellar_plugin import Stellar

CLASSES = 1000
NEIGHBOURS, TEMPERATURE = 20, 0.07


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Times features in bf16, then kNN against a bank as large as ImageNet."""
    sizes, _ = base(arguments.tiny)
    with report.section("features"), tempfile.TemporaryDirectory() as folder:
        _measure_features(sizes, folder, arguments, report)
    with report.section("knn"):
        _measure_knn(sizes, arguments, report)
    known = report.known()
    report.headline(
        f"{known.get('features_images_per_s', 0):.0f} images/s with features, "
        f"{known.get('features_percent_of_encoder', 0):.0f} % of the encoder, "
        f"{known.get('features_percent_of_bare', 0):.0f} % of bare blocks; kNN "
        f"{known.get('knn_queries_per_s', 0):.0f} queries/s"
    )


def _measure_features(
    sizes: Sizes, folder: str, arguments: argparse.Namespace, report: Report
) -> None:
    device, batch_size = arguments.device, 4 if arguments.tiny else 256
    Stellar(**sizes.recipe["model"]).save_pretrained(folder)
    model = load_frozen_model(folder).to(device)
    host = torch.randint(256, (batch_size, 3, sizes.image, sizes.image)).byte()
    host = host.pin_memory() if device == "cuda" else host
    images = torch.randn(host.shape, device=device)
    tokens = 1 + sizes.queries + sizes.grid**2
    x = torch.randn(batch_size, tokens, sizes.width, device=device)
    bare = BareBlocks(sizes, device).encoder.requires_grad_(False)

    def features() -> Tensor:
        return model.pooled(host.to(device, non_blocking=True), "sparse").cpu()

    rows: list[list[Cell]] = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for name, function in {
            "bare": lambda: bare(x),
            "encoder": lambda: model.backbone(images),
            "features": features,
        }.items():
            ms = median_ms(function, device, 10)
            gib = extra_gib(function, device)
            report.values(**{f"{name}_images_per_s": 1000 * batch_size / ms})
            flops = batch_size * encoder_flops(sizes, sizes.grid**2)
            rows.append([name, ms, 1000 * batch_size / ms, mfu(flops, ms), gib])
    half = copy.deepcopy(bare).to(torch.bfloat16)
    with torch.no_grad():
        ms = median_ms(lambda: half(x.bfloat16()), device, 10)
    flops = batch_size * sizes.depth * block_flops(tokens, sizes.width)
    rows.append(
        ["bare, weights in bf16", ms, 1000 * batch_size / ms, mfu(flops, ms), None]
    )
    report.table(
        f"Batches of {batch_size} images, {sizes.image} px, bf16; features start from "
        "uint8 images on the host and end there",
        ["what", "ms", "images/s", "MFU, %", "extra GiB"],
        rows,
    )
    known = report.known()
    for other in ("encoder", "bare"):
        share = known["features_images_per_s"] / known[f"{other}_images_per_s"]
        report.values(**{f"features_percent_of_{other}": 100 * share})


def _measure_knn(sizes: Sizes, arguments: argparse.Namespace, report: Report) -> None:
    device = arguments.device
    bank_size, num_queries = (2000, 100) if arguments.tiny else (1_281_167, 2048)
    labels = torch.randint(CLASSES, (bank_size,), device=device)
    queries = random_tokens(num_queries, sizes.width, device=device)
    voters = Voters(
        random_tokens(bank_size, sizes.width, device=device),
        labels,
        NEIGHBOURS,
        TEMPERATURE,
    )

    def vote() -> None:
        for block in queries.split(voters.rows_at_once):
            voters.classes(block)

    ms = median_ms(vote, device, 3, warm_up=1)
    report.values(
        knn_bank=bank_size,
        knn_rows_at_once=voters.rows_at_once,
        knn_queries_per_s=1000 * num_queries / ms,
        knn_extra_gib=extra_gib(vote, device),
        knn_bank_gib=(voters.features.nbytes + voters.offsets.nbytes) / 2**30,
        knn_50000_queries_s=ms / 1000 * 50_000 / num_queries,
    )
