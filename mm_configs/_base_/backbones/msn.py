# ViT-B/16 of MSN (https://arxiv.org/abs/2204.07141), ImageNet-1K, 600 epochs, the
# target encoder.
baseline = dict(
    name="MSN ViT-B",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(checkpoint="checkpoints/vitb16_600ep.pth.tar"),
        ),
    ),
)
