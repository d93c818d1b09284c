# Linear probe of STELLAR-B on ADE20K, 150 classes.
_base_ = [
    "./_base_/stellar_linear.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
]

model = dict(decode_head=dict(num_classes=150))
# Per GPU: divide by their number, 16 altogether is the protocol.
train_dataloader = dict(batch_size=16)
val_evaluator = dict(type="CountedIoUMetric")
test_evaluator = val_evaluator
evaluation = dict(data="ADE20K", protocol="SEGMENTATION_ADE20K")
