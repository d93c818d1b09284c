# The linear probe of STELLAR's paper (https://arxiv.org/abs/2602.01905, appendix A.2)
# and its public recipe: crops of 224 px, logits and labels compared on the patch grid,
# Dice beside cross-entropy, 80 epochs of batch 2048. Its numbers are not the
# community's (stellar_linear.py) and not exactly reproducible: docs/segmentation.md.
# A shorter run: --cfg-options train_cfg.max_epochs=8.
# Only what differs from the community's probe stands here. A config adds folders and
# classes of a data set; label 0 is ignored on each, the others are shifted down by one.
_base_ = "./stellar_linear.py"

model = dict(
    type="PatchGridSegmentor",
    data_preprocessor=dict(size=(224, 224)),
    decode_head=dict(
        loss_decode=[
            dict(type="CrossEntropyLoss", loss_weight=1.0, avg_non_ignore=True),
            dict(type="LabelledDiceLoss", loss_weight=1.0),
        ],
    ),
    test_cfg=dict(_delete_=True, mode="whole"),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
param_scheduler = []  # constant
train_cfg = dict(
    _delete_=True,
    type="EpochBasedTrainLoop",
    max_epochs=80,
    val_interval=10,
)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=10),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        type="TorchvisionTransform",
        name="RandomResizedCrop",
        size=224,
        scale=(0.5, 1.0),
        interpolation="bicubic",
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        type="TorchvisionTransform",
        name="Resize",
        size=256,
        interpolation="bicubic",
    ),
    dict(type="TorchvisionTransform", name="CenterCrop", size=224),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    # Per GPU: divide by their number, 2048 altogether is the protocol.
    batch_size=2048,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(reduce_zero_label=True, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(reduce_zero_label=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="BatchJaccard", batch_size=2048)
test_evaluator = val_evaluator
evaluation = dict(protocol="SEGMENTATION_PAPER")
