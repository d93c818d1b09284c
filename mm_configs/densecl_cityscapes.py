# stellar_cityscapes.py with the RN-50 of DenseCL.
_base_ = ["./stellar_cityscapes.py", "./_base_/backbones/densecl.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
