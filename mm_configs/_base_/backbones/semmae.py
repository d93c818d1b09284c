# ViT-B/16 of SemMAE (https://arxiv.org/abs/2206.10207), ImageNet-1K, 800 epochs. Where
# it is published the file has no name.
baseline = dict(
    name="SemMAE ViT-B",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(checkpoint="checkpoints/semmae_vit_base_patch16.pth"),
        ),
    ),
)
