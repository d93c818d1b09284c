# stellar_cityscapes_paper.py with the ViT-H of MAE.
_base_ = ["./stellar_cityscapes_paper.py", "./_base_/backbones/mae_huge.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
