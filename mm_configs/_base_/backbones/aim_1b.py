# AIM of 1B parameters and patches of 14 px (https://arxiv.org/abs/2401.08541),
# trained on 5 billion images.
baseline = dict(
    name="AIM 1B",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(
                checkpoint="checkpoints/aim_1b_5bimgs_attnprobe_backbone.pth"
            ),
        ),
        decode_head=dict(in_channels=2048),
    ),
)
