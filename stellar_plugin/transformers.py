"""`Stellar` as a model of Hugging Face transformers: AutoModel, AutoImageProcessor.

Folders that `Stellar.save_pretrained` writes name these classes, so that

    AutoModel.from_pretrained(SOURCE, trust_remote_code=True)

finds them. After `import stellar_plugin.transformers` no code has to be trusted.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BatchFeature
from transformers.utils import ModelOutput, cached_file

from stellar_plugin.checkpoints.files import SCHEMA_VERSION, WEIGHTS_NAME
from stellar_plugin.hashes import file_sha256
from stellar_plugin.hub_files import (
    ADDED_KEYS,
    MODEL_TYPE,
    PROCESSOR_MAP,
    TRANSFORMERS_KEYS,
    without_transformers,
    write_code,
    write_processor,
)
from stellar_plugin.image_transform import ImageTransform
from stellar_plugin.model import Stellar
from stellar_plugin.provenance import (
    PROVENANCE_NAME,
    STARTED_FROM,
    read_provenance,
    saved_provenance,
    write_provenance,
)
from stellar_plugin.wording import counted


class _InPackage:
    """Classes of a package: their code is not copied beside what they save."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: `save_pretrained` writes the file that names these classes."""


class StellarConfig(_InPackage, PretrainedConfig):
    """Arguments of `Stellar` as a config of transformers.

    Examples:
        >>> StellarConfig(model_name="stellar_vit_small_patch16_224", num_queries=8)
    """

    model_type = MODEL_TYPE

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `Stellar`.

        Raises:
            ValueError: If they are those of another version.
        """
        version = getattr(self, "schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"The config has schema version {version!r}, this package reads "
                f"{SCHEMA_VERSION}: install the version of the package that saved it."
            )
        theirs = {*vars(PretrainedConfig()), "schema_version"}
        own = without_transformers(vars(self))
        return {
            name: value
            for name, value in own.items()
            if name not in theirs and not name.startswith("_")
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds, for `Stellar.from_pretrained` too."""
        added = {k: v for k, v in self.to_dict().items() if k in ADDED_KEYS}
        version = {"schema_version": getattr(self, "schema_version", None)}
        return {**version, **self.arguments, **TRANSFORMERS_KEYS, **added}


