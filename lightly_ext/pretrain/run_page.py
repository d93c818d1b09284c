"""The story of a run, for people: a page and a summary."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightly_ext.pages.charts import HEIGHT, WIDTH, Chart, draw_chart
from lightly_ext.pages.page import render_page
from lightly_ext.pretrain.run_log import Series
from stellar_plugin.wording import counted

# Titles of groups of curves, and how the names in them begin.
GROUPS = {
    "Loss": ("train/",),
    "Online kNN": ("knn_top1",),
    "Health": ("health/",),
    "Optimisation": ("lr", "images_per_s"),
}
DERIVED = "What followed from images, machine and prior"
LEFT_OUT = ("loss", "unreadable_images")


def run_page(record: Mapping[str, Any], log: Mapping[str, Series], folder: Path) -> str:
    """Fills the page of a run, which needs nothing else.

    Args:
        record:
            What `run.json` holds.
        log:
            Value by step of everything that was logged.
        folder:
            Folder of the run, with the pictures.
    """
    return render_page(
        "pretrain/run.html",
        title=record["output"],
        cards=_cards(record, log),
        groups=charts(log, record["knn"]),
        width=WIDTH,
        height=HEIGHT,
        samples=_samples(record, folder),
        caption=record["samples"].get("caption", ""),
        names=record["samples"].get("images", []),
        next=record["next"],
        events=record["events"],
        sessions=[session_facts(session) for session in record["sessions"]],
        facts=_facts(record),
        derived_title=DERIVED,
        derived=record.get("derived", {}),
    )


def run_summary(record: Mapping[str, Any], log: Mapping[str, Series]) -> str:
    """The same in Markdown, without pictures."""
    lines = [f"# {record['output']}", ""]
    lines += [
        f"- {name}: {value}{f' ({note})' if note else ''}"
        for name, value, note in _cards(record, log)
    ]
    lines += ["", "## Last values", ""]
    lines += ["| figure | step | value |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {max(points)} | {points[max(points)]:.4g} |"
        for name, points in sorted(log.items())
        if name not in LEFT_OUT
    ]
    lines += ["", "## What to type next", ""]
    lines += [f"- {purpose}: `{x}`" for purpose, x in record["next"].items()]
    lines += ["", "## What happened", ""]
    lines += [
        f"- step {event['step']}, {event['kind']}: {event['text']}"
        for event in record["events"]
    ] or ["Nothing of note."]
    if derived := record.get("derived"):
        lines += ["", f"## {DERIVED}", ""]
        lines += [f"- {name} {value}" for name, value in derived.items()]
    for session in record["sessions"]:
        lines += ["", f"## Session of {session['started']}", ""]
        facts = session_facts(session) | _facts(record)
        lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def charts(
    log: Mapping[str, Series], references: Mapping[str, float]
) -> dict[str, list[Chart]]:
    """Curves by the title of their group.

    Args:
        log:
            Value by step of everything that was logged.
        references:
            Values to compare online kNN with.
    """
    groups: dict[str, list[Chart]] = {title: [] for title in [*GROUPS, "More"]}
    total_first = sorted(log.items(), key=lambda item: item[0] != "train/total")
    for name, points in total_first:
        finite = {step: y for step, y in points.items() if math.isfinite(y)}
        # Both groups of parameters have one learning rate.
        if name in LEFT_OUT or name.endswith("/pg2") or not finite:
            continue
        titles = (t for t, starts in GROUPS.items() if name.startswith(starts))
        lines = references if name == "knn_top1" else {}
        groups[next(titles, "More")].append(draw_chart(name, [finite], lines))
    return {title: found for title, found in groups.items() if found}


def session_facts(session: Mapping[str, Any]) -> dict[str, str]:
    """What a session was made with, for people."""
    packages = ", ".join(f"{k} {v}" for k, v in session["versions"].items())
    return {
        "command": session["command"],
        "began": f"{session['started']}, at step {session['from_step']}",
        "ended": session["ended"] or "not yet",
        "device": f"{session['device']}, {session['precision']}",
        "host": session["host"],
        "images per step": str(session["global_batch"]),
        "versions": packages,
        "revision": session["revision"] or "not a git checkout",
    }


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    data = record.get("data")
    images = "being counted"
    if data:
        images = (
            f"{counted(data['images'], 'image')}, {data['bytes'] / 1e6:.1f} MB in "
            f"{data['path']}; names and sizes: sha256 {data['digest'][:16]}"
        )
    return {
        "method": record["method"],
        "images": images,
        "unreadable": f"{counted(record['unreadable_images'], 'file')}, see "
        "unreadable.txt"
        if record["unreadable_images"]
        else "none",
        "parameters": f"{record['parameters'] / 1e6:.2f} million, without heads",
        "written": record["written"],
    }


def _cards(
    record: Mapping[str, Any], log: Mapping[str, Series]
) -> list[tuple[str, str, str]]:
    """Title, value and a note of what matters most."""
    ended = record["sessions"][-1]["ended"] or "running"
    time = str(datetime.timedelta(seconds=round(record["seconds"])))
    cards = [
        ("status", ended, ""),
        ("step", str(record["step"]), f"of {record['total_steps']}"),
        ("training", time, f"{counted(record['images_seen'], 'image')} seen"),
    ]
    for title, name, note in (
        ("loss", "train/total", "first {first:.4g}"),
        ("online kNN", "knn_top1", _compared(record["knn"])),
        ("images per second", "images_per_s", ""),
        ("loader wait", "health/loader_wait", "of the time, in the last logged steps"),
    ):
        if points := log.get(name):
            first, last = points[min(points)], points[max(points)]
            cards.append((title, f"{last:.4g}", note.format(first=first)))
    return cards


def _compared(references: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in references.items())


def _samples(record: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Title and picture of the images and of every moment."""
    moments = record["samples"].get("moments", {})
    files = {f"Step {step}": file for step, file in moments.items()}
    if files:
        files = {"Images": "samples/images.jpg", **files}
    return [(title, _embedded(folder / file)) for title, file in files.items()]


def _embedded(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
