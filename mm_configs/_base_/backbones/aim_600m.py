# AIM of 600M parameters and patches of 14 px (https://arxiv.org/abs/2401.08541),
# trained on 2 billion images.
baseline = dict(
    name="AIM 600M",
    model=dict(
        backbone=dict(
            num_queries=0,
            norm_eps=1e-6,
            init_cfg=dict(
                checkpoint="checkpoints/aim_600m_2bimgs_attnprobe_backbone.pth"
            ),
        ),
        decode_head=dict(in_channels=1536),
    ),
)
