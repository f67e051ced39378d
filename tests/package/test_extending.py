"""The recipes of docs/extending.md, followed to the letter in a copy of the library."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastsample
from support.ahead import ENVIRONMENT
from support.paths import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
LEVELS = {"scalar": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
KERNELS = {"scalar": "_ZN10fastsample6scalar7kernelsE", "avx2": "_ZN10fastsample4avx27kernelsE"}
# Stands for the module that `pip install -e .` would build: at each level the last kernel of the table, called for each
# sample as the binding calls it. Then the rest of the recipe is tried out.
AT_EACH_LEVEL = """
import ctypes
from fastsample.ops import backend

def binding(library, symbol):
    kernels = (ctypes.c_void_p * {count}).in_dll(ctypes.CDLL(library), symbol)
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_float, ctypes.c_int64)(kernels[{count} - 1])

    def blend(out, x, y, weight, batch, size, threads):
        weights = (ctypes.c_float * batch).from_address(weight)
        for i in range(batch):
            kernel(*(start + 4 * i * size for start in (out, x, y)), weights[i], size)

    return blend

for library, symbol in {libraries!r}:
    backend._cpu.blend = binding(library, symbol)
    exec({tried!r}, {{}})
"""


def recipe(title: str) -> list[tuple[str, str]]:
    """The blocks of one section in order: each its language and its text."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(f"{title}\n"))
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def copy_of_the_library(folder: Path) -> None:
    """The sources, and links to what was built; fastsample/kernels is a link as in the checkout."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "kernels", "digits.safetensors")
    shutil.copytree(ROOT / "fastsample", folder / "fastsample", ignore=skip)
    (folder / "fastsample" / "kernels").symlink_to("../kernels")
    for name in ("kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for built in (Path(fastsample.__file__).parent).glob("_*.so"):
        (folder / "fastsample" / built.name).symlink_to(built)


def follow(title: str, folder: Path) -> Iterator[str]:
    """Writes the recipe's files and makes its changes; yields the code of blocks that are neither, to be tried out."""
    for language, text in recipe(title):
        name = re.match(r"(?:#|//) ([\w/]+\.\w+)\n", text)
        if language == "diff":
            change(folder, text)
        elif name:
            path = folder / name[1]
            assert not path.exists(), f"{name[1]} is there already"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        else:
            yield text


def change(folder: Path, text: str) -> None:
    """Makes each change, whose old lines stand in the file exactly once."""
    for name, lines in re.findall(r"^@@ (\S+) @@\n((?:[ +-].*\n|\n)+)", text, flags=re.MULTILINE):
        marked = [(line[:1] or " ", line[1:]) for line in lines.splitlines()]
        old = "\n".join(line for mark, line in marked if mark in " -")
        new = "\n".join(line for mark, line in marked if mark in " +")
        source = (folder / name).read_text()
        assert source.count(f"\n{old}\n") == 1, f"{name} has other lines than docs/extending.md says: {old}"
        (folder / name).write_text(source.replace(f"\n{old}\n", f"\n{new}\n"))


def run(code: str, folder: Path) -> None:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compiled(folder: Path) -> list[tuple[str, str]]:
    """The kernels at the levels of this CPU, each as a library and its symbol; bindings are read through alone."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    commands = [["-fsyntax-only", *includes, str(folder / "csrc/bindings.cpp")]]
    libraries = []
    for isa in LEVELS.keys() & set(fastsample.backends()["cpu"]["isas"]):
        source, library = folder / f"csrc/cpu/kernels_{isa}.cpp", folder / f"{isa}.so"
        flags = ["-O0", "-ffp-contract=off", "-fPIC", "-shared", *LEVELS[isa]]
        commands.append([*flags, str(source), "-o", str(library)])
        libraries.append((str(library), KERNELS[isa]))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda arguments: subprocess.run(["g++", "-std=c++17", "-w", *arguments], check=True), commands))
    return libraries


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(not fastsample.backends()["cpu"]["available"], reason="no CPU kernels")
def test_an_op(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    copy_of_the_library(tmp_path)
    (tried,) = follow("An op", tmp_path)
    table = re.search(r"kernels = \{(.*)\};", (tmp_path / "csrc/cpu/kernels.inl").read_text())
    assert table is not None and table[1].endswith(", blend")
    count = table[1].count(",") + 1
    run(AT_EACH_LEVEL.format(count=count, libraries=compiled(tmp_path), tried=tried), tmp_path)


def test_a_backend(tmp_path: Path) -> None:
    copy_of_the_library(tmp_path)
    (tried,) = follow("A backend", tmp_path)
    run(tried, tmp_path)
