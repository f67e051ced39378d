"""Builds the CUDA sources as C++ for the CPU, under sanitizers, and drives what runs them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from support.ahead import Ahead
from support.paths import ROOT

HERE = Path(__file__).parent
CUDA = ROOT / "csrc" / "cuda"

# No contraction, as nvcc's -fmad=false. -O1: quick to build, and sanitizers still see what the source says.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DFASTSAMPLE_CUDA_ON_CPU"]
UNDEFINED = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
# Calls in place of inlined checks, and none of the stack, take a third of the time to build.
ADDRESS = ["-fsanitize=address", "--param=asan-stack=0", "--param=asan-instrumentation-with-call-threshold=0"]
# Of the kernels alone: bindings take three times as long with them.
SANITIZERS = {"undefined": UNDEFINED, "address": ADDRESS}
ORDERS = ("ascending", "descending", "mixed")


def why_not() -> str:
    """Why CUDA sources cannot be built for the CPU here; empty where they can."""
    if sys.platform != "linux":
        return "fibers and sanitizers are set up for Linux"
    if shutil.which("g++") is None or shutil.which("nm") is None:
        return "there is no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return ""


@functools.cache
def build(sanitizers: str) -> Path:
    """The Python module `_cuda` from the kernels, their bindings and the trials, in a folder of this process."""
    kernels = [*CUDA.glob("*.cu"), HERE / "trials.cu"]
    others = [CUDA / "bindings.cpp", HERE / "cuda_on_cpu.cpp", HERE / "device.cpp"]

    def compile_one(source: Path) -> Path:
        checked = source in kernels
        target = _folder() / (f"{source.name}.{sanitizers}.o" if checked else f"{source.name}.o")
        if not target.exists():
            flags = SANITIZERS[sanitizers] if checked else python_includes() if source.name == "bindings.cpp" else []
            run("g++", *FLAGS, *flags, f"-I{HERE}", "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*others, *kernels]))
    folder = _folder() / sanitizers
    folder.mkdir(exist_ok=True)
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    run("g++", "-shared", *SANITIZERS[sanitizers], *objects, "-o", library)
    return library


def runtime(library: str) -> str:
    """Where the compiler keeps one of its libraries."""
    return run("g++", f"-print-file-name={library}").strip()


def python_includes() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name with template arguments, grid and block."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]


class CudaOnCpu:
    """The built module, whose addresses are those of CPU tensors, and what runs its threads.

    Attributes:
        path: where the library lies.
        module: `_cuda`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        self._c.run_trial.restype = ctypes.c_char_p
        self._c.cuda_on_cpu_launch.restype = ctypes.c_bool
        self._functions, shared = _symbols(path)
        known = ctypes.cast(self._c.cuda_on_cpu_order, ctypes.c_void_p).value or 0
        self._base = known - next(at for at, name in self._functions.items() if name == "cuda_on_cpu_order")
        for address, size in shared:
            self._c.cuda_on_cpu_add_shared(ctypes.c_void_p(self._base + address), ctypes.c_size_t(size))

    @functools.cached_property
    def module(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("_cuda", self.path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    @contextmanager
    def order(self, name: str) -> Iterator[None]:
        """In which order threads and blocks run, one of ORDERS."""
        self._c.cuda_on_cpu_order(ORDERS.index(name))
        try:
            yield
        finally:
            self._c.cuda_on_cpu_order(0)

    @contextmanager
    def window(self, first: int, last: int) -> Iterator[None]:
        """Only blocks first to last of each launch run, counted along x, then y, then z."""
        self._c.cuda_on_cpu_window(ctypes.c_uint64(first), ctypes.c_uint64(last))
        try:
            yield
        finally:
            self._c.cuda_on_cpu_window(ctypes.c_uint64(0), ctypes.c_uint64(2**64 - 1))

    def launches(self) -> list[Launch]:
        """The launches since the last call."""
        found: list[Launch] = []
        values = (ctypes.c_uint64 * 7)()
        while self._c.cuda_on_cpu_launch(ctypes.c_size_t(len(found)), values):
            kernel, *sizes = values
            found.append(Launch(self._functions[kernel - self._base], tuple(sizes[:3]), tuple(sizes[3:])))
        self._c.cuda_on_cpu_forget_launches()
        return found

    def trial(
        self, name: str, given: Sequence[float], out: int, grid: Sequence[int] = (1,), block: Sequence[int] = (32,)
    ) -> tuple[str, list[float]]:
        """What was wrong with a kernel of trials.cu, and the `out` floats that it wrote."""
        into = (ctypes.c_float * out)()
        sizes = [(ctypes.c_uint * 3)(*(*of, 1, 1)[:3]) for of in (grid, block)]
        why = self._c.run_trial(name.encode(), *sizes, (ctypes.c_float * len(given))(*given), into)
        return why.decode(), list(into)


def _symbols(path: Path) -> tuple[dict[int, str], list[tuple[int, int]]]:
    """The names of a library's functions by address, and (address, size) of each variable in shared memory."""
    in_kernels = set()
    for file in path.parent.parent.glob(f"*.cu.{path.parent.name}.o"):
        in_kernels |= {line.split()[-1] for line in run("nm", "--defined-only", file).splitlines() if line}
    functions, shared = {}, []
    for line in run("nm", "-C", "--defined-only", path).splitlines():
        address, kind, name = line.split(maxsplit=2)
        if kind in "tTwW":
            functions[int(address, 16)] = name
    for line in run("nm", "-S", "--defined-only", path).splitlines():
        match line.split():
            # Static in a function of a kernel file: there is no other way to write __shared__.
            case [address, size, "b" | "d", name] if name.startswith("_ZZ") and name in in_kernels:
                shared.append((int(address, 16), int(size, 16)))
    return functions, shared


_in_use: list[CudaOnCpu] = []


@Ahead
def undefined() -> Path:
    """Under the sanitizer of undefined behaviour, which finds what it finds inside any process."""
    return build("undefined")


@Ahead
def address() -> Path:
    """Under the sanitizer of addresses, which needs a process of its own."""
    return build("address")


def cuda_on_cpu() -> CudaOnCpu:
    """The build that this process's tests use: one that `use` named, else that for undefined behaviour."""
    if not _in_use:
        use(undefined.result())
    return _in_use[0]


def use(path: str | Path) -> None:
    """Makes cuda_on_cpu give the library at this path, which another process may have built."""
    _in_use[:] = [CudaOnCpu(Path(path))]


@functools.cache
def _folder() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="cuda-on-cpu-"))
    return Path(_kept[0].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # it goes with the process
