from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightly_ext.evaluate.cli import main
from lightly_ext.evaluate.dense.presets import PRESETS as LABEL_MAPS
from lightly_ext.evaluate.presets import PRESETS
from lightly_ext.evaluate.report.pages import Report, to_html, to_json, to_markdown
from lightly_ext.evaluate.report.published import TABLE_2, Published, all_published
from lightly_ext.evaluate.report.report import collect_results, related, run_report
from lightly_ext.evaluate.report.scores import SCORES, score_title, shown_score
from lightly_ext.evaluate.report.tables import (
    Table,
    build_tables,
    card_differences,
    learning_gains,
)
from lightly_ext.evaluate.result import Result
from stellar_plugin.protocols import (
    DISCOVER,
    EFFICIENCY,
    IMAGENET_TRAIN_SCALE,
    IN_CONTEXT,
    KNN,
    LINEAR,
    LINEAR_PAPER,
    NOT_TOLD,
    RECONSTRUCTION,
    RETRIEVAL,
    SEGMENTATION_ADE20K,
    SEGMENTATION_PAPER_ADE20K,
    Protocol,
    RandomCropProtocol,
    card_digest,
)
from tests.lightly_ext.evaluate.small import run_options, write_classes, write_model
from tests.page import Page

BOARDS = KNN.replace(data="boards")


def make_result(
    model: str,
    value: float,
    protocol: Protocol = BOARDS,
    seed: int = 0,
    sha256: str | None = None,
    task: str = "knn",
    score: str = "accuracy",
) -> Result:
    scores: dict[str, Any] = {score: value, "num_test": 40}
    provenance = {"sha256": sha256 or f"hash of {model}", "seed": seed}
    return Result(task, model, str(protocol.data), scores, protocol.card(), provenance)


def values_of(table: Table) -> dict[tuple[str, str, str], list[float]]:
    """Values by model, card and score."""
    return {
        (row.title, column.digest, row.score or column.score + column.at): cell.values
        for (row, column), cell in table.cells.items()
    }


