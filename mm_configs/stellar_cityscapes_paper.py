# The paper's linear probe of STELLAR-B on Cityscapes: 33 raw label ids instead of 19
# train ids. In *_gtFine_labelIds.png 0 is "unlabeled" and ignored; id i becomes class
# i - 1. License plates (id -1) are not drawn in these files.
_base_ = ["./_base_/stellar_paper.py", "mmseg::_base_/default_runtime.py"]

# Ids 1 to 33.
classes = [
    "ego vehicle",
    "rectification border",
    "out of roi",
    "static",
    "dynamic",
    "ground",
    "road",
    "sidewalk",
    "parking",
    "rail track",
    "building",
    "wall",
    "fence",
    "guard rail",
    "bridge",
    "tunnel",
    "pole",
    "polegroup",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "caravan",
    "trailer",
    "train",
    "motorcycle",
    "bicycle",
]
dataset = dict(
    type="BaseSegDataset",
    data_root="data/cityscapes",
    img_suffix="_leftImg8bit.png",
    seg_map_suffix="_gtFine_labelIds.png",
    metainfo=dict(classes=classes),
)
train_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="leftImg8bit/train", seg_map_path="gtFine/train"),
    )
)
val_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
    )
)
test_dataloader = val_dataloader
model = dict(decode_head=dict(num_classes=33))
log_processor = dict(by_epoch=True)
evaluation = dict(data="Cityscapes", protocol="SEGMENTATION_PAPER_CITYSCAPES")
