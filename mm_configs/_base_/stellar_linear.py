# The community's linear probe, as DINOv2 defined it (https://arxiv.org/abs/2304.07193):
# the last block's patch features, frozen -> BatchNorm -> 1 x 1 convolution, 40k
# iterations of batch 16. A shorter run: --cfg-options train_cfg.max_iters=400; warm-up
# and decay follow, and the last iteration is validated and saved.
# A config adds a dataset, its number of classes, train_dataloader.batch_size and the
# names of its result (evaluation), and lists this base first: see below.

# The bases that follow are named "mmseg::...", which the maintained fork of mmengine
# resolves only after this import. (A statement would make mmengine take the file for
# one of its pure Python configs; names with two underscores do not become options.)
__import__("stellar_plugin.mmseg")
custom_imports = dict(imports=["stellar_plugin.mmseg"], allow_failed_imports=False)

model = dict(
    type="EncoderDecoder",
    # ImageNet's mean and std times 255, what STELLAR is pretrained with.
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        # Sizes, heads and queries are the checkpoint's; a model of another width needs
        # model.decode_head.in_channels as well.
        type="StellarViT",
        frozen=True,
        # Another one: --cfg-options model.backbone.init_cfg.checkpoint=PATH
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/stellar-b16"),
    ),
    decode_head=dict(
        type="LinearProbeHead",
        in_channels=768,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    train_cfg=dict(),
    test_cfg=dict(
        mode="slide",
        crop_size=(512, 512),
        stride=(341, 341),
    ),
)
# Synchronises BatchNorm when, and only when, the run is distributed.
sync_bn = "torch"

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(
        type="AdamW",
        lr=1e-3,
        weight_decay=1e-4,
    ),
)
# The two multiply: linear decay from the first iteration, scaled up in the first 1500.
# Neither says where it ends: mmengine takes train_cfg.max_iters.
param_scheduler = [
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, by_epoch=False),
    dict(
        type="WarmUpLR",
        fraction=1500 / 40000,
        begin=0,
        by_epoch=False,
    ),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=4000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="CheckpointHook", by_epoch=False, interval=4000, max_keep_ckpts=1
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
# The first writes result.json; by the second, --resume follows this config and not the
# one that the checkpoint was trained with.
custom_hooks = [dict(type="SegmentationResultHook"), dict(type="ResumeByConfigHook")]
# protocol is a constant of stellar_plugin.protocols.
evaluation = dict(model="STELLAR ViT-B", protocol="SEGMENTATION")
