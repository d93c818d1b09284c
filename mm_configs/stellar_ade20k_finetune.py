# Fine-tuning of STELLAR-B on ADE20K by the paper's protocol.
_base_ = "./stellar_ade20k_paper.py"
__protocols = __import__("stellar_plugin.protocols", fromlist=["_"])
__protocol = __protocols.SEGMENTATION_FINETUNE_ADE20K

model = dict(backbone=dict(frozen=False))
train_cfg = dict(max_epochs=__protocol.epochs)
evaluation = dict(protocol="SEGMENTATION_FINETUNE_ADE20K")
