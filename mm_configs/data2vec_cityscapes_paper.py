# stellar_cityscapes_paper.py with the ViT-B of Data2Vec.
_base_ = ["./stellar_cityscapes_paper.py", "./_base_/backbones/data2vec.py"]

model = _base_.baseline.model
evaluation = dict(model=_base_.baseline.name)
