"""Stored results as the paper's tables: Markdown, JSON and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightly_ext.durable import replace_text
from lightly_ext.evaluate.options import check_writable
from lightly_ext.evaluate.report.exhibits import find_exhibits
from lightly_ext.evaluate.report.pages import Report, to_html, to_json, to_markdown
from lightly_ext.evaluate.report.published import Published, all_published
from lightly_ext.evaluate.report.tables import build_tables
from lightly_ext.evaluate.result import RESULT_NAME, Result
from stellar_plugin.protocols import CARD_FIELDS
from stellar_plugin.wording import counted


def run_report(results: list[str] | str, output: str | None = None) -> Path:
    """Collects stored results and writes report.md, report.json and report.html.

    Args:
        results:
            Folder with results, searched to any depth, or several as "[a, b]"; the
            work_dirs of mmsegmentation too.
        output:
            Folder for the report. None makes "report" in the first folder.

    Returns:
        The folder of the report.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If there is no readable result, or nothing can be written.
    """
    folders = [Path(r) for r in ([results] if isinstance(results, str) else results)]
    folder = Path(output) if output else folders[0] / "report"
    check_writable(folder)
    found, notes = collect_results(folders)
    for note in notes:
        print(note)
    if not found:
        names = ", ".join(f"'{folder}'" for folder in folders)
        raise ValueError(
            f"No result in {names}: `stellar evaluate TASK ... --output FOLDER` stores "
            f"a {RESULT_NAME}."
        )
    measured = list(found.values())
    tables = build_tables(measured, related(all_published(), measured))
    report = Report(tables, notes, len(found), find_exhibits(found, folder))
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "report.md", to_markdown(report))
    replace_text(folder / "report.html", to_html(report))
    text = json.dumps(to_json(report), indent=2)
    replace_text(folder / "report.json", f"{text}\n")
    counts = f"{counted(len(found), 'result')}, {counted(len(tables), 'table')}"
    print(f"{counts}: {folder / 'report.html'}")
    return folder


def collect_results(
    folders: Iterable[Path],
) -> tuple[dict[Path, Result], list[str]]:
    """Reads every result below some folders.

    Args:
        folders:
            The folders.

    Returns:
        The results by their files, in the order of these; and a line for each file
        that is left out: unreadable, of another version, or repeated later.

    Raises:
        FileNotFoundError: If a folder is missing.
    """
    results, notes = [], []
    for path in _result_files(folders):
        try:
            result = Result.load(path)
            _check(result)
        except (ValueError, OSError) as error:
            text = str(error)
            named = text if str(path) in text else f"'{path}': {text}"
            notes.append(f"Skipped {named}")
        else:
            results.append((path, result))
    newest: dict[str, tuple[Path, Result]] = {}
    for path, result in sorted(results, key=lambda r: _date(r[1])):
        key = result.digest
        if key in newest:
            skipped, earlier = newest[key]
            differ = "" if earlier.scores == result.scores else ", with other scores"
            notes.append(f"Skipped '{skipped}': repeated by '{path}'{differ}.")
        newest[key] = (path, result)
    kept = sorted(newest.values(), key=lambda r: r[0])
    return dict(kept), notes


def related(
    published: Iterable[Published], results: Sequence[Result]
) -> list[Published]:
    """Published numbers on the data sets that there are results on.

    Args:
        published:
            Published numbers.
        results:
            Measured results.
    """
    names = {result.protocol.get("data") for result in results}
    return [p for p in published if p.protocol.data in names]


def _result_files(folders: Iterable[Path]) -> list[Path]:
    """Files below folders, each once even if the folders overlap."""
    paths: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder '{folder}' with results.")
        paths |= {p.resolve(): p for p in sorted(folder.rglob(RESULT_NAME))}
    return list(paths.values())


def _check(result: Result) -> None:
    """Finds out whether tables can be made of a result.

    Raises:
        ValueError: If not.
    """
    identity = result.identity
    parts = (result.scores, result.protocol, result.provenance, identity)
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("scores, protocol, provenance and identity must be objects.")
    if identity and not {"model", "options", "inputs"} <= identity.keys():
        raise ValueError(
            f"its identity tells of {', '.join(identity)} alone, as another version "
            "has it; run the evaluation again."
        )
    unknown = sorted(set(result.protocol) - CARD_FIELDS.keys())
    if unknown:
        raise ValueError(
            f"its card has fields of another version ({', '.join(unknown)}); run the "
            "evaluation again."
        )
    for name, value in result.scores.items():
        points = value.values() if isinstance(value, Mapping) else [value]
        if not all(isinstance(p, int | float) or p is None for p in points):
            raise ValueError(f"score '{name}' is no number: {value}.")


def _date(result: Result) -> str:
    return str(result.provenance.get("date", ""))
