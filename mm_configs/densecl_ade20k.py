# stellar_ade20k.py with the RN-50 of DenseCL.
_base_ = ["./stellar_ade20k.py", "./_base_/backbones/densecl.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
