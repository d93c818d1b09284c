# stellar_voc.py with the ViT-B of SemMAE.
_base_ = ["./stellar_voc.py", "./_base_/backbones/semmae.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
