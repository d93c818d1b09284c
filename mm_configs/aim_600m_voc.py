# stellar_voc.py with the 600M of AIM.
_base_ = ["./stellar_voc.py", "./_base_/backbones/aim_600m.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
