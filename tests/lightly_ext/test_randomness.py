from __future__ import annotations

import torch

from lightly_ext.randomness import Stream, seeded_uniform


class TestSeededUniform:
    def test_seeded_uniform__a_sample_depends_on_its_seed_and_stream(self) -> None:
        seeds = torch.tensor([3, -(2**63) + 50, 2**63 - 9, 3])
        rows = seeded_uniform(seeds, Stream.MASKS, 2, 50)
        assert rows.shape == (4, 2, 50)
        assert torch.equal(rows[0], rows[3])
        assert torch.equal(seeded_uniform(seeds[1:2], Stream.MASKS, 2, 50)[0], rows[1])
        # Masks, colours of global and of local views are drawn independently.
        streams = torch.stack([seeded_uniform(seeds[:3], s, 100) for s in Stream])
        assert streams.unique().numel() > 0.99 * streams.numel()
        assert streams.min() >= 0 and streams.max() < 1
        assert abs(streams.mean() - 0.5) < 0.05
