"""The recipes of docs/extending.md, followed to the letter in one copy of the library."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import fastsample
from support.ahead import ENVIRONMENT
from support.paths import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
TITLES = ("A sampler", "An op", "A backend")
FLAGS = {"scalar": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
# In place of `pip install -e .`, which takes a minute: the op's C++ with the kernels of one level, without pybind11.
ONE_LEVEL = """
#include "blend.h"
#include "dispatch.h"

namespace fastsample {
const Kernels& kernels() { return LEVEL::kernels; }
}  // namespace fastsample

extern "C" void blend(float* out, float* x, float* y, float* w, int64_t batch, int64_t size, int threads) {
    fastsample::blend(out, x, y, w, batch, size, threads);
}
"""
TRY = """
import ctypes, json, traceback
from fastsample.ops import backend

errors = {}
for title, code, library in json.loads(input()):
    if library:
        backend._cpu.blend = ctypes.CDLL(library).blend
        backend._cpu.blend.argtypes = *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2, ctypes.c_int
    try:
        exec(code, {})
    except Exception:
        errors[title] = traceback.format_exc()
print(json.dumps(errors))
"""


def recipe(title: str) -> list[tuple[str, str]]:
    """The blocks of one section in order: each its language and its text."""
    section = next(part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if part.startswith(f"{title}\n"))
    return re.findall(r"^```(\w+)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def copy_of_the_library(folder: Path) -> None:
    """The sources, and links to what was built; fastsample/kernels is a link as in the checkout."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "kernels", "digits.safetensors")
    shutil.copytree(ROOT / "fastsample", folder / "fastsample", ignore=skip)
    (folder / "fastsample" / "kernels").symlink_to("../kernels")
    for name in ("kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", folder)
    for built in Path(fastsample.__file__).parent.glob("_*.so"):
        (folder / "fastsample" / built.name).symlink_to(built)


def follow(title: str, folder: Path) -> str:
    """Writes the recipe's files and makes its changes; the code of what is neither, to be tried out."""
    tried = []
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
            tried.append(text)
    return "\n".join(tried)


def change(folder: Path, text: str) -> None:
    """Makes each change, whose old lines stand in the file exactly once."""
    for name, lines in re.findall(r"^@@ (\S+) @@\n((?:[ +-].*\n|\n)+)", text, flags=re.MULTILINE):
        marked = [(line[:1] or " ", line[1:]) for line in lines.splitlines()]
        old = "\n".join(line for mark, line in marked if mark in " -")
        new = "\n".join(line for mark, line in marked if mark in " +")
        source = (folder / name).read_text()
        assert source.count(f"\n{old}\n") == 1, f"{name} has other lines than docs/extending.md says: {old}"
        (folder / name).write_text(source.replace(f"\n{old}\n", f"\n{new}\n"))


def compiled(folder: Path) -> list[str]:
    """A library with the op at each level of this CPU, of scalar and avx2; bindings are read through alone."""
    pybind11 = pytest.importorskip("pybind11")
    sources = folder / "csrc" / "cpu"
    (sources / "one_level.cpp").write_text(ONE_LEVEL)
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    commands, libraries = [["-fsyntax-only", *includes, "bindings.cpp"]], []
    for isa in FLAGS.keys() & set(fastsample.backends()["cpu"]["isas"]):
        libraries.append(str(folder / f"{isa}.so"))
        flags = ["-O0", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", f"-DLEVEL={isa}", *FLAGS[isa]]
        commands.append(
            [*flags, "one_level.cpp", "blend.cpp", "threads.cpp", f"kernels_{isa}.cpp", "-o", libraries[-1]]
        )
    with ThreadPoolExecutor() as pool:
        run = partial(subprocess.run, cwd=sources, check=True)
        list(pool.map(lambda arguments: run(["g++", "-std=c++17", "-w", *arguments]), commands))
    return libraries


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each recipe, all of them in one process."""
    pytest.importorskip("triton")
    if shutil.which("g++") is None or not fastsample.backends()["cpu"]["available"]:
        pytest.skip("there is no g++, or there are no CPU kernels")
    folder = tmp_path_factory.mktemp("checkout")
    copy_of_the_library(folder)
    tries, wrong = [], {}
    for title in TITLES:
        try:
            tried = follow(title, folder)
        except (AssertionError, OSError) as error:
            wrong[title] = str(error)
        else:
            libraries = compiled(folder) if title == "An op" else [None]
            tries += [(title, tried, library) for library in libraries]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{TRY}"],
        input=json.dumps(tries),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return wrong | json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("title", TITLES)
def test_recipe(title: str, errors: dict[str, str]) -> None:
    assert title not in errors, errors[title]
