# Linear probe of STELLAR-B on a data set of your own. To be copied and changed:
#     cp "$(stellar configs stellar_own_data)" my_data.py
#     mim train mmseg my_data.py
# docs/segmentation.md goes through it, from a folder to a score.
_base_ = [
    __import__("mm_configs").path("_base_/stellar_linear"),
    "mmseg::_base_/default_runtime.py",
]

# 1. The files: images/train/NAME.jpg has labels/train/NAME.png; the same for val.
data_root = "data/my_data"
img_suffix, seg_map_suffix = ".jpg", ".png"

# 2. The classes, and in the same order what stands for each of them in the label files:
# here masks of 0 and 255. One-based labels: values = [1, 2, ...]. Colours (red, green,
# blue): values = [[0, 0, 0], [128, 0, 0], ...]. Pixels that hold a value of ignored are
# neither trained on nor counted; here there is none.
classes = ["background", "object"]
values = [0, 255]
ignored = []

# 3. The two sizes, in pixels: the shorter side that images are resized to, and the side
# of the square window that the model sees at a time.
short_side = 512
window = 512

# 4. The names of the result in tables, and the weights that are probed.
evaluation = dict(model="STELLAR ViT-B", data="my data")
checkpoint = "checkpoints/stellar-b16"

load_labels = dict(type="LoadConvertedAnnotations", values=values, ignored=ignored)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    load_labels,
    dict(
        type="RandomResize",
        scale=(4 * short_side, short_side),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(type="RandomCrop", crop_size=(window, window), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
# Labels are loaded after the resize: scores are those of the images as they are.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(4 * short_side, short_side), keep_ratio=True),
    load_labels,
    dict(type="PackSegInputs"),
]
# What mim test --tta takes the mean over: six sizes, each as it is and flipped.
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(
                    type="Resize",
                    scale=(int(4 * short_side * ratio), int(short_side * ratio)),
                    keep_ratio=True,
                )
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [load_labels],
            [dict(type="PackSegInputs")],
        ],
    ),
]
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix=img_suffix,
    seg_map_suffix=seg_map_suffix,
)
train_dataloader = dict(
    # Per GPU: divide by their number, 16 altogether is the protocol.
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/train", seg_map_path="labels/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/val", seg_map_path="labels/val"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CountedIoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

model = dict(
    data_preprocessor=dict(size=(window, window)),
    backbone=dict(init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(num_classes=len(classes)),
    test_cfg=dict(
        crop_size=(window, window),
        stride=(2 * window // 3, 2 * window // 3),
    ),
)
