# stellar_cityscapes.py with the ViT-H of I-JEPA.
_base_ = ["./stellar_cityscapes.py", "./_base_/backbones/ijepa.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
