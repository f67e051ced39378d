"""No file is longer than 400 lines, and no function longer than a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

MOST_LINES, MOST_CODE, MOST_OF_A_KERNEL = 400, 60, 80
SUFFIXES = {".py", ".h", ".cpp", ".inl", ".cu"}
FOLDERS = [ROOT / name for name in ("fastsample", "kernels", "csrc", "benchmarks", "tests", "tools")]
# fastsample/kernels is a link to kernels/.
FILES = sorted(
    path
    for folder in FOLDERS
    for path in folder.rglob("*")
    if path.suffix in SUFFIXES and not path.is_relative_to(ROOT / "fastsample" / "kernels")
)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_file_has_one_subject(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".py"], ids=_name)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    most = MOST_OF_A_KERNEL if path.is_relative_to(ROOT / "kernels") else MOST_CODE
    assert not {name: count for name, count in functions(path.read_text()) if count > most}


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Every function and its lines of code: without docstring, comments and blank lines, with its signature."""
    lines = [line.strip() for line in text.splitlines()]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            if body:
                own = lines[node.lineno - 1 : node.body[0].lineno - 1] + lines[body[0].lineno - 1 : node.end_lineno]
                yield node.name, sum(bool(line) and not line.startswith("#") for line in own)
