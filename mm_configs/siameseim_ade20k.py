# stellar_ade20k.py with the ViT-B of SiameseIM.
_base_ = ["./stellar_ade20k.py", "./_base_/backbones/siameseim.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
