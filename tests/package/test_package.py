"""What is shipped: the instruction sets in the binary, installs without a compiler, overrides, documentation, style."""

import doctest
import importlib.util
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsample
from support.ahead import ENVIRONMENT, Ahead
from support.levels import needs_cpu
from support.paths import ROOT

CPU = fastsample.backends()["cpu"]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "*.dylib", "*.pyd", "__pycache__")


def run(command: list[str], cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("FASTSAMPLE_")}
    return subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def python(code: str, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    return run([sys.executable, "-W", "always", "-c", code], cwd, **environment)


def begun(code: str, **environment: str) -> "Ahead[subprocess.CompletedProcess[str]]":
    """`python`, ahead of the test that waits for it."""
    return Ahead(lambda: python(code, **environment))


# The instruction sets in the binary


@pytest.fixture(scope="module")
def encodings() -> dict[str, set[str]]:
    """For each function of the extension the vector encodings it uses: VEX (AVX, AVX2, FMA) and EVEX (AVX-512)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("VEX and EVEX are encodings of x86-64")
    if not shutil.which("objdump"):
        pytest.skip("objdump is missing")
    module = importlib.import_module("fastsample._cpu").__file__
    assert module is not None
    listing = run(["objdump", "-d", "-w", module])
    assert listing.returncode == 0, listing.stderr
    found: dict[str, set[str]] = defaultdict(set)
    function = ""
    for line in listing.stdout.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
        elif code := re.match(r"\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)", line):
            # Segment and address-size prefixes may precede; in 64-bit code these opcodes mean nothing else.
            opcode = next(
                byte for byte in [*code[1].split(), ""] if byte not in {"26", "2e", "36", "3e", "64", "65", "67"}
            )
            found[function] |= {"62": {"EVEX"}, "c4": {"VEX"}, "c5": {"VEX"}}.get(opcode, set())
    if not any(name.startswith("_ZN10fastsample") for name in found):
        pytest.skip("the extension is stripped: its functions have no names")
    return found


@needs_cpu
def test_avx512_lies_in_its_own_functions(encodings: dict[str, set[str]]) -> None:
    using = {name for name, used in encodings.items() if "EVEX" in used}
    own = ("_ZN10fastsample6avx512", "_ZN10fastsample11avx512_bf16", "_ZN10fastsample3amx")
    assert {name for name in using if not name.startswith(own)} == set()
    assert len(using) >= 5, "the AVX-512 kernels themselves"


@needs_cpu
def test_avx_lies_in_its_own_functions(encodings: dict[str, set[str]]) -> None:
    using = {name for name, used in encodings.items() if "VEX" in used}
    own = ("_ZN10fastsample4avx2", "_ZN10fastsample6avx512", "_ZN10fastsample11avx512_bf16", "_ZN10fastsample3amx")
    assert {name for name in using if not name.startswith(own)} == set()
    assert sum(name.startswith(own[0]) for name in using) >= 5, "the AVX2 kernels themselves"


@needs_cpu
@pytest.mark.parametrize("level", ["6scalar", "4avx2", "6avx512", "3amx"], ids=["scalar", "avx2", "avx512", "amx"])
def test_every_level_is_in_the_binary(encodings: dict[str, set[str]], level: str) -> None:
    why_no_amx = importlib.import_module("fastsample._cpu").why_no_amx()
    if level == "3amx" and "compiler" in why_no_amx:
        pytest.skip(why_no_amx)
    assert any(name.startswith(f"_ZN10fastsample{level}") for name in encodings)


# Overrides


WHICH = "import fastsample; print(fastsample.backends()['cpu']['isa'])"
FORCED = {isa: begun(WHICH, FASTSAMPLE_CPU_ISA=isa) for isa in CPU.get("isas", [])}
BEST, UNKNOWN = begun(WHICH), begun("import fastsample", FASTSAMPLE_CPU_ISA="avx1024")


@needs_cpu
@pytest.mark.ahead(*FORCED.values())
@pytest.mark.parametrize("isa", FORCED)
def test_isa_override(isa: str) -> None:
    done = FORCED[isa].result()
    assert done.stdout.strip() == isa, done.stderr


@needs_cpu
@pytest.mark.ahead(BEST)
def test_the_best_isa_is_the_default() -> None:
    assert CPU["isas"][0] == "scalar"
    done = BEST.result()
    assert done.stdout.strip() == CPU["isas"][-1], done.stderr


@needs_cpu
@pytest.mark.ahead(UNKNOWN)
def test_unknown_isa_fails_the_import_with_the_list() -> None:
    done = UNKNOWN.result()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "'avx1024'" in last
    assert last.endswith(", ".join(CPU["isas"]))


REFERENCE = begun(
    """
import torch, fastsample
from fastsample.ops.backend import choose
print(choose(None, torch.device("cpu"), native=True))
print(fastsample.ddim(lambda x, t: 0.1 * x, torch.ones(1, 4, dtype=torch.float64), steps=2).dtype)
try:
    print(choose("cpu", torch.device("cpu"), native=True))
except ValueError as error:
    print(error)
""",
    FASTSAMPLE_BACKEND="reference",
)


@pytest.mark.ahead(REFERENCE)
def test_backend_override() -> None:
    """The reference serves float64, the CPU kernels do not: the override decides, an explicit backend beats it."""
    done = REFERENCE.result()
    automatic, dtype, explicit = done.stdout.splitlines()
    assert (automatic, dtype) == ("reference", "torch.float64")
    assert explicit == "cpu" or not CPU["available"]


RUN = "import fastsample; fastsample.ddim(lambda x, t: x, (1, 4), steps=2)"
REFUSED = {name: begun(RUN, FASTSAMPLE_BACKEND=name) for name in ("nonsense", "cuda")}


@pytest.mark.ahead(*REFUSED.values())
@pytest.mark.parametrize(
    ("name", "message"),
    [("nonsense", "one of reference, cpu, triton, cuda, got 'nonsense'"), ("cuda", "'cuda' cannot run here: ")],
)
def test_backend_override_that_cannot_run(name: str, message: str) -> None:
    done = REFUSED[name].result()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and message in last


@pytest.mark.parametrize("name", ["nonsense", "CPU"])
def test_unknown_backend_argument(name: str) -> None:
    with pytest.raises(ValueError, match=f"reference, cpu, triton, cuda, got '{name}'"):
        fastsample.ddim(lambda x, t: x, (1, 4), steps=2, backend=name)


def test_backends_give_a_reason_exactly_where_they_cannot_run() -> None:
    found = fastsample.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert all(status["available"] == (status["reason"] == "") for status in found.values())
    assert found["reference"]["available"]


# Without the extension


PROBE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastsample
print(fastsample.__file__)
print(" | ".join(str(w.message) for w in caught if "fastsample" in str(w.message)))
cpu = fastsample.backends()["cpu"]
print(cpu["available"], cpu["reason"])
print(fastsample.ddim(lambda x, t: 0.1 * x, (2, 3, 8, 8), steps=5, seed=7).double().abs().sum().item())
try:
    fastsample.ddim(lambda x, t: 0.1 * x, (2, 3, 8, 8), steps=5, backend="cpu")
except ValueError as error:
    print(error)
"""


def check_runs_without_extension(folder: Path, hint: str) -> None:
    """Imports `folder`/fastsample with the reference backend alone, and not the installed package."""
    others = [path for path in sys.path if path and not (Path(path) / "fastsample").exists()]
    # -S: an editable install's finder would lend its extension to any package called fastsample.
    done = run(
        [sys.executable, "-S", "-c", PROBE],
        folder,
        PYTHONPATH=os.pathsep.join([str(folder), *others]),
        PYTHONSAFEPATH="1",
    )
    assert done.returncode == 0, done.stderr
    file, warning, status, total, explicit = done.stdout.splitlines()
    assert Path(file).resolve() == (folder / "fastsample" / "__init__.py").resolve()
    assert "reference backend" in warning and hint in warning
    assert status.startswith("False ") and hint in status
    # The reference equals the kernels within 1 ulp of each normal: the sum of 384 float32 values within 1e-6.
    here = fastsample.ddim(lambda x, t: 0.1 * x, (2, 3, 8, 8), steps=5, seed=7).double().abs().sum().item()
    assert float(total) == pytest.approx(here, rel=1e-6)
    assert explicit.startswith("backend='cpu' cannot run here: ") and hint in explicit


def test_source_tree_that_was_never_built(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fastsample", tmp_path / "fastsample", ignore=NOT_SOURCE)
    shutil.copy(ROOT / "setup.py", tmp_path)
    check_runs_without_extension(tmp_path, "`pip install -e .`")


@pytest.fixture(scope="module")
def bare_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built where no compiler works."""
    for tool in ("pip", "setuptools", "pybind11"):
        if not importlib.util.find_spec(tool):
            pytest.skip(f"building needs {tool}")
    folder = tmp_path_factory.mktemp("bare")
    for name in ("csrc", "fastsample", "kernels"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=NOT_SOURCE)
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("LICENSE*")]:
        shutil.copy(path, folder / "tree")
    done = run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            ".",
            "./tree",
        ],
        folder,
        CC="false",
        CXX="false",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installed WITHOUT its CPU kernels" in done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """As in the folder above a checkout, where the first script of most users lies."""
    (tmp_path / "fastsample").symlink_to(ROOT, target_is_directory=True)
    done = run([sys.executable, "-c", "import fastsample.kernels; print(fastsample.zoo.__name__)"], tmp_path)
    assert done.stdout.strip() == "fastsample.zoo", done.stderr


def test_install_without_a_compiler_has_everything_but_the_extension(bare_wheel: Path) -> None:
    names = set(zipfile.ZipFile(bare_wheel).namelist())
    assert not [name for name in names if name.endswith((".so", ".dylib", ".pyd", ".cpp", ".h", ".inl"))]
    sources = {"fastsample": ROOT / "fastsample", "fastsample/kernels": ROOT / "kernels"}
    for package, folder in sources.items():
        for pattern in ("*.py", "*.pyi", "*.safetensors", "py.typed"):
            expected = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob(pattern)}
            assert expected <= names, "missing from pyproject's packages or package-data"
    assert "fastsample/kernels/__init__.py" in names
    assert "fastsample/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastsample"}, "no other top-level package"


def test_install_without_a_compiler_runs(bare_wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(bare_wheel).extractall(tmp_path)
    check_runs_without_extension(tmp_path, "without its C++ extension")


# Documentation


def module_names() -> list[str]:
    names = []
    for package, folder in (("fastsample", ROOT / "fastsample"), ("fastsample.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] != "__main__":
                names.append(".".join([package, *parts[: -1 if parts[-1] == "__init__" else None]]))
    return names


@pytest.mark.parametrize("name", module_names())
def test_doctests(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastsample"):
            raise
        pytest.skip(f"needs the optional {error.name}")
    assert (module.__doc__ or "").strip() or name == "fastsample.kernels", "a module says what it holds"
    result = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert result.failed == 0


def test_doctests_exist() -> None:
    """The test above would pass an empty suite."""
    found = doctest.DocTestFinder(exclude_empty=True).find(fastsample.ddim, "ddim")
    assert sum(len(test.examples) for test in found) >= 1


PUBLIC = [("fastsample", name) for name in fastsample.__all__] + [
    ("fastsample.ops", name) for name in fastsample.ops.__all__
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module}.{name}" for module, name in PUBLIC])
def test_public_names_are_documented(module: str, name: str) -> None:
    thing: Any = getattr(importlib.import_module(module), name)
    assert own_docstring(thing)
    if inspect.isclass(thing):
        methods = [(key, value) for key, value in inspect.getmembers(thing) if not key.startswith("_")]
        undocumented = [key for key, value in methods if documentable(value) and not own_docstring(value)]
        assert undocumented == []


def own_docstring(thing: Any) -> str:
    text = (inspect.getdoc(thing) or "").strip()
    # Without one of its own a dataclass is given its signature.
    return "" if inspect.isclass(thing) and text.startswith(f"{thing.__name__}(") else text


def documentable(member: Any) -> bool:
    if isinstance(member, property):
        return True
    return callable(member) and (getattr(member, "__module__", None) or "").startswith("fastsample")


# Style


def own_files() -> list[Path]:
    if not shutil.which("git") or run(["git", "rev-parse", "--git-dir"], ROOT).returncode != 0:
        pytest.skip("not a git checkout")
    return [
        ROOT / name for name in run(["git", "ls-files", "-coz", "--exclude-standard"], ROOT).stdout.split("\0") if name
    ]


def test_files_stay_readable() -> None:
    sources = [path for path in own_files() if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".inl"}]
    assert len(sources) > 20
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources if path.exists()}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def checked(command: str) -> "subprocess.CompletedProcess[str]":
    name, *arguments = command.split()
    tool = Path(sys.executable).with_name(name)
    found = str(tool) if tool.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing")
    return run([found, *arguments], ROOT)


CHECKS = {command: Ahead(partial(checked, command)) for command in ("ruff check .", "ruff format --check .", "mypy")}


@pytest.mark.ahead(*CHECKS.values())
@pytest.mark.parametrize("command", CHECKS)
def test_style_and_types(command: str) -> None:
    done = CHECKS[command].result()
    assert done.returncode == 0, done.stdout + done.stderr
