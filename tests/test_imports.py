"""Arrows go one way: who wants one part does not need what the others need."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import lightly_ext
import stellar_cli
import stellar_plugin

LEARNING = ("lightly", "pytorch_lightning", "torchmetrics")
OPENMMLAB = ("mmseg", "mmcv", "mmengine")
DEMO = ("sklearn", "matplotlib", "rich")


def run_without(names: tuple[str, ...], body: str) -> subprocess.CompletedProcess[str]:
    # None in sys.modules: not installed, to imports and to find_spec alike.
    code = f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n{body}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, body",
    [
        (
            LEARNING + OPENMMLAB + DEMO,
            "import torch, timm, stellar_plugin\n"
            "m = stellar_plugin.Stellar('stellar_vit_tiny_patch16_224', depth=1)\n"
            "print(m.reconstruct(torch.zeros(1, 3, 224, 224)).shape)",
        ),
        ((*LEARNING, "sklearn"), "import stellar_plugin.mmseg"),
        (
            (*OPENMMLAB, "sklearn", "threadpoolctl"),
            "import lightly_ext.pretrain.cli, lightly_ext.quick_start.cli",
        ),
        (
            (*OPENMMLAB, "sklearn", "open_clip"),
            "from importlib import import_module\n"
            "from stellar_cli.tasks import TASKS\n"
            "for task, (module, _) in TASKS.items():\n"
            "    if task != 'align-text':\n"
            "        import_module(f'lightly_ext.evaluate.{module}')",
        ),
    ],
    ids=["model", "mmseg", "learning", "evaluation"],
)
def test_import__without_the_others(names: tuple[str, ...], body: str) -> None:
    result = run_without(names, body)
    assert result.returncode == 0, result.stderr
    # What other packages can do without is no news for a user.
    assert "import" not in (result.stdout + result.stderr).lower()


@pytest.mark.parametrize("package", [stellar_plugin, lightly_ext, stellar_cli])
def test_import__every_module(package: object) -> None:
    modules = [
        module.name
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if "examples" not in module.name
    ]
    assert modules
    for name in modules:
        import_module(name)
