# stellar_voc.py with the ViT-B of DINOv2.
_base_ = ["./stellar_voc.py", "./_base_/backbones/dinov2.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
