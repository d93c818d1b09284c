"""The rooms and their arrows, read from the imports that the source files state."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("stellar_plugin", "lightly_ext", "stellar_cli")
OPENMMLAB = ("mmseg", "mmcv", "mmengine", "mim")
LEARNING = ("lightly", "lightly_ext", "pytorch_lightning", "torchmetrics")


def files() -> dict[str, Path]:
    """Every module of the packages, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that a file imports anywhere, also inside of functions.

    Not those that are for type checkers alone.
    """
    names = set()
    for node in ast.walk(_WithoutTyping().visit(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            # `from package import module` is an import of the module.
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in modules else node.module)
    return names


class _WithoutTyping(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if typing else self.generic_visit(node)


MODULES = files()
IMPORTS = {name: imported(path, MODULES) for name, path in MODULES.items()}


def inside(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def arrows(room: str, *targets: str) -> set[tuple[str, str]]:
    """Imports that lead from a room to one of the targets."""
    return {
        (module, name)
        for module, names in IMPORTS.items()
        if inside(module, room)
        for name in names
        if inside(name, *targets)
    }


def test_arrows__are_seen() -> None:
    # Else all that follows would hold of nothing.
    assert len(MODULES) > 80
    assert arrows("lightly_ext.pretrain", "lightly_ext.metrics")
    assert arrows("lightly_ext.evaluate", "lightly_ext.metrics")
    assert arrows("lightly_ext.demo", "lightly_ext.pretrain")
    assert arrows("stellar_plugin.mmseg", "mmseg")
    assert arrows("lightly_ext.pretrain", "lightly")


@pytest.mark.parametrize(
    "room, targets",
    [
        ("stellar_plugin", (*LEARNING, "stellar_cli")),
        # It imports a command by its name, when the command runs.
        ("stellar_cli", (*LEARNING, *OPENMMLAB, "stellar_plugin", "torch", "timm")),
        *(
            (
                f"lightly_ext.{room}",
                tuple(f"lightly_ext.{r}" for r in ("evaluate", "pretrain", "search")),
            )
            for room in (
                *("metrics", "data", "loss", "transforms", "modules", "pages"),
                *("durable", "checkpoint_io"),
            )
        ),
        ("lightly_ext.pretrain", ("lightly_ext.evaluate", "lightly_ext.search")),
        ("lightly_ext.evaluate", ("lightly_ext.pretrain", "lightly_ext.search")),
        ("lightly_ext.search", ("lightly_ext.pretrain",)),
        *(
            (f"lightly_ext.{room}", ("lightly_ext.demo",))
            for room in ("metrics", "data", "pretrain", "evaluate", "search")
        ),
        *(
            (f"lightly_ext.{room}", ("lightly_ext.quick_start",))
            for room in ("metrics", "data", "pretrain", "evaluate", "search")
        ),
        ("lightly_ext.quick_start", ("lightly_ext.demo", "sklearn", "threadpoolctl")),
        # The demo calls mmseg's command line.
        ("lightly_ext", (*OPENMMLAB, "stellar_plugin.mmseg")),
    ],
)
def test_arrows__go_one_way(room: str, targets: tuple[str, ...]) -> None:
    assert arrows(room, *targets) == set()


def test_arrows__only_the_mmseg_room_needs_openmmlab() -> None:
    users = {module for module, _ in arrows("stellar_plugin", *OPENMMLAB)}
    users |= {module for module, _ in arrows("stellar_plugin", "stellar_plugin.mmseg")}
    assert all(inside(module, "stellar_plugin.mmseg") for module in users)


def test_arrows__only_the_room_of_transformers_needs_transformers() -> None:
    room = "stellar_plugin.transformers"
    users = {module for module, _ in arrows("stellar_plugin", "transformers", room)}
    assert users == {room}


def test_arrows__configs_name_the_mmseg_room_only() -> None:
    named = set()
    for path in (ROOT / "mm_configs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.add(node.value)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                named |= {alias.name for alias in node.names}
    ours = {name for name in named if inside(name, *PACKAGES)}
    assert ours == {"stellar_plugin.mmseg"}


def test_imports__no_circle() -> None:
    graph = {name: names & MODULES.keys() for name, names in IMPORTS.items()}
    # Raises a CycleError that names the circle.
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)
