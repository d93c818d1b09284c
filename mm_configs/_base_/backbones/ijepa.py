# ViT-H/14 of I-JEPA (https://arxiv.org/abs/2301.08243), ImageNet-1K, 300 epochs, the
# target encoder.
baseline = dict(
    name="I-JEPA ViT-H",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(checkpoint="checkpoints/IN1K-vit.h.14-300e.pth.tar"),
        ),
        decode_head=dict(in_channels=1280),
    ),
)