class TestBuildTables:
    def test_build_tables__two_models_two_seeds_two_protocols(self) -> None:
        coarse = BOARDS.replace(crop=96)
        measured = {
            (model, protocol, seed): random.Random(f"{model}{seed}").random()
            for model in ("a", "b")
            for protocol in (BOARDS, coarse)
            for seed in (0, 1)
        }
        results = [make_result(m, v, p, s) for (m, p, s), v in measured.items()]
        (table,) = build_tables(results)
        assert (table.task, table.protocol) == ("knn", "knn")
        assert [row.title for row in table.rows] == ["a", "b"]
        assert {c.digest for c in table.columns} == {
            card_digest(p.card()) for p in (BOARDS, coarse)
        }
        assert values_of(table) == {
            (model, card_digest(protocol.card()), "accuracy"): [
                measured[model, protocol, seed] for seed in (0, 1)
            ]
            for model in ("a", "b")
            for protocol in (BOARDS, coarse)
        }

    def test_build_tables__a_column_holds_one_card_only(self) -> None:
        protocols = [
            BOARDS,
            BOARDS.replace(neighbours=10),
            BOARDS.replace(limit=8),
            BOARDS.replace(features="dense"),
            BOARDS.replace(data="other"),
            LINEAR.replace(data="boards"),
            LINEAR_PAPER.replace(data="boards"),
        ]
        chooser = random.Random(0)
        results = [
            make_result(f"m{i % 5}", 0.5, chooser.choice(protocols), i // 5)
            for i in range(60)
        ]
        tables = build_tables(results, all_published())
        for table in tables:
            for (_, column), _ in table.cells.items():
                assert column.digest == card_digest(dict(column.card))
        in_tables = sorted(
            (column.digest, len(cell.values))
            for table in tables
            for (row, column), cell in table.cells.items()
            if row.kind != "published"
        )
        groups: dict[tuple[str, str], int] = {}
        for r in results:
            key = (card_digest(dict(r.protocol)), r.model)
            groups[key] = groups.get(key, 0) + 1
        assert in_tables == sorted((digest, n) for (digest, _), n in groups.items())

    def test_build_tables__other_weights_are_another_row(self) -> None:
        results = [
            make_result("a", 0.5, sha256="1111111122"),
            make_result("a", 0.7, sha256="2222222233"),
            make_result("b", 0.9, seed=0, sha256="3333"),
            make_result("b", 0.8, seed=1, sha256="4444"),
        ]
        (table,) = build_tables(results)
        titles = [row.title for row in table.rows]
        assert titles == ["a (sha256 11111111)", "a (sha256 22222222)", "b"]
        assert sorted(values_of(table).values()) == [[0.5], [0.7], [0.9, 0.8]]

    def test_build_tables__other_options_are_other_rows(self) -> None:
        def result(value: float, **traits: Any) -> Result:
            made = make_result("a", value, seed=traits["seed"])
            model = {"sha256": "1234567890abcdef", "seed": None}
            identity = {"model": model, "options": traits, "inputs": {"data": "x" * 64}}
            return replace(made, identity=identity)

        results = [
            result(0.5, seed=0, precision="32-true"),
            result(0.6, seed=1, precision="32-true"),
            result(0.7, seed=1, precision="bf16-mixed"),
            result(0.8, seed=1, precision="bf16-mixed", decoder="ab" * 32),
            make_result("a", 0.9, seed=1, sha256="1234567890abcdef"),  # older
        ]
        assert len({r.digest for r in results}) == 5
        (table,) = build_tables(results)
        rows = {row.title: cell.values for (row, _), cell in table.cells.items()}
        assert rows == {
            "a (precision 32-true, no decoder)": [0.5, 0.6],
            "a (precision bf16-mixed, no decoder)": [0.7],
            "a (precision bf16-mixed, decoder abababab)": [0.8],
            "a (identity not told)": [0.9],
        }

    def test_build_tables__other_images_are_other_columns(self) -> None:
        def result(model: str, value: float, data: str) -> Result:
            identity = {"model": {}, "options": {}, "inputs": {"data": data}}
            return replace(make_result(model, value), identity=identity)

        one, other = "11111111" * 8, "22222222" * 8
        results = [result("a", 0.5, one), result("a", 0.7, other)]
        results += [result("b", 0.6, one)]
        (table,) = build_tables(results)
        assert {
            (row.title, column.data): cell.values
            for (row, column), cell in table.cells.items()
        } == {
            ("a", "boards (data 11111111)"): [0.5],
            ("a", "boards (data 22222222)"): [0.7],
            ("b", "boards (data 11111111)"): [0.6],
        }
        (table,) = build_tables([results[0], results[2]])
        assert [column.data for column in table.columns] == ["boards"]

    def test_build_tables__untrained_never_averaged_with_trained(self) -> None:
        results = [
            make_result("a", 0.5, seed=0),
            make_result("a", 0.1, seed=1, sha256="random weights of seed 1"),
        ]
        (table,) = build_tables(results)
        assert [row.title for row in table.rows] == ["a", "a (untrained)"]
        (table,) = build_tables([make_result("patches", 0.2, sha256="no weights")])
        assert [row.kind for row in table.rows] == ["untrained"]

    def test_build_tables__random_weights_of_mmseg_are_untrained(self) -> None:
        card = SEGMENTATION_ADE20K.card()
        results = [
            Result("segmentation", "STELLAR", "ADE20K", {"mIoU": 0.1}, card, of)
            for of in (
                {"checkpoint": "random weights", "sha256": None, "seed": 0},
                {"checkpoint": "stellar-b16", "sha256": "12345678", "seed": 0},
            )
        ]
        (table,) = build_tables(results)
        assert [row.title for row in table.rows] == ["STELLAR", "STELLAR (untrained)"]

    def test_build_tables__points_of_curves_by_size(self) -> None:
        curves = {"change_of_l": {"5": 0.2, "30": 0.5}, "moved_back": {"12": 0.1}}
        card = EFFICIENCY.replace(data="boards").card()
        (table,) = build_tables(
            [Result("equivariance", "a", "boards", curves, card, {})]
        )
        assert [column.at for column in table.columns] == ["5", "12", "30"]

    def test_score_title__of_what_a_model_is_compared_with(self) -> None:
        assert score_title("grid_token_overlap") == "uniform grid, token overlap, %"
        assert shown_score("grid_token_overlap", 0.1958) == "19.58"
        assert score_title("tokenizer_fid") == "tokenizer, FID"
        assert shown_score("tokenizer_fid", 1.414) == "1.41"
        assert shown_score("grid_2_mbo_i", 0.1958) == "19.58"
        assert (score_title("grid_of_ours"), shown_score("x", 0.12345)) == (
            "grid of ours",
            "0.1235",
        )

    def test_build_tables__what_scores_are_of_has_rows(self) -> None:
        card = DISCOVER.replace(data="boards").card()
        scores = {"tokens_corloc_oracle": 0.5, "ncut_corloc_oracle": 0.25}
        scores |= {"grid_2_corloc_oracle": 0.125, "num_images": 3}
        chance = {"tokens_corloc_oracle": 0.75}
        trained = Result(
            *("discover", "ours", "boards", scores, card, {"sha256": "a"}),
            chance=chance,
            untrained={"ncut_corloc_oracle": 0.375},
        )
        higher = {name: 2 * value for name, value in scores.items()}
        untrained = replace(
            trained,
            scores=higher,
            provenance={"checkpoint": "random weights", "sha256": None},
        )
        (table,) = build_tables([trained, untrained])
        assert [row.title for row in table.rows][:3] == [
            *("ours: tokens", "ours: normalised cut", "ours: uniform grid of 2"),
        ]
        (column,) = table.columns
        assert column.score == "corloc_oracle"
        of_trained = [table.cells[row, column] for row in table.rows[:3]]
        assert [cell.text(column.score) for cell in of_trained] == [
            *("50.00", "25.00", "12.50"),
        ]
        assert [cell.beside(column.score) for cell in of_trained] == [
            *(["75.00", NOT_TOLD], [NOT_TOLD, "37.50"], [NOT_TOLD, NOT_TOLD]),
        ]
        # Each beside the same of random weights; a grid has learned nothing.
        gains = [(gain.row.subject, gain.value) for gain in learning_gains(table)]
        assert gains == [("tokens", -0.5), ("ncut", -0.25)]
        cells = to_json(Report([table], [], 2))["tables"][0]["cells"]
        assert {cell["score"] for cell in cells} == scores.keys() - {"num_images"}

    def test_build_tables__curves_have_their_points_as_columns(self) -> None:
        protocol = EFFICIENCY.replace(data="a machine")
        scores = {"encoder_ms": {"4": 1.0, "8": 2.0}, "decoder_ms": {"4": 0.5}}
        scores["encoder_iqr_ms"] = {"4": None}  # type: ignore[dict-item]
        result = Result("efficiency", "a", "a machine", scores, protocol.card(), {})
        (table,) = build_tables([result])
        assert [c.at for c in table.columns] == ["4", "8"]
        assert [row.score for row in table.rows] == ["encoder_ms", "decoder_ms"]

    def test_build_tables__limited_is_marked(self) -> None:
        (table,) = build_tables([make_result("a", 0.5, BOARDS.replace(limit=8))])
        assert table.columns[0].data == "boards (limited to 8 images)"

    def test_build_tables__chance_and_untrained_beside_the_score(self) -> None:
        def result(value: float, run: int, **model: Any) -> Result:
            options = {"precision": "32-true", "seed": run}
            identity = {"model": model, "options": options, "inputs": {"data": "x"}}
            made = make_result("a", value, seed=run, sha256=model["sha256"])
            return replace(made, identity=identity, chance={"accuracy": 0.125})

        def random(value: float, seed: int) -> Result:
            # Of another name: what it is tells, not what it is called.
            weights = f"random weights of seed {seed}"
            made = result(value, seed, sha256=weights, seed=seed, facts={})
            return replace(made, model="chosen name")

        trained = [result(0.5 + s / 4, s, sha256=f"abc{s}") for s in (0, 1)]
        other = replace(trained[0], task="knn", model="b", untrained={"accuracy": 0.25})
        results = [*trained, random(0.375, 0), random(0.5, 1), other]
        (table,) = build_tables(results)
        found = {
            row.title: (cell.text("accuracy"), *cell.beside("accuracy"))
            for (row, _), cell in table.cells.items()
        }
        assert found == {
            "a": (
                "62.50 [50.00, 75.00], n 2",
                "12.50",
                "43.75 [37.50, 50.00], n 2",
            ),
            "chosen name (untrained)": (
                "43.75 [37.50, 50.00], n 2",
                "12.50",
                "not told",
            ),
            "b": ("50.00", "12.50", "25.00"),
        }


class TestLearningGains:
    def test_learning_gains__against_the_best_untrained_feature(self) -> None:
        dense = BOARDS.replace(features="dense")
        other = BOARDS.replace(data="other", features="dense")
        results = [
            make_result("a", 0.9, seed=0),
            make_result("a", 0.7, seed=1),
            make_result("a (untrained)", 0.2),
            make_result("a (untrained)", 0.3, dense, seed=0),
            make_result("a (untrained)", 0.5, dense, seed=1),
            make_result("a (untrained)", 0.99, other),
        ]
        (table,) = build_tables(results)
        (gain,) = learning_gains(table)
        assert gain.value == pytest.approx(0.8 - 0.4)
        assert gain.untrained_column.card["features"] == "dense"

    def test_learning_gains__least_fid_is_best(self) -> None:
        protocol = RECONSTRUCTION.replace(data="boards")
        named = {"protocol": protocol, "task": "reconstruction", "score": "fid"}
        results = [
            make_result("a", 10.0, **named),  # type: ignore[arg-type]
            make_result("a (untrained)", 90.0, **named),  # type: ignore[arg-type]
            make_result("b (untrained)", 60.0, **named),  # type: ignore[arg-type]
        ]
        (gain,) = learning_gains(build_tables(results)[0])
        assert gain.value == pytest.approx(10.0 - 60.0)

    def test_learning_gains__none_without_untrained(self) -> None:
        assert learning_gains(build_tables([make_result("a", 0.9)])[0]) == []


class TestPublished:
    @pytest.mark.parametrize(
        ("model", "protocol", "data", "features", "score", "value"),
        [
            ("STELLAR ViT-B", "linear-paper", "ImageNet-1K", "auto", "accuracy", 73.26),
            (
                "STELLAR ViT-B",
                "linear-paper",
                "ImageNet-1K",
                "dense",
                "accuracy",
                72.21,
            ),
            ("MAE ViT-B", "knn", "ImageNet-1K", "auto", "accuracy", 25.82),
            ("STELLAR ViT-L", "linear-paper", "Places365", "auto", "accuracy", 49.25),
            ("STELLAR ViT-B", "finetune", "ImageNet-1K", "auto", "accuracy", 80.05),
            ("DINOv2 ViT-B/14", "segmentation", "ADE20K", "dense", "mIoU", 47.3),
            ("STELLAR ViT-H", "segmentation-paper", "ADE20K", "dense", "mIoU", 36.66),
            ("iBOT ViT-B", "segmentation-finetune", "ADE20K", "dense", "mIoU", 42.76),
            (
                "STELLAR ViT-B",
                "reconstruction-pretrained",
                "ImageNet-1K",
                None,
                "fid",
                314,
            ),
            (
                "STELLAR ViT-B",
                "reconstruction-finetuned",
                "ImageNet-1K",
                None,
                "fid",
                306,
            ),
            (
                "STELLAR ViT-H",
                "reconstruction-pretrained",
                "ImageNet-1K",
                None,
                "fid",
                260,
            ),
        ],
    )
    def test_all_published__numbers_of_the_paper(
        self,
        model: str,
        protocol: str,
        data: str,
        features: str | None,
        score: str,
        value: float,
    ) -> None:
        place = (protocol, data, features)
        (found,) = [
            p.scores[score]
            for p in all_published()
            if score in p.scores
            and p.model == model
            and place == tuple(map(p.protocol.card().get, ("name", "data", "features")))
        ]
        assert found == pytest.approx(value / 100)

    @pytest.mark.parametrize(
        ("model", "reconstruction", "accuracies"),
        [
            ("TiTok-32 ViT-L", (2.75, 0.3281), (7.30, 33.42, 27.83, 38.83, 78.75)),
            ("TiTok-64 ViT-B", (1.99, 0.2571), (7.29, 32.87, 42.06, 43.68, 97.50)),
        ],
    )
    def test_all_published__titok_with_its_own_decoder_and_size(
        self, model: str, reconstruction: Sequence[float], accuracies: Sequence[float]
    ) -> None:
        found = {}
        for p in all_published():
            if p.model == model:
                card = p.protocol.card()
                found[card["name"], card["data"], card.get("crop")] = p.scores
        sets = ("ImageNet-1K", "Oxford-IIIT Pet", "Food-101", "GlaS")
        probes = [("linear-paper", data, 256) for data in sets]
        places = [("knn", "ImageNet-1K", None), *probes]
        assert found == {
            ("reconstruction-native", "ImageNet-1K", None): dict(
                zip(("fid", "lpips"), reconstruction, strict=True)
            ),
            **{
                place: {"accuracy": pytest.approx(value / 100)}
                for place, value in zip(places, accuracies, strict=True)
            },
        }

    def test_all_published__clip_beside_no_probe(self) -> None:
        heads: dict[str, set[str]] = {}
        scores = {}
        for p in all_published():
            if p.task == "align-text":
                heads.setdefault(p.protocol.card()["head"], set()).add(p.model)
            if p.model == "CLIP":
                scores |= p.scores
        assert sorted(map(sorted, heads.values())) == [
            ["CLIP"],
            ["MAE", "STELLAR", "iBOT"],
        ]
        assert scores == pytest.approx(
            {
                "zero_shot_top1": 0.727,
                "t2i_recall_1": 0.43,
                "i2t_recall_1": 0.597,
                "winoground_text": 0.305,
                "winoground_image": 0.115,
                "mmvp": 0.2,
            }
        )

    def test_all_published__one_number_per_place(self) -> None:
        places = [
            (p.model, p.source, card_digest(p.protocol.card()), score)
            for p in all_published()
            for score in p.scores
        ]
        assert len(places) == len(set(places))

    def test_all_published__sets_as_the_commands_call_and_cut_them(self) -> None:
        scales = {preset.name: preset.train_scale for preset in PRESETS.values()}
        probed = [
            protocol
            for protocol in (p.protocol for p in all_published())
            if isinstance(protocol, RandomCropProtocol)
        ]
        assert {protocol.name for protocol in probed} == {"linear-paper", "finetune"}
        for protocol in probed:
            assert protocol.train_scale == scales[protocol.data]

    def test_all_published__digests_of_the_cards_never_change(self) -> None:
        of_vits: set[str] = set()
        of_others: set[str] = set()
        for p in all_published():
            if p.task in ("unsupervised-segmentation", "discover", "in-context"):
                continue  # below
            card = p.protocol.card()
            others = p.model.startswith(("TiTok", "CLIP"))
            others |= "; cells of" in card.get("label_resolution", "")
            (of_others if others else of_vits).add(card_digest(card))
        assert len(of_vits) == 26
        assert card_digest({"cards": sorted(of_vits)}) == "0bb034ed"
        # TiTok: its decoder, kNN, four probes of 256 px; CLIP: four sets; segmentation
        # on cells of 14 and of 32 px: three sets each.
        assert len(of_others) == 16
        assert card_digest({"cards": sorted(of_others)}) == "1eacd682"

    def test_all_published__slots_under_a_card_of_their_own(self) -> None:
        (coco, voc) = (p for p in all_published() if p.task == "discover")
        assert coco.scores == pytest.approx({"mbo_i": 0.349, "mbo_c": 0.448})
        assert voc.scores == pytest.approx({"mbo_i": 0.486, "mbo_c": 0.557})
        cards = sorted(card_digest(p.protocol.card()) for p in (coco, voc))
        assert card_digest({"cards": cards}) == "b5341dba"
        ours = make_result(
            "ours",
            0.3,
            DISCOVER.replace(data="val2017"),
            task="discover",
            score="tokens_mbo_i",
        )
        assert related(all_published(), [ours]) == [coco]
        (table,) = build_tables([ours], [coco])
        assert len({c.digest for c in table.columns}) == 2
        assert score_title("tokens_mbo_i") == "tokens, mBO of instances, %"

    def test_all_published__label_free_segmentation(self) -> None:
        found = {
            (p.model, p.protocol.data): (p.scores, card_digest(p.protocol.card()))
            for p in all_published()
            if p.task == "unsupervised-segmentation"
        }
        assert len(found) == 8
        coco, cityscapes = "COCO-Stuff (27 classes)", "Cityscapes (27 classes)"
        assert {coco, cityscapes} <= {preset.name for preset in LABEL_MAPS.values()}
        dino, mae = (found[name, coco] for name in ("DINO ViT-B/8", "MAE ViT-B/16"))
        assert dino[0] == pytest.approx({"mIoU": 0.419, "accuracy": 0.749})
        assert mae[0] == pytest.approx({"mIoU": 0.215, "accuracy": 0.591})
        assert found["MAE ViT-B/16", cityscapes][0]["mIoU"] == pytest.approx(0.125)
        digests = sorted({digest for _, digest in found.values()})
        assert len(digests) == 4  # two sets, DINOv2's crop beside the others'
        assert card_digest({"cards": digests}) == "69c6572b"

    def test_all_published__in_context(self) -> None:
        found = {
            (p.model, p.protocol.card()["bank"]): (p.scores["mIoU"], p.protocol.card())
            for p in all_published()
            if p.task == "in-context"
        }
        assert len(found) == 18
        scores = [
            found[name, 10_240_000][0] for name in ("DINO ViT-B/16", "DINOv2 ViT-B/14")
        ]
        assert scores == pytest.approx([0.557, 0.769])
        for (name, _), (_, card) in found.items():
            assert card["crop"] == (504 if name.endswith("/14") else 512)
            assert card["data"] == LABEL_MAPS["voc-aug"].name
        digests = sorted({card_digest(card) for _, card in found.values()})
        assert len(digests) == 6  # three banks, two crops
        ours = IN_CONTEXT.replace(data=LABEL_MAPS["voc-aug"].name, num_classes=21)
        assert card_digest(ours.card()) not in digests

    def test_all_published__fractions_and_known_scores(self) -> None:
        for p in all_published():
            for score, value in p.scores.items():
                assert score in SCORES
                assert 0 < value < (100 if score == "fid" else 1)
        assert all(len(values) == 7 for values in TABLE_2.values())

    def test_build_tables__published_only_under_their_own_card(self) -> None:
        imagenet = {"data": "ImageNet-1K", "train_scale": IMAGENET_TRAIN_SCALE}
        same = LINEAR_PAPER.replace(**imagenet)
        results = [
            make_result("ours", 0.7, same, task="linear-paper"),
            make_result("ours", 0.6, same.replace(limit=9), task="linear-paper"),
            make_result("ours", 0.5, LINEAR.replace(data="ImageNet-1K"), task="linear"),
            make_result("ours", 0.4, KNN.replace(data="ImageNet-1K")),
            make_result(
                "ours", 0.3, SEGMENTATION_ADE20K, task="segmentation", score="mIoU"
            ),
        ]
        shared: dict[str, set[str]] = {}
        for table in build_tables(results, related(all_published(), results)):
            for column in table.columns:
                kinds = {row.kind for row in table.rows if (row, column) in table.cells}
                if kinds == {"trained", "published"}:
                    shared[column.digest] = {
                        row.model
                        for row in table.rows
                        if (row, column) in table.cells and row.kind == "published"
                    }
        assert shared.keys() == {
            card_digest(same.card()),
            card_digest(SEGMENTATION_ADE20K.card()),
        }
        assert shared[card_digest(SEGMENTATION_ADE20K.card())] == {
            "DINOv2 ViT-B/14",
            "DINO ViT-B/8",
            "MAE ViT-H/14",
            "iBOT ViT-L/16",
        }
        assert {"STELLAR ViT-B", "MAE ViT-L"} <= shared[card_digest(same.card())]

    def test_build_tables__published_numbers_below_their_own_model(self) -> None:
        names = ("b", "MAE ViT-B", "patches (untrained)", "DINO ViT-B")
        results = [
            make_result(name, 0.5, SEGMENTATION_PAPER_ADE20K, task="segmentation")
            for name in names
        ]
        (table,) = [
            table
            for table in build_tables(results, related(all_published(), results))
            if not table.only_published
        ]
        assert [row.title for row in table.rows][:7] == [
            "b",
            "MAE ViT-B",
            "MAE ViT-B (published, STELLAR table 2)",
            "DINO ViT-B",
            "DINO ViT-B (published, STELLAR table 2)",
            "patches (untrained)",
            "BYOL RN-50 (published, STELLAR table 2)",
        ]

    def test_related__only_data_sets_with_results(self) -> None:
        results = [make_result("a", 0.5, SEGMENTATION_PAPER_ADE20K)]
        names = {p.protocol.data for p in related(all_published(), results)}
        assert names == {"ADE20K"}
        assert related(all_published(), [make_result("a", 0.5)]) == []


def test_card_differences__only_what_differs() -> None:
    cards = {"A": KNN.card(), "B": KNN.replace(crop=96, limit=4).card()}
    assert card_differences(cards) == {"crop": [224, 96], "limit": [None, 4]}


class TestCollectResults:
    def test_collect_results__skips_and_names(self, tmp_path: Path) -> None:
        make_result("a", 0.5).save(tmp_path / "good")
        stale = make_result("a", 0.5, seed=3)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "result.json").write_text("{")
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign" / "result.json").write_text('{"loss": 1}')
        for name, fields in {
            "stale": {"protocol": {**stale.protocol, "old_field": 1}},
            "words": {"scores": {"accuracy": "high"}},
            "shape": {"scores": [1, 2]},
        }.items():
            of_file = {**json.loads((tmp_path / "good" / "result.json").read_text())}
            (tmp_path / name).mkdir()
            text = json.dumps({**of_file, **fields})
            (tmp_path / name / "result.json").write_text(text)
        results, notes = collect_results([tmp_path])
        assert {p.parent.name: r.model for p, r in results.items()} == {"good": "a"}
        text = "\n".join(notes)
        assert len(notes) == 5
        for name in ("broken", "foreign", "stale", "words", "shape"):
            assert str(tmp_path / name / "result.json") in text
        assert "fields of another version (old_field)" in text
        assert "score 'accuracy' is no number: high" in text

    def test_collect_results__repeated_run_counts_once(self, tmp_path: Path) -> None:
        old, new = make_result("a", 0.5), make_result("a", 0.6)
        dates = "2026-01-02T10:00:01+00:00", "2026-01-02T10:00:00+00:00"
        for date, name, result in zip(dates, "xy", (new, old), strict=True):
            provenance = {**result.provenance, "date": date}
            Result(**{**result.__dict__, "provenance": provenance}).save(
                tmp_path / name
            )
        results, notes = collect_results([tmp_path, tmp_path / "x"])
        assert [r.scores["accuracy"] for r in results.values()] == [0.6]
        last = tmp_path / "x/result.json"
        assert len(notes) == 1
        assert notes[0].endswith(f"repeated by '{last}', with other scores.")

    def test_collect_results__no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
            collect_results([tmp_path / "nowhere"])


