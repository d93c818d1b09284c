from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lightly_ext.pretrain import recipes
from lightly_ext.pretrain.cli import PretrainCLI
from lightly_ext.pretrain.recipes import merge_recipes
from stellar_cli.errors import OptionError
from stellar_plugin import MaskGITVQGAN
from tests.pretraining import TINY_OPTIONS, loader, merged, trainer, write_photos

# The command line is called from here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

# Files that recipes name and a test machine does not have.
NO_FILES = {
    "ablations/prior_mae": ["--model.prior=null"],
    "ablations/prior_dino": ["--model.prior=null"],
    "random_stage2": ["--model.weights=null"],
}
SPARSE, CLS, DECODER = "sparse_head", "cls_head", "decoder"
# What each ablation builds beside the encoder.
ABLATIONS: dict[str, set[str]] = {
    "no_reconstruction": {SPARSE, CLS},
    "reconstruction_only": {DECODER},
    "no_alignment": {SPARSE, DECODER},
    "no_clustering": {SPARSE, CLS, DECODER},
    "no_cls_alignment": {SPARSE, CLS, DECODER},
    "no_koleo": {SPARSE, CLS, DECODER},
    "identity_matching": {SPARSE, CLS, DECODER},
    "queries_8": {SPARSE, CLS, DECODER},
    "queries_16": {SPARSE, CLS, DECODER},
    "queries_24": {SPARSE, CLS, DECODER},
    "prior_mae": {SPARSE, CLS, DECODER},
    "prior_dino": {SPARSE, CLS, DECODER},
    "prior_random": {SPARSE, CLS, DECODER},
    "target_pixels": {SPARSE, CLS, DECODER},
    "target_tokens": {SPARSE, CLS, DECODER},
    "places365": {SPARSE, CLS, DECODER},
}


def build(name: str, tmp_path: Path, *options: str) -> PretrainCLI:
    arguments = [f"--config={name}", "--data.path=images", f"--output={tmp_path}"]
    given = [*arguments, *NO_FILES.get(name, []), *options]
    cli = PretrainCLI(merge_recipes(given))
    cli.build()
    return cli


