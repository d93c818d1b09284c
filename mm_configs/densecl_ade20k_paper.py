# stellar_ade20k_paper.py with the RN-50 of DenseCL.
_base_ = ["./stellar_ade20k_paper.py", "./_base_/backbones/densecl.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