class TestPages:
    def _report(self, model: str = "a") -> Report:
        results = [
            make_result(model, 0.5, seed=0),
            make_result(model, 0.75, seed=1),
            make_result("a (untrained)", 0.25),
            make_result(model, 0.125, BOARDS.replace(crop=96, limit=8)),
        ]
        return Report(build_tables(results), ["Skipped '<x>': broken."], len(results))

    def test_to_html__escapes_everything(self) -> None:
        page = Page(to_html(self._report("<script>alert(1)</script>")))
        assert "script" not in page.tags
        assert page.addresses == []  # self-contained
        assert "<script>alert(1)</script>" in page.text
        assert "Skipped '<x>': broken." in page.text

    def test_to_html__says_what_the_table_says(self) -> None:
        page = Page(to_html(self._report()))
        for text in (
            "62.50 [50.00, 75.00], n 2",
            "A. boards: accuracy, %",
            "B. boards (limited to 8 images): accuracy, %",
            "+37.50",
        ):
            assert text in page.text

    def test_to_markdown__expected_table(self) -> None:
        lines = to_markdown(self._report("a|b")).splitlines()
        start = lines.index("## knn")
        assert lines[start + 2 : start + 6] == [
            "| model | A. boards: accuracy, % | chance | untrained "
            "| B. boards (limited to 8 images): accuracy, % | chance | untrained |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            "| a\\|b | 62.50 [50.00, 75.00], n 2 | not told | not told "
            "| 12.50 | not told | not told |",
            "| a (untrained) | 25.00 | not told |  |  |  |  |",
        ]
        assert (
            "| a\\|b | A. boards: accuracy, % | 62.50 [50.00, 75.00], n 2 | 25.00 (a "
            "(untrained), auto) | +37.50 |" in lines
        )
        assert "| limit | - | 8 |" in lines
        assert "- neighbours: 20" in lines

    def test_to_markdown__columns_name_one_feature(self) -> None:
        protocols = (BOARDS.replace(features="dense"), RETRIEVAL.replace(data="boards"))
        results = [
            make_result("m", 0.5, p, task=p.name, score=score)
            for p, score in zip(protocols, ("accuracy", "cls_map"), strict=True)
        ]
        text = to_markdown(Report(build_tables(results), [], len(results)))
        assert "| model | boards, dense: accuracy, % |" in text
        assert "| model | boards: mAP, % |" in text  # whose rows name what is compared

    def test_to_json__unrounded(self) -> None:
        (table,) = to_json(self._report())["tables"]
        cell = table["cells"][0]
        assert (cell["mean"], cell["min"], cell["max"], cell["n"]) == (
            0.625,
            0.5,
            0.75,
            2,
        )
        assert cell["seeds"] == [0, 1]
        assert table["cards"][cell["card"]] == BOARDS.card()
        assert table["gains"][0]["gain"] == 0.375


