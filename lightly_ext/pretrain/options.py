"""Options that are arguments of other classes, checked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from stellar_cli.errors import OptionError, did_you_mean, raise_errors


def check_groups(
    options: Mapping[str, Any], groups: Mapping[str, tuple[type, set[str | int]]]
) -> None:
    """Checks the names and kinds of arguments that are passed on.

    Args:
        options:
            Arguments of a `Pretraining`.
        groups:
            Which of them are passed on, see `Pretraining.GROUPS`.

    Raises:
        OptionError: If there is no such argument, or it is of another kind.
    """
    parser = ArgumentParser()
    raise_errors(parser)
    given: dict[str, dict[str, Any]] = {}
    for group, (kind, own) in groups.items():
        parser.add_class_arguments(kind, f"model.{group}", skip=own)
        names = [n for n in inspect.signature(kind).parameters if n not in own]
        # The encoder's go on to timm.
        vits = [inspect.signature(vit).parameters for vit in (VisionTransformer, Eva)]
        others = {*vits[0], *vits[1]} - {"num_reg_tokens"}
        accepted = [*names, *others] if group == "model" else names
        values = options[group] or {}
        for name in values:
            if name not in accepted:
                raise OptionError(
                    f"There is no option --model.{group}.{name}, as '{name}' is no "
                    f"argument of {kind.__name__}.{did_you_mean(name, accepted)}"
                )
        given[group] = {k: v for k, v in values.items() if k in names}
    parser.parse_object({"model": given}, defaults=False)
