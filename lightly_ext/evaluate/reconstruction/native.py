"""A tokenizer of images as an autoencoder: it decodes by itself, nothing is trained."""

from __future__ import annotations

from torch import Tensor, nn

from lightly_ext.evaluate.frozen_model import FrozenModel
from stellar_plugin.encoder import Factorization
from stellar_plugin.networks.titok import TiTok

LATENT = "sparse"


class NativeAutoencoder(nn.Module):
    """A TiTok: its tokens become codes, and its own decoder makes images of these.

    Attributes:
        model:
            The whole network.
        latent:
            What becomes codes.
        target:
            What is decoded.
        decoder:
            The network again, which decodes.
        tokenizer:
            None: it is one itself.

    Raises:
        ValueError: If it has no pixel decoder.
    """

    latent = LATENT
    target = "pixels"
    tokenizer = None

    def __init__(self, model: FrozenModel) -> None:
        super().__init__()
        assert isinstance(model.backbone, TiTok)
        if not model.backbone.has_decoder:
            raise ValueError(
                f"'{model.origin.label}' holds no pixel decoder, as files of the first "
                "stage of training: name the file of the second stage, or use --form "
                "scratch --latent dense --train FOLDER."
            )
        self.model = model
        self.decoder = model.backbone

    def predict(self, images: Tensor) -> tuple[Factorization, Tensor]:
        """Factorizes uint8 images; the second are codes (batch_size, num_queries)."""
        result = self.model(images)
        return result, self.decoder.codes(result.sparse)

    def to_images(self, prediction: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Makes images of codes."""
        return self.decoder.decode(prediction)

    def grid_size(self, crop: int) -> tuple[int, int]:
        """Codes of an image in their one row; raises where the size does not fit.

        Args:
            crop:
                Side of the images in px.

        Raises:
            ValueError: If the model takes images of another size.
        """
        self.model.check_size(crop)
        return 1, self.decoder.num_queries

    @property
    def target_name(self) -> str:
        """What is decoded, in words; the same for all sizes."""
        return "soft codes of its MaskGIT-VQGAN" if self.decoder.is_legacy else "pixels"


def is_native(model: FrozenModel) -> bool:
    """Whether a model is an autoencoder by itself."""
    return isinstance(model.backbone, TiTok)
