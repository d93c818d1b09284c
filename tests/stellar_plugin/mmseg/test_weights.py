from __future__ import annotations

import re
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, save_checkpoint
from mmengine.runner.checkpoint import get_state_dict
from mmseg.apis import init_model
from mmseg.registry import MODELS
from torch import Tensor, nn

from stellar_plugin import Stellar
from stellar_plugin.mmseg.weights import check_checkpoint, check_file
from tests.stellar_plugin.mmseg.mmseg_sets import (
    MODEL_NAME,
    NUM_QUERIES,
    VIT,
    write_checkpoint,
)

BACKBONE = {
    "type": "StellarViT",
    "model_name": MODEL_NAME,
    "num_queries": NUM_QUERIES,
    **VIT,
}
HEAD = {
    "type": "LinearProbeHead",
    "in_channels": VIT["embed_dim"],
    "num_classes": 5,
    "norm_cfg": {"type": "BN"},
}
# Of mmseg, which knows nothing of checks.
FOREIGN = {"type": "FCNHead", "channels": 8, "num_convs": 1}
IMAGES = torch.rand(1, 3, 64, 64)


def config(backbone: dict[str, Any] | None = None, **head: Any) -> dict[str, Any]:
    return {
        "type": "EncoderDecoder",
        "backbone": {**BACKBONE, **(backbone or {})},
        "decode_head": {**HEAD, **head},
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }


