# Linear probe of STELLAR-B on Pascal VOC 2012, 21 classes with background, trained on
# the 1464 images of its own training split (not the augmented set).
_base_ = [
    "./_base_/stellar_linear.py",
    "mmseg::_base_/datasets/pascal_voc12.py",
    "mmseg::_base_/default_runtime.py",
]

model = dict(decode_head=dict(num_classes=21))
# Per GPU: divide by their number, 16 altogether is the protocol.
train_dataloader = dict(batch_size=16)
val_evaluator = dict(type="CountedIoUMetric")
test_evaluator = val_evaluator
evaluation = dict(data="Pascal VOC 2012", protocol="SEGMENTATION_VOC")
