# stellar_ade20k_paper.py with the ViT-H of I-JEPA.
_base_ = ["./stellar_ade20k_paper.py", "./_base_/backbones/ijepa.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
