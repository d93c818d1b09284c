# stellar_cityscapes.py with the ViT-B of SemMAE.
_base_ = ["./stellar_cityscapes.py", "./_base_/backbones/semmae.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
