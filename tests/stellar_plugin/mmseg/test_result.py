"""The hook on ordinary configs of mmsegmentation: it stores, and ends nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import HOOKS, METRICS, MODELS
from torch import Tensor

from lightly_ext.evaluate.report.report import collect_results
from stellar_plugin.mmseg.classes import check_names
from stellar_plugin.mmseg.result import SegmentationResultHook
from stellar_plugin.mmseg.stored import OPTIONS, as_json, read_scores, write_result
from stellar_plugin.protocols import SEGMENTATION
from tests.stellar_plugin.mmseg.runners import (
    built,
    quick_runner,
    resnet_config,
)

Warned = Callable[[], str]
NAN = torch.full((150,), torch.nan)
WHOLE = {"mIoU", "aAcc", "mAcc"}

pytestmark = pytest.mark.usefixtures("cpu")


@METRICS.register_module()
class Sharpness(BaseMetric):
    """Somebody's metric: no mIoU, not in percent, not only numbers."""

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        self.results += [1.0] * len(data_samples)

    def compute_metrics(self, results: list[float]) -> dict[str, Any]:
        return {"sharpness": sum(results) + 0.5, "mIoU": 0.25, "by": "edges"}


@MODELS.register_module()
class OwnLossHead(FCNHead):
    """Somebody's head, which has no module for its loss."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        del self.loss_decode

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Any) -> Any:
        return {"loss_own": seg_logits.square().mean()}


@HOOKS.register_module()
class Interrupt(Hook):
    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> Warned:
    """Everything that the hook warned of."""
    messages: list[str] = []
    warn = SegmentationResultHook._warn

    def noted(self: SegmentationResultHook, runner: Runner, message: str) -> None:
        messages.append(message)
        warn(self, runner, message)

    monkeypatch.setattr(SegmentationResultHook, "_warn", noted)
    return lambda: "\n".join(messages)


def hook_of(runner: Runner) -> SegmentationResultHook:
    (hook,) = (h for h in runner.hooks if isinstance(h, SegmentationResultHook))
    return hook


def latest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "work/result.json").read_text())


def stored(folder: Path) -> dict[str, Any]:
    """The result of a run, which holds nothing but JSON and can be reported."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "work/result.json").read_text()
    results, notes = collect_results([folder / "work"])
    (result,) = results.values()
    assert not notes
    found = json.loads(text, parse_constant=refuse)
    assert result.scores == found["scores"]
    return found


def trained(cfg: Any, folder: Path) -> dict[str, Any]:
    quick_runner(cfg).train()
    return stored(folder)


