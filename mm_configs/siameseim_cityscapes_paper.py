# stellar_cityscapes_paper.py with the ViT-B of SiameseIM.
_base_ = ["./stellar_cityscapes_paper.py", "./_base_/backbones/siameseim.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
