# stellar_voc.py with the ViT-B of DINOv2.
_base_ = ["./stellar_voc.py", "./_base_/backbones/dinov2.py"]

model = dict(backbone=_base_.baseline.backbone)
evaluation = dict(model=_base_.baseline.name)
