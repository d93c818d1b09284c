from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stellar_plugin import Stellar, StellarEncoder
from stellar_plugin.arguments import check_arguments
from stellar_plugin.tokenizer import MaskGITVQGAN

NAME = "stellar_vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": "2"}, r"^depth must be a whole number, got '2'\.$"),
        ({"depth": True}, "depth must be a whole number, got True"),
        ({"depth": 2.0}, r"depth must be a whole number, got 2\.0"),
        ({"depth": None}, "depth must be a whole number, got None"),
        ({"depth": 100_000}, "depth must be 1 to 512, got 100000"),
        ({"embed_dim": 10**9}, "embed_dim must be 1 to 32768, got 1000000000"),
        ({"num_heads": 0}, "num_heads must be 1 to 1024, got 0"),
        ({"mlp_ratio": math.nan}, "mlp_ratio must be 0.01 to 64, got nan"),
        (
            {"norm_eps": "x" * 10**6},
            r"norm_eps must be a number or None, got 'x{1,20}\.",
        ),
        ({"drop_rate": math.inf}, "drop_rate must be .* got inf"),
        ({"img_size": [16, 16, 16]}, "img_size must be a whole number or a list of 2"),
        ({"img_size": [16, 10**9]}, "img_size must be 1 to 16384"),
        ({"in_chans": 1}, "in_chans must be 3, got 1"),
        ({"mean": [0.5, 0.5]}, r"mean must have 3 values, got \[0\.5, 0\.5\]"),
        ({"std": [0.5, 0.5, 0]}, "std must be 1e-06 to 1"),
        ({"mean": "0.5"}, "mean must be a list of a number, got '0.5'"),
        ({"target": ["pixels"]}, "target must be 'pixels', 'tokens' or None"),
        ({"dept": 2}, r"'dept' is no argument \(did you mean 'depth'\?\)"),
        ({"depth": "2", "num_heads": []}, "depth must be .*, num_heads must be"),
        ({"num_heads": 5}, "timm cannot build .* divisible by num_heads"),
        ({"img_size": 8}, "img_size 8 has not one patch of 16 px"),
        ({"tokenizer": {"codes": 3}, "target": "tokens"}, "'codes' is no argument"),
    ],
)
def test_stellar__wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stellar(NAME, **arguments)


def test_stellar__lists_for_tuples_and_whole_numbers_for_others() -> None:
    with torch.device("meta"):
        model = Stellar(NAME, depth=1, img_size=[32, 64], mean=[0, 1, 0], mlp_ratio=2)
    assert model.encoder.grid_size == (2, 4)
    assert model.mean == (0, 1, 0)


def test_check_arguments__names_that_are_taken() -> None:
    check_arguments({"num_codes": 3}, MaskGITVQGAN)
    with pytest.raises(ValueError, match="'num_codes' is no argument"):
        check_arguments({"num_codes": 3}, MaskGITVQGAN, taken=("num_codes",))


def test_check_arguments__first_owner_decides() -> None:
    check_arguments({"localization": True}, StellarEncoder, MaskGITVQGAN)
    with pytest.raises(ValueError, match="localization must be true or false"):
        check_arguments({"localization": 1}, StellarEncoder, MaskGITVQGAN)
