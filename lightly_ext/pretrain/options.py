"""Options that are arguments of other classes, checked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser
from timm.models.vision_transformer import VisionTransformer

from lightly_ext.loss import STELLARLoss
from lightly_ext.modules import STELLARProjectionHead
from lightly_ext.transforms import STELLARColorAugment
from stellar_cli.errors import OptionError, did_you_mean, raise_errors
from stellar_plugin import Stellar

# What `StellarPretraining` passes on, and the arguments that it sets itself.
GROUPS: dict[str, tuple[type, set[str | int]]] = {
    "model": (Stellar, set()),
    "head": (STELLARProjectionHead, {"input_dim"}),
    "loss": (STELLARLoss, {"target"}),
    "augment": (STELLARColorAugment, {"mean", "std"}),
}


def check_groups(options: Mapping[str, Any]) -> None:
    """Checks the names and kinds of arguments that are passed on.

    Args:
        options:
            Arguments of `StellarPretraining`.

    Raises:
        OptionError: If there is no such argument, or it is of another kind.
    """
    parser = ArgumentParser()
    raise_errors(parser)
    given: dict[str, dict[str, Any]] = {}
    for group, (kind, own) in GROUPS.items():
        parser.add_class_arguments(kind, f"model.{group}", skip=own)
        names = [n for n in inspect.signature(kind).parameters if n not in own]
        # The encoder's go on to timm.
        others = inspect.signature(VisionTransformer).parameters
        accepted = [*names, *others] if kind is Stellar else names
        values = options[group] or {}
        for name in values:
            if name not in accepted:
                raise OptionError(
                    f"There is no option --model.{group}.{name}, as '{name}' is no "
                    f"argument of {kind.__name__}.{did_you_mean(name, accepted)}"
                )
        given[group] = {k: v for k, v in values.items() if k in names}
    parser.parse_object({"model": given}, defaults=False)
