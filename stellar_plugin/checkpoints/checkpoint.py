"""What a checkpoint holds, whatever its layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stellar_plugin.arguments import check_arguments
from stellar_plugin.checkpoints.methods import Method
from stellar_plugin.checkpoints.names import State
from stellar_plugin.networks import Network


@dataclass(frozen=True)
class Architecture:
    """A network of a family.

    Attributes:
        family: Its class, by which messages name it.
        arguments: What the tensors of a file tell of its sizes, values that JSON knows.
    """

    family: type[Network]
    arguments: Mapping[str, Any]

    def build(self, **given: Any) -> Network:
        """Builds it with fresh weights.

        Args:
            given:
                Arguments of the family that shall be others, for example img_size.

        Raises:
            ValueError: If an argument is unknown, of another type or out of range, or
                they make no network.
        """
        check_arguments(given, self.family)
        return self.family(**{**self.arguments, **given})


@dataclass(frozen=True)
class Checkpoint:
    """Weights of any layout by the names of `Stellar`.

    Attributes:
        path:
            The weight file, or timm's name of the model.
        layout:
            How the file names its tensors, one of `layouts.LAYOUTS`.
        state:
            Tensors by their names in `Stellar`; query, key and value are fused. The
            position table may have rows of other tokens, see `prefixes`. Those of a
            network by the names of its `named`.
        method:
            The method that trained it, None if nothing says so.
        rule:
            What told the method, in words.
        choice:
            Which weights were taken where the file holds several, in words.
        heads:
            States of each `STELLARProjectionHead`, "sparse_head" and "cls_head", as far
            as they are there.
        config:
            What is known for sure of the arguments of `Stellar`: all of them for models
            of this package, else num_heads, norm_eps, pos_antialias and the like.
        assumed:
            Of the same arguments those that nothing tells, as timm has them.
        images:
            What timm's config tells of images: interpolation, crop_pct.
        num_queries:
            How many of the register tokens are queries, None if nothing says so.
        grid_size:
            Patch grid of the position table, None if nothing tells it.
        prefixes:
            How many rows the table may have before those of the patches, beside none.
        network:
            What builds the network, None for the ViTs that `StellarEncoder` takes.
        rotary:
            Whether the ViT is one of timm's Eva, by whose names its tensors are then.
        unexpected:
            Names that the layout does not have.
        ignored:
            Names of the layout that nothing depends on.
    """

    path: Path
    layout: str
    state: State
    method: Method | None = None
    rule: str = ""
    choice: str = ""
    heads: dict[str, State] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    num_queries: int | None = None
    grid_size: tuple[int, int] | None = None
    prefixes: tuple[int, ...] = (0,)
    network: Architecture | None = None
    rotary: bool = False
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def has_decoder(self) -> bool:
        """Whether there are tensors of STELLAR's decoder."""
        names = () if self.network else self.state
        return any(name.startswith("decoder.") for name in names)

    @property
    def has_localization(self) -> bool:
        """Whether there are the projections that localization is made of."""
        return any(name.startswith("encoder.dense_proj.") for name in self.state)

    def require_vit(self) -> None:
        """Checks that it is a ViT that `StellarEncoder` takes.

        Raises:
            ValueError: If it is another network.
        """
        if self.network is not None:
            raise ValueError(
                f"'{self.path}' ({self.read_as}) holds a {self.network.family.__name__}"
                ", which takes no latent queries, so it is no prior and no StellarViT. "
                "`stellar evaluate --model` reads it, in mmsegmentation "
                "type='PretrainedNetwork' of model.backbone, and in Python "
                "stellar_plugin.checkpoints.load_network."
            )

    @property
    def read_as(self) -> str:
        """What the file was recognised as, in words."""
        layout = f"layout '{self.layout}'"
        if self.method is None:
            return layout
        return f"{self.method.name} in {layout}"

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Names the file in errors of models that are built from what it tells."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"What '{self.path}' and its config tell makes no model: {error} Take "
                "the files as they were saved, or name the right values."
            ) from error
