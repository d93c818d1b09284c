# ViT-B/16 of SiameseIM (https://arxiv.org/abs/2206.01204), ImageNet-1K, 1600 epochs.
baseline = dict(
    name="SiameseIM ViT-B",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            final_norm=False,  # it was trained without
            init_cfg=dict(checkpoint="checkpoints/sim_base_1600ep_pretrain.pth"),
        ),
    ),
)
