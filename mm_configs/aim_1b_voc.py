# stellar_voc.py with the 1B of AIM.
_base_ = ["./stellar_voc.py", "./_base_/backbones/aim_1b.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
