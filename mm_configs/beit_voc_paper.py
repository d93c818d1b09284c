# stellar_voc_paper.py with the ViT-B of BEiT.
_base_ = ["./stellar_voc_paper.py", "./_base_/backbones/beit.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
