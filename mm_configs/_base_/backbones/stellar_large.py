# ViT-L/16 of STELLAR (https://arxiv.org/abs/2602.01905).
baseline = dict(
    name="STELLAR ViT-L",
    model=dict(
        backbone=dict(init_cfg=dict(checkpoint="checkpoints/stellar-l16")),
        decode_head=dict(in_channels=1024),
    ),
)
