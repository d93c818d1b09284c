from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightly_ext.evaluate.classification.finetune import run_finetune
from lightly_ext.evaluate.classification.finetune_module import (
    FineTuning,
    images_at_once,
)
from lightly_ext.evaluate.classification.split import split_set
from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel, Origin
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.result import Result
from lightly_ext.evaluate.training import fitting_batch
from stellar_cli.__main__ import main as stellar
from stellar_plugin.networks import TimmNetwork
from stellar_plugin.protocols import FINETUNE
from tests.distributed import run_as_torchrun
from tests.lightly_ext.evaluate.small import (
    SIZES,
    Given,
    make_given,
    run_options,
    write_classes,
    write_model,
)

FAST: dict[str, Any] = {"epochs": 2, "train_batch_size": 11, "lr": 1e-3}


def _frozen(model: nn.Module) -> FrozenModel:
    origin = Origin("a network", "BYOL", "0" * 64, image_size=(32, 32))
    return FrozenModel(TimmNetwork(model), origin)


def _given(
    tmp_path: Path, model: str | FrozenModel | None = None, **options: Any
) -> Given:
    model = model or write_model(tmp_path / "model")
    return make_given(tmp_path, model, **SIZES, **options)


def _module(
    given: Given, data: Path, feature: str = "sparse", **fields: Any
) -> FineTuning:
    protocol = given.results.protocol(
        given.model, FINETUNE, batch_sizes=(8,), epochs=2, **fields
    )
    split = split_set(given.devices, str(data))
    return FineTuning(given.model, feature, protocol, given.devices, split)


def _stored(tmp_path: Path) -> Result:
    return Result.load(_folder(tmp_path) / "result.json")


def _folder(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "out").glob("finetune*")
    return path


