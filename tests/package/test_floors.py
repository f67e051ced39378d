"""The house has floors and imports point down: no module imports from a floor above its own, and none in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support.paths import ROOT

# From the roof down. A module stands on the floor of the longest name here that it is or lies in.
FLOORS = (
    ("fastsample.cli", "fastsample.__main__"),
    ("fastsample.commands",),
    ("fastsample.distill",),
    ("fastsample.evaluate", "fastsample.generation", "fastsample.selftest", "fastsample.train"),
    ("fastsample",),  # the door, which names what users call
    (
        *("fastsample.graph", "fastsample.integrations", "fastsample.interpolation"),
        *("fastsample.likelihood", "fastsample.samplers.batcher"),
    ),
    ("fastsample.samplers", "fastsample.lora"),
    ("fastsample.loop", "fastsample.forward"),
    ("fastsample.ops",),
    ("fastsample.kernels",),
    ("fastsample.tables",),
    ("fastsample.times", "fastsample.schedule", "fastsample.model", "fastsample.zoo"),
    (
        *("fastsample.broadcast", "fastsample.caller", "fastsample.checks"),
        *("fastsample.hints", "fastsample.images", "fastsample.moved", "fastsample.storage"),
        *("fastsample.versions", "fastsample.vocabulary"),
    ),
)


@cache
def modules() -> dict[str, Path]:
    """The file of every module; that of a package is its door, `__init__.py`."""
    package = ROOT / "fastsample"
    files = [*package.rglob("*.py"), *(package / "kernels").rglob("*.py")]  # a link, which rglob does not follow
    return {_name(file.relative_to(ROOT)): file for file in files}


def _name(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """(a module, one that it imports) anywhere in its file, in functions and for type checkers too."""
    return frozenset((name, target) for name, file in modules().items() for target in imported(file) if target != name)


def imported(file: Path) -> Iterator[str]:
    """The modules of this package that a file names in its imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module in modules():
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def floor(module: str) -> int:
    """How far below the roof a module stands."""
    names = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    while module not in names:
        module = module.rpartition(".")[0]
    return names[module]


def _floor_of_its_own(module: str) -> bool:
    """Whether a module's floor is said by more than that it lies in the package."""
    return module == "fastsample" or floor(module) != floor("fastsample")


def test_every_module_has_a_floor() -> None:
    assert [module for module in modules() if not _floor_of_its_own(module)] == []


def test_imports_point_down() -> None:
    up = {
        (module, target)
        for module, target in arrows()
        # A package's door names what lies behind it, wherever that stands.
        if floor(target) < floor(module) and not target.startswith(f"{module}.")
    }
    assert up == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    below: dict[str, set[str]] = {}
    for module, target in arrows():
        below.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_imports_that_only_type_checkers_and_functions_see_are_arrows_too(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import numpy\n"
        "if TYPE_CHECKING:\n    from fastsample.samplers.sampler import Sampler\n"
        "def late():\n    from fastsample.samplers import ddim\n    import fastsample.graph\n"
    )
    assert list(imported(file)) == ["fastsample.samplers.sampler", "fastsample.samplers.ddim", "fastsample.graph"]
    assert floor("fastsample.samplers.sampler") < floor("fastsample.loop.loop") < floor("fastsample.ops.step.launch")
    assert floor("fastsample.samplers.batcher") < floor("fastsample.samplers.sampler")