class TestRunReport:
    def test_run_report__command(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs, work_dirs = tmp_path / "runs", tmp_path / "work_dirs"
        make_result("ours", 0.5).save(runs / "knn-boards-ours-0")
        make_result(
            "ours", 0.3, SEGMENTATION_ADE20K, task="segmentation", score="mIoU"
        ).save(work_dirs / "stellar_ade20k" / "deep")
        (runs / "result.json").write_text("[]")
        main(["report", f"[{runs}, {work_dirs}]", "--output", str(tmp_path / "out")])
        said = capsys.readouterr().out
        assert f"Skipped '{runs / 'result.json'}'" in said
        assert "2 results" in said
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"report.md", "report.json", "report.html"}
        text = (tmp_path / "out" / "report.md").read_text()
        assert "*DINOv2 ViT-B/14 (published, DINOv2 section 7.4)* | 47.30 |" in text
        tables = json.loads((tmp_path / "out" / "report.json").read_text())["tables"]
        assert [t["protocol"] for t in tables[:2]] == ["knn", "segmentation"]

    @pytest.mark.slow
    def test_run_report__what_the_commands_store(self, tmp_path: Path) -> None:
        model = write_model(tmp_path / "tiny")
        data = write_classes(tmp_path / "colours", num=8)
        options = ["--model", model, "--data", str(data), "--neighbours", "5"]
        for seed in ("0", "1"):
            for more in ([], ["--untrained"]):
                seeded = [*options, *run_options(tmp_path), "--seed", seed, *more]
                main(["knn", *seeded])
        main(["report", str(tmp_path / "out")])
        text = (tmp_path / "out" / "report" / "report.json").read_text()
        (table,) = json.loads(text)["tables"]
        stored = [Result.load(p) for p in (tmp_path / "out").glob("knn-*/result.json")]
        expected = {
            kind: [r.scores["accuracy"] for r in stored if r.model == kind]
            for kind in ("tiny", "tiny (untrained)")
        }
        cells = {cell["model"]: cell for cell in table["cells"]}
        assert {m: sorted(c["values"]) for m, c in cells.items()} == {
            m: sorted(v) for m, v in expected.items()
        }
        assert [sorted(c["seeds"]) for c in cells.values()] == [[0, 1], [0, 1]]
        (gain,) = table["gains"]
        means = {m: sum(v) / 2 for m, v in expected.items()}
        assert gain["gain"] == pytest.approx(means["tiny"] - means["tiny (untrained)"])

    def test_run_report__one_folder_is_its_own_output(self, tmp_path: Path) -> None:
        make_result("ours", 0.5).save(tmp_path / "a")
        main(["report", str(tmp_path)])
        assert (tmp_path / "report" / "report.html").is_file()

    def test_run_report__no_results(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"No result in '.*': `stellar evaluate"):
            run_report(str(tmp_path))


def test_published__result_keeps_the_card() -> None:
    entry = Published("a", "knn", BOARDS, {"accuracy": 0.5}, "table 1")
    assert entry.result.protocol == BOARDS.card()
