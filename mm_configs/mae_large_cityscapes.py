# stellar_cityscapes.py with the ViT-L of MAE.
_base_ = ["./stellar_cityscapes.py", "./_base_/backbones/mae_large.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
