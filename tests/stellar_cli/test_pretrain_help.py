from __future__ import annotations

from typing import Any

import pytest

from lightly_ext.pretrain.cli import PretrainCLI
from lightly_ext.pretrain.recipes import merge_recipes
from stellar_cli.pretrain_help import OPTIONS, pretrain_help

# They are taken off before Lightning reads the rest.
OURS = ("config", "from-run")
GIVEN = ("data.path", "model.model.model_name")


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def test_pretrain_help__names_and_defaults_are_those_of_the_parser() -> None:
    config = PretrainCLI(merge_recipes(["--data.path=images"])).config
    shown = [option for group in OPTIONS.values() for option in group]
    assert 20 <= len(shown) <= 40
    for option in shown:
        name, _, default = option.partition(" ")
        if name not in (*OURS, *GIVEN):
            value = value_of(config, name)
            # A switch has no value to show.
            assert default == ("" if value is False else _text(value)), option


def test_pretrain_help__fits_two_screens() -> None:
    lines = pretrain_help().splitlines()
    assert len(lines) <= 64
    assert max(map(len, lines)) <= 88
    assert "  --model.lr 0.00015                learning rate" in lines


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.lrr=1", "no option --model.lrr. Did you mean '--model.lr'?"),
        ("--data.batchsize=2", "--data.batchsize. Did you mean '--data.batch_size'?"),
        ("--data.batch_size=x", "--data.batch_size: expected int, got 'x'."),
        ("--model.lr_scaling=x", "--model.lr_scaling: expected 'none', 'sqrt', "),
        ("--trainer.precision=bf17", "'32-true', '64-true' or '64', '32', "),
        ("--model.loss.koleo=1", "--model.loss.koleo, as 'koleo' is no argument of "),
        ("--model.model.depht=1", "argument of Stellar. Did you mean 'depth'?"),
        ("--model.head.num_prototypes=x", "num_prototypes: expected int or null, got"),
        ("--model.head.input_dim=1", "There is no option --model.head.input_dim"),
        ("--model.augment.cj=1", "--model.augment.cj"),
        ("--data.transform.init_args.foo=1", "--data.transform: there is no option"),
    ],
)
def test_wrong_options__are_named(option: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        PretrainCLI(
            merge_recipes(["--config=digit_boards", "--data.path=images", option])
        )
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {lrr: 1}", "no option --model.lrr. Did you mean '--model.lr'?"),
        ("model: [1", "is no recipe in YAML"),
        ("a word", "it has no options by name"),
    ],
)
def test_wrong_recipes__are_named(text: str, said: str, tmp_path: Any) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        PretrainCLI(merge_recipes([f"--config={path}", "--data.path=images"]))
    assert said in str(error.value)
