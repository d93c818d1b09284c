"""Published numbers: data only, each with its source and its protocol.

A number stands under a card of `stellar_plugin.protocols` where that is the protocol of
its source. Where the source does not tell what decides on the score, or scored other
images, it has a card of its own, and so a column of its own. The times of table 10 are
not here: its text form lost their exponents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lightly_ext.evaluate.result import Result
from stellar_plugin.protocols import (
    DISCOVER,
    FINETUNE,
    IMAGENET_TRAIN_SCALE,
    IN_CONTEXT,
    LINEAR_PAPER,
    PAPER_CELL,
    SEGMENTATION_ADE20K,
    SEGMENTATION_CITYSCAPES,
    SEGMENTATION_FINETUNE_ADE20K,
    SEGMENTATION_PAPER_ADE20K,
    SEGMENTATION_PAPER_CITYSCAPES,
    SEGMENTATION_PAPER_VOC,
    SEGMENTATION_VOC,
    Protocol,
    patch_grid,
)

IMAGENET = "ImageNet-1K"
PLACES = "Places365"


@dataclass(frozen=True, kw_only=True)
class StatedProtocol(Protocol):
    """What a source tells of its protocol: of each field, something or nothing."""

    features: str = ""
    pooling: str = ""
    crop: int | None = None
    head: str = ""


@dataclass(frozen=True)
class Published:
    """Scores that others measured.

    Attributes:
        model: Name of the model.
        task: Task that measures the same here.
        protocol: How it was measured, with the data set.
        scores: Numbers by name, fractions in 0 to 1.
        source: Paper and table.
    """

    model: str
    task: str
    protocol: Protocol
    scores: Mapping[str, float]
    source: str

    @property
    def result(self) -> Result:
        """The same as a result."""
        card = self.protocol.card()
        data = self.protocol.data
        return Result(self.task, self.model, data, self.scores, card, {})


def _linear(data: str, features: str = "auto") -> Protocol:
    protocol = LINEAR_PAPER.replace(data=data, features=features)
    if data == IMAGENET:
        protocol = protocol.replace(train_scale=IMAGENET_TRAIN_SCALE)
    return protocol


KNN_PUBLISHED = StatedProtocol(
    name="knn",
    source="STELLAR table 1, which tells neither k nor temperature nor resolution",
    data=IMAGENET,
    features="auto",
    pooling="mean over tokens",
)
KNN_PUBLISHED_DENSE = KNN_PUBLISHED.replace(features="dense")
RECONSTRUCTION_PUBLISHED = StatedProtocol(
    name="reconstruction",
    source="STELLAR tables 1, 3 and 4; its public code scores random crops and flips "
    "of the validation images, so these numbers and ours are not comparable",
    data=IMAGENET,
    crop=224,
)
PRETRAINED_PUBLISHED = RECONSTRUCTION_PUBLISHED.replace(
    name="reconstruction-pretrained", head="the decoder as pretrained"
)
FINETUNED_PUBLISHED = RECONSTRUCTION_PUBLISHED.replace(
    name="reconstruction-finetuned", head="the decoder, fine-tuned on the frozen latent"
)
SCRATCH_PUBLISHED = RECONSTRUCTION_PUBLISHED.replace(
    name="reconstruction-scratch", head="a decoder from scratch on the frozen latent"
)
DENSE_PUBLISHED = RECONSTRUCTION_PUBLISHED.replace(
    name="reconstruction-scratch",
    features="dense",
    head="a decoder on the frozen latent; from scratch or fine-tuned, not stated",
)
NATIVE_PUBLISHED = RECONSTRUCTION_PUBLISHED.replace(
    name="reconstruction-native",
    source="STELLAR table 1, which tells neither crops nor networks of the scores",
    crop=None,
    head="the native decoder, a full ViT",
)
ALIGN_TEXT_PUBLISHED = StatedProtocol(
    name="align-text",
    source="STELLAR appendix B.3, table 9",
    head="one attention-pooling probe, towards the text tower of CLIP",
)
# Of CLIP itself: nothing was trained.
CLIP_PUBLISHED = ALIGN_TEXT_PUBLISHED.replace(
    source="STELLAR table 9, which tells neither the size of CLIP nor its images",
    head="none: CLIP's own image and text towers",
)
# Columns of table 2: task, score and protocol.
TABLE_2_COLUMNS = (
    ("segmentation", "mIoU", SEGMENTATION_PAPER_ADE20K),
    ("segmentation", "mIoU", SEGMENTATION_PAPER_CITYSCAPES),
    ("segmentation", "mIoU", SEGMENTATION_PAPER_VOC),
    ("linear-paper", "accuracy", _linear(IMAGENET)),
    ("linear-paper", "accuracy", _linear("Oxford-IIIT Pet")),
    ("linear-paper", "accuracy", _linear("Food-101")),
    ("linear-paper", "accuracy", _linear("GlaS")),
)
TABLE_2 = {
    "BYOL RN-50": (18.43, 18.66, 63.89, 70.39, 82.77, 64.57, 95.00),
    "MoCo v3 ViT-B": (29.45, 25.13, 74.08, 74.31, 91.14, 77.47, 97.50),
    "DINO ViT-B": (26.87, 26.82, 79.29, 76.46, 93.84, 79.28, 95.00),
    "MSN ViT-B": (26.66, 25.39, 68.59, 73.65, 75.91, 68.93, 92.50),
    "DenseCL RN-50": (23.08, 18.63, 70.95, 61.10, 72.99, 59.16, 85.00),
    "Data2Vec ViT-B": (22.03, 23.49, 61.33, 54.90, 26.47, 34.40, 73.75),
    "SiameseIM ViT-B": (29.24, 26.52, 81.38, 74.97, 91.61, 71.01, 91.25),
    "I-JEPA ViT-H": (21.57, 18.59, 74.13, 71.72, 84.68, 70.34, 87.50),
    "iBOT ViT-B": (31.78, 25.69, 77.06, 76.40, 92.40, 78.08, 96.25),
    "iBOT ViT-L": (33.26, 26.37, 77.57, 78.53, 92.12, 81.07, 96.25),
    "BEiT ViT-B": (11.58, 18.90, 27.44, 32.94, 36.20, 54.49, 90.00),
    "BEiT ViT-L": (12.64, 20.37, 25.48, 36.77, 36.71, 56.03, 90.00),
    "SimMIM Swin-B": (12.46, 17.23, 35.14, 24.77, 27.39, 40.94, 77.50),
    "MAE ViT-B": (30.91, 29.44, 76.43, 66.32, 81.58, 70.40, 93.75),
    "MAE ViT-L": (34.36, 32.53, 77.79, 73.09, 84.30, 76.22, 95.00),
    "MAE ViT-H": (36.16, 35.21, 78.07, 75.22, 84.96, 78.36, 95.00),
    "SemMAE ViT-B": (3.52, 25.48, 48.33, 43.84, 56.99, 58.90, 92.50),
    "TiTok-64 ViT-B": (None, None, None, 32.87, 42.06, 43.68, 97.50),
    "TiTok-32 ViT-L": (None, None, None, 33.42, 27.83, 38.83, 78.75),
    "STELLAR ViT-B": (31.33, 27.74, 81.83, 73.26, 89.70, 74.09, 95.00),
    "STELLAR ViT-L": (34.02, 31.32, 85.90, 76.94, 92.53, 74.78, 97.50),
    "STELLAR ViT-H": (36.66, 33.30, 85.66, 79.10, 92.53, 77.43, 92.50),
    "AIM 600M": (29.00, 27.04, 64.55, 63.78, 64.68, 75.19, 98.75),
    "AIM 1B": (29.59, 27.05, 63.90, 66.86, 64.21, 77.96, 96.25),
    "DINOv2 ViT-B": (40.10, 34.66, 89.52, 82.82, 95.59, 91.08, 98.75),
    "DINOv2 ViT-L": (40.45, 32.07, 89.19, 84.23, 96.08, 92.94, 98.75),
}
# They take images of no other size, so the probes of table 2 had these crops, in px.
CROPS = {"TiTok-64 ViT-B": 256, "TiTok-32 ViT-L": 256}
# Sides of the cells whose labels and logits are compared, in px, where not 16.
CELLS = {
    **dict.fromkeys(("BYOL RN-50", "DenseCL RN-50", "SimMIM Swin-B"), 32),
    **dict.fromkeys(("I-JEPA ViT-H", "MAE ViT-H", "STELLAR ViT-H"), 14),
    **dict.fromkeys(("AIM 600M", "AIM 1B", "DINOv2 ViT-B", "DINOv2 ViT-L"), 14),
}
# Table 1: protocol, FID and LPIPS; for kNN: protocol and accuracy.
TABLE_1_RECONSTRUCTION = {
    "DINO ViT-B": (SCRATCH_PUBLISHED.replace(features="dense"), 3.27, 0.2121),
    "MAE ViT-B": (SCRATCH_PUBLISHED.replace(features="dense"), 3.02, 0.2071),
    "TiTok-32 ViT-L": (NATIVE_PUBLISHED, 2.75, 0.3281),
    "TiTok-64 ViT-B": (NATIVE_PUBLISHED, 1.99, 0.2571),
    "STELLAR ViT-B": (FINETUNED_PUBLISHED, 3.06, 0.2077),
    "STELLAR ViT-B, dense": (DENSE_PUBLISHED, 2.85, 0.2085),
    "STELLAR ViT-H": (PRETRAINED_PUBLISHED, 2.60, 0.1729),
}
TABLE_1_KNN = (
    ("DINO ViT-B", KNN_PUBLISHED, 74.69),
    ("DINO ViT-B", KNN_PUBLISHED_DENSE, 54.41),
    ("MAE ViT-B", KNN_PUBLISHED, 25.82),
    ("TiTok-32 ViT-L", KNN_PUBLISHED, 7.30),
    ("TiTok-64 ViT-B", KNN_PUBLISHED, 7.29),
    ("STELLAR ViT-B", KNN_PUBLISHED, 67.25),
    ("STELLAR ViT-B", KNN_PUBLISHED_DENSE, 64.71),
    ("STELLAR ViT-H", KNN_PUBLISHED, 77.31),
)
# Tables 3 and 4: FID of the decoder as pretrained, ImageNet-1K, ADE20K.
TABLE_3 = {
    "STELLAR ViT-B": (3.14, None, None),  # the rest is in table 2
    "STELLAR ViT-B (a) no reconstruction": (None, 72.44, 29.94),
    "STELLAR ViT-B (b) no clustering, no alignment": (3.21, 52.07, 20.46),
    "STELLAR ViT-B (c) no alignment": (8.95, 2.73, 1.93),
    "STELLAR ViT-B (d) no clustering": (3.62, 42.14, 18.90),
    "STELLAR ViT-B (e) no CLS alignment": (3.26, 70.79, 30.20),
    "STELLAR ViT-B (f) no KoLeo": (3.25, 72.05, 30.10),
}
TABLE_4 = {
    "STELLAR ViT-B, DINO prior": (3.31, 73.31, 28.17),
    "STELLAR ViT-B, random prior": (3.21, 65.28, 28.10),
}
# Tables 5 and 8: linear probes on one kind of token, where it is not the model's own.
TABLE_5 = (
    ("DINO ViT-B", "dense", 70.31),
    ("MAE ViT-B", "cls", 65.61),
    ("iBOT ViT-B", "dense", 71.44),
    ("iBOT ViT-B", "cls+dense", 71.58),
    ("STELLAR ViT-B", "dense", 72.21),
)
TABLE_8 = (("STELLAR ViT-B", "cls", 72.23),)
# Table 7: linear probes of what was pretrained on ImageNet-1K and on Places365.
TABLE_7 = (
    ("STELLAR ViT-L", PLACES, 49.25),
    ("STELLAR ViT-L, pretrained on Places365", IMAGENET, 66.08),
    ("STELLAR ViT-L, pretrained on Places365", PLACES, 51.98),
)
TABLE_9_COLUMNS = (
    (IMAGENET, "zero_shot_top1"),
    (IMAGENET, "zero_shot_top5"),
    ("MS COCO", "t2i_recall_1"),
    ("MS COCO", "i2t_recall_1"),
    ("Winoground", "winoground_text"),
    ("Winoground", "winoground_image"),
    ("MMVP", "mmvp"),
)
CLIP = "CLIP"
TABLE_9 = {
    "MAE": (23.18, 50.43, 11.28, 13.46, 20.75, 9.00, 19.26),
    "iBOT": (50.01, 80.43, 20.79, 29.38, 24.75, 12.00, 18.52),
    "STELLAR": (51.53, 80.04, 17.94, 22.34, 26.25, 8.25, 19.26),
    CLIP: (72.7, None, 43.0, 59.7, 30.5, 11.5, 20.0),
}
# Table 11, fine-tuned: ImageNet-1K, ADE20K.
TABLE_11 = {
    "DINO ViT-B": (79.58, 39.22),
    "MAE ViT-B": (77.75, 40.33),
    "iBOT ViT-B": (80.72, 42.76),
    "STELLAR ViT-B": (80.05, 41.98),
}
DINOV2 = "DINOv2 section 7.4"
# There: ADE20K, Cityscapes, Pascal VOC.
COMMUNITY_COLUMNS = (SEGMENTATION_ADE20K, SEGMENTATION_CITYSCAPES, SEGMENTATION_VOC)
COMMUNITY = {
    "DINOv2 ViT-B/14": (47.3, 69.4, 82.5),
    "DINO ViT-B/8": (31.8, 56.9, 66.4),
    "MAE ViT-H/14": (33.3, 58.4, 67.6),
    "iBOT ViT-L/16": (44.6, 64.8, 82.3),
}

CAUSE = "CAUSE, the table of its repository"
CAUSE_PUBLISHED = StatedProtocol(
    name="unsupervised-segmentation",
    source="CAUSE, 2023, https://arxiv.org/abs/2310.07379, with its public code",
    features="dense",
    crop=320,
    head="CAUSE-TR: 2048 concepts and a segmentation head, trained without labels on "
    "crops of the training images; mean of image and mirror image, CRF; matched by "
    "Hungarian",
)
# There, mIoU and pixel accuracy: COCO-Stuff, Cityscapes, 27 classes each.
CAUSE_TABLE = {
    "DINO ViT-B/8": ((41.9, 74.9), (28.0, 90.8)),
    "DINOv2 ViT-B/14": ((45.3, 78.0), (29.9, 89.8)),
    "iBOT ViT-B/16": ((39.5, 73.8), (23.0, 89.1)),
    "MAE ViT-B/16": ((21.5, 59.1), (12.5, 82.0)),
}
CAUSE_SETS = ("COCO-Stuff (27 classes)", "Cityscapes (27 classes)")

# The repository of SPOT (arXiv 2312.00648), by the public code there; sets as the
# commands call them: COCO's folder of images, and Pascal VOC's with its list.
SPOT = "SPOT, table of pretrained models"
SPOT_PUBLISHED = DISCOVER.replace(
    source="SPOT's public code: slots trained on the training images of the same set; "
    "VOC's borders of objects are background there, COCO's crowds are instances",
    resize=224,
    parts="slots of a trained decoder, the strongest of each px",
    label_resolution="320 x 320 px; labels resized nearest, masks of slots bilinear",
    rule="mbo_i, mbo_c: best IoU of each instance, of all px of each class, with a "
    "slot; px of two instances count nowhere",
)
# mBO of instances, of classes.
SPOT_TABLE = {
    "val2017": ("COCO: 7 slots, DINO ViT-B/16", 34.9, 44.8),
    "JPEGImages (val)": ("Pascal VOC 2012: 6 slots, DINO ViT-B/16", 48.6, 55.7),
}
HUMMINGBIRD = "open-hummingbird-eval, the table of its README"
HUMMINGBIRD_PUBLISHED = IN_CONTEXT.replace(
    source="https://github.com/vpariza/open-hummingbird-eval, a reproduction of "
    "Hummingbird (https://arxiv.org/abs/2306.01667, which has 55.9 for DINO ViT-B/16), "
    "with its public code",
    data="Pascal VOC 2012 (augmented)",
    resize=512,
    crop=512,
    train_views="random resized crops, colour jitter",
    inference="whole image, resized to a square; label distributions of patches, "
    "resized bilinearly to px, the largest share",
    label_resolution="px of the square",
    classes="20 and background; in the bank void is background, at test time ignored",
    num_classes=21,
    epochs=2,
    rule="patches of each image drawn by how rare their classes are in it; approximate "
    "neighbours (ScaNN); neighbours count with exp(cosine similarity / temperature)",
)
# There, mIoU by the most patches that are kept.
HUMMINGBIRD_BANKS = (102_400, 1_024_000, 10_240_000)
HUMMINGBIRD_TABLE = {
    "DINO ViT-S/16": (37.2, 43.1, 46.6),
    "DINO ViT-B/16": (44.9, 50.8, 55.7),
    "DINOv2 ViT-S/14": (70.2, 74.9, 77.0),
    "DINOv2 ViT-B/14": (69.1, 74.6, 76.9),
    "DINOv2 ViT-L/14": (64.6, 71.7, 74.8),
    "DINOv2 ViT-g/14": (62.3, 69.9, 73.6),
}


def all_published() -> list[Published]:
    """Every published number, fractions where we have fractions."""
    return [
        *_table_1(),
        *_table_2(),
        *_tables_3_and_4(),
        *_tables_5_8_and_7(),
        *_table_9(),
        *_table_11(),
        *_community(),
        *_hummingbird(),
        *_cause(),
        *_spot(),
    ]


def _percent(
    number: int, model: str, task: str, protocol: Protocol, score: str, value: float
) -> Published:
    source = f"STELLAR table {number}"
    return Published(model, task, protocol, {score: value / 100}, source)


def _probe(number: int, model: str, protocol: Protocol, value: float) -> Published:
    return _percent(number, model, "linear-paper", protocol, "accuracy", value)


def _table_1() -> Iterator[Published]:
    for model, (protocol, fid, lpips) in TABLE_1_RECONSTRUCTION.items():
        scores = {"fid": fid, "lpips": lpips}
        yield Published(model, "reconstruction", protocol, scores, "STELLAR table 1")
    for model, knn_protocol, value in TABLE_1_KNN:
        yield _percent(1, model, "knn", knn_protocol, "accuracy", value)


def _table_2() -> Iterator[Published]:
    for model, values in TABLE_2.items():
        for (task, score, protocol), value in zip(TABLE_2_COLUMNS, values, strict=True):
            if value is None:
                continue
            if task == "segmentation":
                cells = patch_grid(CELLS.get(model, PAPER_CELL))
                protocol = protocol.replace(label_resolution=cells)
            if model in CROPS:
                protocol = protocol.replace(crop=CROPS[model])
            yield _percent(2, model, task, protocol, score, value)


def _tables_3_and_4() -> Iterator[Published]:
    fid_protocol, miou_protocol = PRETRAINED_PUBLISHED, SEGMENTATION_PAPER_ADE20K
    for number, table in ((3, TABLE_3), (4, TABLE_4)):
        source = f"STELLAR table {number}"
        for model, (fid, imagenet, miou) in table.items():
            if fid is not None:
                scores = {"fid": fid}
                yield Published(model, "reconstruction", fid_protocol, scores, source)
            if imagenet is not None:
                yield _probe(number, model, _linear(IMAGENET), imagenet)
            if miou is not None:
                yield _percent(
                    number, model, "segmentation", miou_protocol, "mIoU", miou
                )


def _tables_5_8_and_7() -> Iterator[Published]:
    for number, table in ((5, TABLE_5), (8, TABLE_8)):
        for model, features, value in table:
            yield _probe(number, model, _linear(IMAGENET, features), value)
    for model, data, value in TABLE_7:
        yield _probe(7, model, _linear(data), value)


def _table_9() -> Iterator[Published]:
    for model, values in TABLE_9.items():
        of_model = CLIP_PUBLISHED if model == CLIP else ALIGN_TEXT_PUBLISHED
        for (data, score), value in zip(TABLE_9_COLUMNS, values, strict=True):
            if value is not None:
                protocol = of_model.replace(data=data)
                yield _percent(9, model, "align-text", protocol, score, value)


def _table_11() -> Iterator[Published]:
    imagenet = FINETUNE.replace(data=IMAGENET, train_scale=IMAGENET_TRAIN_SCALE)
    ade20k = SEGMENTATION_FINETUNE_ADE20K
    for model, (accuracy, miou) in TABLE_11.items():
        yield _percent(11, model, "finetune", imagenet, "accuracy", accuracy)
        yield _percent(11, model, "segmentation", ade20k, "mIoU", miou)


def _community() -> Iterator[Published]:
    for model, values in COMMUNITY.items():
        for protocol, value in zip(COMMUNITY_COLUMNS, values, strict=True):
            scores = {"mIoU": value / 100}
            yield Published(model, "segmentation", protocol, scores, DINOV2)


def _cause() -> Iterator[Published]:
    for model, pairs in CAUSE_TABLE.items():
        for data, (miou, accuracy) in zip(CAUSE_SETS, pairs, strict=True):
            # Patches of 14 px do not fill 320.
            crop = 322 if model.endswith("/14") else CAUSE_PUBLISHED.crop
            protocol = CAUSE_PUBLISHED.replace(data=data, crop=crop)
            scores = {"mIoU": miou / 100, "accuracy": accuracy / 100}
            yield Published(model, "unsupervised-segmentation", protocol, scores, CAUSE)


def _spot() -> Iterator[Published]:
    for data, (classes, *values) in SPOT_TABLE.items():
        protocol = SPOT_PUBLISHED.replace(data=data, classes=classes)
        scores = dict(zip(("mbo_i", "mbo_c"), (v / 100 for v in values), strict=True))
        yield Published("SPOT ViT-B/16", "discover", protocol, scores, SPOT)


def _hummingbird() -> Iterator[Published]:
    for model, values in HUMMINGBIRD_TABLE.items():
        side = 504 if model.endswith("/14") else HUMMINGBIRD_PUBLISHED.crop
        for bank, value in zip(HUMMINGBIRD_BANKS, values, strict=True):
            protocol = HUMMINGBIRD_PUBLISHED.replace(bank=bank, resize=side, crop=side)
            scores = {"mIoU": value / 100}
            yield Published(model, "in-context", protocol, scores, HUMMINGBIRD)
