"""Protocols of semantic segmentation, which mm_configs/ follow."""

from __future__ import annotations

from dataclasses import dataclass

from stellar_plugin.protocols.base import NOT_TOLD, CropProtocol, Protocol


@dataclass(frozen=True, kw_only=True)
class SegmentationProtocol(Protocol):
    """A head, or everything, is trained to segment.

    What is None a config goes without: it counts epochs or iterations, it cuts windows
    or whole images.
    """

    split: str = ""
    features: str
    resize: int | None
    crop: int | None
    longest: int | None = None
    stride: int | None = None
    train_views: str
    train_scale: tuple[float, float] | None = None
    train_ratio: tuple[float, float] | None = None
    test_views: str | None = None
    inference: str
    label_resolution: str
    classes: str = ""
    num_classes: int | None = None
    head: str
    backbone: str
    loss: str
    optimizer: str
    lrs: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    weight_decay: float | None
    clip: float | None = None
    epochs: int | None = None
    iterations: int | None = None
    warmup: int | None = None
    schedule: str
    averaging: str
    evaluation_batch: int | None = None
    rule: str | None = None


SEGMENTATION = SegmentationProtocol(
    name="segmentation",
    source="DINOv2 section 7.4, as mmsegmentation reads the sets",
    features="dense",
    resize=512,
    longest=2048,
    crop=512,
    stride=341,
    train_views="resize by train_ratio, random crop (one class fills 75 % of it at "
    "most), flip, photometric distortion",
    train_ratio=(0.5, 2.0),
    inference="sliding window",
    label_resolution="of the original image",
    head="BatchNorm, 1 x 1 convolution",
    backbone="frozen",
    loss="cross-entropy",
    optimizer="AdamW",
    lrs=(1e-3,),
    batch_sizes=(16,),
    weight_decay=1e-4,
    iterations=40_000,
    warmup=1_500,
    schedule="linear to 0, after linear warm-up",
    averaging="IoU of each class over all pixels of the set, mean over classes",
)
SEGMENTATION_ADE20K = SEGMENTATION.replace(
    data="ADE20K",
    split="training / validation",
    classes="150, label 0 is ignored",
    num_classes=150,
)
SEGMENTATION_CITYSCAPES = SEGMENTATION.replace(
    data="Cityscapes",
    split="train / val, fine annotations",
    resize=1024,
    classes="19 train ids, all other labels are ignored",
    num_classes=19,
)
SEGMENTATION_VOC = SEGMENTATION.replace(
    data="Pascal VOC 2012",
    split="train (1464 images) / val",
    classes="20 and background",
    num_classes=21,
)
PAPER_CELL = 16  # side of a cell of the patch grid of ViT-B/16, in px


def patch_grid(cell: int | None) -> str:
    """The label resolution of the paper's protocol.

    Args:
        cell:
            Side of a cell of the model's map in px, None if it is not told.
    """
    grid = "patch grid, nearest"
    size = f"{cell} px" if cell else f"a size {NOT_TOLD}"
    return grid if cell == PAPER_CELL else f"{grid}; cells of {size}"


SEGMENTATION_PAPER = SegmentationProtocol(
    name="segmentation-paper",
    source="STELLAR appendix A.2 and its public recipe; not exactly reproducible: the "
    "score depends on the evaluation batch and the order of images; weight decay, "
    "training batch and training on the whole training set are our choice",
    features="dense",
    resize=256,
    crop=224,
    train_views="random resized crop, flip",
    train_scale=(0.5, 1.0),
    inference="centre crop",
    label_resolution=patch_grid(PAPER_CELL),
    classes="label 0 is ignored, the others are shifted down by one",
    head="BatchNorm, 1 x 1 convolution",
    backbone="frozen",
    loss="cross-entropy + Dice, weights 1 and 1",
    optimizer="AdamW",
    lrs=(1e-4,),
    batch_sizes=(2048,),
    weight_decay=1e-4,
    epochs=80,
    schedule="constant",
    averaging="Jaccard of each batch, mean over the classes in its labels or "
    "predictions; mean over images",
    evaluation_batch=2048,
)
SEGMENTATION_PAPER_ADE20K = SEGMENTATION_PAPER.replace(
    data="ADE20K",
    split=SEGMENTATION_ADE20K.split,
    train_scale=(0.25, 1.0),
    num_classes=150,
)
SEGMENTATION_PAPER_CITYSCAPES = SEGMENTATION_PAPER.replace(
    data="Cityscapes",
    split=SEGMENTATION_CITYSCAPES.split,
    classes="raw label ids, 0 is ignored, 1 to 33 are shifted down by one",
    num_classes=33,
)
SEGMENTATION_PAPER_VOC = SEGMENTATION_PAPER.replace(
    data="Pascal VOC 2012",
    split=SEGMENTATION_VOC.split,
    classes="20; background and void are ignored, the others shifted down by one",
    num_classes=20,
)
_TRAINED = {"name": "segmentation-finetune", "backbone": "trained", "epochs": 75}
SEGMENTATION_FINETUNE_ADE20K = SEGMENTATION_PAPER_ADE20K.replace(**_TRAINED)
SEGMENTATION_FINETUNE_CITYSCAPES = SEGMENTATION_PAPER_CITYSCAPES.replace(**_TRAINED)
SEGMENTATION_FINETUNE_VOC = SEGMENTATION_PAPER_VOC.replace(**_TRAINED)


@dataclass(frozen=True, kw_only=True)
class InContextProtocol(CropProtocol):
    """Nothing is trained: patches of training images tell the classes of others."""

    split: str
    features: str
    train_views: str
    inference: str
    label_resolution: str
    classes: str = ""
    num_classes: int | None = None
    bank: int
    neighbours: int
    temperature: float
    epochs: int
    averaging: str
    rule: str


IN_CONTEXT = InContextProtocol(
    name="in-context",
    source="Hummingbird, https://arxiv.org/abs/2306.01667: neighbours, softmax and "
    "size of the bank; images of the model's own size, training images as "
    "they are and exact neighbours are our choice",
    split="bank: training set; queries: test set",
    features="dense",
    resize=224,
    crop=224,
    train_views="the same crops as at test time",
    inference="centre crop; label distributions of patches, resized bilinearly to px, "
    "the largest share",
    label_resolution="px of the crop, labels resized nearest",
    bank=10_240_000,
    neighbours=30,
    temperature=0.02,
    epochs=1,
    averaging="IoU of each class over all px of the set, mean over the classes that "
    "labels or predictions have",
    rule="of each training image bank / images patches, drawn by the seed: the least "
    "of uniform numbers times how many patches of the image have the classes of the "
    "patch; a patch has the shares of the classes among its px; cosine similarity, "
    "features in half precision; neighbours count with exp(similarity / temperature); "
    "ignored px count nowhere, and patches of those alone are not kept",
)