@pytest.mark.slow
class TestOrdinaryConfigs:
    def test_train_then_test_then_a_foreign_checkpoint(
        self, tmp_path: Path, warned: Warned
    ) -> None:
        cfg = resnet_config(tmp_path)  # clip_grad=None, no evaluation
        result = trained(cfg, tmp_path)
        assert (result["model"], result["data"]) == ("ResNet", "ADE20KDataset")
        assert result["scores"].keys() == WHOLE
        assert all(0 <= score <= 1 for score in result["scores"].values())
        card, of = result["protocol"], result["provenance"]
        assert (card["backbone"], card["train_views"]) == (
            "trained",
            "random crop 64 x 64",
        )
        assert (of["checkpoint"], of["sha256"]) == ("trained from random weights", None)
        assert of["trained_parameters"] == of["parameters"] == 11_176_512 + 38_230
        assert (of["iterations"], of["seed"], of["precision"]) == (2, 0, "32-true")
        assert (of["num_images"], of["num_train_images"]) == (3, 3)
        assert of["num_images_left_out"] == 0
        assert of["mean"] == pytest.approx([123.675, 116.28, 103.53], rel=1e-6)
        assert of["published_and_here"] == {}
        assert result["identity"] == {
            "model": {"sha256": None},
            "options": {n: of[n] for n in OPTIONS},
            "inputs": {"images": of["images_sha256"]},
        }
        assert "tested" not in of
        assert "the config has no evaluation.model, data and protocol" in warned()

        # The result of the training stays, beside that of the test.
        path = tmp_path / "work/iter_2.pth"
        test = resnet_config(tmp_path, {"load_from": str(path)})
        quick_runner(test).test()
        tested = latest(tmp_path)
        assert tested["scores"] == result["scores"]
        assert tested["protocol"] == card
        weights = sha256(path.read_bytes()).hexdigest()
        expected = {"tested": str(path), "tested_sha256": weights}
        assert tested["provenance"] == {**of, **expected}
        (kept,) = (tmp_path / "work").glob("segmentation-*/result.json")
        assert json.loads(kept.read_text()) == result

        checkpoint = torch.load(path, weights_only=False)
        del checkpoint["meta"]["stellar"]
        torch.save(checkpoint, path)
        quick_runner(test).test()
        foreign = latest(tmp_path)
        not_told = ("optimizer", "lrs", "iterations", "backbone", "loss", "rule")
        assert {foreign["protocol"][name] for name in not_told} == {"not told"}
        assert foreign["protocol"]["split"] == "not told / validation"
        assert foreign["protocol"]["head"] == card["head"]
        of = foreign["provenance"]
        assert (of["seed"], of["iterations"]) == (0, 2)
        assert of["sha256"] == of["tested_sha256"] != weights
        assert len(list((tmp_path / "work").glob("segmentation-*/result.json"))) == 2

    def test_no_validation(self, tmp_path: Path, warned: Warned) -> None:
        cfg = resnet_config(tmp_path, {"train_cfg.max_iters": 1})
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        quick_runner(cfg).train()
        assert "no result is stored: the run was never validated" in warned()
        assert (tmp_path / "work/iter_1.pth").is_file()
        assert not (tmp_path / "work/result.json").exists()

    def test_head_without_loss_and_other_metrics(
        self, tmp_path: Path, warned: Warned
    ) -> None:
        cfg = resnet_config(tmp_path, {"model.decode_head.type": "OwnLossHead"})
        cfg.val_evaluator = [
            {"type": "IoUMetric", "prefix": "all"},
            {"type": "Sharpness", "prefix": "own"},
        ]
        result = trained(cfg, tmp_path)
        assert result["protocol"]["loss"] == "not told"
        assert "loss not told: AttributeError('OwnLossHead has no module" in warned()
        # Both are called mIoU, and one is in percent.
        scores = result["scores"]
        expected = {"all/mIoU", "own/mIoU", "aAcc", "mAcc", "sharpness"}
        assert scores.keys() == expected
        assert (scores["own/mIoU"], scores["sharpness"]) == (0.25, 3.5)
        assert "'own/by' is no number" in warned()
        assert result["protocol"]["averaging"] == (
            f"all: {SEGMENTATION.averaging}; own: Sharpness"
        )

    def test_augmented_test(self, tmp_path: Path) -> None:
        cfg = resnet_config(tmp_path, {"train_cfg.max_iters": 1})
        plain = trained(cfg, tmp_path)
        cfg = resnet_config(tmp_path, {"load_from": str(tmp_path / "work/iter_1.pth")})
        flips = [{"type": "RandomFlip", "prob": p} for p in (0.0, 1.0)]
        read, labels, pack = cfg.test_dataloader.dataset.pipeline
        views = {"type": "TestTimeAug", "transforms": [flips, [labels], [pack]]}
        cfg.test_dataloader.dataset.pipeline = [read, views]
        cfg.model = {"type": "SegTTAModel", "module": cfg.model}
        quick_runner(cfg).test()
        card = latest(tmp_path)["protocol"]
        texts = [f"RandomFlip(direction=horizontal, prob={p})" for p in (0, 1)]
        views_text = f"whole image, mean of 2 views: {', '.join(texts)}"
        assert card == {**plain["protocol"], "inference": views_text}

    def test_averaged_weights_and_a_place_that_cannot_be_written(
        self, tmp_path: Path, warned: Warned
    ) -> None:
        (tmp_path / "work/result.json/taken").mkdir(parents=True)
        cfg = resnet_config(tmp_path, {"train_cfg.max_iters": 1})
        cfg.custom_hooks = [*cfg.custom_hooks, {"type": "EMAHook"}]
        quick_runner(cfg).train()
        assert (tmp_path / "work/iter_1.pth").is_file()
        assert "no result is stored: [Errno 21] Is a directory" in warned()
        assert '"rule": "averaged weights' in warned()  # the result is in the log

    def test_resumed__with_what_changed(self, tmp_path: Path) -> None:
        quick_runner(resnet_config(tmp_path, {"train_cfg.max_iters": 1})).train()
        options = {"resume": True, "optim_wrapper.optimizer.lr": 0.5}
        cfg = resnet_config(tmp_path, options)
        cfg.custom_hooks = [*cfg.custom_hooks, {"type": "ResumeByConfigHook"}]
        quick_runner(cfg).train()
        result = latest(tmp_path)
        assert result["protocol"]["rule"] == (
            "resumed at iteration 1, before it lrs [0.01], before it iterations 1"
        )
        assert result["provenance"]["checkpoint"] == "trained from random weights"
        assert result["provenance"]["iterations"] == 2

    def test_interrupted__ends(self, tmp_path: Path) -> None:
        cfg = resnet_config(tmp_path)
        cfg.custom_hooks = [*cfg.custom_hooks, {"type": "Interrupt"}]
        with pytest.raises(KeyboardInterrupt):
            quick_runner(cfg).train()
        assert not (tmp_path / "work/result.json").exists()

    def test_other_processes__write_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = "stellar_plugin.mmseg.result.is_main_process"
        monkeypatch.setattr(name, lambda: False)
        quick_runner(resnet_config(tmp_path, {"train_cfg.max_iters": 1})).train()
        assert not (tmp_path / "work/result.json").exists()


