from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightly_ext.loss.prototype_cross_entropy import (
    PrototypeTarget,
    assign_prototypes,
    contract_targets,
    prototype_cross_entropy,
)
from lightly_ext.loss.reconstruction import code_cross_entropy, squared_error
from lightly_ext.loss.set_koleo_loss import SetKoLeoLoss
from lightly_ext.loss.set_matching import (
    TokenMatching,
    match_by_number,
    match_tokens,
    matching_statistics,
)
from lightly_ext.loss.stellar_terms import (
    CLSViews,
    SparseViews,
    STELLARLossTerms,
    TeacherTargets,
    check_not_empty,
    named_tensors,
    not_finite,
)

# Weight of the reconstruction by its target.
RECONSTRUCTION_WEIGHTS = {"pixels": 10.0, "tokens": 0.05}


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
        """Returns the total loss, see `terms`.

        Raises:
            ValueError: Beside those of `terms`, on a CPU, if the total is not finite:
                names inputs and images that are not. Elsewhere nothing waits for it.
        """
        inputs: dict[str, Any] = {
            **{"sparse": sparse, "cls": cls, "reconstruction": reconstruction},
            **{"images": images, "teacher": teacher, "codes": codes},
        }
        total = self.terms(**inputs).total
        if total.device.type == "cpu" and not total.isfinite():
            raise ValueError(
                f"The loss is {float(total)}. Not finite in its inputs, with the first "
                f"of the images: {not_finite(named_tensors(**inputs))}."
            )
        return total

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
            ValueError: If an input that a switched-on term needs is missing, or an
                input is empty.
        """
        reads_tokens = self.uses_sparse_head or self._is_on("koleo")
        check_not_empty(
            named_tensors(
                sparse=sparse if reads_tokens else None,
                cls=cls if self.uses_cls_head else None,
                reconstruction=reconstruction if self.uses_reconstruction else None,
                teacher=teacher,
            )
        )
        parts: dict[str, Tensor] = {}
        if self.uses_reconstruction:
            if self.target == "tokens":
                loss = code_cross_entropy(reconstruction, codes)
            else:
                loss = squared_error(reconstruction, images)
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
            own_target = target.select(
                self._match(sparse.tokens, target_tokens).indices
            )
        if self._is_on("clustering"):
            loss = self._cross_entropy(embeddings, prototypes, own_target)
            parts["clustering"] = loss
        if self._is_on("alignment"):
            matching = self._match(sparse.view_tokens, target_tokens[:, None])
            target = PrototypeTarget(target.embedding[:, None], target.mass[:, None])
            parts["alignment"] = self._cross_entropy(
                views, prototypes, target.select(matching.indices)
            )
            parts.update(matching_statistics(matching))
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
            # (batch_size, dim) -> (batch_size, 1, dim), against every view and crop
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
            return match_by_number(predictions)
        return match_tokens(
            predictions, targets, self.matching_epsilon, self.matching_iterations
        )
