# stellar_cityscapes_paper.py with the RN-50 of BYOL.
_base_ = ["./stellar_cityscapes_paper.py", "./_base_/backbones/byol.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
