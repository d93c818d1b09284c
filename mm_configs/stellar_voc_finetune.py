# Fine-tuning of STELLAR-B on Pascal VOC 2012 by the paper's protocol.
_base_ = "./stellar_voc_paper.py"
__protocols = __import__("stellar_plugin.protocols", fromlist=["_"])
__protocol = __protocols.SEGMENTATION_FINETUNE_VOC

model = dict(backbone=dict(frozen=False))
train_cfg = dict(max_epochs=__protocol.epochs)
evaluation = dict(protocol="SEGMENTATION_FINETUNE_VOC")
