# ViT-L/14 of DINOv2 (https://arxiv.org/abs/2304.07193), LVD-142M, without registers.
baseline = dict(
    name="DINOv2 ViT-L",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(checkpoint="checkpoints/dinov2_vitl14_pretrain.pth"),
        ),
        decode_head=dict(in_channels=1024),
    ),
)
