# stellar_ade20k.py with the ViT-L of iBOT.
_base_ = ["./stellar_ade20k.py", "./_base_/backbones/ibot_large.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
