# stellar_cityscapes_paper.py with the 600M of AIM.
_base_ = ["./stellar_cityscapes_paper.py", "./_base_/backbones/aim_600m.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
