# ViT-B/16 of DINO (https://arxiv.org/abs/2104.14294), ImageNet-1K. Its B/8:
# --cfg-options model.backbone.patch_size=8
#     model.backbone.init_cfg.checkpoint=checkpoints/dino_vitbase8_pretrain.pth
baseline = dict(
    name="DINO ViT-B",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            pos_antialias=False,  # its files do not tell it
            init_cfg=dict(checkpoint="checkpoints/dino_vitbase16_pretrain.pth"),
        ),
    ),
)