class TestFineTuning:
    def test_forward__is_norm_and_linear_behind_the_frozen_features(
        self, tmp_path: Path
    ) -> None:
        given = _given(tmp_path)
        module = _module(given, write_classes(tmp_path / "data")).eval()
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        pooled = given.model.pooled(images, "sparse")
        torch.testing.assert_close(module(images), module.head(pooled))
        assert isinstance(module.head[0], nn.LayerNorm)

    @pytest.mark.parametrize(
        ("model", "feature"),
        [
            (None, "sparse"),
            (None, "cls+dense"),
            (None, "lowrank"),
            ("timm:resnet10t", "cls"),
            ("timm:resnet10t", "dense"),
        ],
    )
    @pytest.mark.slow
    def test_trained_parameters__are_those_that_get_gradients(
        self, tmp_path: Path, model: str | None, feature: str
    ) -> None:
        given = _given(tmp_path, model, untrained=model is not None)
        module = _module(given, write_classes(tmp_path / "data"), feature).train()
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        module(images).sum().backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
        if model is None:
            assert any("proj" in n for n in frozen) == (feature != "lowrank")
        assert not any(p.requires_grad for p in given.model.parameters())

    def test_networks_of_timm__statistics_of_batches_and_nothing_dropped(
        self, tmp_path: Path
    ) -> None:
        data = write_classes(tmp_path / "data")
        sizes: dict[str, Any] = {"num_classes": 0, "img_size": 32, "window_size": 2}
        sizes |= {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
        swin = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
        given = _given(tmp_path, _frozen(swin))
        assert any(getattr(m, "drop_prob", 0) > 0 for m in swin.modules())
        module = _module(given, data, "dense").train()
        images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
        pooled = given.model.pooled(images, "dense")
        torch.testing.assert_close(module(images), module.head(pooled))
        assert any(getattr(m, "drop_prob", 0) > 0 for m in swin.modules())

        resnet = timm.create_model("resnet10t", num_classes=0)
        given = _given(tmp_path, _frozen(resnet))
        module = _module(given, data, "cls").train()
        trained: Any = module.backbone
        bn, before = trained.model.bn1, resnet.bn1.running_mean.clone()
        stem = copy.deepcopy(trained.model.conv1).train()(given.model.normalize(images))
        module(images)[:, 0].sum().backward()
        # timm's momentum is 0.1, of a mean that starts at 0.
        expected = 0.1 * stem.mean(dim=(0, 2, 3))
        torch.testing.assert_close(bn.running_mean, expected)
        assert trained.model.conv1[0].weight.grad.abs().sum() > 0
        assert torch.equal(resnet.bn1.running_mean, before)

    def test_nothing_to_train(self, tmp_path: Path) -> None:
        given = _given(tmp_path, load_frozen_model("patches:16"))
        with pytest.raises(ValueError, match="nothing to fine-tune"):
            _module(given, write_classes(tmp_path / "data"), "cls")

    def test_guess__every_image_once(self, tmp_path: Path) -> None:
        given = _given(tmp_path)
        data = write_classes(tmp_path / "data", num=30)
        module = _module(given, data)
        files = module.split.data.test
        (files.root / files.names[7]).write_bytes(b"no image")
        guesses = module.guess(files)
        assert guesses.unreadable == [7] and len(guesses.labels) == 89
        hits = guesses.scores["accuracy"] * 89
        assert hits == pytest.approx(round(hits))

    def test_training_step__ignores_unreadable_images(self, tmp_path: Path) -> None:
        given = _given(tmp_path)
        data = write_classes(tmp_path / "data")
        module = _module(given, data).eval()
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        module.on_train_epoch_start()
        batch = next(iter(module.train_dataloader()))
        readable = torch.arange(8) < 5
        loss = module.training_step(batch._replace(readable=readable), 0)
        labels = module.files.label_tensor[torch.as_tensor(batch.number)]
        expected = F.cross_entropy(module(batch.image)[:5], labels[:5]) * 5 / 8
        torch.testing.assert_close(loss, expected)
        nothing = batch._replace(readable=torch.zeros(8, dtype=torch.bool))
        loss = module.training_step(nothing, 1)
        loss.backward()
        assert loss == 0


class TestRunFinetune:
    @pytest.mark.slow
    def test_run_finetune__learns(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "data", num=10)
        result = run_finetune(
            *_given(tmp_path), str(data), epochs=8, lr=3e-3, train_batch_size=9
        )
        assert result.scores == {"accuracy": 1.0, "num_test": 30}
        assert result.provenance["num_train"] == 27
        assert result.provenance["num_held_out"] == 3
        assert result.provenance["feature"] == "sparse"
        assert result.protocol["batch_sizes"] == [9]
        assert result.protocol["lrs"] == [3e-3]
        assert _stored(tmp_path).scores == result.scores

    @pytest.mark.slow
    def test_run_finetune__learns_in_mixed_precision(self, tmp_path: Path) -> None:
        data = write_classes(tmp_path / "data", num=10)
        given = _given(tmp_path, precision="bf16-mixed")
        options = {"epochs": 8, "lr": 3e-3, "train_batch_size": 9}
        result = run_finetune(*given, str(data), **options)
        assert result.scores["accuracy"] == 1.0

    @pytest.mark.slow
    def test_run_finetune__accumulated_batches_equal_whole_ones(
        self, tmp_path: Path
    ) -> None:
        data = str(write_classes(tmp_path / "data"))
        weights = []
        for at_once in (11, 4):  # 11 is prime: one image at once
            output = str(tmp_path / str(at_once))
            given = _given(tmp_path, batch_size=at_once, output=output)
            result = run_finetune(*given, data, **FAST)
            weights.append(_weights(given.results.folder(result)))
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    def test_run_finetune__an_interrupted_run_ends_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = str(write_classes(tmp_path / "data"))
        options = {**FAST, "epochs": 3}
        straight = _given(tmp_path, output=str(tmp_path / "straight"))
        expected = run_finetune(*straight, data, **options)
        given = _given(tmp_path)

        def fails(self: FineTuning) -> None:
            if self.current_epoch == 1:
                raise InterruptedError

        with monkeypatch.context() as patched:
            patched.setattr(FineTuning, "on_train_epoch_start", _before(fails))
            with pytest.raises(InterruptedError):
                run_finetune(*given, data, **options)
        started: list[int] = []
        monkeypatch.setattr(
            FineTuning,
            "on_train_epoch_start",
            _before(lambda self: started.append(self.current_epoch)),
        )
        result = run_finetune(*given, data, **options)
        assert started == [1, 2]
        ours, theirs = (
            _weights(one.results.folder(its))
            for one, its in ((given, result), (straight, expected))
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)
        assert result.scores == expected.scores

    @pytest.mark.slow
    def test_run_finetune__a_finished_run_is_only_tested_again(
        self, tmp_path: Path
    ) -> None:
        given = _given(tmp_path)
        data = str(write_classes(tmp_path / "data"))
        first = run_finetune(*given, data, **FAST)
        before = _weights(given.results.folder(first))
        again = run_finetune(*given, data, **FAST)
        assert again.scores == first.scores
        after = _weights(given.results.folder(again))
        assert torch.equal(after["head.1.weight"], before["head.1.weight"])

    @pytest.mark.slow
    def test_run_finetune__log_has_loss_and_held_out_accuracy(
        self, tmp_path: Path
    ) -> None:
        given = _given(tmp_path)
        data = str(write_classes(tmp_path / "data"))
        result = run_finetune(*given, data, **FAST)
        (path,) = given.results.folder(result).glob("log/*/metrics.csv")
        rows = list(csv.DictReader(path.open()))
        held_out = [r["held_out_accuracy"] for r in rows if r["held_out_accuracy"]]
        assert len(held_out) == 2
        assert float(held_out[-1]) == pytest.approx(
            result.provenance["held_out_accuracy"]
        )
        losses = [float(row["loss"]) for row in rows if row["loss"]]
        assert losses and all(0 < loss < 5 for loss in losses)

    @pytest.mark.slow
    def test_run_finetune__other_images_under_the_same_name(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first = str(write_classes(tmp_path / "a" / "data"))
        second = str(write_classes(tmp_path / "b" / "data", num=9))
        given = _given(tmp_path)
        run_finetune(*given, first, **FAST)
        other = run_finetune(*given, second, **FAST)
        assert other.scores["num_test"] == 27
        assert "Continues the training" not in capsys.readouterr().out

    def test_run_finetune__a_loss_that_is_not_finite(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: FineTuning, images: Tensor) -> Tensor:
            return self.head(self.head[0].weight.expand(len(images), -1)) * torch.nan

        monkeypatch.setattr(FineTuning, "forward", broken)
        data = str(write_classes(tmp_path / "data"))
        with pytest.raises(RuntimeError, match="not finite in epoch 1, step 1"):
            run_finetune(*_given(tmp_path), data, **FAST)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs must be at least 1"),
            ({"lr": 0.0}, "lr must be positive"),
            ({"lr": float("inf")}, "lr must be positive"),
            ({"train_batch_size": 0}, "train_batch_size must be positive"),
        ],
    )
    def test_run_finetune__bad_options(
        self, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        data = str(write_classes(tmp_path / "data"))
        with pytest.raises(ValueError, match=message):
            run_finetune(*_given(tmp_path), data, **{**FAST, **options})

    def test_run_finetune__one_class_and_too_few_images(self, tmp_path: Path) -> None:
        one = write_classes(tmp_path / "one", classes=["cat"])
        with pytest.raises(ValueError, match=r"has 1 class\(es\)"):
            run_finetune(*_given(tmp_path), str(one), **FAST)
        three = write_classes(tmp_path / "three")
        with pytest.raises(ValueError, match="2 training images for 3 classes"):
            run_finetune(*_given(tmp_path, limit=2), str(three), **FAST)


@pytest.mark.parametrize(("wanted", "cut"), [(1024, 16), (23, 16), (22, 22), (8, 8)])
def test_fitting_batch(
    wanted: int,
    cut: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = _given(tmp_path).devices
    assert fitting_batch(devices, wanted, 22) == cut
    said = f"A batch of {wanted} is cut to {cut}: there are 22 images"
    assert (said in capsys.readouterr().out) == (wanted > 22)
    monkeypatch.setattr(Devices, "world_size", 2)
    assert fitting_batch(devices, wanted, 22) == cut


def test_fitting_batch__fewer_than_a_device_computes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = _given(tmp_path).devices
    assert fitting_batch(devices, 1024, 7) == 7
    with pytest.raises(ValueError, match="0 images to train on, cannot be shared by 1"):
        fitting_batch(devices, 1024, 0)
    monkeypatch.setattr(Devices, "world_size", 2)
    with pytest.raises(ValueError, match=r"A batch of 7, .* be shared by 2 devices"):
        fitting_batch(devices, 1024, 7)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "most", "expected"),
    [(1024, 1, 64, 64), (1024, 8, 100, 64), (12, 1, 8, 6), (7, 1, 4, 1), (4, 4, 9, 1)],
)
def test_images_at_once(
    batch_size: int, world_size: int, most: int, expected: int
) -> None:
    class Stub:
        pass

    stub: Any = Stub()
    stub.batch_size, stub.world_size = most, world_size
    assert images_at_once(stub, batch_size) == expected