class TestUnreadable:
    def test_every_event__warns_and_goes_on(
        self, tmp_path: Path, warned: Warned
    ) -> None:
        """A runner of which next to nothing can be read."""
        runner = built(resnet_config(tmp_path))
        runner.model = torch.nn.Identity()
        runner.optim_wrapper = None
        runner._val_loop.evaluator = None
        hook = hook_of(runner)
        hook.before_run(runner)
        hook.before_train(runner)
        hook.before_train_iter(runner, 0, data_batch=None)
        checkpoint = {"meta": {"iter": 1, "epoch": 0}, "state_dict": {}}
        hook.before_save_checkpoint(runner, checkpoint)
        assert checkpoint["meta"]["stellar"]["card"]["lrs"] == "not told"
        hook.after_val_epoch(runner, {"mIoU": 50.0})
        hook.after_train(runner)
        result = stored(tmp_path)
        assert result["scores"] == {"mIoU": 50.0}  # nobody says that it is in percent
        assert result["protocol"]["backbone"] == "not told"
        assert result["provenance"]["sha256"] == "not told"
        assert "labels not checked" in warned()
        assert "backbone not told" in warned()

    def test_wrong_labels__end_the_run(self, tmp_path: Path) -> None:
        options = {"model.decode_head.num_classes": 20}
        runner = built(resnet_config(tmp_path, options))
        with pytest.raises(ValueError, match="num_classes is 20"):
            runner.call_hook("before_run")

        # Labels are loaded before a resize, images compared as they are.
        cfg = resnet_config(tmp_path / "resized")
        resize = {"type": "Resize", "scale": (32, 32)}
        cfg.val_dataloader.dataset.pipeline.insert(2, resize)
        runner = built(cfg)
        message = r"is 32 x 32 pixels .*, its image is 96 x 130\. Predictions are comp"
        with pytest.raises(ValueError, match=message):
            runner.call_hook("before_run")

    def test_heads(self, tmp_path: Path) -> None:
        cfg = resnet_config(tmp_path)
        few = {**cfg.model.decode_head, "num_classes": 19}
        cfg.model.auxiliary_head = [few, {**few, "type": "OwnLossHead"}]
        runner = built(cfg)
        heads = runner.model.auxiliary_head
        with pytest.raises(
            ValueError, match=r"have 150 classes, .* auxiliary_head, .*19"
        ):
            runner.call_hook("before_run")
        del heads[0]  # the other has labels of its own
        runner.call_hook("before_run")

        # One channel tells two classes, whatever num_classes is.
        head = runner.model.decode_head
        del runner.model.auxiliary_head
        for num_classes in (1, 2):
            head.out_channels, head.num_classes = 1, num_classes
            with pytest.raises(ValueError, match=r"has 150 classes, .* is 2; "):
                runner.call_hook("before_run")

    def test_predictions_alone_need_no_labels(self, tmp_path: Path) -> None:
        cfg = resnet_config(tmp_path)
        loader = {"type": "LoadConvertedAnnotations", "values": list(range(150))}
        images = {"img_path": "images/validation"}
        cfg.test_dataloader.dataset.data_prefix = images
        cfg.test_dataloader.dataset.pipeline[1] = loader
        runner = quick_runner(cfg)
        runner._test_loop = runner.build_test_loop(runner._test_loop)
        with pytest.raises(ValueError, match="names no label files"):
            runner.call_hook("before_run")
        runner.test_evaluator.metrics[0].format_only = True
        runner.call_hook("before_run")
        assert "gt_sem_seg" not in runner.test_dataloader.dataset[0]["data_samples"]


