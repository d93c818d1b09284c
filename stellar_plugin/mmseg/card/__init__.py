"""The protocol card and the provenance of a run of mmsegmentation.

`card.py` puts cards together, of what `data.py`, `transforms.py`, `model.py`,
`training.py` and `metric.py` read of the objects that mmengine built (`built.py`);
`described.py` puts objects into words, `reading.py` goes on where one cannot be read,
`names.py` has what the config says itself. `stages.py` follows the training's part of a
card through checkpoints; `provenance.py` has weights, images, precision and versions.
"""
