from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightly_ext.pretrain import cli as pretrain_cli
from lightly_ext.pretrain import derived
from lightly_ext.pretrain.cli import PretrainCLI
from lightly_ext.pretrain.derived import RULES, Known, Machine, Photos, Prior, follow
from lightly_ext.pretrain.recipes import merge_recipes
from stellar_cli.errors import OptionError
from stellar_plugin import Stellar
from tests.lightly_ext.data.streams.shard_files import write_shards
from tests.pretraining import TINY, tiny, tiny_mae, write_photos

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

ONE_CORE = Machine("cpu", 1, 1, 1, 0, "32-true")
LAPTOP = Machine("cpu", 8, 1, 1, 0, "32-true")
GPU = Machine("gpu", 16, 1, 1, 80 * 2**30, "bf16-mixed")
SMALL_GPU = Machine("gpu", 4, 1, 1, 4 * 2**30, "16-mixed")
TWO_GPUS = Machine("gpu", 16, 2, 2, 80 * 2**30, "bf16-mixed")
OWN = {"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 8}
PUBLIC = {"model_name": "vit_base_patch16_224", "embed_dim": 768, "depth": 12}
PUBLIC |= {"num_heads": 12, "patch_size": 16}
PRIOR = Prior("runs/prior/model", OWN, {}, 64, own=True)
PUBLIC_PRIOR = Prior("timm:vit_base", PUBLIC, {}, 224, own=False)


def values(
    number: int,
    side: int,
    machine: Machine,
    prior: Prior | None = None,
    **given: Any,
) -> dict[str, Any]:
    """All values, by the last part of their names."""
    options = {name: given[last] for name in RULES if (last := _last(name)) in given}
    known = Known(options, Photos("photos", number, side), machine, prior)
    follow([name for name in RULES if name not in options], known)
    return {_last(name): value for name, value in known.options.items()}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def parsed(*options: str) -> PretrainCLI:
    return PretrainCLI(merge_recipes(["--config=photos", *options]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 210, 64)


class TestFollow:
    @pytest.mark.parametrize(
        ("side", "machine", "patch", "size", "local", "queries"),
        [
            (32, ONE_CORE, 4, 32, 16, 8),
            (64, ONE_CORE, 8, 64, 32, 8),
            (96, ONE_CORE, 8, 64, 32, 8),  # a CPU: 64 patches
            (500, ONE_CORE, 16, 128, 64, 8),
            (50, GPU, 4, 48, 24, 16),
            (64, GPU, 8, 64, 32, 8),
            (75, GPU, 8, 72, 32, 8),
            (127, GPU, 8, 96, 48, 16),
            (160, GPU, 16, 160, 80, 8),
            (224, GPU, 16, 224, 112, 16),
            (900, GPU, 16, 224, 112, 16),
        ],
    )
    def test_follow__sizes(
        self,
        side: int,
        machine: Machine,
        patch: int,
        size: int,
        local: int,
        queries: int,
    ) -> None:
        found = values(5000, side, machine)
        assert found["patch_size"] == patch
        assert found["global_crop_size"] == found["img_size"] == size
        assert found["local_crop_size"] == local
        assert local % patch == 0
        assert found["num_queries"] == queries
        assert 64 <= (size // patch) ** 2 <= 196
        assert found["gaussian_blur"] == (0.0 if size < 128 else 0.5)

    @pytest.mark.parametrize(
        ("number", "machine", "batch", "lr"),
        [
            (8000, ONE_CORE, 64, 1e-3),
            (200, ONE_CORE, 32, 7.07e-4),  # four steps in an epoch
            (8000, GPU, 128, 1.41e-3),
        ],
    )
    def test_follow__batch(
        self, number: int, machine: Machine, batch: int, lr: float
    ) -> None:
        found = values(number, 64, machine)
        assert found["batch_size"] == batch
        assert found["lr"] == lr

    @pytest.mark.parametrize(
        ("number", "machine", "epochs"),
        [
            (1000, ONE_CORE, 200),
            (8000, ONE_CORE, 25),
            (100_000, ONE_CORE, 10),
            (1000, GPU, 1600),
            (8000, GPU, 250),
        ],
    )
    def test_follow__epochs(self, number: int, machine: Machine, epochs: int) -> None:
        assert values(number, 64, machine)["max_epochs"] == epochs

    @pytest.mark.parametrize(
        ("number", "machine", "name", "depth", "heads", "decoder"),
        [
            (50_000, LAPTOP, "stellar_vit_tiny_patch16_224", 4, (512, 128), (192, 3)),
            (5000, GPU, "stellar_vit_tiny_patch16_224", 12, (512, 128), (192, 3)),
            (50_000, GPU, "stellar_vit_small_patch16_224", 12, (1024, 256), (384, 6)),
        ],
    )
    def test_follow__model(
        self,
        number: int,
        machine: Machine,
        name: str,
        depth: int,
        heads: tuple[int, int],
        decoder: tuple[int, int],
    ) -> None:
        found = values(number, 64, machine)
        assert (found["model_name"], found["depth"]) == (name, depth)
        assert (found["hidden_dim"], found["output_dim"]) == heads
        assert (found["decoder_dim"], found["decoder_num_heads"]) == decoder

    def test_follow__machine(self) -> None:
        machines = (ONE_CORE, LAPTOP, GPU, SMALL_GPU)
        found = [values(20_000, 224, machine) for machine in machines]
        assert [x["num_workers"] for x in found] == [0, 2, 16, 4]
        precisions = ["32-true", "32-true", "bf16-mixed", "16-mixed"]
        assert [x["precision"] for x in found] == precisions
        # vit_small at 196 patches: 0.13 GiB for an image.
        assert [x["batch_size"] for x in found] == [64, 64, 128, 16]

    def test_follow__processes_share_the_batch_and_agree(self) -> None:
        one, two = values(8000, 64, GPU), values(8000, 64, TWO_GPUS)
        assert 2 * two.pop("batch_size") == one.pop("batch_size")
        assert 2 * two.pop("num_workers") == one.pop("num_workers")
        assert one == two

    def test_follow__what_is_given_wins_and_others_follow(self) -> None:
        found = values(8000, 64, ONE_CORE, batch_size=256, patch_size=4)
        assert found["batch_size"] == 256
        assert found["lr"] == 2e-3
        assert found["global_crop_size"] == 32  # a CPU: 64 patches
        assert values(8000, 64, GPU, img_size=48)["global_crop_size"] == 48
        small = values(8000, 64, ONE_CORE, model_name="vit_small_patch16_224")
        assert (small["depth"], small["decoder_dim"]) == (12, 384)

    def test_follow__prior_decides_on_the_vit(self) -> None:
        found = values(8000, 80, ONE_CORE, PRIOR)
        assert OWN.items() <= found.items()
        assert found["img_size"] == 64  # on a GPU 80 would fit
        assert found["decoder_dim"] == 128
        assert found["lr"] == 1e-3
        assert "weight_init" not in found

    def test_follow__public_prior(self) -> None:
        found = values(8000, 500, GPU, PUBLIC_PRIOR)
        assert PUBLIC.items() <= found.items()
        assert (found["img_size"], found["decoder_dim"]) == (224, 512)
        assert found["lr"] == 1.41e-4
        # 64 patches of 16 px at least.
        assert values(8000, 64, GPU, PUBLIC_PRIOR)["img_size"] == 128


class TestPhotos:
    def test_photos__config_has_numbers(self, photos: Path, tmp_path: Path) -> None:
        built = parsed(f"--data.path={photos}", "--trainer.accelerator=cpu")
        names = {name for name, value in derived.flat(built.config.as_dict())}
        assert set(RULES) <= names
        left = [n for n, v in derived.flat(built.config.as_dict()) if v == "auto"]
        assert set(left) <= derived.OTHERS
        assert built.config["data"]["batch_size"] == 32
        assert built.config["model"]["head"]["num_prototypes"] is None
        assert built.derived["data.batch_size"].value == 32

    def test_photos_prior__has_the_same_vit_and_more_epochs(self, photos: Path) -> None:
        given = f"--data.path={photos}", "--trainer.accelerator=cpu"
        stellar = parsed(*given)
        prior = PretrainCLI(merge_recipes(["--config=photos_prior", *given]))
        assert prior.config["method"] == "mae"
        ours, theirs = (one.config["model"]["model"] for one in (prior, stellar))
        assert {k: theirs[k] for k in ours} == ours
        assert prior.config["model"]["lr"] == stellar.config["model"]["lr"]
        epochs = [one.config["trainer"]["max_epochs"] for one in (stellar, prior)]
        assert epochs == [952, 1600]  # no more than that

    @pytest.mark.parametrize("kind", ["tar", "parquet"])
    def test_photos__shards_are_counted_and_measured(
        self, kind: str, photos: Path, tmp_path: Path
    ) -> None:
        images = [file.read_bytes() for file in sorted(photos.rglob("*.*"))]
        write_shards(tmp_path, kind, [images[:100], images[100:]])
        found = derived._photos({"data.path": str(tmp_path)})
        assert found == Photos(str(tmp_path), 210, 64)

    def test_photos__options_win(self, photos: Path) -> None:
        built = parsed(
            *(f"--data.path={photos}", "--trainer.accelerator=cpu"),
            *("--data.batch_size=16", "--data.transform.global_crop_size=48"),
            "--model.model={model_name: stellar_vit_small_patch16_224}",
        )
        model, data = built.config["model"], built.config["data"]
        assert data["batch_size"] == 16
        assert model["lr"] == 5e-4
        assert data["transform"]["init_args"]["local_crop_size"] == 24
        # A group that is given as a whole is not derived.
        assert not [name for name in built.derived if name.startswith("model.model.")]

    def test_photos__processes_derive_one_batch(
        self, photos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = []
        for rank in "01":
            monkeypatch.setenv("LOCAL_RANK", rank)
            found.append(
                parsed(
                    *(f"--data.path={photos}", "--trainer.accelerator=cpu"),
                    "--trainer.devices=2",
                )
            )
        configs = [json.dumps(one.config.as_dict(), default=str) for one in found]
        assert configs[0] == configs[1]
        assert found[0].config["data"]["batch_size"] == 16

    def test_photos__prior_of_a_folder(self, photos: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        Stellar(**TINY["model"]).save_pretrained(tmp_path / "model")
        given = f"--data.path={photos}", f"--model.prior={tmp_path / 'model'}"
        built = parsed(*given, "--trainer.accelerator=cpu")
        model = built.config["model"]["model"]
        for name in ("embed_dim", "depth", "num_heads", "patch_size", "num_queries"):
            assert model[name] == TINY["model"][name]
        assert model["img_size"] == 64  # no run made it: the size of the images
        assert built.config["model"]["lr"] == 7.07e-5
        # As a run has it: made of images like these.
        (tmp_path / "config.yaml").touch()
        built = parsed(*given, "--trainer.accelerator=cpu")
        assert built.config["model"]["model"]["img_size"] == 32
        assert built.config["model"]["lr"] == 7.07e-4
        with pytest.raises(OptionError) as error:
            parsed(*given, "--model.model.patch_size=16")
        assert str(error.value) == (
            f"--model.model.patch_size 16 contradicts '{tmp_path / 'model'}', whose "
            "patch_size is 8: leave the option out, or start from other weights."
        )

    def test_photos__prior_of_mae_is_known_in_any_folder(
        self, photos: Path, tmp_path: Path
    ) -> None:
        tiny_mae().export(tmp_path / "copied")
        prior = f"--model.prior={tmp_path / 'copied'}"
        built = parsed(f"--data.path={photos}", "--trainer.accelerator=cpu", prior)
        model = built.config["model"]
        assert (model["model"]["img_size"], model["lr"]) == (32, 7.07e-4)

    def test_photos__checkpoint_of_a_run_is_of_that_run(
        self, photos: Path, tmp_path: Path
    ) -> None:
        module = tiny()
        saved = tmp_path / "checkpoints" / "last.ckpt"
        saved.parent.mkdir()
        hparams = {"model": dict(module.hparams["model"])}
        torch.save(
            {"state_dict": module.state_dict(), "hyper_parameters": hparams}, saved
        )
        (tmp_path / "config.yaml").touch()
        prior = f"--model.prior={saved}"
        built = parsed(f"--data.path={photos}", "--trainer.accelerator=cpu", prior)
        assert built.config["model"]["lr"] == 7.07e-4

    def test_photos_prior__weights_with_queries_are_left_to_the_model(
        self, photos: Path, tmp_path: Path
    ) -> None:
        tiny().export(tmp_path / "model")
        options = "--config=photos_prior", f"--model.weights={tmp_path / 'model'}"
        built = parsed(f"--data.path={photos}", "--trainer.accelerator=cpu", *options)
        with pytest.raises(ValueError, match="has latent queries, which an MAE does"):
            built.build()

    @pytest.mark.parametrize(
        ("number", "side", "message"),
        [
            (199, 64, "There are 199 images below .*: with fewer than 200 nothing can"),
            (
                200,
                31,
                "are too small: their shorter side is 31 px in the median, and 32",
            ),
        ],
    )
    def test_photos__too_little(
        self, number: int, side: int, message: str, tmp_path: Path
    ) -> None:
        write_photos(tmp_path, number, side)
        with pytest.raises(ValueError, match=message):
            parsed(f"--data.path={tmp_path}")

    def test_photos__unreadable_ones_tell_no_size(
        self, photos: Path, tmp_path: Path
    ) -> None:
        write_photos(tmp_path, 100, 64)
        for i in range(110):
            (tmp_path / f"broken{i}.jpg").write_bytes(b"no image")
        config = parsed(f"--data.path={tmp_path}").config
        assert config["model"]["model"]["img_size"] == 64

    def test_say_what_follows__commands_can_be_pasted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        photos = write_photos(tmp_path / "my photos", 200, 64)
        parsed(f"--data.path={photos}", "--trainer.accelerator=cpu").say_what_follows()
        said = capsys.readouterr().out
        assert f"From {photos} and this machine" in said
        assert f"pretrain --config photos_prior --data.path '{photos}'\n" in said

    def test_asked_for__names_the_option(self, tmp_path: Path) -> None:
        own = tmp_path / "own.yaml"
        own.write_text("model: {head: {num_prototyps: auto}}")
        with pytest.raises(OptionError) as error:
            parsed(f"--config={own}", "--data.path=images")
        said = "--model.head.num_prototyps cannot be auto: nothing tells its value."
        assert str(error.value).startswith(said)
        with pytest.raises(OptionError, match=r"--model.model.model_name: auto stands"):
            parsed("--model.model.model_name=auto", "--data.path=images")
        with pytest.raises(OptionError, match=r"Missing: --data.path\."):
            parsed()


def test_resolved__run_that_goes_on_keeps_what_its_prior_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "model: {model: {model_name: vit, embed_dim: 24}, lr: 0.5, min_lr: 0.25}"
    )
    recipe = {"model": {"model": {"model_name": "auto"}, "lr": "auto"}}
    # Neither the prior nor the images are read: there are none.
    kept, found = derived.resolved(recipe, lambda x: {**x, "output": str(tmp_path)})
    assert kept == {
        "model": {"model": {"model_name": "vit", "embed_dim": 24}, "lr": 0.5}
    }
    assert found == {}
    # Of another method the run is refused later, not for arguments of its model.
    recipe["method"] = "mae"
    kept, _ = derived.resolved(recipe, lambda x: {**x, "output": str(tmp_path)})
    assert kept["model"] == {"model": {"model_name": "vit"}, "lr": 0.5}


@pytest.mark.slow
def test_main__prints_stores_and_keeps_what_it_derived(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_photos(tmp_path / "images", 200, 32)
    run, again = tmp_path / "run", tmp_path / "again"
    options = [
        *("--config=photos", f"--data.path={images}", "--trainer.accelerator=cpu"),
        *("--model.model.depth=1", "--trainer.enable_model_summary=false"),
    ]
    pretrain_cli.main([*options, f"--output={run}", "--trainer.max_steps=1"])
    said = capsys.readouterr().out
    row = "data.batch_size 32 4 steps of 200 images in an epoch"
    assert row in " ".join(said.split())
    assert "No --model.prior: training starts from random weights." in said
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["data"]["batch_size"] == 32
    assert stored["trainer"]["max_epochs"] == 1000
    for file in ("summary.md", "index.html"):
        assert "4 steps of 200 images in an epoch" in (run / file).read_text()
    # More images: a run that goes on keeps what it had, and says so.
    write_photos(images, 300, 32)
    resumed = [*options, f"--output={run}", "--trainer.max_steps=2", "--resume"]
    pretrain_cli.main(resumed)
    said = capsys.readouterr().out
    assert f"what '{run / 'config.yaml'}' says stays" in said
    assert "data.images 200 images" in said
    kept = yaml.safe_load((run / "config.yaml").read_text())
    stored["trainer"]["max_steps"] = 2
    assert kept == stored
    assert "4 steps of 200 images in an epoch" in (run / "summary.md").read_text()
    pretrain_cli.main(
        [f"--from-run={run}", f"--output={again}", "--trainer.max_steps=1"]
    )
    repeated = yaml.safe_load((again / "config.yaml").read_text())
    assert repeated["trainer"]["max_epochs"] == 1000
    assert "From " not in capsys.readouterr().out