class StellarImageProcessor(_InPackage, BaseImageProcessor):
    """Makes inputs of photos, the same as `Stellar.transform`.

    Attributes:
        size:
            "height" and "width" of inputs in px.
        image_mean:
            Per-channel mean, of [0, 1] intensities.
        image_std:
            Per-channel standard deviation.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: Mapping[str, int] | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = {"height": 224, "width": 224, **(size or {})}
        self.image_mean = list(image_mean or IMAGENET_DEFAULT_MEAN)
        self.image_std = list(image_std or IMAGENET_DEFAULT_STD)
        self.auto_map = PROCESSOR_MAP

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Makes inputs, see `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        size: Mapping[str, int] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Makes inputs of photos.

        Args:
            images:
                A photo or a list of photos: PIL images, uint8 arrays with shape
                (height, width, 3) or (height, width), uint8 tensors with shape
                (3, height, width). Arrays and tensors may be batches.
            size:
                "height" and "width" of these inputs in px.
            return_tensors:
                "pt" or "np".

        Returns:
            `pixel_values`, float32 with shape (num_images, 3, height, width).

        Raises:
            ValueError: If an image is of another type, shape or range, there is none,
                or `size` has other names.
        """
        size = self.size if size is None else size
        if not isinstance(size, Mapping) or not {"height", "width"} <= size.keys():
            raise ValueError(
                'size must be {"height": ..., "width": ...}, of the input in px, got '
                f"{size!r}."
            )
        transform = ImageTransform(
            (size["height"], size["width"]), self.image_mean, self.image_std
        )
        pixels = torch.stack([transform(photo) for photo in _photos(images)])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What preprocessor_config.json holds."""
        names = ("size", "image_mean", "image_std", "auto_map")
        kind = {"image_processor_type": type(self).__name__}
        return {**kind, **{name: getattr(self, name) for name in names}}

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Writes preprocessor_config.json, and the code that it names."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_code(folder)
        return super().save_pretrained(str(folder), **kwargs)


@dataclass
class StellarModelOutput(ModelOutput):
    """What `StellarModel` returns; None is what the model does not have.

    Attributes:
        last_hidden_state:
            All tokens, normed, with shape (batch_size, num_tokens, embed_dim): CLS, own
            registers, sparse tokens, patches.
        pooler_output:
            Mean of the sparse tokens with shape (batch_size, embed_dim).
        cls:
            CLS token with shape (batch_size, embed_dim).
        sparse:
            Sparse tokens, "what", with shape (batch_size, num_queries, embed_dim).
        dense:
            Patch features with shape (batch_size, num_patches, embed_dim), row-major.
        localization:
            "Where", with shape (batch_size, num_patches, num_queries); rows sum to one.
        hidden_states:
            Tokens before the first block and after each, without the last norm.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    cls: Tensor | None = None
    sparse: Tensor | None = None
    dense: Tensor | None = None
    localization: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class StellarModel(_InPackage, PreTrainedModel):
    """`Stellar` as a model of transformers, of the same weights and numbers.

    Examples:
        >>> model = AutoModel.from_pretrained(SOURCE, trust_remote_code=True)
        >>> processor = AutoImageProcessor.from_pretrained(
        ...     SOURCE, trust_remote_code=True
        ... )
        >>> output = model(**processor(Image.open("photo.jpg")))
        >>> output.sparse, output.localization  # what, where
    """

    config_class = StellarConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "EvaBlock"]

    def __init__(self, config: StellarConfig) -> None:
        super().__init__(config)
        model = Stellar(**config.arguments)
        config.update(model.config)
        self.encoder, self.decoder = model.encoder, model.decoder
        self.tokenizer = model.tokenizer
        # In a list: not one more level in the names of weights.
        self._stellar = [model]
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def stellar(self) -> Stellar:
        """The model of this package that computes; it shares the weights."""
        return self._stellar[0]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a folder or hub repository, as any model of transformers.

        Raises:
            ValueError: If weights are missing.
        """
        told = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            more = ", ..." if len(missing) > 5 else ""
            raise ValueError(
                f"The weights lack {counted(len(missing), 'tensor')} that config.json "
                f"tells of: {', '.join(missing[:5])}{more}. Take both as they were "
                "saved."
            )
        model._restore_buffers()
        source = args[0] if args else kwargs["pretrained_model_name_or_path"]
        model.stellar.provenance = _provenance(source, kwargs)
        return (model, info) if told else model

    def _restore_buffers(self) -> None:
        """Makes rotary positions, which no file holds."""
        saved = self.state_dict().keys()
        unsaved = [name for name, _ in self.named_buffers() if name not in saved]
        if unsaved:
            made = dict(Stellar(**self.config.arguments).named_buffers())
            for name in unsaved:
                self.get_buffer(name).copy_(made[name])

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> StellarModelOutput | tuple[Tensor, ...]:
        """Computes tokens and where they are.

        Args:
            pixel_values:
                Normalised images with shape (batch_size, 3, height, width); height and
                width are multiples of the patch size.
            output_hidden_states:
                Whether tokens between the blocks are returned too.
            return_dict:
                False returns a plain tuple of what there is.

        Raises:
            ValueError: If the images are of another shape.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        states: list[Tensor] | None = [] if output_hidden_states else None
        with self._recording(states):
            tokens = self.encoder.forward_features(pixel_values.to(self.dtype))
        p = self.encoder.patch_size
        height, width = pixel_values.shape[-2:]
        result = self.encoder.split(tokens, (height // p, width // p))
        output = StellarModelOutput(
            last_hidden_state=tokens,
            pooler_output=result.sparse.mean(dim=1),
            cls=result.cls,
            sparse=result.sparse,
            dense=result.dense,
            localization=result.localization if self.encoder.has_localization else None,
            hidden_states=None if states is None else tuple(states),
        )
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def reconstruct(
        self, pixel_values: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Reconstructs images from their tokens, see `Stellar.reconstruct`.

        Args:
            pixel_values:
                As for `forward`.
            size:
                Height and width to resize the reconstruction to.

        Returns:
            Images in [0, 1] with shape (batch_size, 3, height, width).
        """
        return self.stellar.reconstruct(pixel_values.to(self.dtype), size)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Writes a folder that `Stellar.from_pretrained` reads as well."""
        folder, model = Path(save_directory), self.stellar
        is_first = kwargs.get("is_main_process", True)
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            write_code(folder)
            write_processor(folder, model.encoder.image_size, model.mean, model.std)
        super().save_pretrained(str(save_directory), **kwargs)
        if is_first and (folder / WEIGHTS_NAME).is_file():
            sha256 = file_sha256(folder / WEIGHTS_NAME)
            write_provenance(folder, saved_provenance(model.provenance, sha256))

    def _init_weights(self, module: Any) -> None:
        """Nothing: `Stellar` is built with its weights."""

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, **_: Any
    ) -> None:
        self.gradient_checkpointing = enable
        self.stellar.set_grad_checkpointing(enable)

    @contextlib.contextmanager
    def _recording(self, states: list[Tensor] | None) -> Iterator[None]:
        """Puts what enters and leaves the blocks into a list, if there is one."""
        hooks = []
        if states is not None:
            blocks = self.encoder.vit.blocks

            def entered(_: Any, inputs: tuple[Tensor, ...]) -> None:
                states.append(inputs[0])

            def left(_: Any, __: Any, output: Tensor) -> None:
                states.append(output)

            hooks = [blocks[0].register_forward_pre_hook(entered)]
            hooks += [block.register_forward_hook(left) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _provenance(source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Where weights come from, of a folder or hub repository."""
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    told = {name: options[name] for name in names if name in options}
    found = cached_file(
        source,
        PROVENANCE_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **told,
    )
    if found:
        return read_provenance(Path(found).parent)
    is_local = Path(source).exists()
    facts = {"source": str(source), "is_local": is_local, "read_as": "STELLAR"}
    return {STARTED_FROM: {**facts, "license": ""}}


def _photos(images: Any) -> list[Any]:
    """Photos one by one, each a PIL image or a tensor."""
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        images = list(images)
    photos = list(images) if isinstance(images, (list, tuple)) else [images]
    if not photos:
        raise ValueError("There is no image: got an empty list.")
    return [_photo(photo) for photo in photos]


def _photo(image: Any) -> Image.Image | Tensor:
    if isinstance(image, (Image.Image, Tensor)):
        return image
    if not isinstance(image, np.ndarray):
        raise ValueError(
            "An image must be a PIL image, an array or a tensor, got "
            f"{type(image).__name__} {reprlib.repr(image)}; open a file by "
            "PIL.Image.open."
        )
    is_photo = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
    if image.dtype != np.uint8 or not is_photo:
        raise ValueError(
            "An image array must be uint8 with shape (height, width, 3) or (height, "
            f"width), got {image.dtype} with shape {image.shape}."
        )
    return Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)


AutoConfig.register(MODEL_TYPE, StellarConfig)
AutoModel.register(StellarConfig, StellarModel)
AutoImageProcessor.register(
    StellarConfig, slow_image_processor_class=StellarImageProcessor
)
