"""Any encoder behind one interface: STELLAR, the ViTs of other methods, timm models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightly_ext.evaluate.backbones import RawPatches, TimmBackbone
from stellar_plugin import Stellar
from stellar_plugin.checkpoints import (
    create_encoder,
    load_encoder_weights,
    methods,
    model_config,
    read_checkpoint,
    untrained_encoder,
)
from stellar_plugin.checkpoints.files import read_tensors
from stellar_plugin.checkpoints.layouts import TIMM as TIMM_LAYOUT
from stellar_plugin.checkpoints.recognise import unwrap
from stellar_plugin.encoder import Factorization, StellarEncoder
from stellar_plugin.hashes import file_sha256, weights_sha256
from stellar_plugin.protocols import FEATURES

TIMM = "timm:"
NOT_A_VIT = "pooled by the network"
PATCHES = "patches"
RAW_PATCHES = "raw patches"


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, and what its images are like.

    Attributes:
        source: What the user named.
        method: Name of the method, or the layout of weights that do not tell it.
        sha256: Hash of the weight file or, where there is none, of the weights.
        mean: Per-channel mean of the images, of [0, 1] intensities.
        std: Per-channel standard deviation of the images.
        interpolation: How images are resized, "bicubic" or "bilinear".
        name: Name in tables.
        seed: Seed of random weights, None for a model that is trained.
        feature: The feature that "auto" stands for, None if it is not known.
    """

    source: str
    method: str
    sha256: str
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    name: str = ""
    seed: int | None = None
    feature: str | None = None

    @property
    def untrained(self) -> bool:
        """Whether the weights are random."""
        return self.seed is not None

    @property
    def label(self) -> str:
        """What the user named, and whether the weights are random."""
        return f"{self.source} (untrained)" if self.untrained else self.source


