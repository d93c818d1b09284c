# ViT-B/16 of MoCo v3 (https://arxiv.org/abs/2104.02057), ImageNet-1K, 300 epochs.
baseline = dict(
    name="MoCo v3 ViT-B",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(checkpoint="checkpoints/vit-b-300ep.pth.tar"),
        ),
    ),
)
