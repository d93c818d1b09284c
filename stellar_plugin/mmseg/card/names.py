"""What a config calls its run: model, data and published protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.runner import Runner

from stellar_plugin.mmseg.card.built import built_datasets
from stellar_plugin.mmseg.card.described import joined
from stellar_plugin.mmseg.datasets import parts_of
from stellar_plugin.mmseg.weights import inner
from stellar_plugin.protocols import SegmentationProtocol, segmentation


def published(runner: Runner) -> SegmentationProtocol | None:
    """The published protocol that a config names, None where it names none."""
    said, _ = evaluation_names(runner)
    named = getattr(segmentation, str(said.get("protocol")), None)
    return named if isinstance(named, SegmentationProtocol) else None


def model_name(runner: Runner) -> str:
    """What the config calls the model, else the class of the backbone."""
    said, _ = evaluation_names(runner)
    backbone = getattr(inner(runner.model), "backbone", runner.model)
    return str(said.get("model") or type(backbone).__name__)


def data_name(runner: Runner) -> str:
    """What the config calls the data, else the class of the data set."""
    said, _ = evaluation_names(runner)
    if said.get("data"):
        return str(said["data"])
    datasets = built_datasets(runner)
    evaluated = next(datasets[n] for n in ("val", "test", "train") if n in datasets)
    return type(parts_of(evaluated)[0]).__name__


def evaluation_names(runner: Runner) -> tuple[Mapping[str, Any], list[str]]:
    """What the config says under `evaluation`, and what is missing there."""
    said = runner.cfg.get("evaluation")
    said = said if isinstance(said, Mapping) else {}
    missing = [name for name in ("model", "data", "protocol") if not said.get(name)]
    notes = []
    if missing:
        notes.append(
            f"the config has no evaluation.{joined(missing)}: write evaluation = "
            "dict(model='STELLAR ViT-B', data='My set', protocol='SEGMENTATION')"
        )
    elif not isinstance(
        getattr(segmentation, str(said["protocol"]), None), SegmentationProtocol
    ):
        notes.append(
            f"evaluation.protocol is '{said['protocol']}', which is no protocol of "
            "stellar_plugin.protocols.segmentation"
        )
    return said, notes