class FrozenModel(nn.Module):
    """An encoder in evaluation mode and without gradients.

    Attributes:
        backbone:
            Maps normalised images to a `Factorization`.
        origin:
            Where it comes from.
        has_decoder:
            Whether its checkpoint has a decoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, origin: Origin, has_decoder: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.origin = origin
        self.has_decoder = has_decoder
        for name in ("mean", "std"):
            value = torch.tensor(getattr(origin, name)).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def train(self, mode: bool = True) -> FrozenModel:
        """Stays in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Factorization:
        """Factorizes images.

        Args:
            images:
                uint8 tensor, or intensities in [0, 1], with shape (batch_size, 3,
                height, width); normalised here.
        """
        return self.backbone(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Normalises images, uint8 or in [0, 1], by the mean and std of the model."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std

    def pooled(self, images: Tensor, feature: str) -> Tensor:
        """One vector per image: the mean over tokens, float32 (batch_size, dim).

        Args:
            images:
                As for `forward`.
            feature:
                One of `FEATURES`; "cls+dense" is the CLS token beside the mean of the
                patches.
        """
        return pool(self(images), feature)

    @property
    def own_feature(self) -> str:
        """The feature that "auto" stands for.

        Raises:
            ValueError: If the weights do not tell which method they come from.
        """
        if self.origin.feature is None:
            raise ValueError(
                f"'{self.origin.label}' does not tell which method trained it (read "
                f"as {self.origin.method}), so features 'auto' are not known: name one "
                f"of {', '.join(FEATURES)}."
            )
        return self.origin.feature

    def resolve_feature(self, feature: str) -> str:
        """Checks the name of a feature, and says what "auto" is.

        Args:
            feature:
                "auto" or one of `FEATURES`.

        Raises:
            ValueError: If there is no such feature, or the model does not have it.
        """
        if feature == "auto":
            return self.own_feature
        if feature not in FEATURES:
            raise ValueError(
                f"features must be 'auto' or one of {', '.join(FEATURES)}, got "
                f"'{feature}'."
            )
        if feature in ("sparse", "lowrank") and not self.num_queries:
            raise ValueError(
                f"'{self.origin.label}' has no latent queries, so no {feature} "
                "features: name dense or cls."
            )
        return feature

    @property
    def num_queries(self) -> int:
        """Number of latent queries, 0 for every model that is not STELLAR."""
        return int(getattr(self.backbone, "num_queries", 0))

    @property
    def has_localization(self) -> bool:
        """Whether there is a localization of tokens on patches."""
        return bool(getattr(self.backbone, "has_localization", False))


def load_frozen_model(
    model: str,
    weights: str | None = None,
    untrained: bool = False,
    name: str | None = None,
    seed: int = 0,
) -> FrozenModel:
    """Loads any encoder.

    Args:
        model:
            What to evaluate: file, folder, "stellar-b16", hub repository or "timm:NAME"
            (ViT or not), of any layout that is read; "patches" is no model at all.
        weights:
            Weight file of a timm model, instead of timm's own weights.
        untrained:
            Evaluate the same architecture with random weights, drawn by the seed.
        name:
            Name of the model in tables. None makes one of `model`.
        seed:
            Decides on random weights.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If weights and model do not fit, or timm has no such model.
    """
    timm_name = model.removeprefix(TIMM) if model.startswith(TIMM) else None
    if weights is not None and (timm_name is None or untrained):
        raise ValueError(
            f"weights belong to a timm model ('timm:NAME') that is not untrained, the "
            f"model is '{model}'; name the file as the model itself."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model.partition(":")[0] == PATCHES and not Path(model).exists():
            loaded = _of_patches(model)
        elif timm_name is None:
            loaded = _of_checkpoint(model, untrained)
        elif isinstance(_on_meta(timm_name), VisionTransformer):
            loaded = _of_timm_vit(timm_name, weights, untrained)
        else:
            loaded = _of_timm(timm_name, weights, untrained)
    name = name or short_name(weights or model)
    if untrained:
        name = f"{name} (untrained)"
        if loaded.origin.method != RAW_PATCHES:
            digest = f"random weights of seed {seed}"
            loaded.origin = replace(loaded.origin, sha256=digest, seed=seed)
    loaded.origin = replace(loaded.origin, name=name)
    return loaded


def load_like(model: FrozenModel, source: str) -> FrozenModel:
    """Loads another encoder beside one: on its device, random if that one is.

    Args:
        model:
            The one.
        source:
            As `model` of `load_frozen_model`.
    """
    untrained, seed = model.origin.untrained, model.origin.seed or 0
    other = load_frozen_model(source, untrained=untrained, seed=seed)
    return other.to(model.mean.device)


def load_stellar(model: FrozenModel) -> Stellar:
    """The whole STELLAR model with decoder, on the device, without gradients.

    Args:
        model:
            Its encoder, whose weights it has.

    Raises:
        ValueError: If the model is not STELLAR.
    """
    origin = model.origin
    if origin.method != "STELLAR":
        raise ValueError(
            f"This needs a STELLAR model with its decoder, '{origin.source}' is "
            f"{origin.method}."
        )
    if origin.seed is None:
        stellar = Stellar.from_pretrained(origin.source)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(origin.seed)  # as in load_frozen_model
            config = model_config(read_checkpoint(origin.source))
            stellar = Stellar(**config).eval()
    return stellar.requires_grad_(False).to(model.mean.device)


def select_tokens(result: Factorization, feature: str) -> Tensor:
    """Tokens of a factorization, (batch_size, num_tokens, dim).

    Args:
        result:
            The factorization.
        feature:
            One of `FEATURES` except "cls+dense".

    Raises:
        ValueError: If the encoder has no such tokens.
    """
    if feature != "cls":
        return getattr(result, feature)
    if result.cls is None:
        raise ValueError("The encoder has no CLS token: name dense features.")
    return result.cls[:, None]


def pool(result: Factorization, feature: str) -> Tensor:
    """One vector per image, see `FrozenModel.pooled`."""
    names = feature.split("+")
    tokens = [select_tokens(result, name).float() for name in names]
    return torch.cat([t.mean(dim=1) for t in tokens], dim=1)


def _of_patches(source: str) -> FrozenModel:
    size = source.partition(":")[2] or "16"
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"'{source}' must be '{PATCHES}' or '{PATCHES}:SIZE' in px.")
    origin = Origin(source, RAW_PATCHES, "no weights", feature="cls")
    return FrozenModel(RawPatches(int(size)), origin)


def _of_checkpoint(source: str, untrained: bool) -> FrozenModel:
    checkpoint = read_checkpoint(source)
    encoder = untrained_encoder(checkpoint) if untrained else create_encoder(checkpoint)
    digest = _sha256(checkpoint.path, encoder)
    method = checkpoint.method
    origin = Origin(
        source,
        method.name if method else checkpoint.layout,
        digest,
        mean=tuple(checkpoint.config.get("mean", IMAGENET_DEFAULT_MEAN)),
        std=tuple(checkpoint.config.get("std", IMAGENET_DEFAULT_STD)),
        feature=method.feature if method else None,
    )
    return FrozenModel(encoder, origin, checkpoint.has_decoder)


def _of_timm_vit(name: str, weights: str | None, untrained: bool) -> FrozenModel:
    method, layout = methods.of_timm(name), TIMM_LAYOUT
    source = f"{TIMM}{name}"
    if weights is not None:
        checkpoint = read_checkpoint(weights)
        # As the file says, and as timm does it where the file does not say.
        antialias = checkpoint.config.get("pos_antialias", True)
        encoder = StellarEncoder(name, num_queries=0, pos_antialias=antialias)
        load_encoder_weights(encoder, checkpoint)
        if checkpoint.method or checkpoint.layout != TIMM_LAYOUT:
            method, layout = checkpoint.method, checkpoint.layout
        digest = _sha256(checkpoint.path, encoder)
    else:
        encoder = (
            StellarEncoder(name, num_queries=0, pos_antialias=True)
            if untrained
            else create_encoder(source)
        )
        digest = _sha256(Path(name), encoder)
    feature = method.feature if method else None
    name = method.name if method else layout
    return FrozenModel(encoder, _timm_origin(source, name, feature, digest))


def _of_timm(name: str, weights: str | None, untrained: bool) -> FrozenModel:
    try:
        model = timm.create_model(
            name, pretrained=weights is None and not untrained, num_classes=0
        )
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"timm gives no weights for '{name}': {error} Download them yourself and "
            "give their path as weights."
        ) from error
    path = Path(weights or name)
    if weights is not None:
        _load_strictly(model, path)
    digest = _sha256(path, model)
    origin = _timm_origin(f"{TIMM}{name}", NOT_A_VIT, "cls", digest)
    return FrozenModel(TimmBackbone(model), origin)


