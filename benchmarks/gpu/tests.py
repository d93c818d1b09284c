"""The tests that need a GPU, in pytest."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.gpu.measure import ROOT
from benchmarks.gpu.results import Report


def run(arguments: argparse.Namespace, report: Report) -> None:
    """Runs every test with the mark `gpu` and counts how they end."""
    # Only their files: others may need packages that a GPU machine lacks.
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short"]
        # A file that needs a package which the machine lacks ends no other.
        command += ["--continue-on-collection-errors"]
        command += ["-p", "no:cacheprovider", f"--junitxml={xml}", *files]
        subprocess.run(command, cwd=ROOT)
        suite = ET.parse(xml).getroot()[0]
    number = {
        k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")
    }
    failed = number["failures"] + number["errors"]
    passed = number["tests"] - failed - number["skipped"]
    report.values(passed=passed, failed=failed, skipped=number["skipped"])
    rows = [
        [
            f"{case.get('classname')}.{case.get('name')}",
            end.tag,
            end.get("message", "")[:300],
        ]
        for case in suite.iter("testcase")
        for end in case
        if end.tag in ("failure", "error", "skipped")
    ]
    report.table("Tests that did not pass", ["test", "end", "message"], rows)
    report.headline(f"{passed} passed, {failed} failed, {number['skipped']} skipped")
