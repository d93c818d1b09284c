from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightly_ext.search.entries import Entries
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.scoring import quantised, restored
from lightly_ext.search.token_index import TokenIndex

NUM_TOKENS, DIM = 3, 80
IDENTITY = {"sha256": "a", "precision": "32-true"}
GRID, CLS_DIM = (2, 2), 5


def _tokens(num: int, seed: int = 0) -> Tensor:
    return torch.randn(
        num, NUM_TOKENS, DIM, generator=torch.Generator().manual_seed(seed)
    )


def _names(num: int) -> list[str]:
    return [f"a'b/{i:04d}.jpg" for i in range(num)]


def _card(**identity: str) -> IndexCard:
    made = {**IDENTITY, **identity}
    return IndexCard(NUM_TOKENS, DIM, CLS_DIM, GRID, 32, 32, made, "/images", {})


def _entries(files: list[str], tokens: Tensor, cls_dim: int = CLS_DIM) -> Entries:
    num = len(files)
    maps = torch.rand(num, NUM_TOKENS, 4, generator=torch.Generator().manual_seed(1))
    maps = maps / maps.sum(dim=1, keepdim=True)
    sizes = torch.tensor([[30, 40]]).expand(num, -1)
    stamps = torch.arange(num)[:, None] + torch.tensor([100, 2**60, 2**61])
    hashes = torch.arange(num).byte()[:, None].expand(-1, 32).contiguous()
    mean, cls = tokens.mean(dim=1), tokens[:, 0, :cls_dim]
    masses = maps.mean(dim=2)
    return Entries(files, tokens, masses, maps, mean, cls, sizes, stamps, hashes)


def _index(folder: Path, num: int = 40) -> TokenIndex:
    index = TokenIndex.create(folder, _card())
    if num:
        index.put(_entries(_names(num), _tokens(num)))
        index.refresh()
    return index


