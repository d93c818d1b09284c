# ViT-H/14 of STELLAR (https://arxiv.org/abs/2602.01905).
baseline = dict(
    name="STELLAR ViT-H",
    model=dict(
        backbone=dict(init_cfg=dict(checkpoint="checkpoints/stellar-h16")),
        decode_head=dict(in_channels=1280),
    ),
)
