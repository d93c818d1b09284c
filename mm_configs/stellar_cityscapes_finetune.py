# Fine-tuning of STELLAR-B on Cityscapes by the paper's protocol.
_base_ = "./stellar_cityscapes_paper.py"

model = dict(backbone=dict(frozen=False))
train_cfg = dict(max_epochs=75)
evaluation = dict(protocol="SEGMENTATION_FINETUNE_CITYSCAPES")