class SubIoU(IoUMetric):
    """Somebody's, which may give fractions."""


class TestTested:
    """What a test, or a resumed run, makes of the checkpoint of a training."""

    def test_another_model__ends_the_test_or_keeps_its_name(
        self, tmp_path: Path, warned: Warned
    ) -> None:
        said = {"model": "DINO", "data": "ADE20K", "protocol": "SEGMENTATION"}
        training = built(resnet_config(tmp_path, {"evaluation": said}))
        hook = hook_of(training)
        hook.before_train(training)
        metainfo = training.train_dataloader.dataset.metainfo
        meta = {"iter": 1, "epoch": 0, "dataset_meta": dict(metainfo)}
        state = training.model.state_dict()
        checkpoint = {"meta": meta, "state_dict": state}
        hook.before_save_checkpoint(training, checkpoint)

        options = {"evaluation": {**said, "model": "MAE"}, "load_from": "iter_1.pth"}
        run = quick_runner(resnet_config(tmp_path, options))
        run._test_loop = run.build_test_loop(run._test_loop)
        hook, model = hook_of(run), run.model
        hook.after_load_checkpoint(run, checkpoint)
        trained_as = "'iter_1.pth' was trained as model 'DINO', and is stored as that"
        assert trained_as in warned()
        hook.after_test_epoch(run, {"mIoU": 50.0})
        first = latest(tmp_path)
        assert (first["model"], first["scores"]) == ("DINO", {"mIoU": 0.5})
        assert first["provenance"]["classes"][:2] == ["wall", "building"]

        images = model.data_preprocessor
        # The stock packages' has no underscore.
        (conversion,) = (n for n in vars(images) if n.endswith("channel_conversion"))
        for module, name, value, message in (
            (model.decode_head, "align_corners", True, "is True, was False"),
            (model.decode_head, "act_cfg", None, r"is None, was \{type: ReLU\}"),
            (images, conversion, True, "is True, was False"),
            (images, "mean", torch.zeros(3, 1, 1), r"is \[0.0, 0.0"),
        ):
            kept = getattr(module, name)
            setattr(module, name, value)
            with pytest.raises(ValueError, match=rf"iter_1\.pth.*{name[1:]} {message}"):
                hook.after_load_checkpoint(run, checkpoint)
            setattr(module, name, kept)
        names = list(metainfo["classes"])
        meta["dataset_meta"]["classes"] = [names[1], names[0], *names[2:]]
        with pytest.raises(ValueError, match=r"Class 0 is 'wall' in test and 'buildin"):
            hook.after_load_checkpoint(run, checkpoint)
        meta["dataset_meta"]["classes"] = names
        checkpoint["state_dict"] = dict(state, **{"decode_head.conv_seg.bias": NAN})
        with pytest.raises(ValueError, match=r"not finite, in decode_head\.conv_seg\."):
            hook.after_load_checkpoint(run, checkpoint)

        # What a test may have of its own has a place of its own.
        images.pad_val = 200
        checkpoint["state_dict"] = state
        hook.after_load_checkpoint(run, checkpoint)
        hook.after_test_epoch(run, {"mIoU": 25.0})
        assert latest(tmp_path)["scores"] == {"mIoU": 0.25}
        (kept,) = (tmp_path / "work").glob("segmentation-*/result.json")
        assert json.loads(kept.read_text()) == first

        # Scores of weights that are no numbers, and of somebody's metric.
        run.test_loop.evaluator.metrics = [SubIoU()]
        hook.after_test_epoch(run, {"mIoU": 0.25})
        assert latest(tmp_path)["scores"] == {"mIoU": 0.25}
        model.decode_head.conv_seg.bias.data[0] = torch.inf
        hook.after_test_epoch(run, {"mIoU": 25.0})
        assert latest(tmp_path)["scores"] == {"mIoU": None}
        assert "weights are not finite, in decode_head.conv_seg.bias" in warned()

    def test_names_of_classes(self) -> None:
        def sets(**names: Any) -> dict[str, Any]:
            meta = {"test": {}, **{k: {"classes": v} for k, v in names.items()}}
            return {k: SimpleNamespace(metainfo=v) for k, v in meta.items()}

        check_names(sets(train=["a", "b"], val=("a", "b")))
        for found, message in (
            (
                sets(train=["a", "b"], val=["b", "a"]),
                "Class 0 is 'b' in val and 'a' in",
            ),
            (sets(train=["a", "b"], val=["a"]), "Class 1 is missing in val and 'b' in"),
            (sets(val=["a", "b", "a"]), "classes of val hold 'a' more than once"),
            (sets(val="ab"), "classes of val are the text 'ab'"),
        ):
            with pytest.raises(ValueError, match=message):
                check_names(found)


