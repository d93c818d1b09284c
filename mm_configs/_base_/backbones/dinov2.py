# ViT-B/14 of DINOv2 (https://arxiv.org/abs/2304.07193), LVD-142M, without registers.
# The crop of 512 px is padded to 518 px, the size of its position table.
baseline = dict(
    name="DINOv2 ViT-B",
    model=dict(
        backbone=dict(
            num_queries=0,
            model_name="vit_base_patch14_dinov2",
            img_size=518,
            init_values=1.0,
            norm_eps=1e-6,
            init_cfg=dict(checkpoint="checkpoints/dinov2_vitb14_pretrain.pth"),
        ),
    ),
)
