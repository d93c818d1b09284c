from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightly_ext.loss.prototype_cross_entropy import (
    PrototypeTarget,
    assign_prototypes,
    contract_targets,
    prototype_cross_entropy,
)
from lightly_ext.loss.set_koleo_loss import SetKoLeoLoss
from lightly_ext.loss.set_matching import TokenMatching, match_tokens

# Letters in shape comments:
# B images, V masked views, U local crops, r tokens, d encoder width, D embedding width,
# K prototypes


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


# Weight of the reconstruction by its target.
RECONSTRUCTION_WEIGHTS = {"pixels": 10.0, "tokens": 0.05}


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
    matching_entropy: Tensor | None = None


class STELLARLoss(nn.Module):
    """Objective of STELLAR [0]: reconstruction, clustering, set alignment, KoLeo.

    Takes embeddings and prototypes, never logits: the (tokens x prototypes) matrix of
    the masked views is not kept in memory. A term with weight 0 is not computed and
    needs no input.

    - [0]: STELLAR, 2026, https://arxiv.org/abs/2602.01905 (sections 3.3 to 3.7)

    Attributes:
        reconstruction_weight:
            Weight of the reconstruction. None is 10 for pixels and 0.05 for tokens.
        clustering_weight:
            Weight of the clustering loss of sparse tokens.
        alignment_weight:
            Weight of the alignment loss of sparse tokens.
        cls_clustering_weight:
            Weight of the clustering loss of the CLS token.
        cls_alignment_weight:
            Weight of the CLS alignment of masked views and of local crops, each.
        koleo_weight:
            Weight of the set KoLeo of the target view and of the masked views, each.
        prediction_temperature:
            Temperature of the predictions.
        target_temperature:
            Temperature of the balanced assignments.
        sinkhorn_iterations:
            Iterations of the balanced assignment.
        matching:
            "optimal_transport" matches tokens by their distance, "identity" by their
            number (an ablation).
        matching_epsilon:
            Entropy weight of the matching.
        matching_iterations:
            Iterations of the matching.
        gather_distributed:
            If True, assignments are balanced over the tokens of all processes.
        target:
            What is reconstructed: "pixels" (mean squared error) or the codes of a
            frozen tokenizer, "tokens" (cross-entropy).

    Raises:
        ValueError: If a weight is negative, a temperature not positive, `matching` or
            `target` unknown, or `gather_distributed` is True without torch.distributed.

    Examples:
        >>> criterion = STELLARLoss()
        >>> loss = criterion(
        >>>     sparse=SparseViews(tokens, view_tokens, embeddings, view_embeddings, W),
        >>>     cls=CLSViews(cls, view_cls, local_cls, W_cls),
        >>>     reconstruction=model.decode(lowrank, grid_size),
        >>>     images=images,  # in [0, 1]
        >>> )
    """

    def __init__(
        self,
        reconstruction_weight: float | None = None,
        clustering_weight: float = 1.0,
        alignment_weight: float = 1.0,
        cls_clustering_weight: float = 1.0,
        cls_alignment_weight: float = 1.0,
        koleo_weight: float = 0.1,
        prediction_temperature: float = 0.12,
        target_temperature: float = 0.06,
        sinkhorn_iterations: int = 3,
        matching: Literal["optimal_transport", "identity"] = "optimal_transport",
        matching_epsilon: float = 0.1,
        matching_iterations: int = 5,
        gather_distributed: bool = False,
        target: Literal["pixels", "tokens"] = "pixels",
    ) -> None:
        super().__init__()
        if target not in RECONSTRUCTION_WEIGHTS:
            raise ValueError(f"target must be 'pixels' or 'tokens', got '{target}'.")
        if reconstruction_weight is None:
            reconstruction_weight = RECONSTRUCTION_WEIGHTS[target]
        self.weights = {
            "reconstruction": reconstruction_weight,
            "clustering": clustering_weight,
            "alignment": alignment_weight,
            "cls_clustering": cls_clustering_weight,
            "cls_alignment": cls_alignment_weight,
            "cls_local_alignment": cls_alignment_weight,
            "koleo": koleo_weight,
            "koleo_views": koleo_weight,
        }
        negative = {name: w for name, w in self.weights.items() if w < 0}
        if negative:
            raise ValueError(f"Weights must be 0 or more, got {negative}.")
        if min(prediction_temperature, target_temperature) <= 0:
            raise ValueError(
                f"Temperatures must be positive, got {prediction_temperature} and "
                f"{target_temperature}."
            )
        if matching not in ("optimal_transport", "identity"):
            raise ValueError(
                f"matching must be 'optimal_transport' or 'identity', got '{matching}'."
            )
        if gather_distributed and not dist.is_available():
            raise ValueError(
                "gather_distributed is True but torch.distributed is not available. "
                "Please set gather_distributed=False or install a torch version with "
                "distributed support."
            )
        self.target = target
        self.prediction_temperature = prediction_temperature
        self.target_temperature = target_temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.matching = matching
        self.matching_epsilon = matching_epsilon
        self.matching_iterations = matching_iterations
        self.gather_distributed = gather_distributed
        self.koleo = SetKoLeoLoss()

    @property
    def uses_reconstruction(self) -> bool:
        """Whether a decoder is needed."""
        return self._is_on("reconstruction")

    @property
    def uses_sparse_head(self) -> bool:
        """Whether embeddings and prototypes of sparse tokens are needed."""
        return self._is_on("clustering", "alignment")

    @property
    def uses_cls_head(self) -> bool:
        """Whether embeddings and prototypes of CLS tokens are needed."""
        return self._is_on("cls_clustering", "cls_alignment")

    @property
    def uses_local_views(self) -> bool:
        """Whether local crops are read."""
        return self._is_on("cls_local_alignment")

    def forward(
        self,
        sparse: SparseViews,
        cls: CLSViews | None = None,
        reconstruction: Tensor | None = None,
        images: Tensor | None = None,
        teacher: TeacherTargets | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """Returns the total loss, see `terms`."""
        return self.terms(sparse, cls, reconstruction, images, teacher, codes).total

    def terms(
        self,
        sparse: SparseViews,
        cls: CLSViews | None = None,
        reconstruction: Tensor | None = None,
        images: Tensor | None = None,
        teacher: TeacherTargets | None = None,
        codes: Tensor | None = None,
    ) -> STELLARLossTerms:
        """Computes the total and its parts.

        Args:
            sparse:
                Sparse tokens of target view and masked views.
            cls:
                CLS embeddings; may be None if both CLS weights are 0.
            reconstruction:
                Decoded target view with shape (batch_size, 3, height, width), or for
                the target "tokens" logits with shape (batch_size, num_patches,
                num_codes); may be None if its weight is 0.
            images:
                Target view in [0, 1] intensities with the shape of `reconstruction`;
                read for the target "pixels".
            teacher:
                If given, targets come from this momentum teacher instead of the
                target view itself.
            codes:
                Codes of the target view, int64 with shape (batch_size, num_patches);
                read for the target "tokens".

        Returns:
            Total and parts, scalars.

        Raises:
            ValueError: If an input that a switched-on term needs is missing.
        """
        parts: dict[str, Tensor] = {}
        if self.uses_reconstruction:
            if self.target == "tokens":
                loss = _code_cross_entropy(reconstruction, codes)
            else:
                loss = _squared_error(reconstruction, images)
            parts["reconstruction"] = loss
        if self.uses_sparse_head:
            parts.update(self._sparse_terms(sparse, teacher))
        if self.uses_cls_head:
            parts.update(self._cls_terms(cls, teacher))
        if self._is_on("koleo"):
            parts["koleo"] = self.koleo(sparse.tokens)
            parts["koleo_views"] = self.koleo(sparse.view_tokens)
        weighted = [self.weights[k] * v for k, v in parts.items() if k in self.weights]
        if not weighted:
            raise ValueError("Every weight of STELLARLoss is 0: nothing to minimise.")
        return STELLARLossTerms(total=torch.stack(weighted).sum(), **parts)

    def _is_on(self, *names: str) -> bool:
        return any(self.weights[name] > 0 for name in names)

    def _sparse_terms(
        self, sparse: SparseViews, teacher: TeacherTargets | None
    ) -> dict[str, Tensor]:
        embeddings, views, prototypes = sparse[2:]
        if embeddings is None or views is None or prototypes is None:
            raise ValueError(
                "Clustering and alignment of sparse tokens need embeddings, "
                "view_embeddings and prototypes; set clustering_weight and "
                "alignment_weight to 0 to train without."
            )
        parts: dict[str, Tensor] = {}
        if teacher is None:
            target_tokens = sparse.tokens
            target = self._target(embeddings, prototypes, prototypes)
            own_target = target
        else:
            target_tokens = teacher.tokens
            target = self._target(teacher.embeddings, teacher.prototypes, prototypes)
            own_target = _gather(target, self._match(sparse.tokens, target_tokens))
        if self._is_on("clustering"):
            loss = self._cross_entropy(embeddings, prototypes, own_target)
            parts["clustering"] = loss
        if self._is_on("alignment"):
            matching = self._match(sparse.view_tokens, target_tokens[:, None])
            target = PrototypeTarget(target.embedding[:, None], target.mass[:, None])
            parts["alignment"] = self._cross_entropy(
                views, prototypes, _gather(target, matching)
            )
            parts.update(_matching_statistics(matching))
        return parts

    def _cls_terms(
        self, cls: CLSViews | None, teacher: TeacherTargets | None
    ) -> dict[str, Tensor]:
        if cls is None:
            raise ValueError(
                "The CLS terms need `cls`; set cls_clustering_weight and "
                "cls_alignment_weight to 0 to train without."
            )
        source, source_prototypes = cls.embeddings, cls.prototypes
        if teacher is not None:
            if teacher.cls_embeddings is None or teacher.cls_prototypes is None:
                raise ValueError("The CLS terms need the teacher's CLS embeddings.")
            source = teacher.cls_embeddings
            source_prototypes = teacher.cls_prototypes
        target = self._target(source, source_prototypes, cls.prototypes)
        parts: dict[str, Tensor] = {}
        if self._is_on("cls_clustering"):
            loss = self._cross_entropy(cls.embeddings, cls.prototypes, target)
            parts["cls_clustering"] = loss
        if self._is_on("cls_alignment"):
            # (B, D) -> (B, 1, D), against every view and crop
            target = PrototypeTarget(target.embedding[:, None], target.mass[:, None])
            parts["cls_alignment"] = self._cross_entropy(
                cls.view_embeddings, cls.prototypes, target
            )
            if cls.local_embeddings is not None:
                parts["cls_local_alignment"] = self._cross_entropy(
                    cls.local_embeddings, cls.prototypes, target
                )
        return parts

    def _target(
        self, embeddings: Tensor, source_prototypes: Tensor, prototypes: Tensor
    ) -> PrototypeTarget:
        """Balanced assignment by the source, contracted with the prototypes."""
        assignments = assign_prototypes(
            embeddings,
            source_prototypes,
            self.target_temperature,
            self.sinkhorn_iterations,
            self.gather_distributed and dist.is_initialized(),
        )
        return contract_targets(assignments, prototypes)

    def _cross_entropy(
        self, embeddings: Tensor, prototypes: Tensor, target: PrototypeTarget
    ) -> Tensor:
        return prototype_cross_entropy(
            embeddings, prototypes, target, self.prediction_temperature
        ).mean()

    def _match(self, predictions: Tensor, targets: Tensor) -> TokenMatching:
        if self.matching == "identity":
            count = predictions.shape[-2]
            plan = torch.eye(count, device=predictions.device)
            plan = plan.expand(*predictions.shape[:-1], count)
            return TokenMatching(indices=plan.argmax(dim=-1), plan=plan)
        return match_tokens(
            predictions, targets, self.matching_epsilon, self.matching_iterations
        )


def _gather(target: PrototypeTarget, matching: TokenMatching) -> PrototypeTarget:
    """Target of each prediction, (..., r, D) -> (..., num_predictions, D)."""
    indices = matching.indices
    embedding = target.embedding.expand(*indices.shape[:-1], -1, -1)
    mass = target.mass.expand(*indices.shape[:-1], -1)
    wide = indices[..., None].expand(*indices.shape, embedding.shape[-1])
    return PrototypeTarget(embedding.gather(-2, wide), mass.gather(-1, indices))


def _matching_statistics(matching: TokenMatching) -> dict[str, Tensor]:
    indices, plan = matching
    identity = torch.arange(indices.shape[-1], device=indices.device)
    rows = plan / plan.sum(dim=-1, keepdim=True)
    return {
        "non_identity_matches": (indices != identity).float().mean(),
        "matching_entropy": torch.special.entr(rows).sum(dim=-1).mean(),
    }


def _squared_error(reconstruction: Tensor | None, images: Tensor | None) -> Tensor:
    if reconstruction is None or images is None:
        raise ValueError(
            "The reconstruction term needs `reconstruction` and `images`; set "
            "reconstruction_weight=0 to train without."
        )
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"reconstruction {tuple(reconstruction.shape)} and images "
            f"{tuple(images.shape)} differ in shape."
        )
    return F.mse_loss(reconstruction.float(), images.float())


def _code_cross_entropy(logits: Tensor | None, codes: Tensor | None) -> Tensor:
    if logits is None or codes is None:
        raise ValueError(
            "The reconstruction term of the target 'tokens' needs logits as "
            "`reconstruction`, and `codes`; set reconstruction_weight=0 to train "
            "without."
        )
    if logits.shape[:-1] != codes.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and codes {tuple(codes.shape)} must have "
            "shapes (batch_size, num_patches, num_codes) and (batch_size, num_patches)."
        )
    return F.cross_entropy(logits.float().flatten(0, -2), codes.flatten())