def _load_strictly(model: nn.Module, path: Path) -> None:
    """Loads the tensors of a file that the model needs, whatever stands before them."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file '{path}'.")
    tensors, _, _ = unwrap(read_tensors(path)[0])
    wanted = model.state_dict()
    first = next(iter(wanted))
    ends = [n.removesuffix(first) for n in tensors if n.endswith(first)]
    for prefix in sorted(ends):
        state = {k: tensors[prefix + k] for k in wanted if prefix + k in tensors}
        if all(k in state and state[k].shape == v.shape for k, v in wanted.items()):
            model.load_state_dict(state)
            return
    raise ValueError(
        f"'{path}' does not hold the weights of {type(model).__name__}: under no prefix"
        f" are there all of its {len(wanted)} tensors ('{first}', ...) in their shapes."
    )


def _timm_origin(source: str, method: str, feature: str | None, digest: str) -> Origin:
    data = resolve_data_config({}, model=_on_meta(source.removeprefix(TIMM)))
    return Origin(
        source,
        method,
        digest,
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
        feature=feature,
    )


def _on_meta(name: str) -> nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model '{name}'; timm.list_models() has all.")
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def short_name(source: str) -> str:
    """Short: "my_run" of "runs/my_run/model", "mae" of "x/mae.pth"."""
    path = Path(source)
    parts = [p for p in path.parts if p not in ("model", "checkpoint", "checkpoints")]
    name = parts[-1] if parts else source
    if path.suffix in (".pth", ".pt", ".ckpt", ".tar", ".safetensors", ".bin"):
        name = name.removesuffix(path.suffix)
    return name


def _sha256(path: Path, model: nn.Module) -> str:
    return file_sha256(path) if path.is_file() else f"weights {weights_sha256(model)}"