class TestMergeRecipes:
    def test_merge_recipes__weights_are_merged_one_by_one(self, tmp_path: Path) -> None:
        # A dictionary as a whole would lose gather_distributed.
        own = tmp_path / "own.yaml"
        own.write_text("model: {loss: {koleo_weight: 5e-1}, lr: 1e-3}\n")
        config = merged("vit_large", "ablations/no_reconstruction", str(own))
        assert config["model"]["loss"] == {
            "gather_distributed": True,
            "reconstruction_weight": 0.0,
            "koleo_weight": 0.5,
        }
        assert config["model"]["lr"] == 1e-3
        assert config["model"]["weight_decay"] == 0.04
        assert config["model"]["model"]["num_queries"] == 16
        assert config["model"]["model"]["model_name"].startswith("stellar_vit_large")

    def test_merge_recipes__run_that_was_moved(self, tmp_path: Path) -> None:
        run = tmp_path / "moved"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").write_text("output: where/it/was\n")

        def output(*options: str) -> str:
            config, *_ = merge_recipes([f"--config={run / 'config.yaml'}", *options])
            return json.loads(config.removeprefix("--config="))["output"]

        assert output("--resume") == str(run)
        # A new run from the same recipe asks for its folder.
        assert output() == "where/it/was"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("trainer: 1", "has no options by name under 'trainer'"),
            ("- 1", "it has no options by name"),
            ("[" * 100_000, "nested more than 50 times"),
            ("&a [*a]", "Circular reference"),
            ("a: [", "while parsing"),
            ("a: \x00", "characters are not allowed"),
        ],
    )
    def test_merge_recipes__no_recipe(
        self, text: str, message: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(OptionError, match=message) as found:
            merge_recipes([f"--config={path}"])
        assert str(path) in str(found.value)

    def test_merge_recipes__option_without_a_value(self) -> None:
        with pytest.raises(OptionError, match=r"^--config needs a value;"):
            merge_recipes(["--config"])

    @pytest.mark.parametrize("name", ["Foo", "foo.Bar", "collections.OrderedDict"])
    def test_parse__no_transform(self, name: str) -> None:
        expected = "expected STELLARTransform, or package.Class derived from it"
        with pytest.raises(OptionError) as error:
            PretrainCLI(merge_recipes([f"--data.transform={name}", "--data.path=x"]))
        assert str(error.value) == f"--data.transform: {expected}, got '{name}'."

    def test_merge_recipes__another_class_brings_its_own_arguments(self) -> None:
        old = {"class_path": "a.A", "init_args": {"size": 1}}
        new = {"class_path": "b.B", "init_args": {"depth": 2}}
        assert recipes._merged(old, new) == new
        more = {"init_args": {"depth": 2}}
        assert recipes._merged(old, more) == {
            "class_path": "a.A",
            "init_args": {"size": 1, "depth": 2},
        }

    def test_merge_recipes__options_win_wherever_they_stand(
        self, tmp_path: Path
    ) -> None:
        with torch.device("meta"):
            built = PretrainCLI(
                merge_recipes(
                    [
                        *("--model.loss.koleo_weight=0.25", "--data.path=images"),
                        *("--config", "ablations/no_koleo", f"--output={tmp_path}"),
                    ]
                )
            )
            built.build()
        assert built.model.criterion.weights["koleo"] == 0.25
        assert built.model.criterion.gather_distributed

    @pytest.mark.parametrize("form", ["--config=", "--config", "-c=", "-c"])
    def test_merge_recipes__every_form_of_the_option(self, form: str) -> None:
        names = ["vit_large", "ablations/no_koleo"]
        given = [[form + x] if form.endswith("=") else [form, x] for x in names]
        options = [
            "--trainer.max_steps",
            "-1",
            "--data.path=a b",
            "--model.loss={a: 1}",
        ]
        config, *rest = merge_recipes(
            [*given[0], *options[:3], *given[1], *options[3:]]
        )
        assert rest == options
        assert json.loads(config.removeprefix("--config=")) == merged(*names)

    def test_merge_recipes__short_option_keeps_what_the_base_says(
        self, tmp_path: Path
    ) -> None:
        # One weight of the loss; the base says gather_distributed.
        with torch.device("meta"):
            built = build("vit_base", tmp_path, "-c", "ablations/no_koleo")
        assert built.model.criterion.weights["koleo"] == 0.0
        assert built.model.criterion.gather_distributed

    def test_merge_recipes__file_wins_and_unknown_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("vit_base").write_text("seed_everything: 7")
        assert merged("vit_base")["seed_everything"] == 7
        with pytest.raises(
            OptionError, match=r"'vit_base'\?.*vit_huge, vit_large.*ablations/NAME"
        ):
            merged("vit_bas")


class TestRecipes:
    @pytest.mark.parametrize("name", recipes.recipe_names())
    @pytest.mark.slow
    def test_recipe__builds(self, name: str, tmp_path: Path) -> None:
        options = []
        if name == "ablations/target_tokens":
            options = tokens_options(tmp_path)
        elif name.startswith("photos"):
            options = [f"--data.path={write_photos(tmp_path / 'photos', 256, 64)}"]
        with torch.device("meta"):
            built = build(name, tmp_path, *options)
        size = built.datamodule.transform.global_crop_size
        assert size == built.model.model.encoder.vit.patch_embed.img_size[0]
        patch = built.model.model.encoder.patch_size
        assert built.datamodule.transform.local_crop_size % patch == 0
        small = name in ("digit_boards", "photos", "photos_prior")
        if built.config["method"] == "stellar":
            assert built.model.criterion.gather_distributed
        assert built.model.hparams["lr"] == (1e-3 if small else 1.5e-4)

    @pytest.mark.parametrize("name", ["vit_base", "vit_large", "vit_huge"])
    @pytest.mark.slow
    def test_recipe__every_size_with_the_token_target(
        self, name: str, tmp_path: Path
    ) -> None:
        options = ["--config=ablations/target_tokens", *tokens_options(tmp_path)]
        with torch.device("meta"):
            module = build(name, tmp_path, *options).model
        module.model.tokenizer = MaskGITVQGAN.from_pretrained(
            tmp_path / "tokenizer.bin"
        )
        codes = module.model.target_codes(torch.rand(1, 3, 224, 224))
        assert codes.shape == (1, module.model.encoder.vit.patch_embed.num_patches)
        assert module.criterion.weights["reconstruction"] == 0.05
        assert module.model.encoder.patch_size == (14 if name == "vit_huge" else 16)

    def test_recipe__stages_of_the_random_prior(self) -> None:
        first, second = merged("random_stage1"), merged("random_stage2")
        epochs = [config["trainer"]["max_epochs"] for config in (first, second)]
        assert epochs == [150, 75]
        assert first["model"]["teacher_momentum"] == 0.996
        assert second["model"]["teacher_momentum"] is None
        assert first["model"]["mask_ratio"] == 0.6
        assert second["model"]["mask_ratio"] == 0.8
        assert second["model"]["weights"] == f"{first['output']}/model"
        assert first["output"] != second["output"]

    def test_recipe__ablations_are_a_few_lines(self) -> None:
        folder = recipes.RECIPES / "ablations"
        files = {path.stem: path.read_text() for path in folder.glob("*.yaml")}
        assert files.keys() == ABLATIONS.keys()
        for name, text in files.items():
            assert len(text.splitlines()) <= 10, name
            assert yaml.safe_load(text), name


class TestAblations:
    @pytest.mark.parametrize("name", [*ABLATIONS, "stage1"])
    @pytest.mark.slow
    def test_ablation__builds_what_it_trains(self, name: str, tmp_path: Path) -> None:
        recipe = "random_stage1" if name == "stage1" else f"ablations/{name}"
        options = tokens_options(tmp_path) if name == "target_tokens" else []
        torch.manual_seed(0)
        module = build(recipe, tmp_path, *TINY_OPTIONS, *options).model
        built = {SPARSE, CLS} & {child for child, _ in module.named_children()}
        if module.model.decoder is not None:
            built.add(DECODER)
        assert built == ABLATIONS.get(name, {SPARSE, CLS, DECODER})
        projections = [n for n, _ in module.model.named_parameters() if "_proj." in n]
        assert bool(projections) == (DECODER in built)
        if name.startswith("queries"):
            assert module.model.encoder.num_queries == int(name.split("_")[1])
        trainer(tmp_path, max_steps=1).fit(module, loader())
        missing = [
            n
            for n, p in module.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
        ]
        assert missing == []
        idle = [n for n, p in module.named_parameters() if not p.requires_grad]
        assert all(n.startswith(("teacher.", "model.tokenizer.")) for n in idle)


def tokens_options(tmp_path: Path) -> list[str]:
    """A small tokenizer with as many codes as the published one."""
    tokenizer = MaskGITVQGAN(32, (1, 1, 1, 1, 1), 1, 8, 1024)
    torch.save(dict(tokenizer.state_dict()), tmp_path / "tokenizer.bin")
    return [f"--model.tokenizer={tmp_path / 'tokenizer.bin'}"]
