from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from stellar_plugin.mmseg import BatchJaccard, CountedIoUMetric
from stellar_plugin.mmseg.metric import batch_jaccard, count
from tests import distributed

NUM_CLASSES = 5
META = {"classes": [str(number) for number in range(NUM_CLASSES)]}


@pytest.fixture(autouse=True)
def logger() -> None:
    """mmsegmentation's metric writes its table to the current one."""
    MMLogger.get_instance("test_metric")


def draw(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions and labels, some ignored; class 4 is rare, so often absent."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.tensor([0.4, 0.3, 0.2, 0.09, 0.01])

    def maps() -> Tensor:
        shape = (num_images, 3, 4)
        drawn = torch.multinomial(chances, num_images * 12, True, generator=generator)
        return drawn.view(shape)

    predictions, labels = maps(), maps()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return predictions, labels


def samples(predictions: Tensor, labels: Tensor) -> list[dict]:
    return [
        {"pred_sem_seg": {"data": p[None]}, "gt_sem_seg": {"data": y[None]}}
        for p, y in zip(predictions, labels, strict=True)
    ]


def brute_force(predictions: Tensor, labels: Tensor, batch_size: int) -> float:
    """Loops over batches, classes and cells; percent."""
    total = 0.0
    for start in range(0, len(labels), batch_size):
        cells = list(
            zip(
                predictions[start : start + batch_size].flatten().tolist(),
                labels[start : start + batch_size].flatten().tolist(),
                strict=True,
            )
        )
        cells = [(p, y) for p, y in cells if y != 255]
        scores = []
        for c in range(NUM_CLASSES):
            union = sum(p == c or y == c for p, y in cells)
            if union:
                scores.append(sum(p == c and y == c for p, y in cells) / union)
        images = min(batch_size, len(labels) - start)
        total += images * sum(scores) / len(scores)
    return 100 * total / len(labels)


def evaluate(metric: object, predictions: Tensor, labels: Tensor, loader: int) -> float:
    metric.dataset_meta = META
    everything = samples(predictions, labels)
    for start in range(0, len(everything), loader):
        metric.process({}, everything[start : start + loader])
    metrics = metric.evaluate(len(everything))
    return next(v for k, v in metrics.items() if k.endswith("mIoU"))


def evaluate_part(folder: Path, rank: int, world_size: int) -> list[dict[str, float]]:
    """As mmengine shares images out: every second one, the first again at the end."""
    MMLogger.get_instance("test_metric")
    predictions, labels = draw(7)
    mine = [*range(7), 0][rank::world_size]
    scores = []
    for metric in (BatchJaccard(3), CountedIoUMetric()):
        metric.collect_dir = str(folder / type(metric).__name__)
        metric.dataset_meta = META
        metric.process({}, samples(predictions[mine], labels[mine]))
        scores.append({k: float(v) for k, v in metric.evaluate(7).items()})
    return scores


class TestCountedIoUMetric:
    def test_evaluate__a_missing_class_is_left_out(self) -> None:
        # Class 2 is in a label, 3 in a prediction, 4 in neither; 255 is ignored.
        prediction = torch.tensor([[[0, 0, 1, 1], [1, 3, 0, 4]]])
        label = torch.tensor([[[0, 0, 1, 2], [1, 1, 255, 255]]])
        metric = CountedIoUMetric()
        metric.dataset_meta = META
        metric.process({}, samples(prediction, label))
        # IoU: 2/2, 2/4, 0/1, 0/1.
        assert metric.evaluate(1) == {
            "aAcc": pytest.approx(100 * 4 / 6, abs=0.005),
            "mIoU": pytest.approx(100 * 1.5 / 4, abs=0.005),
            # Of the classes in labels: 2/2, 2/3, 0/1.
            "mAcc": pytest.approx(100 * (5 / 3) / 3, abs=0.005),
            "num_classes": 4,
        }

    @pytest.mark.parametrize("metric", [CountedIoUMetric(), BatchJaccard(2)])
    def test_evaluate__no_labels_no_score(self, metric: BaseMetric) -> None:
        predictions, labels = draw(3)
        assert math.isnan(evaluate(metric, predictions, labels * 0 + 255, 2))

    def test_evaluate__without_scores(self, tmp_path: Path) -> None:
        metric = CountedIoUMetric(format_only=True, output_dir=str(tmp_path))
        metric.dataset_meta = META
        (sample,) = samples(*draw(1))
        metric.process({}, [{**sample, "img_path": "a.png"}])
        assert metric.compute_metrics([]) == {}
        assert (tmp_path / "a.png").is_file()


class TestBatchJaccard:
    @pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 2048])
    def test_evaluate__brute_force(self, batch_size: int) -> None:
        predictions, labels = draw(10)
        score = evaluate(BatchJaccard(batch_size), predictions, labels, loader=3)
        expected = brute_force(predictions, labels, batch_size)
        assert score == pytest.approx(expected, rel=1e-12)

    def test_evaluate__one_batch_is_mmsegs_miou_and_smaller_ones_are_not(self) -> None:
        predictions, labels = draw(12, seed=1)
        theirs = evaluate(IoUMetric(), predictions, labels, loader=5)
        assert evaluate(BatchJaccard(12), predictions, labels, 5) == pytest.approx(
            theirs, abs=0.005
        )
        assert abs(evaluate(BatchJaccard(3), predictions, labels, 5) - theirs) > 0.1

    def test_evaluate__loader_does_not_matter(self) -> None:
        predictions, labels = draw(9)
        scores = {
            evaluate(BatchJaccard(4), predictions, labels, loader)
            for loader in (1, 2, 4, 9)
        }
        assert len(scores) == 1

    def test_evaluate__batch_without_labels_is_left_out(self) -> None:
        predictions, labels = draw(4)
        alone = evaluate(BatchJaccard(2), predictions[:2], labels[:2], 2)
        labels[2:] = 255
        assert evaluate(BatchJaccard(2), predictions, labels, 2) == alone

    @pytest.mark.slow
    def test_two_processes__as_one(self, tmp_path: Path) -> None:
        part = partial(evaluate_part, tmp_path / "parts")
        first, second = distributed.run(part, tmp_path)
        paper, counted = first
        assert second == first
        predictions, labels = draw(7)
        expected = evaluate(BatchJaccard(3), predictions, labels, 2)
        assert paper == {"paper/mIoU": expected, "paper/num_classes": 5}
        # Of 84 cells some 17 are ignored; every class is in a label or a prediction.
        expected = brute_force(predictions, labels, 7)
        assert counted["mIoU"] == pytest.approx(expected, abs=0.005)
        assert counted["num_classes"] == 5

    def test_evaluate__classes_of_any_batch(self) -> None:
        predictions = torch.tensor([[[0, 1]], [[0, 0]], [[3, 0]]])
        labels = torch.tensor([[[0, 0]], [[0, 255]], [[0, 0]]])
        metric = BatchJaccard(1)
        metric.dataset_meta = META
        metric.process({}, samples(predictions, labels))
        assert metric.evaluate(3) == {
            "paper/mIoU": pytest.approx(100 * (0.25 + 1 + 0.25) / 3),
            "paper/num_classes": 3,  # 0, 1 and 3
        }

    def test_process__writes_predictions_as_label_files(self, tmp_path: Path) -> None:
        # What `mim test --out` adds to a config.
        out = {"output_dir": str(tmp_path / "out"), "keep_results": True}
        metric = METRICS.build({"type": "BatchJaccard", **out})
        metric.dataset_meta = {"classes": ["a", "b", "c"]}
        grid = torch.tensor([[[0, 2], [1, 1]]])
        sample = {name: {"data": grid} for name in ("pred_sem_seg", "gt_sem_seg")}
        paths = {"img_path": "data/x.jpg", "reduce_zero_label": True}
        metric.process(None, [{**sample, **paths}])
        written = Image.open(tmp_path / "out/x.png")
        assert torch.equal(pil_to_tensor(written), grid + 1)
        assert metric.evaluate(1)["paper/mIoU"] == 100

    def test_bad_batch_size(self) -> None:
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            BatchJaccard(0)


class TestCount:
    def test_count__by_hand(self) -> None:
        counts = count(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1]), 4)
        assert counts.tolist() == [[1, 1, 0, 0], [2, 3, 1, 0]]
        # Class 3 is in neither, class 2 in the predictions only.
        assert batch_jaccard(counts).item() == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)

    def test_batch_jaccard__nothing_is_nan(self) -> None:
        assert math.isnan(batch_jaccard(torch.zeros(2, 3).long()).item())