def build(seed: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.build(Config(config(**kwargs)))


def write(path: Path, model: nn.Module) -> Path:
    """A checkpoint as mmengine's hook writes it."""
    save_checkpoint({"meta": {}, "state_dict": get_state_dict(model)}, str(path))
    return path


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()._forward(IMAGES)


def inference(path: Path, **kwargs: Any) -> nn.Module:
    """The model of mmseg's inference API."""
    return init_model(Config({"model": config(**kwargs)}), str(path), device="cpu")


class Check(Hook):
    def before_run(self, runner: Runner) -> None:
        check_file(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(runner, checkpoint)


class Unread(torch.utils.data.Dataset):
    metainfo: dict[str, Any] = {}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an image was read")


def runner(path: Path, folder: Path, *hooks: Any, **kwargs: Any) -> Runner:
    loader = {"dataset": Unread(), "sampler": {"type": "DefaultSampler"}}
    return Runner(
        model=build(2, **kwargs),
        work_dir=str(folder),
        train_dataloader={**loader, "sampler": {"type": "InfiniteSampler"}},
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": 0},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        test_dataloader=loader,
        test_cfg={},
        test_evaluator={"type": "IoUMetric"},
        load_from=str(path),
        custom_hooks=[Check(), *hooks],
        default_scope="mmseg",
        experiment_name=uuid.uuid4().hex,
    )


MISFITS = [
    (
        {"num_classes": 7},
        r"decode_head\.conv_seg\.bias \(5,\) instead of \(7,\).*classes is 7, was 5",
    ),
    ({"norm_cfg": None}, r"unexpected: decode_head\.norm\.weight"),
    ({"in_index": 0}, r"decode_head\.in_index is 0, was -1"),
    ({"align_corners": True}, r"decode_head\.align_corners is True, was False"),
    (
        {"backbone": {"embed_dim": 96}, "in_channels": 96},
        r"cls_token \(1, 1, 48\) instead of \(1, 1, 96\).*embed_dim is 96, was 48",
    ),
    ({"backbone": {"depth": 1}}, r"unexpected: backbone\.encoder\.vit\.blocks\.1\."),
    ({"backbone": {"depth": 3}}, r"missing: backbone\.encoder\.vit\.blocks\.2\."),
    ({"backbone": {"img_size": 32}}, r"pos_embed \(1, 16, 48\) instead of"),
    ({"backbone": {"num_queries": 3}}, r"reg_token \(1, 4, 48\) instead of"),
    # What no tensor shows.
    ({"backbone": {"feature": "lowrank"}}, r"feature is lowrank, was dense"),
    ({"backbone": {"out_indices": 0}}, r"out_indices is \(0,\), was \(1,\)"),
    ({"backbone": {"num_heads": 2}}, r"num_heads is 2, was 3"),
    ({"backbone": {"norm_eps": 1e-6}}, r"norm_eps is 1e-06, was 1e-12"),
    ({"backbone": {"pos_antialias": True}}, r"pos_antialias is True, was False"),
]


class TestTest:
    @pytest.mark.parametrize(("change", "message"), MISFITS)
    def test_another_model(
        self, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "iter_4.pth", build())
        with pytest.raises(ValueError, match=rf"iter_4\.pth.*{message}.*load_from"):
            runner(path, tmp_path, **change).test()
        # The same where no hook of ours is.
        message = message.replace(r"backbone\.", "").replace(r"decode_head\.", "")
        with pytest.raises(ValueError, match=f"{message}.*load_from"):
            inference(path, **change)

    @pytest.mark.parametrize(
        ("lost", "named"),
        [
            ("decode_head", "conv_seg.weight"),
            ("backbone", "encoder.vit.cls_token"),
            ("running_mean", "norm.running_mean"),
            ("fc2.bias", "encoder.vit.blocks.0.mlp.fc2.bias"),
        ],
    )
    def test_missing(self, lost: str, named: str, tmp_path: Path) -> None:
        state = build().state_dict()
        for name in [name for name in state if lost in name]:
            del state[name]
        path = tmp_path / "iter_4.pth"
        torch.save({"meta": {}, "state_dict": state}, path)
        with pytest.raises(ValueError, match=rf"iter_4\.pth.*missing: .*{named}"):
            runner(path, tmp_path).test()
        with pytest.raises(ValueError, match=f"missing: .*{named}"):
            inference(path)

    def test_head_of_mmseg(self, tmp_path: Path) -> None:
        path = write(tmp_path / "iter_4.pth", build())
        with pytest.raises(ValueError, match=r"missing: decode_head\.convs\.0"):
            runner(path, tmp_path, **FOREIGN).test()

    def test_pretraining_checkpoint(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        state = Stellar.from_pretrained(tmp_path).state_dict()
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
        message = r"last\.ckpt' holds nothing of this .*init_cfg\.checkpoint=PATH"
        with pytest.raises(ValueError, match=message):
            runner(tmp_path / "last.ckpt", tmp_path).test()
        with pytest.raises(ValueError, match="missing: encoder"):
            inference(tmp_path / "last.ckpt")

    @pytest.mark.parametrize(
        ("name", "content", "error", "message"),
        [
            ("nothing.pth", None, FileNotFoundError, "does not exist; give the file"),
            ("", None, FileNotFoundError, "is a folder; give the file"),
            ("a.pth", "abc", ValueError, "has 3 bytes"),
            ("a.pth", "<html>" * 20, ValueError, "is a web page"),
            ("a.pth", "PK" * 40, ValueError, "is cut short"),
        ],
    )
    def test_no_checkpoint(
        self,
        name: str,
        content: str | None,
        error: type[Exception],
        message: str,
        tmp_path: Path,
    ) -> None:
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(error, match=f"{name}' {message}"):
            runner(tmp_path / name, tmp_path).test()

    @pytest.mark.parametrize(
        "prefix", ["", "module.", "module._orig_mod.", "backbone:_fsdp_wrapped_module."]
    )
    @pytest.mark.parametrize("bare", [False, True])
    def test_the_same_model(self, prefix: str, bare: bool, tmp_path: Path) -> None:
        """Wrappers are no part of names; a head for training may be left out."""
        trained = build()
        state = OrderedDict(trained.state_dict())
        if prefix:
            inside, _, prefix = prefix.rpartition(":")
            state = OrderedDict(
                (name.replace(f"{inside}.", f"{inside}.{prefix}"), tensor)
                if inside
                else (prefix + name, tensor)
                for name, tensor in state.items()
            )
        state["auxiliary_head.conv_seg.bias"] = torch.zeros(5)
        del state[next(name for name in state if "num_batches_tracked" in name)]
        path = tmp_path / "iter_4.pth"
        torch.save(state if bare else {"state_dict": state, "meta": {}}, path)
        tested = runner(path, tmp_path)
        tested.load_or_resume()
        torch.testing.assert_close(logits(tested.model), logits(trained))

    def test_augmented_test(self, tmp_path: Path) -> None:
        trained = build()
        tested = runner(write(tmp_path / "iter_4.pth", trained), tmp_path)
        tested.model = MODELS.build({"type": "SegTTAModel", "module": tested.model})
        tested.load_or_resume()
        torch.testing.assert_close(logits(tested.model.module), logits(trained))
        del trained.decode_head
        tested = runner(write(tmp_path / "iter_4.pth", trained), tmp_path)
        tested.model = MODELS.build({"type": "SegTTAModel", "module": tested.model})
        with pytest.raises(ValueError, match=r"missing: decode_head\.conv_seg"):
            tested.load_or_resume()

    @pytest.mark.slow
    def test_sizes_of_the_checkpoint(self, tmp_path: Path) -> None:
        """The file that the run began with is not there any more."""
        source = write_checkpoint(tmp_path / "stellar")
        cfg = {"type": "Pretrained", "checkpoint": str(source)}
        open_sizes = dict.fromkeys((*VIT, "model_name", "num_queries"))
        trained = build(backbone={**open_sizes, "init_cfg": cfg})
        trained.init_weights()
        path = write(tmp_path / "iter_4.pth", trained)
        source.rename(tmp_path / "moved")
        tested = runner(path, tmp_path, backbone={**open_sizes, "init_cfg": cfg})
        tested.load_or_resume()
        torch.testing.assert_close(logits(tested.model), logits(trained))
        tested = inference(path, backbone=open_sizes)
        torch.testing.assert_close(logits(tested), logits(trained))
        # What is given holds.
        with pytest.raises(ValueError, match="num_heads is 4, was 3"):
            inference(path, backbone={**open_sizes, "num_heads": 4})

    def test_inference(self, tmp_path: Path) -> None:
        trained = build()
        path = write(tmp_path / "iter_4.pth", trained)
        tested = inference(path)
        torch.testing.assert_close(logits(tested), logits(trained), rtol=0, atol=0)
        trained.decode_head.conv_seg.bias.data[0] = torch.nan
        with pytest.raises(ValueError, match=r"not finite, in conv_seg\.bias"):
            inference(write(path, trained))


class TestTrain:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({}, None),
            ({"num_classes": 7}, r"gives 40 of the 42 tensors.*conv_seg\.bias \(5,\)"),
            (FOREIGN, r"missing: decode_head\.convs"),
            ({"backbone": {"feature": "lowrank"}}, "feature is lowrank, was dense"),
        ],
    )
    def test_load_from__a_part(
        self,
        change: dict[str, Any],
        message: str | None,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        source = build()
        run = runner(write(tmp_path / "a.pth", source), tmp_path, **change)
        run.logger.addHandler(caplog.handler)
        run.train()
        said = [m for m in caplog.messages if "stay as initialised" in m]
        assert len(said) == (message is not None)
        if message:
            assert re.search(message, said[0])
        for name, tensor in source.backbone.state_dict().items():
            assert run.model.backbone.state_dict()[name].equal(tensor)

    def test_load_from__a_part_into_averaged_weights(self, tmp_path: Path) -> None:
        source = build()
        path = write(tmp_path / "a.pth", source)
        run = runner(path, tmp_path, {"type": "EMAHook"}, num_classes=7)
        run.train()
        content = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
        averaged = content["ema_state_dict"]
        for name, tensor in source.backbone.state_dict().items():
            assert averaged[f"module.backbone.{name}"].equal(tensor)
        # The average is what a test takes.
        content["state_dict"]["decode_head.conv_seg.bias"].fill_(3.0)
        torch.save(content, tmp_path / "ema.pth")
        tested = runner(tmp_path / "ema.pth", tmp_path, num_classes=7)
        tested.load_or_resume()
        assert tested.model.decode_head.conv_seg.bias.tolist() == [3.0] * 7
        with pytest.raises(ValueError, match="classes is 5, was 7"):
            runner(tmp_path / "ema.pth", tmp_path, {"type": "EMAHook"}).test()

    def test_load_from__nothing(self, tmp_path: Path) -> None:
        torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth' holds nothing.*encoder\.weight"):
            runner(tmp_path / "a.pth", tmp_path).train()

    def test_resume__all_or_nothing(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.pth", build())
        run = runner(path, tmp_path, num_classes=7)
        run._resume = True
        with pytest.raises(ValueError, match=r"a\.pth.*conv_seg\.bias \(5,\)"):
            run.train()