def test_finetune__from_the_command_line(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data")
    model = write_model(tmp_path / "model")
    options = ["--model", model, "--data", str(data), *run_options(tmp_path)]
    main(["finetune", *options, "--epochs", "1", "--train_batch_size", "8"])
    result = _stored(tmp_path)
    assert result.protocol["train_scale"] == [0.5, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stellar", "timm:resnet10t"])
def test_finetune__two_processes_equal_one(tmp_path: Path, model: str) -> None:
    data = write_classes(tmp_path / "data", num=9)
    source = write_model(tmp_path / "model") if model == "stellar" else model
    options = {"train_batch_size": 12, "epochs": 2, "lr": 3e-4}
    untrained = model != "stellar"
    output = str(tmp_path / "1" / "out")
    given = _given(tmp_path, source, untrained=untrained, output=output)
    one = run_finetune(*given, str(data), **options)
    command = ["evaluate", "finetune", "--model", source]
    command += ["--untrained", str(untrained).lower()]
    command += ["--data", str(data), *run_options(tmp_path / "2"), "--devices", "2"]
    command += [text for k, v in options.items() for text in (f"--{k}", str(v))]
    run_as_torchrun(stellar, command, tmp_path)
    two = _stored(tmp_path / "2")
    assert one.scores["num_test"] == two.scores["num_test"] == 27
    assert one.provenance["num_held_out"] == two.provenance["num_held_out"] == 3
    if model == "stellar":  # batch norm sees other batches on two processes
        assert one.scores == two.scores
        ours, theirs = (_weights(_folder(tmp_path / n)) for n in ("1", "2"))
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def _weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)[
        "state_dict"
    ]


def _before(function: Any) -> Any:
    original = FineTuning.on_train_epoch_start

    def hook(self: FineTuning) -> None:
        function(self)
        original(self)

    return hook
