# Linear probe on low-rank features of the demo's digit boards: 60 x 60 px, 11 classes,
# in ADE20K's folder layout. Made for a tiny encoder and a minute of CPU.
_base_ = ["./_base_/stellar_linear.py", "mmseg::_base_/default_runtime.py"]

# The demo's own boards and encoder; other ones by
# --cfg-options train_dataloader.dataset.data_root=PATH
#     val_dataloader.dataset.data_root=PATH test_dataloader.dataset.data_root=PATH
#     model.backbone.init_cfg.checkpoint=PATH
data_root = "runs/demo/ade20k"
checkpoint = "runs/demo/checkpoint"

# Value 0 of a label image is "ignored", 1 is background, 2 + d is digit d.
metainfo = dict(
    classes=["background", *(str(digit) for digit in range(10))],
    palette=[
        [0, 0, 0],
        [230, 25, 75],
        [60, 180, 75],
        [255, 225, 25],
        [0, 130, 200],
        [245, 130, 48],
        [145, 30, 180],
        [70, 240, 240],
        [240, 50, 230],
        [210, 245, 60],
        [250, 190, 212],
    ],
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=metainfo,
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    pipeline=test_pipeline,
)
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(
            img_path="images/training", seg_map_path="annotations/training"
        ),
    ),
)
val_dataloader = dict(
    batch_size=25,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(
            img_path="images/validation", seg_map_path="annotations/validation"
        ),
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CountedIoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

model = dict(
    data_preprocessor=dict(size=(60, 60)),
    backbone=dict(
        model_name="stellar_vit_tiny_patch16_224",
        num_queries=8,
        feature="lowrank",
        img_size=60,
        patch_size=12,
        embed_dim=96,
        depth=4,
        num_heads=3,
        init_cfg=dict(checkpoint=checkpoint),
    ),
    decode_head=dict(in_channels=96, num_classes=11),
    test_cfg=dict(_delete_=True, mode="whole"),
)

optim_wrapper = dict(optimizer=dict(lr=1e-2))
param_scheduler = [
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, by_epoch=False),
    dict(type="WarmUpLR", fraction=0.1, begin=0, by_epoch=False),
]
train_cfg = dict(max_iters=300, val_interval=300)
default_hooks = dict(checkpoint=dict(interval=300))
evaluation = dict(
    model="STELLAR of the demo",
    data="digit boards",
    changes=dict(
        source="the demo",
        classes="digits and background, label 0 is ignored",
    ),
)
