from __future__ import annotations

import dataclasses
import json
from itertools import combinations

import pytest

from stellar_plugin import protocols
from stellar_plugin.protocols import FEATURE_OF_METHOD, FEATURES, Protocol, card_digest

ALL = {name: p for name, p in vars(protocols).items() if isinstance(p, Protocol)}


class TestProtocol:
    def test_card__only_fields_in_use_as_json_knows_them(self) -> None:
        protocol = Protocol(name="a", source="b", crop=224, lrs=(0.1, 0.2))
        card = protocol.card()
        assert card == {"name": "a", "source": "b", "crop": 224, "lrs": [0.1, 0.2]}
        assert json.loads(json.dumps(card)) == card

    def test_replace__makes_another_card(self) -> None:
        protocol = Protocol(name="a", source="b", crop=224)
        assert protocol.replace(crop=96).card()["crop"] == 96
        assert protocol.crop == 224

    def test_protocol__is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Protocol(name="a", source="b").crop = 3  # type: ignore[misc]

    def test_protocol__every_field_is_documented(self) -> None:
        text = Protocol.__doc__ or ""
        for field in dataclasses.fields(Protocol):
            assert f"\n        {field.name}: " in text


class TestCardDigest:
    def test_card_digest__order_of_fields_does_not_matter(self) -> None:
        assert card_digest({"a": 1, "b": 2}) == card_digest({"b": 2, "a": 1})

    def test_card_digest__every_field_matters(self) -> None:
        digests = {
            card_digest(Protocol(name="a", source="b", **{field: value}).card())
            for field, value in {
                "crop": 1,
                "resize": 1,
                "limit": 1,
                "rule": "1",
            }.items()
        }
        assert len(digests) == 4


class TestConstants:
    def test_constants__no_two_have_equal_cards(self) -> None:
        for (a, first), (b, second) in combinations(ALL.items(), 2):
            assert first.card() != second.card(), f"{a} and {b}"

    @pytest.mark.parametrize("name", ALL)
    def test_constants__name_and_source(self, name: str) -> None:
        assert ALL[name].name and ALL[name].source
        assert ALL[name].features in (None, "auto", *FEATURES)

    def test_constants__features_of_methods_exist(self) -> None:
        assert set(FEATURE_OF_METHOD.values()) <= set(FEATURES)
