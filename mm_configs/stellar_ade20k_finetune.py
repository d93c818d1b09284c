# Fine-tuning of STELLAR-B on ADE20K by the paper's protocol.
_base_ = "./stellar_ade20k_paper.py"

model = dict(backbone=dict(frozen=False))
train_cfg = dict(max_epochs=75)
evaluation = dict(protocol="SEGMENTATION_FINETUNE_ADE20K")
