from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightly_ext.loss import assign_prototypes
from lightly_ext.modules import STELLARProjectionHead
from tests import reference


def reference_head(name: str) -> STELLARProjectionHead:
    head = STELLARProjectionHead(48, **reference.head_arguments())
    head.load_state_dict(reference.head_state(reference.weights(), name))
    return head


class TestSTELLARProjectionHead:
    @pytest.mark.parametrize(
        "name, kind", [("clustering_head", "sparse"), ("cls_cluster_head", "cls")]
    )
    @torch.no_grad()
    def test_forward__reference_numbers(self, name: str, kind: str) -> None:
        expected = reference.load("forward")
        head = reference_head(name)
        tokens = expected[f"out.{kind}"]
        embeddings = head(tokens)
        projected = F.normalize(expected[f"cluster.{kind}.projected"], dim=-1)
        torch.testing.assert_close(embeddings, projected, rtol=0, atol=2e-5)
        logits = embeddings @ head.prototypes.weight.T
        torch.testing.assert_close(
            logits, expected[f"cluster.{kind}.logits"], rtol=0, atol=2e-5
        )
        torch.testing.assert_close(
            assign_prototypes(embeddings, head.prototypes.weight),
            expected[f"cluster.{kind}.assignments"],
            rtol=0,
            atol=2e-5,
        )

    def test_init__sizes_of_the_paper(self) -> None:
        head = STELLARProjectionHead()
        shapes = {n: tuple(p.shape) for n, p in head.named_parameters()}
        assert shapes == {
            "layers.0.weight": (2048, 768),
            "layers.0.bias": (2048,),
            "layers.2.weight": (256, 2048),
            "layers.2.bias": (256,),
            "prototypes.weight": (16384, 256),
        }
        assert head.prototypes.weight.std().item() == pytest.approx(1.0, rel=0.01)

    def test_forward__unit_length_in_float32(self) -> None:
        head = STELLARProjectionHead(8, 16, 4, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = head(torch.randn(2, 3, 8))
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2, 3))

    def test_init__without_prototypes(self) -> None:
        head = STELLARProjectionHead(8, 16, 4, num_prototypes=None, batch_norm=True)
        assert head.prototypes is None
        tokens = torch.randn(64, 3, 8) + 5
        # Normalised over tokens before each is made a unit vector.
        hidden = head.layers(tokens)
        torch.testing.assert_close(hidden.mean(dim=(0, 1)), torch.zeros(4))
        torch.testing.assert_close(
            hidden.var(dim=(0, 1), correction=0), torch.ones(4), rtol=0, atol=1e-2
        )
        torch.testing.assert_close(head(tokens), F.normalize(hidden, dim=-1))

    def test_init__no_prototypes(self) -> None:
        with pytest.raises(ValueError, match="num_prototypes"):
            STELLARProjectionHead(num_prototypes=0)
