# stellar_voc.py with the ViT-B of MAE.
_base_ = ["./stellar_voc.py", "./_base_/backbones/mae.py"]

model = dict(backbone=_base_.baseline.backbone)
evaluation = dict(model=_base_.baseline.name)
