# Linear probe of STELLAR-B on Cityscapes, 19 classes.
_base_ = [
    "./_base_/stellar_linear.py",
    "mmseg::_base_/datasets/cityscapes.py",
    "mmseg::_base_/default_runtime.py",
]

# mmseg's pipeline with the protocol's crop of 512 x 512 instead of 512 x 1024.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        type="RandomResize",
        scale=(2048, 1024),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(
        type="RandomCrop",
        crop_size=(512, 512),
        cat_max_ratio=0.75,
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]

model = dict(decode_head=dict(num_classes=19))
# Per GPU: divide by their number, 16 altogether is the protocol.
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(type="CountedIoUMetric")
test_evaluator = val_evaluator
evaluation = dict(data="Cityscapes", protocol="SEGMENTATION_CITYSCAPES")
