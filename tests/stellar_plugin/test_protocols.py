from __future__ import annotations

import dataclasses
import json

import pytest

from stellar_plugin import protocols
from stellar_plugin.protocols import (
    CARD_FIELDS,
    FEATURES,
    KNN,
    RETRIEVAL_FORMS,
    CropProtocol,
    Protocol,
    TrainedProtocol,
    card_digest,
)

ALL = {name: p for name, p in vars(protocols).items() if isinstance(p, Protocol)}
KINDS = {kind for protocol in ALL.values() for kind in type(protocol).mro()}
# Stored results are told apart by these: another digest is another column.
DIGESTS = {
    "KNN": "096656c5",
    "LINEAR": "0d186620",
    "LINEAR_PAPER": "62bddf14",
    "FINETUNE": "38ed20ce",
    "EFFICIENCY": "369b3553",
    "EFFICIENCY_ENCODER": "aeb7f01c",
    "RANK": "56e8a1c5",
    "SEGMENTATION": "fbe1f457",
    "SEGMENTATION_ADE20K": "28251dc6",
    "SEGMENTATION_CITYSCAPES": "0cb21251",
    "SEGMENTATION_VOC": "4e86bbca",
    "SEGMENTATION_PAPER": "8b39f80e",
    "SEGMENTATION_PAPER_ADE20K": "68e60086",
    "SEGMENTATION_PAPER_CITYSCAPES": "5f357755",
    "SEGMENTATION_PAPER_VOC": "6e735378",
    "SEGMENTATION_FINETUNE_ADE20K": "8f2ab416",
    "SEGMENTATION_FINETUNE_CITYSCAPES": "3bc8c742",
    "SEGMENTATION_FINETUNE_VOC": "3d57b0ae",
    "VISUALIZE": "34181c6c",
    "ATLAS": "7544e494",
    "IN_CONTEXT": "b302d427",
    "RECONSTRUCTION": "ca64167b",
    "RECONSTRUCTION_SCRATCH": "7204fea2",
    "RECONSTRUCTION_FINETUNED": "78032929",
    "RECONSTRUCTION_NATIVE": "bba2d7be",
    "EQUIVARIANCE": "93fe51bc",
    "STABILITY": "d204c3e7",
    "WHERE": "be7ace5d",
    "WHERE_CLUSTERS": "8b0a5e46",
    "DISCOVER": "9550f67e",
    "ALIGN_TEXT": "4b2c69ed",
    "RETRIEVAL": "0ef7fe8a",
    "UNSUPERVISED_SEGMENTATION": "9e23d57d",
    "UNSUPERVISED_SEGMENTATION_PROTOTYPES": "d8ee4356",
}


class TestProtocol:
    def test_card__only_what_is_filled_in_as_json_knows_it(self) -> None:
        card = CropProtocol(name="a", source="", resize=256, crop=0).card()
        assert card == {"name": "a", "resize": 256, "crop": 0}
        card = protocols.LINEAR.card()
        assert card["lrs"] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
        assert json.loads(json.dumps(card)) == card

    def test_card__order_of_the_fields(self) -> None:
        card = KNN.replace(data="x", limit=3).card()
        assert list(card) == [
            *("name", "source", "data", "split", "limit", "features", "pooling"),
            *("resize", "crop", "neighbours", "temperature", "averaging", "rule"),
        ]

    def test_replace__makes_another_card(self) -> None:
        assert KNN.replace(crop=96).card() == {**KNN.card(), "crop": 96}
        assert KNN.crop == 224

    def test_replace__a_field_of_another_task(self) -> None:
        with pytest.raises(TypeError, match="epochs"):
            KNN.replace(epochs=3)

    def test_protocol__is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            KNN.crop = 3  # type: ignore[misc]

    def test_trained_protocol__needs_every_field(self) -> None:
        with pytest.raises(TypeError, match="'optimizer', 'lrs', 'batch_sizes'"):
            TrainedProtocol(name="a", source="b", resize=256, crop=224)  # type: ignore[call-arg]

    def test_card_fields__are_those_of_the_tasks(self) -> None:
        kinds = [kind for kind in KINDS if dataclasses.is_dataclass(kind)]
        used = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        assert used == CARD_FIELDS.keys()


class TestCardDigest:
    def test_card_digest__order_of_fields_does_not_matter(self) -> None:
        assert card_digest({"a": 1, "b": 2}) == card_digest({"b": 2, "a": 1})

    def test_card_digest__every_field_matters(self) -> None:
        others = {"crop": 1, "resize": 1, "limit": 1, "rule": "1"}
        digests = {card_digest(KNN.replace(**{k: v}).card()) for k, v in others.items()}
        assert len({*digests, DIGESTS["KNN"]}) == 5


class TestConstants:
    def test_constants__digests_never_change(self) -> None:
        assert {n: card_digest(p.card()) for n, p in ALL.items()} == DIGESTS
        assert len(set(DIGESTS.values())) == len(DIGESTS)

    @pytest.mark.parametrize("name", ALL)
    def test_constants__name_and_source(self, name: str) -> None:
        assert ALL[name].name and ALL[name].source
        features = ALL[name].card().get("features")
        assert features in (None, "auto", *FEATURES, ", ".join(RETRIEVAL_FORMS))
