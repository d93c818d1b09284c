# Swin-B of SimMIM (https://arxiv.org/abs/2111.09886), ImageNet-1K at 192 px, 800
# epochs; its last map has a cell per 32 px.
baseline = dict(
    name="SimMIM Swin-B",
    model=dict(
        backbone=dict(
            type="PretrainedNetwork",
            init_cfg=dict(
                checkpoint="checkpoints/simmim_pretrain__swin_base__img192_window6"
                "__800ep.pth"
            ),
        ),
        decode_head=dict(in_channels=1024),
    ),
)
