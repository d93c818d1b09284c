"""`stellar search`: the images of an index that are like a photo, and where."""

from __future__ import annotations

import inspect
import json as json_format
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.command_line import command_parser, parse
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.loading import load_frozen_model
from lightly_ext.evaluate.options import check_new_file, check_positive
from lightly_ext.evaluate.pictures.gallery import shown_name
from lightly_ext.search.answers import Answer, find_answers
from lightly_ext.search.asking import (
    Asked,
    Photo,
    Weights,
    ask,
    check_box,
    parse_box,
    shown_box,
)
from lightly_ext.search.encoding import ImageEncoder
from lightly_ext.search.image_index import ImageIndex
from lightly_ext.search.index_card import IndexCard
from lightly_ext.search.places import open_index
from lightly_ext.search.query import By, check_asked
from lightly_ext.search.search_page import render_search
from stellar_plugin.visualize import is_absent
from stellar_plugin.wording import counted

BY = {
    "maxsim": "sum of the best cosine of each token",
    "mean": "cosine of mean tokens",
    "cls": "cosine of CLS tokens",
}
AGAIN = "run stellar index again"


def main(argv: Sequence[str]) -> None:
    """Runs `stellar search`.

    Args:
        argv:
            Its arguments.

    Raises:
        OptionError: If there is no such option, or its value is of another kind.
    """
    parser = command_parser(
        "stellar search", "Finds the images of an index that are like a photo."
    )
    parser.add_function_arguments(run_search, as_positional=True)
    run_search(**parse(parser, argv, run_search))


def run_search(
    index: str,
    image: str,
    token: int | None = None,
    box: str | None = None,
    by: By = "maxsim",
    weights: Weights = "mass",
    top: int = 20,
    json: str | None = None,
    page: str | None = None,
    model: str | None = None,
    model_weights: str | None = None,
    accelerator: str = "auto",
    server: str | None = None,
) -> list[Answer]:
    """Finds the images of an index that are like a photo, and where they are.

    Args:
        index:
            Folder of the index; with --server its name.
        image:
            The photo.
        token:
            Search with this token of the photo alone, counted from 0.
        box:
            Search with what lies in this box: its edges x0,y0,x1,y1 in px of the photo
            as it is seen, for example 40,10,200,180.
        by:
            "maxsim" lets each token look for its like in each image, "mean" compares
            the means of tokens, "cls" the CLS tokens of whole images.
        weights:
            "mass" weighs tokens by their share of the patches, "uniform" all alike.
        top:
            Number of images.
        json:
            File for the answers, a list of file, score, token and box.
        page:
            File for a page with the answers, HTML that needs nothing else.
        model:
            Where the model of the index is, if it has moved.
        model_weights:
            Where the weight file of a timm model is, if it has moved.
        accelerator:
            "auto", "cpu" or "cuda".
        server:
            URL of the Qdrant server that has the index, http://host:6333. Its key, if
            it asks for one, is the environment variable QDRANT_API_KEY.

    Returns:
        The images, the best first.

    Raises:
        FileNotFoundError: If there is no such index, image or model.
        ValueError: If an option is impossible, the image cannot be read, nothing of it
            is searched with, or the model is another than that of the index.
    """
    edges = _check_options(token, box, by, top, json, page)
    opened = open_index(index, server)
    check_asked(opened.place, len(opened), top)
    _check_card(opened.card, token, by)
    photo = Photo.read(image, opened.card)
    seen = None if edges is None else check_box(edges, photo)
    encoder = _load(opened, model, model_weights, accelerator)
    encoded = encoder.checked(encoder.transform(photo.image)[None], [image])
    asked = ask(photo, encoded, token, edges, by, weights)
    found = opened.search(asked.tokens, top, asked.weights, by=by, pooled=asked.pooled)
    answers = find_answers(opened, asked, found)
    told = [_told_photo(photo), _told_asked(photo, asked, token, edges, seen)]
    told.append(_told_score(asked, by, weights))
    notes = _notes(opened, answers, top)
    _show(encoder.devices.console, told, answers, notes)
    if json is not None:
        texts = [answer.json() for answer in answers]
        replace_text(Path(json), json_format.dumps(texts, indent=2) + "\n")
        encoder.devices.say(json)
    if page is not None:
        root = Path(opened.card.images)
        replace_text(
            Path(page), render_search(photo, asked, edges, answers, root, told, notes)
        )
        encoder.devices.say(page)
    return answers


def _check_options(
    token: int | None,
    box: str | None,
    by: By,
    top: int,
    json: str | None,
    page: str | None,
) -> Tensor | None:
    """Checks all that needs no index; reads the box."""
    check_positive(top=top)
    if token is not None and box is not None:
        raise ValueError("Name a token or a box, not both.")
    if by == "cls" and (token is not None or box is not None):
        raise ValueError(
            "A CLS token is of a whole image: with --token or --box search by "
            "maxsim or mean."
        )
    for option, file in (("--json", json), ("--page", page)):
        if file is not None:
            check_new_file(option, file)
    return None if box is None else parse_box(box)