class TestReadScores:
    def test_percent__known_names_only(self) -> None:
        metrics = {"a/mIoU": 47.61, "loss": 3.25, "mIoU": 12.0}
        scores, notes = read_scores(metrics, {"a/mIoU"})
        assert scores == {"a/mIoU": 0.4761, "loss": 3.25, "mIoU": 12.0}
        assert notes == []

    def test_no_numbers(self) -> None:
        nan, tensor = float("nan"), torch.tensor(50.0)
        metrics = {"p/mIoU": nan, "mAcc": tensor, "names": ["a"], "two": torch.ones(2)}
        scores, notes = read_scores(metrics, {"p/mIoU", "mAcc"})
        assert scores == {"mIoU": None, "mAcc": 0.5}
        assert notes == [
            "'p/mIoU' is nan, stored as null",
            "'names' is no number and not stored",
            "'two' is no number and not stored",
        ]


class TestWriteResult:
    @pytest.fixture
    def result(self) -> dict[str, Any]:
        of = {"sha256": "a", "seed": 0, "versions": {"torch": "2"}}
        return {"task": "x", "protocol": {}, "provenance": of, "scores": {"mIoU": 0.5}}

    def test_as_json__is_json(self) -> None:
        values = {"nan": float("nan"), "of": [float("inf"), 1.5], "path": Path("a")}
        expected = {"nan": None, "of": [None, 1.5], "path": "a"}
        assert json.loads(as_json(values)) == expected

    def test_the_same_again__replaces(
        self, result: dict[str, Any], tmp_path: Path
    ) -> None:
        path = tmp_path / "result.json"
        assert write_result(path, as_json(result)) is None
        result["provenance"]["versions"] = {}
        result["scores"]["mIoU"] = 0.25
        assert write_result(path, as_json(result)) is None
        assert json.loads(path.read_text())["scores"]["mIoU"] == 0.25
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("name", ["sha256", "seed", "precision", "images_sha256"])
    def test_another__moves_what_is_there(
        self, name: str, result: dict[str, Any], tmp_path: Path
    ) -> None:
        path, first = tmp_path / "result.json", as_json(result)
        write_result(path, first)
        result["provenance"][name] = "b"
        moved = write_result(path, as_json(result))
        assert moved is not None and moved.read_text() == first
        assert path.read_text() == as_json(result)
        # And back: each has a place of its own.
        assert write_result(path, first) != moved
        assert len(list(tmp_path.rglob("result.json"))) == 3

    @pytest.mark.parametrize("content", [b"[1]", b"\xff\xfe{\0}\0", b"\x80\0\xff"])
    def test_no_result__is_kept(
        self, content: bytes, result: dict[str, Any], tmp_path: Path
    ) -> None:
        path = tmp_path / "result.json"
        path.write_bytes(content)
        moved = write_result(path, as_json(result))
        assert moved is not None and moved.read_bytes() == content
