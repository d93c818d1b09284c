from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from lightly_ext.evaluate.classification.split import hold_out
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.text.probe import AttentionProbe
from lightly_ext.evaluate.text.training import (
    MOST_HELD_OUT,
    Alignment,
    PairBatches,
    PairSampler,
    TrainingPairs,
    held_out_loader,
    training_loader,
)
from stellar_plugin.protocols import ALIGN_TEXT
from tests import distributed

COUNTS = torch.tensor([1, 3, 2, 2, 1, 4, 2, 1])
DIM, TEXT_DIM = 24, 16


def _pairs() -> TrainingPairs:
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(int(COUNTS.sum()), TEXT_DIM)).astype(np.float32)
    return TrainingPairs(
        tokens=rng.normal(size=(len(COUNTS), 3, DIM)).astype(np.float16),
        texts=texts / np.linalg.norm(texts, axis=1, keepdims=True),
        starts=torch.cat([torch.zeros(1).long(), COUNTS.cumsum(0)]),
        train=torch.tensor([0, 1, 2, 4, 5, 7]),
        held_out=torch.tensor([3, 6]),
    )


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    pairs = _pairs()
    return torch.from_numpy(pairs.tokens), torch.from_numpy(pairs.texts[:8])


def _alignment(rank: int = 0, world_size: int = 1) -> Alignment:
    torch.manual_seed(0)
    probe = AttentionProbe(DIM, TEXT_DIM)
    return Alignment(probe, ALIGN_TEXT, _pairs(), rank, world_size)


class TestHoldOut:
    def test_hold_out__a_tenth_of_the_readable(self) -> None:
        readable = torch.arange(100)[torch.arange(100) % 3 > 0]
        train, held_out = hold_out(readable)
        assert len(held_out) == 7  # of 66
        assert torch.cat([train, held_out]).sort()[0].equal(readable)
        assert hold_out(readable)[1].equal(held_out)

    def test_hold_out__at_most_5000(self) -> None:
        train, held_out = hold_out(torch.arange(70_000), MOST_HELD_OUT)
        assert (len(train), len(held_out)) == (65_000, 5_000)


class TestPairSampler:
    def test_iter__own_captions_of_every_image_once(self) -> None:
        pairs = _pairs()
        sampler = PairSampler(pairs, 3, seed=0)
        owners = torch.repeat_interleave(torch.arange(len(COUNTS)), COUNTS)
        drawn = []
        for epoch in range(30):
            sampler.set_epoch(epoch)
            images, texts = torch.cat(list(sampler)).T
            assert images.sort()[0].equal(pairs.train)
            assert owners[texts].equal(images)
            drawn.append(texts)
        # All captions are drawn some time, none of a held-out image.
        expected = torch.arange(len(owners))[torch.isin(owners, pairs.train)]
        assert torch.cat(drawn).unique().equal(expected)

    def test_iter__processes_share_the_batches(self) -> None:
        (one,) = PairSampler(_pairs(), 4, seed=1)  # two images fill no batch
        shares = [next(iter(PairSampler(_pairs(), 4, 1, rank, 2))) for rank in (0, 1)]
        assert torch.stack(shares, dim=1).flatten(0, 1).equal(one)

    def test_iter__depends_on_seed_and_epoch(self) -> None:
        orders = set()
        for seed in (0, 1):
            sampler = PairSampler(_pairs(), 6, seed)
            for epoch in (0, 1):
                sampler.set_epoch(epoch)
                first = next(iter(sampler))
                assert first.equal(next(iter(sampler)))
                orders.add(str(first.tolist()))
        assert len(orders) == 4


def test_pair_batches__rows() -> None:
    pairs = _pairs()
    tokens, texts = PairBatches(pairs)[torch.tensor([[5, 9], [0, 0]])]
    assert np.array_equal(tokens, pairs.tokens[[5, 0]])
    assert np.array_equal(texts, pairs.texts[[9, 0]])


def test_texts_of__all_captions() -> None:
    pairs = _pairs()
    texts, owners = pairs.texts_of(torch.tensor([5, 1, 3]))
    assert owners.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    expected = pairs.texts[[9, 10, 11, 12, 1, 2, 3, 6, 7]]
    assert np.array_equal(texts, expected)


class TestAlignment:
    def test_contrast__closed_form(self) -> None:
        module, pairs = _alignment(), _pairs()
        tokens, texts = (
            torch.from_numpy(pairs.tokens),
            torch.from_numpy(pairs.texts[:8]),
        )
        with torch.no_grad():
            loss = module.contrast(tokens, texts)
            images = module.probe(tokens.float()).double()
        logits = images @ texts.double().T / 0.07
        rows = -logits.log_softmax(1).diagonal().mean()
        columns = -logits.log_softmax(0).diagonal().mean()
        assert loss.item() == pytest.approx(float(rows + columns) / 2, rel=1e-5)

    def test_contrast__perfect_and_constant(self) -> None:
        module = _alignment()
        texts = F.normalize(torch.randn(8, TEXT_DIM), dim=1)
        module.probe.forward = lambda tokens: texts[:1].expand(8, -1)  # type: ignore
        assert module.contrast(torch.zeros(8), texts).item() > math.log(8)
        module.probe.forward = lambda tokens: torch.eye(TEXT_DIM)[:8]  # type: ignore
        loss = module.contrast(torch.zeros(8), torch.eye(TEXT_DIM)[:8])
        assert loss.item() == pytest.approx(
            math.log1p(7 * math.exp(-1 / 0.07)), abs=1e-6
        )

    def test_on_train_batch_end__scale_at_most_100(self) -> None:
        module = _alignment()
        module.log_scale.data.fill_(9.0)
        module.on_train_batch_end(None, (torch.zeros(1), torch.zeros(1)), 0)
        assert module.log_scale.exp().item() == pytest.approx(100)

    @pytest.mark.slow
    def test_contrast__two_processes_equal_one(self, tmp_path: Path) -> None:
        expected = _gradients(0, 1)
        for found in distributed.run(_gradients, tmp_path):
            assert found.keys() == expected.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)


def _gradients(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Loss and gradients, averaged over processes as DDP does."""
    module, (tokens, texts) = _alignment(rank, world_size), _batch()
    loss = module.contrast(tokens[rank::world_size], texts[rank::world_size])
    loss.backward()
    values = {"loss": loss.detach()}
    values |= {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    if world_size > 1:
        for value in values.values():
            dist.all_reduce(value)
            value /= world_size
    return values


def test_loaders(tmp_path: Path) -> None:
    devices = Devices(accelerator="cpu", num_workers=0)
    pairs = _pairs()
    assert [len(texts) for _, texts in training_loader(devices, pairs, 3)] == [
        3,
        3,
    ]
    held_out = torch.cat([tokens for tokens, _ in held_out_loader(devices, pairs, 1)])
    assert np.array_equal(held_out, pairs.tokens[[3, 6]])
    assert [len(texts) for _, texts in training_loader(devices, pairs, 7)] == [6]
