"""Protocols: how images are cut, labels read, heads trained and scores averaged.

Every rule of evaluation has its one place here, in a module per family. Commands, the
cards stored with scores and the documentation take their values from it; mmseg configs
are held equal to it by a test.
"""

from stellar_plugin.protocols.base import (
    CARD_FIELDS,
    FEATURES,
    CropProtocol,
    Protocol,
    RandomCropProtocol,
    TrainedProtocol,
    card_digest,
)
from stellar_plugin.protocols.classification import (
    FINETUNE,
    FINETUNE_WARMUP,
    HELD_OUT,
    HELD_OUT_SEED,
    IMAGENET_TRAIN_SCALE,
    KNN,
    LINEAR,
    LINEAR_PAPER,
    AugmentedClassifierProtocol,
    ClassifierProtocol,
    KNNProtocol,
)
from stellar_plugin.protocols.efficiency import EFFICIENCY, EfficiencyProtocol
from stellar_plugin.protocols.pictures import (
    CONCEPTS,
    VISUALIZE,
    ConceptsProtocol,
    VisualizeProtocol,
)
from stellar_plugin.protocols.probing import (
    EQUIVARIANCE,
    EQUIVARIANCE_SHIFTS,
    RANK,
    STABILITY,
    STABILITY_SCALES,
    WHERE,
    EquivarianceProtocol,
    RankProtocol,
    StabilityProtocol,
    WhereProtocol,
)
from stellar_plugin.protocols.reconstruction import (
    FID_IMAGES,
    MOST_PSNR_DB,
    RECONSTRUCTION,
    RECONSTRUCTION_FINETUNED,
    RECONSTRUCTION_SCRATCH,
    DecoderProtocol,
    ReconstructionProtocol,
)
from stellar_plugin.protocols.segmentation import (
    SEGMENTATION,
    SEGMENTATION_ADE20K,
    SEGMENTATION_CITYSCAPES,
    SEGMENTATION_FINETUNE_ADE20K,
    SEGMENTATION_FINETUNE_CITYSCAPES,
    SEGMENTATION_FINETUNE_VOC,
    SEGMENTATION_PAPER,
    SEGMENTATION_PAPER_ADE20K,
    SEGMENTATION_PAPER_CITYSCAPES,
    SEGMENTATION_PAPER_VOC,
    SEGMENTATION_VOC,
    SegmentationProtocol,
)
from stellar_plugin.protocols.text import (
    ALIGN_TEXT,
    ALIGN_TEXT_MOST_SCALE,
    ALIGN_TEXT_WARMUP,
    AlignTextProtocol,
)
