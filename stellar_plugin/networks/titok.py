"""TiTok: an image as a short row of tokens, and back; names as in published files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stellar_plugin.encoder import Factorization
from stellar_plugin.networks.network import Network
from stellar_plugin.vqgan import Codebook, VQGANDecoder, nearest_rows

# Letters in shape comments:
# B images, n patches of a grid h x w, N latent tokens, W width, c channels of a code

HEAD_DIM = 64  # of attention, in every published size
# The frozen MaskGIT-VQGAN that those published first decode through.
NUM_PIXEL_CODES, PIXEL_DIM, PIXEL_BLOCKS = 1024, 256, 2
PIXEL_WIDTHS = (128, 128, 256, 256, 512)
# Images whose pixels are made at a time: at full size each has 128 values per pixel.
CHUNK_SIZE = 32


class TiTok(Network):
    """Tokenizer of images into one dimension [0]: a ViT to codes, and a ViT back.

    Sparse tokens are the encoder's latent tokens behind its last LayerNorm, before they
    become codes. CLS and dense go through the same LayerNorm; the original has no use
    for them. Images have one size and are not normalised: mean 0, std 1.

    - [0]: An Image is Worth 32 Tokens for Reconstruction and Generation, 2024,
      https://arxiv.org/abs/2406.07550
    - [1]: https://github.com/bytedance/1d-tokenizer

    Attributes:
        embed_dim:
            Width of the encoder, a multiple of 64.
        depth:
            Number of its blocks.
        num_queries:
            Number of latent tokens.
        img_size:
            Side of the images in px, a multiple of the patch size.
        patch_size:
            Side of a patch in px.
        token_size:
            Channels of a code.
        num_codes:
            Number of codes.
        decoder_dim:
            Width of the decoder, a multiple of 64.
        decoder_depth:
            Number of its blocks.
        is_legacy:
            Whether it is of those published first (B-64, L-32, S-128), which reshape
            the tokens where they should transpose them, and decode through the codes of
            a MaskGIT-VQGAN. The later ones decode to pixels at once.
        use_l2_norm:
            Whether codes, and vectors that look for theirs, are brought to length 1.
        pixel_widths:
            Width of each level of the MaskGIT-VQGAN's decoder, () where it is missing.

    Raises:
        ValueError: If a width is no multiple of 64.

    Examples:
        >>> titok = TiTok()
        >>> tokens = titok(images).sparse  # [0, 1], (B, 3, 256, 256) -> (B, 64, 768)
        >>> decoded = titok.decode(titok.codes(tokens))
    """

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        num_queries: int = 64,
        img_size: int = 256,
        patch_size: int = 16,
        token_size: int = 12,
        num_codes: int = 4096,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        is_legacy: bool = True,
        use_l2_norm: bool = True,
        pixel_widths: Sequence[int] = PIXEL_WIDTHS,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.stride = patch_size
        self.image_size = (img_size, img_size)
        self.num_queries = num_queries
        self.is_legacy = is_legacy
        self.use_l2_norm = use_l2_norm
        self.has_decoder = not is_legacy or len(pixel_widths) > 0
        grid = img_size // patch_size
        self.latent_tokens = _embedding(num_queries, embed_dim)
        self.encoder = _Encoder(
            embed_dim, depth, grid, num_queries, patch_size, token_size
        )
        self.quantize = Codebook(num_codes, token_size)
        self.decoder = _Decoder(
            decoder_dim,
            decoder_depth,
            grid,
            num_queries,
            token_size,
            patch_size=None if is_legacy else patch_size,
        )
        if is_legacy and pixel_widths:
            self.pixel_quantize = Codebook(NUM_PIXEL_CODES, PIXEL_DIM)
            self.pixel_decoder = VQGANDecoder(
                list(pixel_widths), PIXEL_BLOCKS, PIXEL_DIM
            )

    def forward(self, images: Tensor) -> Factorization:
        """Encodes images.

        Args:
            images:
                Images in [0, 1] with shape (batch_size, 3, img_size, img_size).

        Returns:
            CLS, latent tokens and patch features, none of which is localized.

        Raises:
            ValueError: If the images have another size.
        """
        height, width = images.shape[-2:]
        side = self.decoder.grid * self.stride
        if (height, width) != (side, side):
            raise ValueError(
                f"TiTok takes images of {side} x {side} px alone, the size of its "
                f"positions, got {height} x {width}."
            )
        tokens = self.encoder(images, self.latent_tokens)
        cls, dense, sparse = tokens.split(
            [1, tokens.shape[1] - 1 - self.num_queries, self.num_queries], dim=1
        )
        grid_size = (self.decoder.grid, self.decoder.grid)
        return Factorization(cls[:, 0], sparse, dense, grid_size, _localize)

    def codes(self, tokens: Tensor) -> Tensor:
        """Finds the code of each latent token; in float32, also under autocast.

        Args:
            tokens:
                Sparse tokens with shape (batch_size, num_queries, embed_dim).

        Returns:
            Codes, int64 with shape (batch_size, num_queries).
        """
        if self.is_legacy:
            # The weights were trained so: read as if it were its own transpose.
            channels = tokens.reshape(len(tokens), self.embed_dim, self.num_queries)
        else:
            channels = tokens.mT
        vectors = self.encoder.conv_out(channels[..., None]).squeeze(3).mT  # (B, N, c)
        return nearest_rows(self._of_length_one(vectors), self._code_vectors())

    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes to images.

        Args:
            codes:
                Codes, int64 with shape (batch_size, num_queries).

        Returns:
            Images in [0, 1], float32 with shape (batch_size, 3, img_size, img_size).

        Raises:
            ValueError: If there is no pixel decoder.
        """
        if not self.has_decoder:
            raise ValueError(
                "This TiTok has no pixel decoder, as files of its first stage of "
                "training have none: its codes cannot be decoded to images."
            )
        return torch.cat([self._decode(part) for part in codes.split(CHUNK_SIZE)])

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = self._code_vectors().to(self.latent_tokens.dtype)[codes]
        decoded = self.decoder(vectors)
        if self.is_legacy:
            # What is decoded is the mean of the codes by their probabilities.
            shares = decoded.softmax(dim=1)  # (B, 1024, h, w)
            rows = self.pixel_quantize.embedding.weight
            latent = (shares.movedim(1, 3) @ rows).movedim(3, 1)
            decoded = self.pixel_decoder(latent)
        return decoded.float().clamp(0, 1)

    def _code_vectors(self) -> Tensor:
        return self._of_length_one(self.quantize.embedding.weight)

    def _of_length_one(self, vectors: Tensor) -> Tensor:
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1) if self.use_l2_norm else vectors


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // HEAD_DIM, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=nn.GELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _ViT(nn.Module):
    """Blocks on CLS and patches, with positions, and the latent tokens after them."""

    def __init__(self, width: int, depth: int, grid: int, num_tokens: int) -> None:
        super().__init__()
        if width % HEAD_DIM:
            raise ValueError(
                f"The width of a ViT of TiTok is a multiple of {HEAD_DIM}, that of a "
                f"head, got {width}."
            )
        self.class_embedding = _embedding(1, width)
        self.positional_embedding = _embedding(grid**2 + 1, width)
        self.latent_token_positional_embedding = _embedding(num_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(_Block(width) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def _run(self, patches: Tensor, latents: Tensor) -> Tensor:
        """(B, n, W) and (B, N, W), or batches of 1 -> (B, 1 + n + N, W)."""
        size = max(len(patches), len(latents))
        cls = self.class_embedding.expand(size, 1, -1)
        patches = torch.cat([cls, patches.expand(size, -1, -1)], dim=1)
        patches = patches + self.positional_embedding
        latents = latents + self.latent_token_positional_embedding
        x = torch.cat([patches, latents.expand(size, -1, -1)], dim=1)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        return self.ln_post(x)


class _Encoder(_ViT):
    def __init__(
        self,
        width: int,
        depth: int,
        grid: int,
        num_tokens: int,
        patch_size: int,
        token_size: int,
    ) -> None:
        super().__init__(width, depth, grid, num_tokens)
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.conv_out = nn.Conv2d(width, token_size, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        return self._run(self.patch_embed(images).flatten(2).mT, latent_tokens[None])


class _Decoder(_ViT):
    """To logits of the pixel decoder's codes, or to pixels with a patch size."""

    def __init__(
        self,
        width: int,
        depth: int,
        grid: int,
        num_tokens: int,
        token_size: int,
        patch_size: int | None,
    ) -> None:
        super().__init__(width, depth, grid, num_tokens)
        self.grid, self.patch_size = grid, patch_size
        self.decoder_embed = nn.Linear(token_size, width)
        self.mask_token = _embedding(1, 1, width)
        self.ffn: nn.Sequential
        if patch_size is None:
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1),
                nn.Tanh(),
                nn.Conv2d(2 * width, NUM_PIXEL_CODES, 1),
            )
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch_size**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, N, c) -> logits (B, 1024, h, w), or pixels (B, 3, height, width)."""
        masks = self.mask_token.expand(1, self.grid**2, -1)
        tokens = self._run(masks, self.decoder_embed(vectors))
        patches = tokens[:, 1 : 1 + self.grid**2]
        x = self.ffn(patches.mT.unflatten(2, (self.grid, self.grid)))
        if self.patch_size is None:
            return x
        # (B, p p 3, h, w) -> (B, 3, h, p, w, p)
        x = x.unflatten(1, (self.patch_size, self.patch_size, 3))
        x = x.permute(0, 3, 4, 1, 5, 2)
        return self.conv_out(x.flatten(4, 5).flatten(2, 3))


def _embedding(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


def _localize(dense: Tensor, sparse: Tensor) -> Tensor:
    raise ValueError("The tokens of TiTok have no localization.")
