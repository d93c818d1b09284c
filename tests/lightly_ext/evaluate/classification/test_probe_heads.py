from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.evaluate.classification import probe_heads
from lightly_ext.evaluate.classification.probe_heads import HeadOptions, ProbeHeads

DIM, NUM_CLASSES = 12, 5
GRID = [HeadOptions(b, lr) for b in (4, 8, 16) for lr in (1e-3, 1e-2, 0.1)]
RECIPE = {"weight_decay": 1e-2, "clip": 0.5}


def _data(
    num: int, seed: int = 0, num_classes: int = NUM_CLASSES, noise: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Noisy clusters, with features of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, DIM, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (num,), generator=generator)
    features = centres[labels] + noise * torch.randn(num, DIM, generator=generator)
    return 3 * features + 1, labels


def _heads(grid: list[HeadOptions] = GRID, **kwargs: object) -> ProbeHeads:
    options = {**RECIPE, **kwargs}
    return ProbeHeads(grid, DIM, NUM_CLASSES, **options)  # type: ignore[arg-type]


def _alone(
    options: HeadOptions, blocks: list[tuple[Tensor, Tensor]], clip: float
) -> nn.Sequential:
    """The same head by torch's own parts, one batch after the other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, NUM_CLASSES))
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=options.lr, weight_decay=RECIPE["weight_decay"]
    )
    for features, labels in blocks:
        size = options.batch_size
        for x, y in zip(features.split(size), labels.split(size), strict=True):
            if len(y) < size:
                continue
            optimizer.zero_grad()
            F.cross_entropy(head(x), y).backward()
            nn.utils.clip_grad_norm_(head.parameters(), clip)
            optimizer.step()
    return head


class TestProbeHeads:
    # Every step is clipped, some are, none is. Adam does not see a gradient's size, but
    # whether sizes change from step to step.
    @pytest.mark.parametrize("clip", [0.5, 1.2, 1e6])
    @pytest.mark.slow
    def test_train_block__equals_heads_trained_alone(self, clip: float) -> None:
        heads = _heads(clip=clip)
        # The last block is full for none of the batch sizes.
        blocks = [_data(num, seed) for seed, num in enumerate((32, 32, 27))]
        for features, labels in blocks:
            heads.train_block(features, labels)
        for number, options in enumerate(GRID):
            ours, theirs = heads.module(number), _alone(options, blocks, clip)
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)

    def test_train_block__clipping_matters_in_this_test(self) -> None:
        blocks = [_data(32)]
        clipped, free = (_alone(GRID[0], blocks, clip) for clip in (0.5, 1e6))
        assert (clipped[1].weight - free[1].weight).abs().max() > 1e-4

    def test_train_block__the_same_in_chunks(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, chunked = _heads(), _heads()
        features, labels = _data(64)
        whole.train_block(features, labels)
        monkeypatch.setattr(probe_heads, "LOGITS_AT_ONCE", 3 * 3 * NUM_CLASSES)
        chunked.train_block(features, labels)
        for number in range(len(GRID)):
            for a, b in zip(
                whole.module(number).parameters(),
                chunked.module(number).parameters(),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
        assert torch.equal(
            chunked.count_correct(features, labels),
            torch.tensor(
                [
                    int((chunked.module(i)(features).argmax(1) == labels).sum())
                    for i in range(len(GRID))
                ]
            ),
        )

    def test_train_block__smaller_than_a_batch_changes_nothing(self) -> None:
        heads = _heads([HeadOptions(16, 1e-2)])
        before = heads.state()[0]
        heads.train_block(*_data(15))
        after = heads.state()[0]
        assert set(after) == {"weights"}  # the optimiser has not started
        assert torch.equal(after["weights"], before["weights"])

    def test_count_correct__equals_modules(self) -> None:
        heads = _heads()
        heads.train_block(*_data(64))
        features, labels = _data(50, seed=7)
        expected = [
            int((heads.module(i)(features).argmax(1) == labels).sum())
            for i in range(len(GRID))
        ]
        assert heads.count_correct(features, labels).tolist() == expected

    def test_share__sums_up_to_all(self) -> None:
        features, labels = _data(64)
        whole = _heads()
        shares = [_heads(share=range(rank, len(GRID), 2)) for rank in range(2)]
        for heads in (whole, *shares):
            heads.train_block(features, labels)
        counts = [heads.count_correct(features, labels) for heads in shares]
        assert torch.equal(sum(counts), whole.count_correct(features, labels))  # type: ignore[arg-type]
        assert (counts[0][1::2] == 0).all()
        for number in range(len(GRID)):
            parts = [list(heads.module(number).parameters()) for heads in shares]
            for a, b, c in zip(*parts, whole.module(number).parameters(), strict=True):
                torch.testing.assert_close(a + b, c, rtol=1e-3, atol=2e-5)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_train_block__the_same_on_cuda(self) -> None:
        on_cpu, on_cuda = _heads(), _heads(device="cuda")
        features, labels = _data(64)
        on_cpu.train_block(features, labels)
        on_cuda.train_block(features.cuda(), labels.cuda())
        # Continued from the other device, as after a change of machines.
        on_cuda.load_state(on_cuda.state())
        on_cuda.train_block(features.cuda(), labels.cuda())
        on_cpu.train_block(features, labels)
        for number in range(len(GRID)):
            for a, b in zip(
                on_cpu.module(number).parameters(),
                on_cuda.module(number).cpu().parameters(),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)

    def test_share__may_be_empty(self) -> None:
        heads = _heads(share=[])
        heads.train_block(*_data(16))
        assert heads.count_correct(*_data(16)).tolist() == [0] * len(GRID)

    def test_load_state__continues_exactly(self) -> None:
        straight = _heads()
        first, second = _data(32), _data(32, seed=1)
        straight.train_block(*first)
        parts = [straight.state()]
        straight.train_block(*second)
        # Saved by one process, continued by two.
        for rank in range(2):
            continued = _heads(share=range(rank, len(GRID), 2), seed=5)
            continued.load_state(parts[0])
            continued.train_block(*second)
            for number, state in continued.state().items():
                expected = straight.state()[number]
                assert state["step"] == expected["step"] == 64 / GRID[number].batch_size
                for name, tensor in expected.items():
                    torch.testing.assert_close(
                        state[name], tensor, rtol=1e-3, atol=2e-5
                    )

    def test_seed__decides_on_first_weights_and_leaves_the_generator_alone(
        self,
    ) -> None:
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        heads = [_heads(seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(torch.rand(1), expected)
        weights = [h.state()[4]["weights"] for h in heads]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_probe_heads__reach_logistic_regression() -> None:
    train, test = _data(400, noise=1.0), _data(1000, seed=1, noise=1.0)
    heads = ProbeHeads(
        [HeadOptions(200, 0.03)], DIM, NUM_CLASSES, weight_decay=0.0, clip=5.0
    )
    for _ in range(400):
        heads.train_block(*train)
    normalised = [F.layer_norm(x, (DIM,)) for x, _ in (train, test)]
    reference = LogisticRegression(C=1e4, max_iter=2000)
    reference.fit(normalised[0].numpy(), train[1].numpy())
    accuracy = int(heads.count_correct(*test)[0]) / len(test[1])
    assert accuracy == pytest.approx(
        reference.score(normalised[1].numpy(), test[1].numpy()), abs=0.015
    )
    assert accuracy > 0.7


def test_probe_heads__permuted_labels_give_chance() -> None:
    features, labels = _data(400)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    heads = _heads([HeadOptions(50, 1e-2)])
    for _ in range(20):
        heads.train_block(features, shuffled)
    test_features, test_labels = _data(2000, seed=1)
    accuracy = int(heads.count_correct(test_features, test_labels)[0]) / 2000
    assert accuracy == pytest.approx(1 / NUM_CLASSES, abs=0.08)