def _check_card(card: IndexCard, token: int | None, by: By) -> None:
    if token is not None and not 0 <= token < card.num_tokens:
        raise ValueError(
            f"token must be in 0 to {card.num_tokens - 1}, as many as an image of the "
            f"index has, got {token}."
        )
    if by == "cls" and not card.cls_dim:
        raise ValueError(
            "The model of the index has no CLS token: search by maxsim or mean."
        )


def _load(
    index: ImageIndex, model: str | None, weights: str | None, accelerator: str
) -> ImageEncoder:
    """Loads the model of an index, from where the user says if that is told."""
    card = index.card
    _check_complete(card, index.place)
    moved = {"model": model, "weights": weights}
    places = {name: place for name, place in moved.items() if place is not None}
    devices = Devices(
        batch_size=1,
        num_workers=0,
        accelerator=accelerator,
        precision=card.identity["precision"],
        seed=card.model.get("seed", 0),
    )
    try:
        return ImageEncoder.of_card(
            replace(card, model={**card.model, **places}), devices, index.place
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} The index in '{index.place}' names it: if the files of its model "
            "have moved, say where with --model (of a timm model --model_weights)."
        ) from error


def _check_complete(card: IndexCard, place: str) -> None:
    """Checks that a card tells its model, as that of `stellar index` does."""
    try:
        inspect.signature(load_frozen_model).bind(**card.model)
        _ = card.identity["precision"], card.identity["clusters"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The card of the index in '{place}' does not tell what made it ({error}): "
            "make the index anew, in another place."
        ) from error


def _told_photo(photo: Photo) -> str:
    width, height = photo.size[:2].int().tolist()
    text = f"'{photo.name}', {width} x {height} px"
    if photo.place.box[:2].any() or (photo.place.box != photo.size)[2:].any():
        return f"{text}; the model sees its middle, {shown_box(photo.place.box)}."
    return f"{text}, all of which the model sees."


def _told_asked(
    photo: Photo,
    asked: Asked,
    token: int | None,
    box: Tensor | None,
    seen: float | None,
) -> str:
    """How the photo was read: which tokens, and how much each of them is of it."""
    if token is not None:
        return f"Searched with token {token} alone."
    pairs = sorted(
        zip(asked.shares.tolist(), asked.numbers, strict=True),
        key=lambda pair: (-pair[0], pair[1]),
    )
    shares = ", ".join(f"{number} ({share:.1%})" for share, number in pairs)
    if box is None:
        return f"Tokens by their share of its patches: {shares}."
    return (
        f"Searched with the box {shown_box(box)}, of which the model sees {seen:.0%}. "
        f"Tokens by their share of the patches in it: {shares}."
    )


def _told_score(asked: Asked, by: By, weights: Weights) -> str:
    text = f"Score: {BY[by]}"
    if by == "maxsim" and len(asked.numbers) > 1:
        text += " times its share" if weights == "mass" else ", all alike"
    return (
        f"{text}. Token and box: where the like of token "
        f"{asked.numbers[asked.heaviest]} is."
    )


def _notes(index: ImageIndex, answers: Sequence[Answer], top: int) -> list[str]:
    """What a user should know of the answers."""
    notes = []
    if len(index) < top:
        notes.append(
            f"The index has {counted(len(index), 'image')}, fewer than {top}: "
            "all are listed."
        )
    for state, what in (("changed", "have changed"), ("gone", "are gone")):
        number = sum(answer.state == state for answer in answers)
        if number:
            notes.append(
                f"{number} of these files {what} since they were indexed: {AGAIN}."
            )
    absent = [a for a in answers if is_absent(float(a.map.mean()), a.map.numel())]
    if absent:
        notes.append(
            f"In {len(absent)} of these images the token has less than half a patch in "
            "all."
        )
    return notes


def _show(
    console: Console,
    told: Sequence[str],
    answers: Sequence[Answer],
    notes: Sequence[str],
) -> None:
    marked = any(answer.state for answer in answers)
    table = Table(box=None, pad_edge=False)
    for name in ("", "score", "token", "box"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("file", overflow="fold")
    if marked:
        table.add_column("since indexed", no_wrap=True)
    for number, answer in enumerate(answers, 1):
        cells = [
            str(number),
            f"{answer.score:.4f}",
            str(answer.token),
            ",".join(map(str, answer.box)),
        ]
        file = Text(shown_name(answer.file))
        table.add_row(*cells, file, *([answer.state] if marked else []))
    for text in told:
        console.print(shown_name(text), highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for text in notes:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
