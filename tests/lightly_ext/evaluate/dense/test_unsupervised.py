from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lightly_ext.evaluate.dense import regions, unsupervised
from lightly_ext.evaluate.dense.unsupervised import run_unsupervised_segmentation
from lightly_ext.modules import STELLARProjectionHead
from stellar_plugin.checkpoints import save_heads
from tests import distributed
from tests.lightly_ext.evaluate.dense.small_sets import NAMES, SIDE, write_halves
from tests.lightly_ext.evaluate.small import (
    EMBED_DIM,
    SIZES,
    Given,
    make_given,
    write_images,
    write_model,
)

RAW = "patches:8"


def _given(tmp_path: Path, model: str = RAW, **options: Any) -> Given:
    return make_given(tmp_path, model, **{**SIZES, **options})


def _write_random(root: Path, num: int = 9) -> Path:
    """Images and maps of random blocks; 3 classes and ignored px."""
    rng = np.random.default_rng(0)
    for p, part in enumerate(("train", "val")):
        write_images(root / "images" / part, num, seed=p)
        folder = root / "masks" / part
        folder.mkdir(parents=True)
        for i in range(num):
            coarse = rng.choice([0, 1, 2, 255], size=(4, 5)).astype(np.uint8)
            Image.fromarray(coarse).resize((36, 40), 0).save(folder / f"{i:04d}.png")
    return root


def _with_prototypes(folder: Path, num: int) -> str:
    source = write_model(folder)
    torch.manual_seed(2)
    head = STELLARProjectionHead(EMBED_DIM, 32, 8, num)
    save_heads({"sparse_head": head.state_dict()}, folder)
    return source