def _brute_force(
    query: Tensor, weights: list[float], tokens: Tensor
) -> tuple[list[float], list[int]]:
    """Scores and matched tokens by loops, in float64."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    asked, images = query.double().numpy(), tokens.double().numpy()
    heaviest = asked[int(np.argmax(weights))]
    scores = [
        sum(
            w * max(cosine(s, t) for t in image)
            for w, s in zip(weights, asked, strict=True)
        )
        for image in images
    ]
    return scores, [int(np.argmax([cosine(heaviest, t) for t in i])) for i in images]


class TestScoring:
    def test_quantised__unit_length_and_zero(self) -> None:
        vectors = torch.cat([_tokens(5).flatten(0, 1), torch.zeros(1, DIM)])
        found = restored(*quantised(vectors))
        lengths = torch.tensor([1.0] * 15 + [0.0])
        torch.testing.assert_close(found.norm(dim=-1), lengths)
        cosines = (found[:15] * vectors[:15]).sum(-1) / vectors[:15].norm(dim=-1)
        # Steps of peak / 127, so an angle below sqrt(DIM / 12) / 127 * peak / length.
        assert cosines.min() > 1 - 1e-4


class TestTokenIndex:
    @pytest.mark.parametrize("candidates", [None, 1000, 12])
    def test_search__brute_force(self, tmp_path: Path, candidates: int | None) -> None:
        query, weights = _tokens(1, seed=3)[0], [0.2, 0.7, 0.1]
        found = _index(tmp_path).search(
            query, 3, torch.tensor(weights), candidates=candidates
        )
        scores, matched = _brute_force(query, weights, _tokens(40))
        order = np.argsort(scores)[::-1][:3]
        assert [f.file for f in found] == [_names(40)[i] for i in order]
        assert [f.token for f in found] == [matched[i] for i in order]
        got = [f.score for f in found]
        np.testing.assert_allclose(got, [scores[i] for i in order], atol=2e-3)

    def test_search__finds_itself_at_any_length(self, tmp_path: Path) -> None:
        (first, *_) = _index(tmp_path).search(100 * _tokens(40)[7], 5)
        assert first.file == _names(40)[7]
        assert first.score == pytest.approx(1, abs=1e-3)

    def test_search__fewer_images_than_k(self, tmp_path: Path) -> None:
        assert len(_index(tmp_path, 4).search(_tokens(1)[0], 9)) == 4

    @pytest.mark.parametrize(
        "tokens, k, weights, message",
        [
            (torch.ones(2, 5), 1, None, r"\(num_query_tokens, 80\), got \(2, 5\)"),
            (torch.ones(2, DIM), 0, None, "k must be at least 1"),
            (torch.ones(2, DIM), 1, torch.ones(3), "one for each of 2 tokens"),
        ],
    )
    def test_search__bad_input(
        self,
        tmp_path: Path,
        tokens: Tensor,
        k: int,
        weights: Tensor | None,
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            _index(tmp_path, 4).search(tokens, k, weights)

    def test_search__empty(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has no image"):
            _index(tmp_path, 0).search(_tokens(1)[0], 1)

    def test_open__nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="There is no index"):
            TokenIndex.open(tmp_path)

    def test_create__other_model(self, tmp_path: Path) -> None:
        _index(tmp_path, 2)
        with pytest.raises(ValueError, match=r"sha256: a there, b here"):
            TokenIndex.create(tmp_path, _card(sha256="b"))

    def test_create__elsewhere(self, tmp_path: Path) -> None:
        _index(tmp_path, 2)
        moved = replace(_card(), images="/moved", model={"model": "m"})
        index = TokenIndex.create(tmp_path, moved)
        assert len(index) == 2
        assert TokenIndex.open(tmp_path).card == moved

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}'])
    def test_open__broken_card(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="is no card of an index"):
            TokenIndex.open(tmp_path)

    @pytest.mark.parametrize(
        "edited, message",
        [
            ({"num_tokens": "x"}, "num_tokens is 'x'"),
            ({"crop": 0}, "sizes are"),
            ({"grid_size": [4]}, "sizes are"),
            ({"images": 3}, "images is 3"),
            ({"model": ["m"]}, "model is"),
            ({"known": [None]}, "known has"),
            ({"num_tokens": 4}, "is not of its card: maps has 12 .* there, 16 by"),
            ({"dim": 64}, "is not of its card: mean has 80 .* there, 64 by"),
            ({"cls_dim": 0}, "is not of its card: cls has 5 .* there, 0 by"),
        ],
    )
    def test_open__edited_card(
        self, tmp_path: Path, edited: dict[str, Any], message: str
    ) -> None:
        _index(tmp_path, 2)
        card = json.loads((tmp_path / "index.json").read_text())
        (tmp_path / "index.json").write_text(json.dumps({**card, **edited}))
        with pytest.raises(ValueError, match=message):
            TokenIndex.open(tmp_path)

    def test_check_same__other_known_numbers(self) -> None:
        card = replace(_card(), known=[0.5, 1.0])
        with pytest.raises(ValueError, match="tells 0 numbers of a known image, not 2"):
            replace(card, known=[]).check_same(card, "there")

    def test_put_and_drop(self, tmp_path: Path) -> None:
        index, names = _index(tmp_path, 6), _names(6)
        index.put(_entries([names[2]], _tokens(1, seed=8)))  # changed
        index.drop([names[4]])
        index.tidy()
        moved = tmp_path.with_name(f"{tmp_path.name}_moved")
        tmp_path.rename(moved)
        index = TokenIndex.open(moved)
        assert index.files == names[:4] + names[5:]
        assert index.search(_tokens(1, seed=8)[0], 1)[0].file == names[2]
        assert index.search(_tokens(6)[2], 1)[0].score < 0.9
        assert index.search(_tokens(6)[5], 1)[0].file == names[5]

    @pytest.mark.parametrize("cls_dim", [0, CLS_DIM])
    def test_entries__as_put(self, tmp_path: Path, cls_dim: int) -> None:
        index = TokenIndex.create(tmp_path, replace(_card(), cls_dim=cls_dim))
        given = _entries(_names(7), _tokens(7), cls_dim)
        index.put(given)
        index.refresh()
        found = index.entries([given.files[5], given.files[0]])
        wanted = given[[5, 0]]
        assert found.files == wanted.files
        for name in ("tokens", "mean", "cls"):
            unit = F.normalize(getattr(wanted, name), dim=-1)
            torch.testing.assert_close(getattr(found, name), unit, atol=2e-2, rtol=0)
        torch.testing.assert_close(found.maps, wanted.maps, atol=0.5 / 255, rtol=0)
        for name in ("masses", "sizes", "stamps", "hashes"):
            assert getattr(found, name).equal(getattr(wanted, name))
        with pytest.raises(ValueError, match=r"'none\.jpg' is not in the index"):
            index.entries(["none.jpg"])
        blocks = list(index.blocks(3))
        assert [len(block) for block in blocks] == [3, 3, 1]
        assert torch.cat([b.tokens for b in blocks])[5].equal(found.tokens[0])
        wanted_content = (106, 2**60 + 6, 2**61 + 6), bytes([6] * 32)
        assert index.contents()[_names(7)[6]] == wanted_content

    @pytest.mark.slow
    def test_put__killed(self, tmp_path: Path) -> None:
        code = (
            "import sys; import tests.lightly_ext.search.test_token_index as t\n"
            "index = t.TokenIndex.create(sys.argv[1], t._card())\n"
            "for i in range(10**6):\n"
            "    index.put(t._entries([f'{i}'], t._tokens(1)))\n"
            "    print(i, flush=True)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "5":
                    break
            os.kill(process.pid, signal.SIGKILL)
        index = TokenIndex.open(tmp_path)
        assert set(index.files) >= {str(i) for i in range(6)}
        _index(tmp_path, 3)  # goes on
        assert {*_names(3)} <= {*TokenIndex.open(tmp_path).files}


class TestHistory:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_search__not_finite(self, tmp_path: Path, value: float) -> None:
        tokens = _tokens(1)[0]
        tokens[1, 2] = value
        with pytest.raises(ValueError, match="tokens must be finite"):
            _index(tmp_path, 3).search(tokens, 2)

    def test_search__candidates_are_positive(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
            _index(tmp_path, 3).search(_tokens(1)[0], 2, candidates=0)

    def test_search__with_gradient(self, tmp_path: Path) -> None:
        index, tokens = _index(tmp_path, 3), _tokens(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = index.search(tokens.clone().requires_grad_(), 2)
        assert found == index.search(tokens, 2)

    def test_search__order_of_writing_and_changes(self, tmp_path: Path) -> None:
        names, tokens = _names(30), _tokens(30)
        tokens[20] = tokens[4]  # equal images: the first by name comes first
        straight = _index(tmp_path / "straight", 0)
        straight.put(_entries(names, tokens))
        winding = _index(tmp_path / "winding", 0)
        for i in reversed(range(30)):
            winding.put(_entries([names[i]], tokens[[i]] if i % 3 else _tokens(1)))
        winding.put(_entries(["gone"], _tokens(1)))
        winding.put(_entries(names[::3], tokens[::3]))  # changed
        winding.drop(["gone"])
        query = tokens[4] + 0.1
        for index in (straight, winding):
            index.refresh()
        for options in ({"candidates": None}, {"candidates": 9}, {"by": "mean"}):
            found = straight.search(query, 9, **options)
            assert found == winding.search(query, 9, **options)
            assert [one.file for one in found[:2]] == [names[4], names[20]]
            assert found[0].score == found[1].score

    @pytest.mark.parametrize("options", [{"candidates": None}, {"by": "mean"}])
    def test_search__changed_but_not_refreshed(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        index, query = _index(tmp_path), _tokens(1)[0]
        index.put(_entries(_names(2), _tokens(2, seed=8)))
        with pytest.raises(ValueError, match=r"2 of 40 images .* `refresh` the index"):
            index.search(query, 3, **options)
        with pytest.raises(ValueError, match=r"1 of 1 images .* `refresh` the index"):
            index.entries(_names(1))
        index.refresh()
        assert len(index.search(query, 50, **options)) == 40

    def test_search__as_float64_of_the_bytes(self, tmp_path: Path) -> None:
        index, query = _index(tmp_path), _tokens(1, seed=5)[0]
        weights = [0.2, 0.0, 0.8]
        stored = index.entries(index.files).tokens
        scores, _ = _brute_force(query, weights, stored)
        for candidates in (None, 7):
            found = index.search(query, 3, torch.tensor(weights), candidates=candidates)
            best = sorted(scores, reverse=True)[:3]
            np.testing.assert_allclose([f.score for f in found], best, atol=1e-6)

    @pytest.mark.parametrize(
        "weights, by, pooled, message",
        [
            (torch.tensor([0.5, -0.1, 0.6]), "maxsim", None, "at least 0"),
            (torch.zeros(3), "maxsim", None, "one of them more"),
            (torch.full((3,), torch.inf), "maxsim", None, "weights must be finite"),
            (None, "mean", torch.full((DIM,), torch.nan), "pooled must be finite"),
            (None, "cls", None, r"pooled must be \(5,\) by cls, got None"),
            (None, "median", None, "must be one of maxsim, mean, cls"),
            (None, "maxsim", torch.ones(80), "leave it out"),
        ],
    )
    def test_search__bad_queries(
        self,
        tmp_path: Path,
        weights: Tensor | None,
        by: Any,
        pooled: Tensor | None,
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            _index(tmp_path, 3).search(_tokens(1)[0], 2, weights, by=by, pooled=pooled)
