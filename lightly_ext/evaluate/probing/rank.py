"""`stellar evaluate rank`: number of tokens against FID and accuracy, figure 2 (c)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lightly_ext.durable import replace_text, replacing
from lightly_ext.evaluate.classification.linear import check_linear, run_linear
from lightly_ext.evaluate.datasets import ClassificationSet
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.images import ImageFiles
from lightly_ext.evaluate.loading import load_like
from lightly_ext.evaluate.plots import COLOURS, MARKERS
from lightly_ext.evaluate.presets import PRESETS
from lightly_ext.evaluate.reconstruction.autoencoder import build_autoencoder
from lightly_ext.evaluate.reconstruction.metric_networks import load_networks
from lightly_ext.evaluate.reconstruction.reconstruction import (
    check_reconstruction,
    run_reconstruction,
)
from lightly_ext.evaluate.report.scores import shown_score
from lightly_ext.evaluate.report.tables import card_differences
from lightly_ext.evaluate.result import Result, markdown_table
from lightly_ext.evaluate.results import Results, evaluation
from stellar_plugin.protocols import LINEAR, RANK, RECONSTRUCTION, Protocol, card_digest

# Fields of a card that follow from weights and data.
OF_WEIGHTS_AND_DATA = ("target", "batch_sizes")


class RankPoint(NamedTuple):
    """One model of the figure.

    Attributes:
        num_tokens: Its number of sparse tokens, r.
        linear: Its linear probe.
        reconstruction: Its reconstruction with the decoder as pretrained.
    """

    num_tokens: int
    linear: Result
    reconstruction: Result


def check_rank(
    results: Results,
    data: str,
    others: list[str],
    images: str | None,
    inception: str | None,
    lpips_net: str | None,
    tokenizer: str | None,
    force: bool,
) -> tuple[ClassificationSet, str, str, ImageFiles]:
    """Finds both sets; see `Results.required`.

    Returns:
        The classes; what names the images to reconstruct, their name, and they.
    """
    if not others:
        raise ValueError("One model makes no curve: name more with --others MODEL.")
    classes = check_linear(results, data, "auto", None, None, None).data
    images = images or _test_images(data, classes)
    name, files, _ = check_reconstruction(
        results,
        images,
        "pretrained",
        train=None,
        tokenizer=tokenizer,
        decoder=None,
        epochs=None,
        inception=inception,
        lpips_net=lpips_net,
        force=force,
    )
    return classes, images, name, files


@evaluation
def run_rank(
    model: FrozenModel,
    devices: Devices,
    results: Results,
    data: str,
    others: list[str],
    images: str | None = None,
    inception: str | None = None,
    lpips_net: str | None = None,
    tokenizer: str | None = None,
    force: bool = False,
) -> Result:
    """Probes and reconstructs models with different numbers of tokens.

    What an earlier run stored in the output folder under an equal card, with the same
    weights, seed and precision, is taken from there.

    Args:
        model:
            What is evaluated.
        devices:
            Where it runs.
        results:
            Where results are kept.
        data:
            Data set for the linear probe: a folder with `train` and `val` or `test`,
            hf:NAME of the hub, or the name of a known set.
        others:
            The other models, which may be given several times. No two models may have
            the same number of tokens.
        images:
            Images to reconstruct: a folder, tars or parquet. None takes the test images
            of `data`.
        inception:
            See `stellar evaluate reconstruction`.
        lpips_net:
            See `stellar evaluate reconstruction`.
        tokenizer:
            See `stellar evaluate reconstruction`.
        force:
            See `stellar evaluate reconstruction`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If models have no tokens or equally many, or cannot be compared.
    """
    classes, images, decoded_set, files = results.required(check_rank)
    models = models_by_rank(model, others)
    networks = load_networks(devices, inception, lpips_net).identity
    probed = {"data": results.fingerprint(classes.train, classes.test)}
    decoded_of = {"data": results.fingerprint(files)}
    stored = {}  # of all models, before the first of them reads an image
    for num_tokens, of_rank in models.items():
        given = (of_rank, devices, results)
        probe = results.protocol(of_rank, LINEAR, data=classes.name)
        decoding = results.protocol(
            of_rank, RECONSTRUCTION, data=decoded_set, networks=networks
        )
        decoding_run = results.of_run(run_reconstruction, *given, images)
        decoding_run = decoding_run.settled(latent="lowrank")
        decoded = stored_result(decoding_run, of_rank, decoding, decoded_of)
        if decoded is None:
            build_autoencoder(
                of_rank, devices, True, "lowrank", None, tokenizer, decoding.crop
            )
        probe_run = results.of_run(run_linear, *given, data)
        linear = stored_result(probe_run, of_rank, probe, probed)
        stored[num_tokens] = decoded, linear
    points = []
    for num_tokens, (decoded, linear) in stored.items():
        given = (models[num_tokens], devices, results)
        # Its checks are the stricter ones, and it takes less time.
        decoded = decoded or run_reconstruction(
            *given,
            images,
            tokenizer=tokenizer,
            inception=inception,
            lpips_net=lpips_net,
            force=force,
        )
        linear = linear or run_linear(*given, data)
        points.append(RankPoint(num_tokens, linear, decoded))
    _check_cards(points)
    return _save(model, results, points)


def models_by_rank(model: FrozenModel, others: Sequence[str]) -> dict[int, FrozenModel]:
    """The models by their number of tokens in ascending order.

    Args:
        model:
            The first model.
        others:
            The other models.

    Raises:
        ValueError: If two models have the same number of tokens, or one has none.
    """
    found: dict[int, FrozenModel] = {}
    for each in chain([model], (load_like(model, other) for other in others)):
        num_tokens = each.num_queries
        if not (num_tokens and each.origin.is_stellar):
            raise ValueError(
                f"'{each.origin.source}' ({each.origin.method}) has no sparse tokens "
                "with places, so no number of them: `linear` probes it, "
                "`reconstruction --form scratch` decodes it."
            )
        if num_tokens in found:
            raise ValueError(
                f"'{found[num_tokens].origin.source}' and '{each.origin.source}' both "
                f"have {num_tokens} tokens: name one model per number."
            )
        found[num_tokens] = each
    return dict(sorted(found.items()))


def stored_result(
    results: Results, model: FrozenModel, protocol: Protocol, inputs: Mapping[str, str]
) -> Result | None:
    """A result of an earlier run that the same run would only repeat.

    Args:
        results:
            Where results are kept, of the run.
        model:
            What is evaluated.
        protocol:
            The protocol, but for what follows from weights and data.
        inputs:
            Fingerprints of the data.
    """
    identity = results.identity(model, protocol, inputs)
    wanted = _chosen(protocol.card())

    def find() -> Result | None:
        for path, result in results.stored():
            if _chosen(result.protocol) == wanted and result.identity == identity:
                results.devices.say(
                    f"{model.origin.name}: {result.task} is stored in {path.parent}."
                )
                return result
        return None

    return results.devices.of_first(find)  # another run may store one meanwhile


def _chosen(card: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in card.items() if k not in OF_WEIGHTS_AND_DATA}


def _test_images(data: str, classes: ClassificationSet) -> str:
    """What `find_images` finds the test images of a classification set by."""
    if data.partition(":")[0] in PRESETS or classes.test.rows is not None:
        return data
    if classes.test.root == classes.train.root:
        raise ValueError(
            f"Training and test images share '{classes.test.root}': name the images to "
            "reconstruct with --images FOLDER."
        )
    return str(classes.test.root)


def _check_cards(points: Sequence[RankPoint]) -> None:
    """Points of one curve must be comparable; nothing is lost, all are stored."""
    for name in ("linear", "reconstruction"):
        cards = {p.num_tokens: getattr(p, name).protocol for p in points}
        differences = card_differences({str(k): card for k, card in cards.items()})
        if differences:
            raise ValueError(
                f"The cards of {name} differ in {', '.join(differences)} between the "
                f"models with {', '.join(map(str, cards))} tokens: {differences}."
            )


def _save(model: FrozenModel, results: Results, points: Sequence[RankPoint]) -> Result:
    """Stores scores by number of tokens, with table and figure."""
    linear, reconstruction = points[0].linear, points[0].reconstruction
    digests = [card_digest(dict(r.protocol)) for r in (linear, reconstruction)]
    protocol = RANK.replace(
        data=linear.data,
        limit=results.limit,
        rule=f"{RANK.rule}; linear card {digests[0]}; reconstruction card {digests[1]} "
        f"on {reconstruction.data}",
    )
    results.announce(model, protocol)
    scores = _scores(points)
    runs = [r for p in points for r in (p.linear, p.reconstruction)]
    inputs = {"results": ", ".join(run.digest for run in runs)}
    result = results.result(model, "rank", linear.data, protocol, scores, inputs)
    models = {
        str(p.num_tokens): {
            "name": p.linear.model,
            "model": p.linear.provenance["model"],
            "sha256": p.linear.provenance["sha256"],
        }
        for p in points
    }
    together = hashlib.sha256("".join(m["sha256"] for m in models.values()).encode())
    provenance: Mapping[str, Any] = {
        **result.provenance,
        "models": models,
        "sha256": together.hexdigest(),
        "num_queries": [p.num_tokens for p in points],
    }
    names = ", ".join(p.linear.model for p in points)
    result = replace(result, model=names, provenance=provenance)
    folder = results.save(result, control=False)
    if results.devices.rank == 0:
        replace_text(folder / "rank.md", _markdown(points))
        _plot(scores, folder / "rank.png")
    return result


def _scores(points: Sequence[RankPoint]) -> dict[str, dict[str, float]]:
    return {
        "accuracy": {str(p.num_tokens): p.linear.scores["accuracy"] for p in points},
        "fid": {str(p.num_tokens): p.reconstruction.scores["fid"] for p in points},
    }


def _markdown(points: Sequence[RankPoint]) -> str:
    rows = [("r", "model", "accuracy, %", "FID")]
    for p in points:
        accuracy = shown_score("accuracy", p.linear.scores["accuracy"])
        fid = shown_score("fid", p.reconstruction.scores["fid"])
        rows.append((str(p.num_tokens), p.linear.model, accuracy, fid))
    return markdown_table(rows) + "\n"


def _plot(scores: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Accuracy on the left axis, FID on the right one."""
    figure = Figure(figsize=(5.6, 3.7), layout="constrained")
    left = figure.add_subplot()
    looks = zip((left, left.twinx()), scores.items(), COLOURS, MARKERS, strict=False)
    for axes, (name, points), colour, marker in looks:
        ys = [float(shown_score(name, value)) for value in points.values()]
        axes.plot([int(r) for r in points], ys, color=colour, marker=marker, lw=1.8)
        label = "linear accuracy, %" if name == "accuracy" else "FID"
        axes.set_ylabel(label, color=colour)
        axes.tick_params(axis="y", colors=colour)
    left.set(xlabel="number of sparse tokens r")
    left.set_xticks([int(r) for r in scores["fid"]])
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=150, metadata={"Software": None})
