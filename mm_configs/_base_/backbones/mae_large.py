# ViT-L/16 of MAE (https://arxiv.org/abs/2111.06377), ImageNet-1K, 1600 epochs.
baseline = dict(
    name="MAE ViT-L",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(checkpoint="checkpoints/mae_pretrain_vit_large.pth"),
        ),
        decode_head=dict(in_channels=1024),
    ),
)
