# stellar_ade20k.py with the 600M of AIM.
_base_ = ["./stellar_ade20k.py", "./_base_/backbones/aim_600m.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