class TestRunUnsupervisedSegmentation:
    def test_run__colours_are_found(self, tmp_path: Path) -> None:
        data = write_halves(tmp_path / "set")
        result = run_unsupervised_segmentation(*_given(tmp_path), str(data))
        assert result.scores == {
            **{"mIoU": 1.0, "accuracy": 1.0, "num_images": 6},
            **{"mIoU_many_to_one": 1.0, "accuracy_many_to_one": 1.0},
        }
        assert result.provenance["class_iou"] == dict.fromkeys(NAMES, 1.0)
        assert sorted(result.provenance["class_cluster"].values()) == [0, 1, 2]
        # Equal classes: one is right in a third; random: 1/9 of 1/3 + 1/3 - 1/9.
        assert result.chance["mIoU"] == pytest.approx(1 / 5)
        assert result.chance["mIoU_many_to_one"] == pytest.approx(1 / 9)
        assert result.chance["accuracy"] == pytest.approx(1 / 3)
        assert result.protocol["parts"] == "3 k-means clusters"
        assert result.protocol["num_classes"] == 3
        with Image.open(next(tmp_path.glob("out/*/segments.png"))) as picture:
            assert picture.width > 6 * SIDE

    def test_run__names_of_classes_mean_nothing(self, tmp_path: Path) -> None:
        """Colours with other labels, two of them with one: the same clusters."""
        data = write_halves(tmp_path / "set")
        turned = write_halves(tmp_path / "turned", values=(2, 0, 1))
        merged = write_halves(tmp_path / "merged", values=(0, 0, 1), names=("a", "b"))
        given = _given(tmp_path)
        first, second = (
            run_unsupervised_segmentation(*given, str(d)) for d in (data, turned)
        )
        assert first.scores == second.scores
        clusters = [r.provenance["class_cluster"] for r in (first, second)]
        assert clusters[0]["red"] == clusters[1]["blue"]
        third = run_unsupervised_segmentation(*given, str(merged), clusters=3)
        # Red or green has no class; blue is right; a joined match is right everywhere.
        assert third.scores["mIoU"] == pytest.approx((0.5 + 1) / 2)
        assert third.scores["accuracy"] == pytest.approx(2 / 3)
        assert third.scores["mIoU_many_to_one"] == 1
        assert third.provenance["num_reused"] == 12  # of the same images elsewhere

    def test_run__loops_over_px(self, tmp_path: Path) -> None:
        """Every step anew, from the files, with the centres that were found."""
        data = _write_random(tmp_path / "set", num=4)
        given = _given(tmp_path, write_model(tmp_path / "model"), resize=34)
        centres: list[torch.Tensor] = []
        k_means = regions.k_means

        def recorded(*args: Any) -> Any:
            found = k_means(*args)
            centres.append(found.centres.double())
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(regions, "k_means", recorded)
            result = run_unsupervised_segmentation(*given, str(data), clusters=4)
        counts = torch.zeros(4, 3)
        test = unsupervised.find_segmentation_set(str(data)).test
        protocol = unsupervised.UNSUPERVISED_SEGMENTATION.replace(resize=34, crop=SIDE)
        for sample in test.cut(protocol, "bicubic"):
            dense = F.normalize(given.model(sample.image[None]).dense, dim=2)
            maps = dense[0].mT.unflatten(1, (2, 2)).double()[None]
            features = F.interpolate(maps, (SIDE, SIDE), mode="bilinear")[0]
            for feature, label in zip(
                features.flatten(1).mT, sample.mask.flatten().tolist(), strict=True
            ):
                if label != 255:
                    distances = (centres[0] - feature).square().sum(dim=1)
                    counts[distances.argmin(), label] += 1
        expected = unsupervised.summarize(counts.long(), ("0", "1", "2"))[0]
        assert result.scores["num_images"] == 4
        for name, value in expected.items():
            assert result.scores[name] == pytest.approx(value, abs=2e-3), name

    def test_run__batches_change_nothing(self, tmp_path: Path) -> None:
        data = _write_random(tmp_path / "set", num=4)
        source = write_model(tmp_path / "model")
        scores = [
            run_unsupervised_segmentation(
                *_given(tmp_path / str(size), source, batch_size=size), str(data)
            ).scores
            for size in (1, 4)
        ]
        assert scores[0] == scores[1]

    def test_run__prototype_of_the_strongest_token(self, tmp_path: Path) -> None:
        data = _write_random(tmp_path / "set", num=4)
        source = _with_prototypes(tmp_path / "model", num=5)
        given = _given(tmp_path, source)
        result = run_unsupervised_segmentation(*given, str(data), prototypes=True)
        assert result.protocol["parts"] == "5 prototypes"
        assert result.protocol["features"] == "sparse"
        head = unsupervised.load_sparse_head(given.model)
        counts = torch.zeros(5, 3, dtype=torch.int64)
        test = unsupervised.find_segmentation_set(str(data)).test
        protocol = unsupervised.UNSUPERVISED_SEGMENTATION.replace(**SIZES)
        for sample in test.cut(protocol, "bicubic"):
            found = given.model(sample.image[None])
            nearest = (head(found.sparse) @ head.prototypes.weight.mT).argmax(dim=2)[0]
            maps = found.localization.half().float().mT.unflatten(2, (2, 2))
            tokens = F.interpolate(maps, (SIDE, SIDE), mode="bilinear")[0].argmax(dim=0)
            for c in range(3):
                counts[:, c] += nearest[tokens[sample.mask == c]].bincount(minlength=5)
        expected = unsupervised.summarize(counts, ("0", "1", "2"))[0]
        assert {k: result.scores[k] for k in expected} == pytest.approx(expected)

    def test_run__after_an_interruption(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = str(write_halves(tmp_path / "set"))

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(regions, "k_means", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_unsupervised_segmentation(*_given(tmp_path), data)
        result = run_unsupervised_segmentation(*_given(tmp_path), data)
        assert result.provenance["num_reused"] == 12
        assert result.scores["mIoU"] == 1

    def test_run__unreadable_are_counted(self, tmp_path: Path) -> None:
        data = write_halves(tmp_path / "set", num=42)
        (data / "images/val/000.png").write_bytes(b"no image")
        (data / "masks/val/001.png").write_bytes(b"no map")
        result = run_unsupervised_segmentation(*_given(tmp_path), str(data))
        assert result.provenance["num_unreadable"] == 2
        assert result.scores["num_images"] == 40
        assert result.scores["mIoU"] == 1

    def test_run__control(self, tmp_path: Path) -> None:
        data = _write_random(tmp_path / "set", num=2)
        given = _given(tmp_path, write_model(tmp_path / "model"), controls=True)
        run_unsupervised_segmentation(*given, str(data))
        (result,) = (r for _, r in given.results.stored() if r.untrained)
        assert set(result.untrained) == set(result.scores)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"clusters": 2}, "2 clusters cannot be matched to the 3 classes"),
            ({"clusters": 0}, "clusters must be at least 1"),
            ({"features": "cls"}, "features must be dense or lowrank"),
            ({"prototypes": True, "clusters": 4}, "leave out clusters"),
            ({"prototypes": True}, "no latent queries"),
            ({"features": "lowrank"}, "no latent queries"),
            ({"clusters": 4}, "Of 96 drawn patches 3 differ, too few for 4 clusters"),
        ],
    )
    def test_run__impossible_options(
        self, options: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        data = write_halves(tmp_path / "set")
        with pytest.raises(ValueError, match=message):
            run_unsupervised_segmentation(*_given(tmp_path), str(data), **options)

    def test_run__a_value_that_is_no_class(self, tmp_path: Path) -> None:
        data = write_halves(tmp_path / "set", values=(0, 1, 7))
        with pytest.raises(ValueError, match=r"00\d.png' has the value 7, which is no"):
            run_unsupervised_segmentation(*_given(tmp_path), str(data))

    def test_run__all_ignored(self, tmp_path: Path) -> None:
        data = write_halves(tmp_path / "set", values=(255, 255, 255))
        with pytest.raises(RuntimeError, match="No px of the 6 test images"):
            run_unsupervised_segmentation(*_given(tmp_path), str(data))

    def test_run__no_training_part(self, tmp_path: Path) -> None:
        data = write_halves(tmp_path / "set")
        (data / "images/train").rename(data / "elsewhere")
        with pytest.raises(FileNotFoundError, match="images/train"):
            run_unsupervised_segmentation(*_given(tmp_path), str(data))

    def test_run__without_prototypes(self, tmp_path: Path) -> None:
        data = write_halves(tmp_path / "set")
        given = _given(tmp_path, write_model(tmp_path / "model"))
        with pytest.raises(ValueError, match="has no prototypes"):
            run_unsupervised_segmentation(*given, str(data), prototypes=True)

    def test_run__too_few_prototypes(self, tmp_path: Path) -> None:
        data = write_halves(tmp_path / "set")
        given = _given(tmp_path, _with_prototypes(tmp_path / "model", num=2))
        with pytest.raises(ValueError, match="2 prototypes cannot be matched to 3"):
            run_unsupervised_segmentation(*given, str(data), prototypes=True)


def _of_process(folder: Path, source: str, rank: int, world_size: int) -> Any:
    distributed.say_as_torchrun(rank, world_size)
    given = _given(folder / "two", source, devices=world_size, batch_size=3)
    return _found(given, folder)


def _found(given: Given, folder: Path) -> list[dict[str, Any]]:
    data = str(folder / "set")
    results = [
        run_unsupervised_segmentation(*given, data, clusters=5),
        run_unsupervised_segmentation(*given, data, prototypes=True),
    ]
    return [
        {**r.scores, **r.provenance["class_iou"], **r.provenance["class_cluster"]}
        for r in results
    ]


@pytest.mark.slow
def test_two_processes__as_one(tmp_path: Path) -> None:
    _write_random(tmp_path / "set")
    source = _with_prototypes(tmp_path / "model", num=6)
    alone = _found(_given(tmp_path / "one", source, batch_size=3), tmp_path)
    (tmp_path / "meet").mkdir()
    work: Callable[..., Any] = partial(_of_process, tmp_path, source)
    found = distributed.run(work, tmp_path / "meet")
    assert found == [alone, alone]
