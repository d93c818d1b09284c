"""The folder of an atlas: one page, what it reads, and the same as JSON."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightly_ext.durable import (
    PARTIAL,
    finish_replacing,
    partial,
    remove_partial,
    replace_folder,
)
from lightly_ext.evaluate.atlas.codes import NUM_SIMILAR, found_share, part_codes
from lightly_ext.evaluate.atlas.concepts import Concepts
from lightly_ext.evaluate.atlas.page_data import (
    base64_of,
    concept_entries,
    write_maps,
    write_script,
)
from lightly_ext.evaluate.atlas.part_table import PartTable
from lightly_ext.evaluate.atlas.sheets import SHEET, write_regions, write_sheets
from lightly_ext.evaluate.devices import Devices
from lightly_ext.evaluate.frozen_model import FrozenModel
from lightly_ext.evaluate.parts import Cut
from lightly_ext.evaluate.pictures.gallery import shown_name
from lightly_ext.evaluate.result import Result, shown_value
from lightly_ext.evaluate.sizes import described_cut
from lightly_ext.pages.page import render_page
from stellar_plugin.protocols import CropProtocol
from stellar_plugin.visualize import ABSENT_PATCHES

PAGE, DATA, FILES = "index.html", "atlas.json", "files"
# A concept is told with so many folders.
NUM_FOLDERS = 5


@dataclass(frozen=True)
class AtlasFolder:
    """What an atlas shows.

    Attributes:
        model:
            The model.
        devices:
            Loads images, and shows progress.
        table:
            Images and their parts.
        concepts:
            What the parts have in common.
        cut:
            How images were cut into parts.
        protocol:
            What part of an image is seen.
        result:
            What is known of the run.
    """

    model: FrozenModel
    devices: Devices
    table: PartTable
    concepts: Concepts
    cut: Cut
    protocol: CropProtocol
    result: Result

    def write(self, folder: Path) -> None:
        """Writes the folder as a whole: a kill leaves what was there."""
        finish_replacing(folder)
        # A name of its own: two runs may write the same atlas.
        new = folder.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
        try:
            (new / FILES).mkdir(parents=True)
            self._write(new)
            shutil.rmtree(partial(folder), ignore_errors=True)
            new.rename(partial(folder))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        replace_folder(partial(folder), folder)
        remove_partial(folder.parent)  # of killed runs

    def _write(self, new: Path) -> None:
        cutting = self.protocol, self.model.origin.interpolation, self.devices
        examples = self.concepts.examples(self.table.present)
        side = write_sheets(new / FILES, self.table, *cutting)
        boxes = write_regions(new / FILES, self.table, examples, *cutting)
        write_maps(new / FILES, self.table)
        codes = part_codes(self.table)
        write_script(
            new / FILES / "codes.js",
            "ATLAS.loaded",
            "codes",
            base64_of(codes.values.numpy()),
        )
        known = {
            "weights": codes.weights.tolist(),
            "shown": NUM_SIMILAR,
            "found": found_share(self.table, codes, self.devices.seed),
        }
        entries = self._concept_entries(examples)
        page = {**self._page_values(entries, side), "codes": known}
        write_script(new / FILES / "data.js", "ATLAS.start", page)
        for name in ("atlas.js", "atlas.css"):
            text = files(__package__).joinpath(name).read_text("utf-8")
            (new / FILES / name).write_text(text, "utf-8")
        (new / PAGE).write_text(self._html(), "utf-8")
        stored = self._stored(entries, boxes)
        (new / DATA).write_text(json.dumps(stored, indent=1) + "\n", "utf-8")

    @cached_property
    def folders(self) -> tuple[list[str], Tensor | None]:
        """Names of the folders of the images, and the number of each image's.

        No folders where there is but one. Images that lie in none are in ".".
        """
        parents = [str(PurePosixPath(n).parent) for n in self.table.files.names]
        names = sorted(set(parents))
        if len(names) < 2:
            return [], None
        numbers = {name: number for number, name in enumerate(names)}
        return names, torch.tensor([numbers[parent] for parent in parents])

    def _concept_entries(
        self, examples: Sequence[Sequence[tuple[int, int]]]
    ) -> list[dict[str, Any]]:
        concepts, table = self.concepts, self.table
        images, parts = concepts.occurrences(table.present)
        maps = concepts.mean_maps(table)
        entries: list[dict[str, Any]] = [
            {
                "concept": number,
                "coverage": concepts.coverage[number].item(),
                "images": images[number],
                "parts": parts[number],
                "neighbours": near,
                "mean_map": maps[number].view(table.grid_size).tolist(),
                "examples": [
                    (*place, concepts.similarity[place].item()) for place in found
                ],
            }
            for number, (near, found) in enumerate(
                zip(concepts.neighbours(), examples, strict=True)
            )
        ]
        if concepts.numbers is not None:
            for entry, prototype in zip(entries, concepts.numbers, strict=True):
                entry["prototype"] = prototype
        names, labels = self.folders
        if labels is not None:
            shares, lifts = concepts.folder_shares(table.masses, labels, len(names))
            order = shares.argsort(dim=1, descending=True, stable=True)
            for entry, share, lift, chosen in zip(
                entries, shares, lifts, order[:, :NUM_FOLDERS], strict=True
            ):
                entry["folders"] = [
                    (i, share[i].item(), lift[i].item())
                    for i in chosen.tolist()
                    if share[i] > 0
                ]
        return entries

    def _page_values(
        self, entries: Sequence[dict[str, Any]], side: int
    ) -> dict[str, Any]:
        table, (folders, labels) = self.table, self.folders
        return {
            "names": list(table.files.names),
            "folders": folders,
            "labels": None if labels is None else labels.tolist(),
            "parts": table.num_parts,
            "grid": table.grid_size,
            "side": side,
            "sheet": SHEET,
            "absent": ABSENT_PATCHES / table.maps.shape[2],
            "concepts": concept_entries(entries),
            "of_part": base64_of(self.concepts.of_part.numpy().astype(np.int16)),
            "masses": base64_of(table.masses.numpy()),
        }

    def _stored(
        self,
        entries: Sequence[dict[str, Any]],
        boxes: Sequence[NDArray[np.float64]],
    ) -> dict[str, Any]:
        """What is written as JSON: files instead of numbers of images."""
        names, folders = self.table.files.names, self.folders[0]
        concepts = []
        for entry, edges in zip(entries, boxes, strict=True):
            examples = [
                {
                    "file": names[image],
                    "token": part,
                    "mass": self.table.masses[image, part].item(),
                    "similarity": similarity,
                    "box": box,
                }
                for (image, part, similarity), box in zip(
                    entry["examples"], edges.tolist(), strict=True
                )
            ]
            neighbours = [
                {"concept": number, "similarity": cosine}
                for number, cosine in entry["neighbours"]
            ]
            concept = {**entry, "neighbours": neighbours, "examples": examples}
            if "folders" in entry:
                concept["folders"] = [
                    {"folder": folders[number], "share": share, "lift": lift}
                    for number, share, lift in entry["folders"]
                ]
            concepts.append(concept)
        return {
            "model": self.result.model,
            "data": self.result.data,
            "images": len(names),
            "unreadable": self.result.provenance["num_unreadable"],
            "parts": self.cut.kind,
            "grid": self.table.grid_size,
            "covered": self.result.provenance["covered"],
            "concepts": concepts,
        }

    def _html(self) -> str:
        result = self.result
        facts = {"model": result.model, **result.protocol, **result.scores}
        page = render_page(
            "evaluate/atlas/atlas.html",
            title=f"What {result.model} finds in {result.data}",
            model=result.model,
            num_images=len(self.table.rows),
            num_unreadable=result.provenance["num_unreadable"],
            num_concepts=len(self.concepts),
            prototypes=self.concepts.numbers is not None,
            covered=result.provenance["covered"],
            kind=self.cut.kind,
            num_parts=self.cut.num_parts,
            clusters=self.cut.clusters,
            untrained=self.model.origin.untrained,
            cut=described_cut(self.protocol),
            absent=ABSENT_PATCHES,
            facts=facts,
            shown_value=shown_value,
        )
        return shown_name(page)
