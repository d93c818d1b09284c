# The paper's linear probe of STELLAR-B on Pascal VOC 2012: 20 classes, background is
# ignored. Not to be compared with the 21 classes of stellar_voc.py.
_base_ = ["./_base_/stellar_paper.py", "mmseg::_base_/default_runtime.py"]
__mmseg = __import__("mmseg.utils", fromlist=["_"])

dataset = dict(
    type="BaseSegDataset",
    data_root="data/VOCdevkit/VOC2012",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    metainfo=dict(classes=__mmseg.voc_classes()[1:], palette=__mmseg.voc_palette()[1:]),
)
train_dataloader = dict(
    dataset=dict(**dataset, ann_file="ImageSets/Segmentation/train.txt")
)
val_dataloader = dict(
    dataset=dict(**dataset, ann_file="ImageSets/Segmentation/val.txt")
)
test_dataloader = val_dataloader
model = dict(decode_head=dict(num_classes=20))
log_processor = dict(by_epoch=True)
evaluation = dict(data="Pascal VOC 2012", protocol="SEGMENTATION_PAPER_VOC")
