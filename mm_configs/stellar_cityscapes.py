# Linear probe of STELLAR-B on Cityscapes, 19 classes.
_base_ = [
    "./_base_/stellar_linear.py",
    "mmseg::_base_/datasets/cityscapes.py",
    "mmseg::_base_/default_runtime.py",
]
__protocols = __import__("stellar_plugin.protocols", fromlist=["_"])
__protocol = __protocols.SEGMENTATION_CITYSCAPES

# mmseg's pipeline with the protocol's crop of 512 x 512 instead of 512 x 1024.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        type="RandomResize",
        scale=(__protocol.longest, __protocol.resize),
        ratio_range=__protocol.train_ratio,
        keep_ratio=True,
    ),
    dict(
        type="RandomCrop",
        crop_size=(__protocol.crop, __protocol.crop),
        cat_max_ratio=0.75,
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]

model = dict(decode_head=dict(num_classes=__protocol.num_classes))
# Per GPU: divide by their number, 16 altogether is the protocol.
train_dataloader = dict(
    batch_size=__protocol.batch_sizes[0], dataset=dict(pipeline=train_pipeline)
)
evaluation = dict(data=__protocol.data, protocol="SEGMENTATION_CITYSCAPES")
