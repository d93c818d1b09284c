"""What `STELLARLoss` takes and returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

# Fields of `STELLARLossTerms` that are figures of the matching, and no losses.
MATCHING_FIGURES = ("non_identity_matches", "matching_collisions", "matching_entropy")


class SparseViews(NamedTuple):
    """Sparse tokens of a batch. Embeddings are None if no term reads them.

    Attributes:
        tokens:
            Encoder tokens of the target view with shape (batch_size, r, embed_dim).
        view_tokens:
            Encoder tokens of the masked views, (batch_size, num_views, r, embed_dim).
        embeddings:
            Head output of `tokens` with shape (batch_size, r, dim).
        view_embeddings:
            Head output of `view_tokens` with shape (batch_size, num_views, r, dim).
        prototypes:
            Tensor with shape (num_prototypes, dim).
    """

    tokens: Tensor
    view_tokens: Tensor
    embeddings: Tensor | None = None
    view_embeddings: Tensor | None = None
    prototypes: Tensor | None = None


class CLSViews(NamedTuple):
    """CLS embeddings of a batch.

    Attributes:
        embeddings:
            Head output of the target view with shape (batch_size, dim).
        view_embeddings:
            Head output of the masked views with shape (batch_size, num_views, dim).
        local_embeddings:
            Head output of the local crops with shape (batch_size, num_crops, dim), or
            None without local crops.
        prototypes:
            Tensor with shape (num_prototypes, dim).
    """

    embeddings: Tensor
    view_embeddings: Tensor
    local_embeddings: Tensor | None
    prototypes: Tensor


class TeacherTargets(NamedTuple):
    """What a momentum teacher says of the batch (random prior, stage 1).

    Attributes:
        tokens:
            Encoder tokens with shape (batch_size, r, embed_dim).
        embeddings:
            Head output of `tokens` with shape (batch_size, r, dim).
        prototypes:
            Prototypes of the teacher with shape (num_prototypes, dim).
        cls_embeddings:
            CLS head output with shape (batch_size, dim), None if the CLS terms are off.
        cls_prototypes:
            CLS prototypes of the teacher, None if the CLS terms are off.
    """

    tokens: Tensor
    embeddings: Tensor
    prototypes: Tensor
    cls_embeddings: Tensor | None = None
    cls_prototypes: Tensor | None = None


class STELLARLossTerms(NamedTuple):
    """Parts of the STELLAR loss before weighting, None where switched off.

    Attributes:
        total:
            Weighted sum, what `STELLARLoss.forward` returns.
        reconstruction:
            Mean squared error of the reconstruction, in squared intensities; for the
            target "tokens" cross-entropy of the tokenizer's codes, in nats.
        clustering:
            Cross-entropy of the target view with its assignment, in nats.
        alignment:
            Cross-entropy of the masked views with the matched assignments, in nats.
        cls_clustering:
            As `clustering`, for the CLS token.
        cls_alignment:
            As `alignment`, for the CLS token of masked views, without matching.
        cls_local_alignment:
            The same for the CLS token of local crops.
        koleo:
            Set KoLeo of the target view.
        koleo_views:
            Set KoLeo of the masked views.
        non_identity_matches:
            Share of tokens of masked views matched with a token of another number.
        matching_collisions:
            Share of target tokens that no or several tokens of a view are matched with.
        matching_entropy:
            Mean entropy of the rows of the transport plan, in nats.
    """

    total: Tensor
    reconstruction: Tensor | None = None
    clustering: Tensor | None = None
    alignment: Tensor | None = None
    cls_clustering: Tensor | None = None
    cls_alignment: Tensor | None = None
    cls_local_alignment: Tensor | None = None
    koleo: Tensor | None = None
    koleo_views: Tensor | None = None
    non_identity_matches: Tensor | None = None
    matching_collisions: Tensor | None = None
    matching_entropy: Tensor | None = None

    def losses(self) -> dict[str, Tensor]:
        """Total and parts by name, without gradient, the total first."""
        return {
            name: value.detach()
            for name, value in self._asdict().items()
            if value is not None and name not in MATCHING_FIGURES
        }


def named_tensors(**inputs: Any) -> dict[str, Tensor]:
    """The tensors among inputs of the loss by name, such as "sparse.tokens"."""
    named: dict[str, Any] = {}
    for name, value in inputs.items():
        if hasattr(value, "_asdict"):
            named |= {f"{name}.{k}": tensor for k, tensor in value._asdict().items()}
        else:
            named[name] = value
    return {name: value for name, value in named.items() if value is not None}


def check_not_empty(tensors: dict[str, Tensor]) -> None:
    """Raises a ValueError that names a tensor without any element."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: the loss needs one image, "
                "token and view or more. Without local crops, local_embeddings is None."
            )


def not_finite(tensors: dict[str, Tensor]) -> str:
    """Which tensors hold what is not finite, and where first; waits for the device."""
    found = []
    for name, tensor in tensors.items():
        bad = ~tensor.isfinite().flatten(1).all(dim=1)
        if bad.any():
            what = "row" if name.endswith("prototypes") else "image"
            found.append(f"{name} ({what} {int(bad.nonzero()[0])})")
    return ", ".join(found) or "no input"
