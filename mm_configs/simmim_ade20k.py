# stellar_ade20k.py with the Swin-B of SimMIM.
_base_ = ["./stellar_ade20k.py", "./_base_/backbones/simmim.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
