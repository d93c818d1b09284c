"""STELLAR as a whole: encoder and decoder, saved and loaded together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from stellar_plugin.arguments import check_arguments
from stellar_plugin.checkpoints.checkpoint import Checkpoint
from stellar_plugin.checkpoints.files import (
    SCHEMA_VERSION,
    WEIGHTS_NAME,
    write_own,
)
from stellar_plugin.checkpoints.heads import save_heads
from stellar_plugin.checkpoints.layouts import STELLAR
from stellar_plugin.checkpoints.load import fitted_model, load_model_weights
from stellar_plugin.checkpoints.names import State
from stellar_plugin.checkpoints.recognise import read_checkpoint
from stellar_plugin.checkpoints.sizes import encoder_arguments, model_config
from stellar_plugin.decoder import PixelDecoder, TokenDecoder
from stellar_plugin.encoder import Factorization, StellarEncoder
from stellar_plugin.hashes import file_sha256
from stellar_plugin.hub_files import TRANSFORMERS_KEYS, write_code, write_processor
from stellar_plugin.image_transform import ImageTransform
from stellar_plugin.model_card import CARD_NAME, REPLACED, model_card
from stellar_plugin.provenance import (
    loaded_provenance,
    saved_provenance,
    write_provenance,
)
from stellar_plugin.tokenizer import TOKENIZER_FILE, WHERE_TO_GET_IT, MaskGITVQGAN
from stellar_plugin.visual_tokens import VisualTokens, visual_tokens
from stellar_plugin.weight_files import CONFIG_NAME


class Stellar(nn.Module, PyTorchModelHubMixin):
    """STELLAR: sparse tokens, where they are, and the image back from them [0].

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905

    Attributes:
        model_name:
            Name of a timm VisionTransformer or Eva, see `StellarEncoder`.
        num_queries:
            Number r of sparse tokens, at least 1.
        target:
            What the decoder predicts: "pixels", or the codes ("tokens") that a frozen
            tokenizer gives for the image. None builds neither decoder nor localization
            (the ablation without reconstruction).
        num_codes:
            Size of the tokenizer's codebook, for the target "tokens".
        tokenizer:
            Sizes of the tokenizer inside the model, arguments of `MaskGITVQGAN`. None
            leaves it out; `load_tokenizer` brings it in with its weights.
        decoder_dim:
            Width of the decoder.
        decoder_depth:
            Number of decoder blocks.
        decoder_num_heads:
            Number of attention heads of the decoder.
        decoder_mlp_ratio:
            MLP width over width of the decoder.
        mean:
            Per-channel mean that images are normalised with, of [0, 1] intensities.
        std:
            Per-channel standard deviation that images are normalised with.
        norm_eps:
            Epsilon of the encoder's LayerNorms, see `StellarEncoder`.
        pos_antialias:
            How the position embedding is resampled, see `StellarEncoder`.
        vit_kwargs:
            Passed on to timm, for example img_size, patch_size, embed_dim, depth.
        heads:
            States of the projection heads that it was trained with, by name; no part of
            the model, but saved with it.
        provenance:
            Where its weights come from, as far as that is recorded; its model card
            tells it.

    Raises:
        ValueError: If `num_queries` is less than 1, an argument is unknown, of another
            type or out of range, a size does not fit, or the tokenizer does not fit the
            target.

    Examples:
        >>> model = Stellar("stellar_vit_base_patch16_224")
        >>> images = model.transform()(Image.open("photo.jpg")).unsqueeze(0)
        >>> result = model(images)  # normalised, (batch_size, 3, height, width)
        >>> result.sparse, result.localization  # what, where
        >>> model.reconstruct(images)  # in [0, 1]
    """

    def __init__(
        self,
        model_name: str = "stellar_vit_base_patch16_224",
        *,
        num_queries: int = 16,
        target: Literal["pixels", "tokens"] | None = "pixels",
        num_codes: int = 1024,
        tokenizer: dict[str, Any] | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 6,
        decoder_num_heads: int = 8,
        decoder_mlp_ratio: float = 4.0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        norm_eps: float | None = None,
        pos_antialias: bool = False,
        **vit_kwargs: Any,
    ) -> None:
        super().__init__()
        arguments = {
            "model_name": model_name,
            "num_queries": num_queries,
            "target": target,
            "num_codes": num_codes,
            "tokenizer": tokenizer,
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "decoder_mlp_ratio": decoder_mlp_ratio,
            "mean": mean,
            "std": std,
            "norm_eps": norm_eps,
            "pos_antialias": pos_antialias,
        }
        check_arguments(arguments, Stellar)
        check_arguments(tokenizer or {}, MaskGITVQGAN)
        if num_queries < 1:
            raise ValueError(
                f"Stellar needs num_queries >= 1, got {num_queries}; for a plain ViT "
                "use StellarEncoder(num_queries=0)."
            )
        self.config: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            **arguments,
            "tokenizer": None,
            "mean": list(mean),
            "std": list(std),
            **vit_kwargs,
        }
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.encoder = StellarEncoder(**encoder_arguments(self.config))
        self.target = target
        self.decoder = _create_decoder(self.encoder, self.config)
        self.tokenizer: MaskGITVQGAN | None = None
        if tokenizer is not None:
            self._set_tokenizer(MaskGITVQGAN(**tokenizer))
        self.heads: dict[str, State] = {}
        self.provenance: dict[str, Any] = {}

    def transform(
        self, image_size: int | tuple[int, int] | None = None
    ) -> ImageTransform:
        """What makes an input of this model from a photo, a PIL image of any size.

        Args:
            image_size:
                Height and width of the input in px, multiples of the patch size; one
                number for a square, by default what the model was trained with.

        Returns:
            Function of a photo to a normalised tensor with shape (3, height, width).

        Raises:
            ValueError: If `image_size` is no multiple of the patch size.

        Examples:
            >>> images = model.transform()(Image.open("photo.jpg")).unsqueeze(0)
        """
        patch = self.encoder.patch_size
        height, width = (side * patch for side in self.encoder.grid_size)
        if isinstance(image_size, int):
            height = width = image_size
        elif image_size is not None:
            height, width = image_size
        if min(height, width) < 1 or height % patch or width % patch:
            raise ValueError(
                f"image_size must be a multiple of the patch size {patch}, got "
                f"{height} x {width}."
            )
        return ImageTransform((height, width), self.mean, self.std)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Factorization:
        """Factorizes normalised images, see `StellarEncoder.forward`."""
        return self.encoder(images, keep)

    def decode(self, lowrank: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Decodes a low-rank latent to raw intensities, unclamped.

        With the target "tokens" the most probable codes are decoded by the tokenizer,
        without gradient.

        Args:
            lowrank:
                Latent Z with shape (batch_size, num_patches, embed_dim).
            grid_size:
                Height and width of the patch grid.

        Returns:
            Images with shape (batch_size, 3, height, width), [0, 1] where the
            reconstruction is good, at the native size of the target: pixels as many as
            the input has, tokens 16 px per patch.

        Raises:
            ValueError: If the model has no decoder, or predicts codes and has no
                tokenizer.
        """
        if self.target == "tokens":
            tokenizer = self._loaded_tokenizer()
            codes = self.predict_codes(lowrank, grid_size).argmax(dim=-1)
            return tokenizer.decode_unclamped(codes.unflatten(1, grid_size))
        if self.decoder is None:
            raise ValueError(
                "The model has no decoder: it was built with target=None, without "
                "reconstruction."
            )
        return self.decoder(lowrank, grid_size)

    def predict_codes(self, lowrank: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Predicts the tokenizer's code of each patch; needs no tokenizer.

        Args:
            lowrank:
                Latent Z with shape (batch_size, num_patches, embed_dim).
            grid_size:
                Height and width of the patch grid.

        Returns:
            Logits with shape (batch_size, num_patches, num_codes).

        Raises:
            ValueError: If the target is not "tokens".
        """
        if not isinstance(self.decoder, TokenDecoder):
            raise ValueError(
                f"predict_codes needs target='tokens', this model has '{self.target}'."
            )
        return self.decoder(lowrank, grid_size)

    @torch.no_grad()
    def target_codes(self, images: Tensor) -> Tensor:
        """Codes that the tokenizer gives for images, one per patch of the encoder.

        Where the patches of the encoder are not as large as the tokenizer's (14 and 16
        px), images are first resized, so that both grids are the same.

        Args:
            images:
                Images in raw [0, 1] intensities, not normalised, with shape
                (batch_size, 3, height, width).

        Returns:
            Codes, int64 with shape (batch_size, num_patches), row-major.

        Raises:
            ValueError: If there is no tokenizer, or the images do not fit it.
        """
        grid_size = [side // self.encoder.patch_size for side in images.shape[-2:]]
        return self._loaded_tokenizer().encode_to_grid(images, grid_size).flatten(1)

    def reconstruct(
        self, images: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Reconstructs images from their sparse tokens and localization.

        Args:
            images:
                Normalised images with shape (batch_size, 3, height, width).
            size:
                Height and width to resize the reconstruction to. None keeps the native
                size of the target, see `decode`.

        Returns:
            Images in [0, 1] with shape (batch_size, 3, height, width), not normalised.

        Raises:
            ValueError: As for `decode`.
        """
        result = self(images)
        decoded = self.decode(result.lowrank, result.grid_size)
        return resized(decoded, size or decoded.shape[-2:]).clamp(0, 1)

    def visual_tokens(self, images: Tensor) -> VisualTokens:
        """Tokens, masses and boxes of images, for a language model's connector.

        Args:
            images:
                Normalised images with shape (batch_size, 3, height, width).

        Returns:
            `tokens` (batch_size, num_queries, embed_dim) and `geometry` (batch_size,
            num_queries, 5): mass, x0, y0, x1, y1 in [0, 1]. Both have a gradient.

        Raises:
            ValueError: If the model was built with target=None, without localization.
        """
        return visual_tokens(self(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades computation for memory: block activations are recomputed.

        The backward pass computes each block of encoder and decoder once more; results
        and gradients stay as they are.
        """
        self.encoder.set_grad_checkpointing(enable)
        if self.decoder is not None:
            self.decoder.set_grad_checkpointing(enable)

    def load_tokenizer(self, path: str | Path) -> None:
        """Brings in the frozen tokenizer; `save_pretrained` then saves it too.

        Args:
            path:
                See `MaskGITVQGAN.from_pretrained`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds no tokenizer or one with another number of
                codes, or the target is not "tokens".
        """
        device = next(self.encoder.parameters()).device
        self._set_tokenizer(MaskGITVQGAN.from_pretrained(path).to(device))

    def _set_tokenizer(self, tokenizer: MaskGITVQGAN) -> None:
        if self.target != "tokens":
            raise ValueError(
                f"A tokenizer needs target='tokens', this model has '{self.target}'."
            )
        if tokenizer.num_codes != self.config["num_codes"]:
            raise ValueError(
                f"The tokenizer has {tokenizer.num_codes} codes, the decoder predicts "
                f"{self.config['num_codes']}; set num_codes={tokenizer.num_codes}."
            )
        self.tokenizer = tokenizer
        self.config["tokenizer"] = tokenizer.config

    def _loaded_tokenizer(self) -> MaskGITVQGAN:
        if self.tokenizer is not None:
            return self.tokenizer
        if self.target != "tokens":
            raise ValueError(f"A model with target '{self.target}' has no tokenizer.")
        raise ValueError(
            "This model predicts the codes of a tokenizer that it does not have: call "
            f"load_tokenizer('{TOKENIZER_FILE}'). {WHERE_TO_GET_IT}."
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        variant: str | None = None,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        **hub_kwargs: Any,
    ) -> Stellar:
        """Loads a model that `save_pretrained` wrote or a released one, for evaluation.

        Released models come with clustering heads, which are not part of the model; see
        `stellar_plugin.checkpoints.read_checkpoint`. What a file lacks (the decoder) or
        has beyond the model is logged.

        Args:
            source:
                Folder or weight file; or "stellar-b16" (b8, b24, l16, h16), or the name
                of a repository on the Hugging Face hub. An existing path wins.
            variant:
                Which file of a hub repository, "b16" of "microsoft/STELLAR".
            num_heads:
                Attention heads of a released encoder of unusual width.
            decoder_num_heads:
                The same for its decoder, if its heads are not 64 wide.
            hub_kwargs:
                revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: If the weights or the config are missing.
            ValueError: If config or weights do not fit this version or each other, the
                layout is not known, or the number of heads is not.
        """
        checkpoint = read_checkpoint(source, variant=variant, **hub_kwargs)
        return cls.from_checkpoint(
            checkpoint,
            num_heads=num_heads,
            decoder_num_heads=decoder_num_heads,
            source=source,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        source: str | Path | None = None,
    ) -> Stellar:
        """The same from what `stellar_plugin.checkpoints.read_checkpoint` returned.

        Args:
            checkpoint:
                The checkpoint.
            num_heads:
                As for `from_pretrained`.
            decoder_num_heads:
                As for `from_pretrained`.
            source:
                What the checkpoint was read from, for the model card; None is its file.
        """
        if checkpoint.layout == STELLAR and not checkpoint.config:
            raise FileNotFoundError(
                f"No {CONFIG_NAME} in '{checkpoint.path.parent}'; from_pretrained "
                f"reads a {WEIGHTS_NAME} with its {CONFIG_NAME} beside it, as "
                "save_pretrained writes them."
            )
        config = model_config(checkpoint, num_heads, decoder_num_heads)
        if config.get("num_queries") == 0:
            raise ValueError(
                f"'{checkpoint.path}' has no latent queries (read as "
                f"{checkpoint.read_as}) and is no STELLAR model, but a prior for "
                "`stellar pretrain --model.prior` and a ViT for `stellar convert --to "
                "timm`."
            )
        # Sizes first, on meta: no time is spent on weights that are replaced, or that
        # do not fit.
        with checkpoint.building(), torch.device("meta"):
            model = cls(**config)
        saved = model.state_dict().keys()
        unsaved = dict(model.named_buffers()).keys() - saved  # of rotary positions
        if unsaved or not saved <= checkpoint.state.keys():
            _, missing, _ = fitted_model(model, checkpoint, num_heads)
            if any(name.startswith("tokenizer.") for name in missing):
                raise ValueError(
                    f"'{checkpoint.path}' does not hold the tokenizer that its config "
                    "names; take the file as it was saved, or set 'tokenizer' to null "
                    "and use load_tokenizer."
                )
            model = cls(**config)
        load_model_weights(model, checkpoint, num_heads=num_heads)
        model.heads = dict(checkpoint.heads)
        model.provenance = loaded_provenance(checkpoint, source or checkpoint.path)
        return model.eval()

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads model, heads and model card, see `generate_model_card`.

        Args:
            repo_id:
                "OWNER/NAME"; made if it is not there.
            kwargs:
                As of huggingface_hub: private, token, branch, create_pr,
                commit_message, and `model_card_kwargs`, for example {"license":
                "cc-by-4.0", "results": "runs/evaluate"}.

        Returns:
            Address of the commit.
        """
        named = {"source": repo_id} if "/" in repo_id else {}
        card = {**named, **(kwargs.pop("model_card_kwargs", None) or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs)

    def generate_model_card(
        self,
        source: str | None = None,
        license: str | None = None,
        results: str | Path | None = None,
    ) -> ModelCard:
        """The card that `save_pretrained` writes: what is recorded, and what is not.

        Args:
            source:
                What the weights are loaded by, for example the name of a repository.
            license:
                The hub's name of the licence of the weights, for example "mit". None
                is that of the weights that training started from.
            results:
                Folder with results of `stellar evaluate`; those of these very weights
                are shown with their protocols.

        Raises:
            FileNotFoundError: If `results` is no folder.
            ValueError: If a stored result is damaged.
        """
        return model_card(self, source, license, results)

    def _save_pretrained(self, save_directory: Path) -> None:
        config = {**self.config, **TRANSFORMERS_KEYS}
        write_own(self.state_dict(), config, save_directory)
        save_heads(self.heads, save_directory)
        write_code(save_directory)
        write_processor(save_directory, self.encoder.image_size, self.mean, self.std)
        sha256 = file_sha256(save_directory / WEIGHTS_NAME)
        self.provenance = saved_provenance(self.provenance, sha256)
        write_provenance(save_directory, self.provenance)
        card = save_directory / CARD_NAME
        if card.is_file() and _is_replaced(card):
            card.unlink()  # the caller keeps what is there


def _is_replaced(card: Path) -> bool:
    """Whether a card is none that somebody wrote, in whatever encoding."""
    text = card.read_text("utf-8", errors="replace")
    return any(words in text for words in REPLACED)


def _create_decoder(
    encoder: StellarEncoder, config: dict[str, Any]
) -> PixelDecoder | TokenDecoder | None:
    sizes = {
        "decoder_dim": config["decoder_dim"],
        "depth": config["decoder_depth"],
        "num_heads": config["decoder_num_heads"],
        "mlp_ratio": config["decoder_mlp_ratio"],
    }
    if config["target"] == "pixels":
        return PixelDecoder(encoder.embed_dim, encoder.patch_size, **sizes)
    if config["target"] == "tokens":
        return TokenDecoder(encoder.embed_dim, config["num_codes"], **sizes)
    return None


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images of another height and width, bicubic with antialiasing."""
    if list(images.shape[-2:]) == list(size):
        return images
    return F.interpolate(images, list(size), mode="bicubic", antialias=True)
