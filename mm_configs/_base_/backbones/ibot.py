# ViT-B/16 of iBOT (https://arxiv.org/abs/2111.07832), ImageNet-1K, the teacher. The
# file is called checkpoint_teacher.pth for every size of iBOT.
baseline = dict(
    name="iBOT ViT-B",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            pos_antialias=False,  # its files do not tell it
            init_cfg=dict(checkpoint="checkpoints/checkpoint_teacher.pth"),
        ),
    ),
)
