# stellar_cityscapes_paper.py with the ViT-L of STELLAR.
_base_ = ["./stellar_cityscapes_paper.py", "./_base_/backbones/stellar_large.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
