from __future__ import annotations

import torch

from lightly_ext.metrics.late_interaction import best_matches, maxsim


def test_maxsim__closed_form() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[-1.0, 0.0], [0.0, -1.0]]])
    found = maxsim(query, torch.tensor([0.75, 0.25]), tokens)
    # 0.75 * 1 + 0.25 * 0.8; both of the other image's best are orthogonal.
    torch.testing.assert_close(found, torch.tensor([0.95, 0.0]))


def test_best_matches__first_of_equals_and_no_token() -> None:
    query = torch.tensor([[1.0, 0.0]])
    tokens = torch.tensor([[[-0.6, 0.8], [-0.6, 0.8], [0.0, 0.0]]])
    cosines, matched = best_matches(query, tokens)
    assert matched.tolist() == [[0]]
    torch.testing.assert_close(cosines, torch.tensor([[-0.6]]))
