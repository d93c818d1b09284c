# ResNet-50 of BYOL (https://arxiv.org/abs/2006.07733), ImageNet-1K, 200 epochs, as
# mmselfsup trained it; its last map has a cell per 32 px.
baseline = dict(
    name="BYOL RN-50",
    model=dict(
        backbone=dict(
            type="PretrainedNetwork",
            init_cfg=dict(
                checkpoint="checkpoints/byol_resnet50_16xb256-coslr-200e_in1k_20220825"
                "-de817331.pth"
            ),
        ),
        decode_head=dict(in_channels=2048),
    ),
)
