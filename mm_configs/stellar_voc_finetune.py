# Fine-tuning of STELLAR-B on Pascal VOC 2012 by the paper's protocol.
_base_ = "./stellar_voc_paper.py"

model = dict(backbone=dict(frozen=False))
train_cfg = dict(max_epochs=75)
evaluation = dict(protocol="SEGMENTATION_FINETUNE_VOC")
