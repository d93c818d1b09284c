from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.prototypes import load_sparse_head
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.checkpoints import save_heads
from tests.lightly_ext.evaluate.small import EMBED_DIM, write_model


def test_load_sparse_head__as_it_was_saved(tmp_path: Path) -> None:
    source = write_model(tmp_path)
    head = STELLARProjectionHead(EMBED_DIM, 32, 8, 6)
    save_heads({"sparse_head": head.state_dict()}, tmp_path)
    found = load_sparse_head(load_frozen_model(source))
    tokens = torch.randn(2, 3, EMBED_DIM)
    torch.testing.assert_close(found(tokens), head.eval()(tokens))
    torch.testing.assert_close(found.prototypes.weight.data, head.prototypes.weight)
    assert not any(weights.requires_grad for weights in found.parameters())


def test_load_sparse_head__no_prototypes(tmp_path: Path) -> None:
    source = write_model(tmp_path)
    with pytest.raises(ValueError, match=r"has no prototypes.*beside it.*Leave them"):
        load_sparse_head(load_frozen_model(source))
    for kwargs, problem in (
        ({"num_prototypes": None}, "it was trained without"),
        ({"batch_norm": True}, "normalised by the batch"),
    ):
        head = STELLARProjectionHead(EMBED_DIM, 32, 8, **kwargs)
        save_heads({"sparse_head": head.state_dict()}, tmp_path)
        with pytest.raises(ValueError, match=problem):
            load_sparse_head(load_frozen_model(source))
    with pytest.raises(ValueError, match="untrained model has no prototypes"):
        load_sparse_head(load_frozen_model(source, untrained=True))
