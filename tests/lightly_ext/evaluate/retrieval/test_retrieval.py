from __future__ import annotations

import csv
import itertools
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.result import RESULT_NAME, Result
from lightly_ext.evaluate.retrieval import retrieval
from lightly_ext.evaluate.retrieval.ranking import average_precision, random_precision
from lightly_ext.evaluate.retrieval.retrieval import run_retrieval
from lightly_ext.evaluate.retrieval.scores import retrieval_table
from stellar_plugin.encoder import Factorization
from tests import distributed
from tests.lightly_ext.evaluate.retrieval.loops import Seen, brute_force, forms
from tests.lightly_ext.evaluate.small import (
    SIZES,
    Given,
    make_given,
    run_options,
    write_images,
    write_model,
)

PATCH, SIDE, GRID = 8, 32, 4
CLASSES = ("cat", "dog", "eel")


class ObjectsAreRed(nn.Module):
    """Patches with red are the object, green tells its class; CLS is always alike."""

    num_queries = 2
    has_localization = True

    def forward(self, images: Tensor) -> Factorization:
        patches = images[:, :, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten(2)
        is_object = (patches[:, 0] > 0.5).long()
        classes = (patches[:, 1] * is_object * 255 / 50).round().long().amax(dim=1)
        objects = F.one_hot(1 + classes, 8).float()
        background = F.one_hot(torch.zeros_like(classes), 8).float()
        sparse = torch.stack([background, objects], dim=1)
        localization = F.one_hot(is_object, 2).float()
        cls = torch.ones(len(images), 8)
        dense = localization @ sparse
        return Factorization(cls, sparse, dense, (GRID, GRID), lambda *_: localization)


def _given(tmp_path: Path, **options: Any) -> Given:
    origin = Origin(
        "red", "STELLAR", "0" * 64, mean=(0, 0, 0), std=(1, 1, 1), name="red"
    )
    values = {"resize": SIDE, "crop": SIDE, "batch_size": 3, **options}
    return make_given(tmp_path, FrozenModel(ObjectsAreRed(), origin), **values)


def _write_boxes(path: Path, boxes: dict[str, Sequence[tuple[int, ...]]]) -> str:
    """A CSV, whose last px are inclusive, of edges."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "x0", "y0", "x1", "y1"])
        for name, of_image in boxes.items():
            rows.writerows(
                [name, x0, y0, x1 - 1, y1 - 1] for x0, y0, x1, y1 in of_image
            )
    return str(path)


def _write_objects(root: Path, num: int = 4) -> dict[str, str]:
    """Objects of 2 x 2 patches, red and as green as their class, and their boxes."""
    rng = np.random.default_rng(0)
    boxes = {}
    for c, i in itertools.product(range(3), range(num)):
        x, y = PATCH * rng.integers(3, size=2)
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        pixels[y : y + 2 * PATCH, x : x + 2 * PATCH] = (255, 50 * c, 0)
        path = root / "images" / CLASSES[c] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        box = (int(x), int(y), int(x) + 2 * PATCH, int(y) + 2 * PATCH)
        boxes[f"{CLASSES[c]}/{i}.png"] = [box]
    return {
        "data": str(root / "images"),
        "boxes": _write_boxes(root / "boxes.csv", boxes),
    }


def _order(num: int) -> list[int]:
    return torch.randperm(num, generator=torch.Generator().manual_seed(0)).tolist()


class TestRunRetrieval:
    def test_run_retrieval__what_is_perfect(self, tmp_path: Path) -> None:
        data = _write_objects(tmp_path)
        result = run_retrieval(*_given(tmp_path), **data, neighbours=3, clusters=2)
        scores = result.scores
        for name in ("tokens", "clusters", "mean_token", "mean_patch", "patches"):
            assert scores[f"{name}_map"] == 1
        for name in ("tokens", "clusters", "patches"):
            assert scores[f"{name}_location"] == 1
            assert scores[f"{name}_location_of_class"] == 1
        assert scores["tokens_location_oracle"] == 1
        # A crop of 32 x 32 px, boxes of 16 x 16.
        assert scores["mean_token_location"] == result.chance["cls_location"] == 0
        # All alike: by an order that knows nothing.
        precision = [
            average_precision(
                torch.tensor([[i // 4 == q // 4 for i in _order(12) if i != q]])
            )
            for q in range(12)
        ]
        assert scores["cls_map"] == pytest.approx(float(torch.cat(precision).mean()))
        assert 0.2 < scores["cls_map"] < 0.6
        counts = [scores[f"num_{n}"] for n in ("images", "queries", "located_queries")]
        assert counts == [12, 12, 12]

    def test_run_retrieval__loops(self, tmp_path: Path) -> None:
        """Images of 48 x 32 px, whose centre is seen; some have boxes, two or none."""
        boxes: dict[str, list[tuple[int, ...]]] = {}
        rng = np.random.default_rng(3)
        nums = dict(zip(CLASSES, (5, 4, 1), strict=True))
        for seed, (name, num) in enumerate(nums.items()):
            write_images(tmp_path / "set" / name, num, (SIDE, 48), seed=seed)
            for i in range(num):
                starts = rng.integers(0, 12, (i % 3, 2))
                ends = starts + rng.integers(8, 36, (i % 3, 2))
                ends = np.minimum(ends, (48, SIDE))
                boxes[f"{name}/{i:04d}.png"] = [
                    (*map(int, s), *map(int, e))
                    for s, e in zip(starts, ends, strict=True)
                ]
        boxes["cat/0004.png"] = [(0, 0, 8, 32)]  # beside the crop
        path = _write_boxes(tmp_path / "set" / "boxes.csv", boxes)
        given = make_given(
            tmp_path, write_model(tmp_path / "model", patch_size=PATCH), **SIZES
        )
        run = partial(run_retrieval, *given, str(tmp_path / "set"), clusters=3)
        result = run(boxes=path, neighbours=4)
        seen = [
            Seen(
                forms(given.model, _pixels(file)[:, :, 8:40], 3),
                file.parent.name,
                [(b[0], b[1], b[2], b[3]) for b in boxes[str(file.relative_to(root))]],
                (8, 0),
            )
            for root in [tmp_path / "set"]
            for file in sorted(root.glob("*/*.png"))
        ]
        with torch.no_grad():
            expected = brute_force(seen, GRID, SIDE, 4, _order(10))
        scores = dict(result.scores)
        counts = {key: scores.pop(key) for key in list(scores) if key[:4] == "num_"}
        assert counts == {
            "num_images": 10,
            "num_queries": 9,
            "num_located_queries": sum(map(bool, boxes.values())) - 1,
        }
        assert scores == pytest.approx(expected, abs=1e-6)
        assert len({round(value, 6) for value in expected.values()}) > 15
        assert result.provenance["num_alone"] == 1
        # Without boxes no location, and nothing else changes.
        plain = run()
        assert not [key for key in plain.scores if "locat" in key]
        assert plain.scores.items() <= result.scores.items()
        other = make_given(tmp_path, given.model, batch_size=3, **SIZES, seed=0)
        other.results.output = tmp_path / "other"
        again = run_retrieval(
            *other, str(tmp_path / "set"), path, clusters=3, neighbours=4
        )
        assert again.scores == pytest.approx(result.scores, rel=1e-5)

    def test_run_retrieval__some(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = _write_objects(tmp_path)["data"]
        run = partial(run_retrieval, data=data)
        by = {"by": ["pixels", "cls"], "clusters": 3}
        result = run(*_given(tmp_path), queries=4, **by)
        assert "No location score: --boxes" in capsys.readouterr().out
        assert set(result.scores) == {
            *("cls_map", "cls_query_map", "pixels_map", "pixels_query_map"),
            *("num_images", "num_queries"),
        }
        assert [result.scores[f"num_{n}"] for n in ("images", "queries")] == [12, 4]
        rows = (_folder(tmp_path) / "classes.csv").read_text().splitlines()
        assert [row.split(",")[:2] for row in rows] == [
            *(["class", "num_queries"], ["cat", "2"], ["dog", "1"], ["eel", "1"])
        ]
        limited = run(*_given(tmp_path, limit=6), **by)
        assert limited.scores["num_images"] == limited.protocol["limit"] == 6
        folders = {_given(tmp_path).results.folder(r) for r in (result, limited)}
        assert len(folders) == 2
        given = make_given(tmp_path, "patches:16", **SIZES)
        run(*given, clusters=4)
        said = capsys.readouterr().out
        assert "does not have tokens (no latent queries), mean_token (no latent" in said
        with pytest.raises(ValueError, match=r"not have tokens \(no latent queries"):
            run(*given, by=["tokens"])

    def test_run_retrieval__time_is_told(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(retrieval, "expected_seconds", lambda *_: 600.0)
        data = _write_objects(tmp_path)["data"]
        run_retrieval(*_given(tmp_path), data, by=["patches"], queries=4)
        said = capsys.readouterr().out
        assert "patches: to compare 4 x 12 images of 16 vectors takes about 10 " in said
        assert said.index("about 10 minutes") < said.index("Stored in")

    @pytest.mark.slow
    def test_run_retrieval__unreadable(self, tmp_path: Path) -> None:
        data = _write_objects(tmp_path, num=7)
        (tmp_path / "images/cat/3.png").write_bytes(b"no image")
        options = {"neighbours": 3, "by": ["tokens", "cls"]}
        result = run_retrieval(*_given(tmp_path), **data, **options)
        assert result.provenance["num_unreadable"] == 1
        assert result.scores["num_images"] == 20
        (tmp_path / "images/cat/3.png").unlink()
        again = run_retrieval(*_given(tmp_path), **data, **options)
        assert again.scores == result.scores
        for i in (0, 1):
            (tmp_path / f"images/dog/{i}.png").write_bytes(b"no image")
        with pytest.raises(RuntimeError, match="2 of 20 images are unreadable"):
            run_retrieval(*_given(tmp_path), **data, **options)

    def test_run_retrieval__wrong_data(self, tmp_path: Path) -> None:
        data = _write_objects(tmp_path)
        run = partial(run_retrieval, *_given(tmp_path))
        with pytest.raises(ValueError, match=r"must be some of tokens, cls.*'token'"):
            run(data["data"], by=["token"])
        with pytest.raises(ValueError, match=r"boxes of 12 of the images.*12 answers"):
            run(**data, neighbours=12)
        with pytest.raises(ValueError, match="queries must be at least 1"):
            run(**data, queries=0)
        with pytest.raises(ValueError, match=r"cat/0.png' has no class"):
            run(str(tmp_path / "images/cat"))
        with pytest.raises(ValueError, match="has one class, 'images'"):
            shutil.copytree(data["data"], tmp_path / "one" / "images")
            run(str(tmp_path / "one"))
        given = _given(tmp_path, limit=3)
        with pytest.raises(ValueError, match=r"None of the 3 images .* larger --limit"):
            run_retrieval(*given, data["data"])

    def test_run_retrieval__boxes_beside_the_crops(self, tmp_path: Path) -> None:
        for name in CLASSES:
            write_images(tmp_path / "set" / name, 2, (SIDE, 2 * SIDE))
        names = [f"{name}/000{i}.png" for name in CLASSES for i in (0, 1)]
        boxes = {name: [(0, 0, 9, 9)] for name in names}
        path = _write_boxes(tmp_path / "set" / "boxes.csv", boxes)
        with pytest.raises(RuntimeError, match="No query has anything of a box in"):
            run_retrieval(
                *_given(tmp_path),
                *(str(tmp_path / "set"), path),
                by=["cls"],
                neighbours=2,
            )

    @pytest.mark.slow
    def test_run_retrieval__part_of_a_set(self, tmp_path: Path) -> None:
        data = _write_objects(tmp_path)
        for part in ("train", "val"):
            shutil.copytree(data["data"], tmp_path / "set" / part)
        by = {"by": ["cls"]}
        for name in ("set", "set/val"):
            result = run_retrieval(*_given(tmp_path), str(tmp_path / name), **by)
            assert result.data == "set (val)"

    @pytest.mark.slow
    def test_run_retrieval__command(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = _write_objects(tmp_path)
        model = write_model(tmp_path / "model", patch_size=PATCH)
        options = [*run_options(tmp_path), "--controls", "true", "--neighbours", "2"]
        places = ["--data", data["data"], "--boxes", data["boxes"]]
        main(["retrieval", "--model", model, *options, *places, "--by", "tokens"])
        said = capsys.readouterr().out
        found = [Result.load(path) for path in tmp_path.glob(f"out/*/{RESULT_NAME}")]
        trained, untrained = sorted(found, key=lambda r: "untrained" in r.model)
        assert trained.untrained == untrained.scores
        table = next(
            path.parent / "table.md"
            for path in tmp_path.glob(f"out/*/{RESULT_NAME}")
            if Result.load(path).model == trained.model
        ).read_text()
        scores = [trained.scores, untrained.scores]
        measures = ("map", "location", "location_of_class", "location_oracle")
        cells = [f"{100 * s[f'tokens_{m}']:.2f}" for m in measures for s in scores]
        head, _, tokens, _ = (line.split("|") for line in table.splitlines())
        assert [cell.strip() for cell in tokens[1:-1]] == ["tokens", *cells]
        assert [cell.strip() for cell in head[2:8]] == [
            *("mAP", "untrained", "location", "untrained"),
            *("location, right class", "untrained"),
        ]
        assert table in said
        chance = trained.chance["tokens_map"]
        n, r = 11, 3
        harmonic = sum(1 / k for k in range(1, n + 1))
        assert chance == pytest.approx(
            (harmonic + (r - 1) / (n - 1) * (n - harmonic)) / n
        )


class TestRetrievalTable:
    SCORES = {"tokens_map": 0.5, "cls_map": 0.25}
    CHANCE = {"tokens_map": 0.125}

    def _table(self, **known: Any) -> str:
        result = Result(
            *("retrieval", "m", "photos", self.SCORES, {}, {}),
            chance=self.CHANCE,
            **known,
        )
        return retrieval_table(result, ["tokens", "cls"])

    def test_retrieval_table__columns(self) -> None:
        assert self._table(untrained={"tokens_map": 0.1}) == (
            "| m      |   mAP | untrained |\n"
            "| --- | --- | --- |\n"
            "| tokens | 50.00 |     10.00 |\n"
            "| cls    | 25.00 |         – |\n"
            "| chance | 12.50 |           |"
        )

    def test_retrieval_table__without_control(self) -> None:
        assert self._table().startswith("| m      |   mAP |\n")


class TestRandomPrecision:
    @pytest.mark.parametrize("num, relevant", [(5, 2), (6, 1), (4, 4), (6, 3)])
    def test_random_precision__all_orders(self, num: int, relevant: int) -> None:
        orders = itertools.combinations(range(num), relevant)
        ranked = torch.tensor([[i in chosen for i in range(num)] for chosen in orders])
        expected = float(average_precision(ranked).mean())
        found = random_precision(torch.tensor([relevant]), num)
        assert float(found[0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_two_processes_as_one(tmp_path: Path) -> None:
    data = _write_objects(tmp_path)
    source = write_model(tmp_path / "model", patch_size=PATCH)
    (tmp_path / "meet").mkdir()
    work = partial(_of_process, tmp_path, source, data)
    found = distributed.run(work, tmp_path / "meet")
    alone = _scores(tmp_path, source, data, devices=1)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(alone, rel=1e-6)


def _of_process(
    folder: Path, source: str, data: dict[str, str], rank: int, world_size: int
) -> dict[str, Any]:
    distributed.say_as_torchrun(rank, world_size)
    return _scores(folder, source, data, devices=world_size)


def _scores(
    folder: Path, source: str, data: dict[str, str], devices: int
) -> dict[str, Any]:
    output = str(folder / f"out{devices}")
    given = make_given(folder, source, output=output, devices=devices, **SIZES)
    assert given.devices.world_size == devices
    return dict(run_retrieval(*given, **data, neighbours=3, clusters=3).scores)


def _pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def _folder(tmp_path: Path) -> Path:
    return next(tmp_path.glob(f"out/*/{RESULT_NAME}")).parent
