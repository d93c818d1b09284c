# stellar_ade20k_paper.py with the ViT-B of MSN.
_base_ = ["./stellar_ade20k_paper.py", "./_base_/backbones/msn.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
