"""Builds lora_linear's kernels for AMX over a model of its instructions, under sanitizers, for any x86 CPU."""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsample.ops.backend import cpu_module
from support.ahead import Ahead
from support.cuda_on_cpu.build import UNDEFINED, python_includes, run
from support.cuda_on_cpu.build import why_not as no_compiler
from support.paths import ROOT

_cpu = cpu_module()

HERE = Path(__file__).parent
CSRC = ROOT / "csrc"

FLAGS = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
# Every access is checked that a sanitizer can see; -O1 is quick to build.
SANITIZERS = {
    "undefined": ["-O1", *UNDEFINED],
    "address": ["-O1", "-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0"],
}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512_BF16 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]


def why_not() -> str:
    """Why the model cannot be built or run here; empty where it can."""
    if reason := no_compiler():
        return reason
    return "" if _cpu is not None and "avx2" in _cpu.available_isas() else "this CPU has no AVX2, which the model needs"


@functools.cache
def build(sanitizers: str) -> Path:
    """The Python module `_amx`. Its vectors are the hardware's where this CPU has them, else half as wide."""
    wide = "avx512-bf16" in _cpu.available_isas()
    lanes = AVX512_BF16 if wide else [*AVX2, "-DFASTSAMPLE_LANES=8"]
    model = [f"-I{HERE}", "-include", HERE / "amx_on_cpu.h", "-Wno-maybe-uninitialized"]
    checked = SANITIZERS[sanitizers]
    sources: dict[Path, list[str | Path]] = {
        CSRC / "cpu" / "lora_amx.cpp": [*checked, *lanes, *model],
        CSRC / "cpu" / "lora_linear.cpp": [*checked],
        CSRC / "cpu" / "memory.cpp": ["-O1"],
        CSRC / "cpu" / "threads.cpp": ["-O1"],
        CSRC / "cpu" / "lora_bindings.cpp": ["-O0", *python_includes()],
        HERE / "module.cpp": ["-O0", *python_includes()],
        HERE / "amx_on_cpu.cpp": ["-O3", *AVX2],
    }

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        run("g++", *FLAGS, *sources[source], "-c", source, "-o", target)
        return target

    folder = _folder() / sanitizers
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / f"_amx{sysconfig.get_config_var('EXT_SUFFIX')}"
    run("g++", "-shared", *checked, *objects, "-ldl", "-pthread", "-o", library)
    return library


undefined = Ahead(lambda: build("undefined"))


class AmxOnCpu:
    """Takes the place of fastsample._cpu: lora_linear's functions from the model, all others from the real one."""

    def __init__(self, module: ModuleType, real: Any) -> None:
        self._module, self._real = module, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module if hasattr(self._module, name) else self._real, name)


_in_use: list[AmxOnCpu] = []


def amx_on_cpu() -> AmxOnCpu:
    """The build that this process's tests use: one that `use` named, else a fresh one for undefined behaviour."""
    if not _in_use:
        use(undefined.result())
    return _in_use[0]


def use(path: str | Path) -> None:
    """Makes amx_on_cpu give the library at this path, which another process may have built."""
    spec = importlib.util.spec_from_file_location("_amx", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _in_use[:] = [AmxOnCpu(module, _cpu)]


@functools.cache
def _folder() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="amx-on-cpu-"))
    return Path(_kept[0].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # it goes with the process
