# ViT-L/16 of BEiT (https://arxiv.org/abs/2106.08254), ImageNet-22K. Its biases are
# resampled to the size of the image.
baseline = dict(
    name="BEiT ViT-L",
    model=dict(
        data_preprocessor=dict(
            mean=[127.5, 127.5, 127.5],
            std=[127.5, 127.5, 127.5],
        ),
        backbone=dict(
            type="PretrainedNetwork",
            init_cfg=dict(checkpoint="checkpoints/beit_large_patch16_224_pt22k.pth"),
        ),
        decode_head=dict(in_channels=1024),
    ),
)
