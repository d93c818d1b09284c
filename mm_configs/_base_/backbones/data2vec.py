# ViT-B/16 of data2vec (https://arxiv.org/abs/2202.03555), ImageNet-1K, 800 epochs. Its
# biases are resampled to the size of the image.
baseline = dict(
    name="Data2Vec ViT-B",
    model=dict(
        backbone=dict(
            type="PretrainedNetwork",
            init_cfg=dict(checkpoint="checkpoints/base_800/checkpoint-799.pth"),
        ),
    ),
)
