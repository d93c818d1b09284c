# Linear probe of STELLAR-B on ADE20K, 150 classes.
_base_ = [
    "./_base_/stellar_linear.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
]
__protocol = __import__("stellar_plugin.protocols", fromlist=["_"]).SEGMENTATION_ADE20K

model = dict(decode_head=dict(num_classes=__protocol.num_classes))
# Per GPU: divide by their number, 16 altogether is the protocol.
train_dataloader = dict(batch_size=__protocol.batch_sizes[0])
evaluation = dict(data=__protocol.data, protocol="SEGMENTATION_ADE20K")
