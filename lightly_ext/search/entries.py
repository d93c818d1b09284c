"""What an index keeps of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """Images on their way into an index, or out of it.

    Attributes:
        files:
            Names of their files, relative to the folder of the images.
        tokens:
            Their tokens, float with shape (num_images, num_tokens, dim); those out of
            an index have unit length and the precision of a byte per number.
        masses:
            Share of its image that each token has, float32 with shape (num_images,
            num_tokens).
        maps:
            Where each is, float32 in [0, 1] with shape (num_images, num_tokens,
            num_patches).
        mean:
            The mean of the tokens, with shape (num_images, dim).
        cls:
            The CLS tokens with shape (num_images, cls_dim), cls_dim 0 without.
        sizes:
            Height and width of the images in px, int64 with shape (num_images, 2).
        stamps:
            What changes with the files: their size in bytes, and the times in ns when
            content and inode changed last, int64 with shape (num_images, 3); -1 where
            another content could have the same.
        hashes:
            SHA-256 of the files, uint8 with shape (num_images, 32); zeros where the
            file changed while it was read.
    """

    files: Sequence[str]
    tokens: Tensor
    masses: Tensor
    maps: Tensor
    mean: Tensor
    cls: Tensor
    sizes: Tensor
    stamps: Tensor
    hashes: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """All images of several entries, one behind the other."""
        files = [file for part in parts for file in part.files]
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name, value in vars(parts[0]).items()
            if isinstance(value, Tensor)
        }
        return cls(files=files, **tensors)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, chosen: Sequence[int]) -> Entries:
        """Some of the images, by their numbers."""
        rows = torch.tensor(list(chosen), dtype=torch.int64)
        tensors = {
            name: value[rows]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, files=[self.files[i] for i in chosen], **tensors)
