# ResNet-50 of DenseCL (https://arxiv.org/abs/2011.09157), ImageNet-1K, 200 epochs; its
# last map has a cell per 32 px.
baseline = dict(
    name="DenseCL RN-50",
    model=dict(
        backbone=dict(
            type="PretrainedNetwork",
            init_cfg=dict(checkpoint="checkpoints/densecl_r50_imagenet_200ep.pth"),
        ),
        decode_head=dict(in_channels=2048),
    ),
)
