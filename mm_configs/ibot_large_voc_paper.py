# stellar_voc_paper.py with the ViT-L of iBOT.
_base_ = ["./stellar_voc_paper.py", "./_base_/backbones/ibot_large.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
