from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightly_ext.modules import TokenBatchNorm
from tests import distributed

SHAPE = (4, 3, 5)


def norm_and_tokens() -> tuple[TokenBatchNorm, Tensor]:
    """With weights that are not one, for four images of three tokens."""
    torch.manual_seed(0)
    norm = TokenBatchNorm(SHAPE[-1])
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm, torch.randn(SHAPE) * 3 + 2


def step(x: Tensor, norm: TokenBatchNorm) -> dict[str, Tensor]:
    """Output, and gradients of a loss that is a mean over images."""
    x = x.clone().requires_grad_()
    output = norm(x)
    weights = torch.arange(output[0].numel()).view_as(output[0])
    (output.square() * weights).flatten(1).sum(dim=1).mean().backward()
    assert x.grad is not None and norm.weight is not None
    assert norm.weight.grad is not None
    return {"output": output, "x": x.grad, "weight": norm.weight.grad}


def in_processes(rank: int, world_size: int) -> dict[str, Any]:
    warnings.simplefilter("error")  # of deprecated collectives
    norm, x = norm_and_tokens()
    result = step(x.chunk(world_size)[rank], norm)
    dist.all_reduce(result["weight"])
    return {name: value.detach() for name, value in result.items()}


class TestTokenBatchNorm:
    def test_forward__mean_and_variance_of_all_tokens(self) -> None:
        norm, x = norm_and_tokens()
        rows = x.double().reshape(-1, SHAPE[-1])
        expected = (rows - rows.mean(dim=0)) / (
            rows.var(dim=0, correction=0) + 1e-5
        ) ** 0.5
        assert norm.weight is not None and norm.bias is not None
        expected = expected * norm.weight + norm.bias
        torch.testing.assert_close(norm(x), expected.view(SHAPE).float())
        norm.eval()  # remembers nothing
        torch.testing.assert_close(norm(x), expected.view(SHAPE).float())
        plain = TokenBatchNorm(SHAPE[-1], affine=False)
        assert not list(plain.parameters())
        assert plain(x).mean(dim=(0, 1)).abs().max() < 1e-6

    def test_forward__one_token(self) -> None:
        with pytest.raises(ValueError, match="two tokens or more"):
            TokenBatchNorm(5)(torch.randn(1, 1, 5))

    @pytest.mark.slow
    def test_forward__processes_like_one(self, tmp_path: Path) -> None:
        norm, x = norm_and_tokens()
        expected = step(x, norm)
        results = distributed.run(in_processes, tmp_path)
        output = torch.cat([result["output"] for result in results])
        torch.testing.assert_close(output, expected["output"].detach())
        # Each process' loss is a mean over its half of the images.
        gradient = torch.cat([result["x"] for result in results]) / 2
        torch.testing.assert_close(gradient, expected["x"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results[0]["weight"] / 2, expected["weight"])
