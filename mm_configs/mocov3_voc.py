# stellar_voc.py with the ViT-B of MoCo v3.
_base_ = ["./stellar_voc.py", "./_base_/backbones/mocov3.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
