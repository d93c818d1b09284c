"""Scores of whole tests, against loops over the stored predictions and label files."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from stellar_plugin.mmseg.pipeline import name_files
from tests.stellar_plugin.mmseg.mmseg_sets import MODEL_NAME, NUM_QUERIES, VIT

CLASSES = ("a", "b", "c", "d", "e")
VOID = 255
BATCH = 2  # of the paper's metric
Array = np.ndarray

SIZES = [(48, 64), (64, 48), (50, 33)]
# Labels of every image, and whether the logits of all classes are equal.
CASES: dict[str, tuple[list[list[int]], bool]] = {
    # Class 3 is in no label and never predicted, class 4 in no label.
    "missing class": ([[0, 1, VOID], [1, 2], [0, 1, 2, VOID]], False),
    "one image": ([[0, 1, 2, VOID]], False),
    "one class": ([[1, VOID], [1], [1]], False),
    "ties": ([[0, 1, VOID], [1, 2], [0, 2]], True),
    "image without labels": ([[VOID], [VOID], [0, 1, 2]], False),
}


def write_data(root: Path, values: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "labels", "predictions"):
        (root / folder).mkdir()
    for i, allowed in enumerate(values):
        height, width = SIZES[i]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        labels = rng.choice(np.array(allowed, np.uint8), (height, width))
        Image.fromarray(pixels).save(root / f"images/{i}.png")
        Image.fromarray(labels).save(root / f"labels/{i}.png")


def model_config(kind: str, mode: str) -> dict[str, Any]:
    vit = {"model_name": MODEL_NAME, "num_queries": NUM_QUERIES, **VIT}
    window = {"crop_size": (32, 32), "stride": (20, 20)} if mode == "slide" else {}
    return {
        "type": kind,
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": [127.5] * 3,
            "std": [64.0] * 3,
        },
        "backbone": {"type": "StellarViT", **vit},
        "decode_head": {
            "type": "LinearProbeHead",
            "in_channels": VIT["embed_dim"],
            "num_classes": len(CLASSES),
            "align_corners": False,
        },
        "test_cfg": {"mode": mode, **window},
    }


def build(root: Path, kind: str, mode: str, ties: bool = False) -> Runner:
    """Tests a model with random weights and stores its predictions."""
    torch.manual_seed(0)
    loader = {
        "batch_size": 1,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {
            "type": "BaseSegDataset",
            "data_root": str(root),
            "data_prefix": {"img_path": "images", "seg_map_path": "labels"},
            "img_suffix": ".png",
            "metainfo": {"classes": CLASSES},
            "pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "LoadAnnotations"},
                {"type": "PackSegInputs"},
            ],
        },
    }
    stored = {"type": "CountedIoUMetric", "output_dir": str(root / "predictions")}
    cfg = {
        "model": model_config(kind, mode),
        "work_dir": str(root),
        "test_dataloader": loader,
        "test_cfg": {},
        "test_evaluator": [stored, {"type": "BatchJaccard", "batch_size": BATCH}],
        "default_scope": "mmseg",
        "experiment_name": uuid.uuid4().hex,
        "log_level": "ERROR",
    }
    runner = Runner.from_cfg(Config(cfg))
    conv = runner.model.decode_head.conv_seg
    torch.nn.init.normal_(conv.weight, std=0.0 if ties else 1.0)
    torch.nn.init.constant_(conv.bias, 0.0)
    if not ties:
        conv.bias.data[3] = -1e6
    return runner


def read(root: Path, num_images: int) -> list[tuple[Array, Array]]:
    """Stored predictions and label files, these by nearest neighbour as large."""
    pairs = []
    for i in range(num_images):
        prediction = np.asarray(Image.open(root / f"predictions/{i}.png"))
        labels = np.asarray(Image.open(root / f"labels/{i}.png"))
        (height, width), (rows, columns) = labels.shape, prediction.shape
        grid = [
            [labels[r * height // rows, c * width // columns] for c in range(columns)]
            for r in range(rows)
        ]
        pairs.append((prediction, np.array(grid)))
    return pairs


def brute_force(pairs: list[tuple[Array, Array]]) -> dict[str, float]:
    """Scores in percent over all pixels, and the number of classes with an IoU."""
    cells = [
        (int(p), int(y))
        for prediction, labels in pairs
        for p, y in zip(prediction.ravel(), labels.ravel(), strict=True)
        if y != VOID
    ]
    ious, accuracies = [], []
    for c in range(len(CLASSES)):
        both = sum(p == c and y == c for p, y in cells)
        either = sum(p == c or y == c for p, y in cells)
        labelled = sum(y == c for _, y in cells)
        ious += [both / either] if either else []
        accuracies += [both / labelled] if labelled else []
    if not cells:
        return {"mIoU": float("nan"), "num_classes": 0}
    return {
        "mIoU": 100 * sum(ious) / len(ious),
        "mAcc": 100 * sum(accuracies) / len(accuracies),
        "aAcc": 100 * sum(p == y for p, y in cells) / len(cells),
        "num_classes": len(ious),
    }


def paper(pairs: list[tuple[Array, Array]]) -> float:
    """Mean over batches of the batch's mIoU, weighted by images."""
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    scores = [(brute_force(batch)["mIoU"], len(batch)) for batch in batches]
    scores = [(score, size) for score, size in scores if score == score]
    return sum(score * size for score, size in scores) / sum(s for _, s in scores)


@pytest.mark.parametrize(
    ("kind", "mode"), [("EncoderDecoder", "slide"), ("PatchGridSegmentor", "whole")]
)
@pytest.mark.parametrize(
    "case",
    ["ties", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "ties")],
)
def test_scores(kind: str, mode: str, case: str, tmp_path: Path) -> None:
    values, ties = CASES[case]
    write_data(tmp_path, values)
    scores = build(tmp_path, kind, mode, ties).test()
    pairs = read(tmp_path, len(values))
    on_grid = kind == "PatchGridSegmentor"
    assert pairs[0][0].shape == ((3, 4) if on_grid else SIZES[0])
    predicted = set(np.concatenate([p.ravel() for p, _ in pairs]))
    assert predicted == {0} if ties else len(predicted) > 1 and 3 not in predicted

    expected = brute_force(pairs)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert scores[name] == pytest.approx(expected[name], abs=0.0051), name
    assert scores["num_classes"] == expected["num_classes"]
    assert scores["paper/mIoU"] == pytest.approx(paper(pairs), abs=1e-4)


@pytest.mark.parametrize("name", ["images/0.png", "labels/0.png"])
@pytest.mark.parametrize("keep", [0, 60])
@pytest.mark.slow
def test_unreadable__is_named(name: str, keep: int, tmp_path: Path) -> None:
    write_data(tmp_path, CASES["one image"][0])
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    runner = build(tmp_path, "EncoderDecoder", "whole")
    dataset = runner.test_dataloader.dataset
    with pytest.raises(Exception, match=r".*") as unnamed:
        dataset[0]
    name_files([dataset])
    message = rf"{name}.*cannot be used: .*Mend the file"
    with pytest.raises(unnamed.type, match=message) as named:
        dataset[0]  # of the type that data sets may skip
    assert named.type is unnamed.type
