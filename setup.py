"""Builds fastsample._cpu, one object per instruction set in one pybind11 module, and fastsample._cuda where nvcc is.

Without a working C++ compiler the package still installs, without the extensions: the reference backend then serves.
FASTSAMPLE_CUDA=0 leaves fastsample._cuda out, 1 insists on it, auto (the default) builds it where that works.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# GCC 12 finds its own intrinsics uninitialised.
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# No contraction: every level must round where the source says so.
COMMON = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", *WARNINGS]
LEVELS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [
        *LEVELS["avx2"],
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    ]
    LEVELS["avx512_bf16"] = [*LEVELS["avx512"], "-mavx512bf16"]
    LEVELS["amx"] = [*LEVELS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]

# Of these compilers (GCC from 10 and 11 on) and assemblers may know nothing: a program that uses them tells.
YOUNG = {
    "avx512_bf16": "volatile __m512 v = _mm512_setzero_ps(); v = _mm512_dpbf16_ps(v, (__m512bh)v, (__m512bh)v);",
    "amx": "_tile_zero(0); _tile_dpbf16ps(0, 1, 2); _tile_release();",
}

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]


class BuildExtension(build_ext):
    """setuptools has no flags per source file, so the kernels are compiled here and handed over as objects."""

    def build_extension(self, extension):
        if extension.name == "fastsample._cuda":
            self._build_cuda(extension)
            return
        for level, flags in LEVELS.items():
            if level in YOUNG:
                if not self._can_compile(flags, f"#include <immintrin.h>\nvoid probe() {{ {YOUNG[level]} }}\n"):
                    continue
                extension.define_macros.append((f"FASTSAMPLE_{level.upper()}", None))
            extension.extra_objects += self.compiler.compile(
                [str(path) for path in Path("csrc/cpu").glob(f"*_{level}.cpp")],
                output_dir=self.build_temp,
                extra_postargs=["-std=c++17", *COMMON, *flags],
                depends=[source for source in SOURCES if not source.startswith(str(Path("csrc/cuda")))],
            )
        super().build_extension(extension)

    def build_extensions(self):
        if not self._can_compile():
            # A slower fastsample is better than none; its first import says so. Errors in our own sources still fail.
            if cuda_wanted() == "1":
                raise CompileError("FASTSAMPLE_CUDA=1 asks for the CUDA kernels: there is no working C++ compiler")
            print("warning: no working C++ compiler: fastsample is installed WITHOUT its CPU kernels", file=sys.stderr)
            self.extensions = []
        built = []
        for extension in self.extensions:
            try:
                self.build_extension(extension)
            except (CompileError, OSError, subprocess.CalledProcessError) as error:
                if extension.name != "fastsample._cuda" or cuda_wanted() == "1":
                    raise
                why = "nvcc failed" if isinstance(error, subprocess.CalledProcessError) else error
                print(f"warning: fastsample is installed WITHOUT its CUDA kernels: {why}", file=sys.stderr)
            else:
                built.append(extension)
        self.extensions = built

    def _build_cuda(self, extension):
        """nvcc compiles and links: it knows where its headers and the static runtime are."""
        nvcc = find_nvcc()
        known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
        real = [name for name in CUDA_ARCHITECTURES if f"sm_{name}" in known]
        if not real:
            raise CompileError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHITECTURES)}")
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in real]
        # Drivers compile the last one for later GPUs, and the first one for those in between.
        virtual = sorted({real[0], real[-1]}, key=int)
        targets += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in virtual]
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(source):
            target = folder / f"{Path(source).stem}.o"
            if self.force or newer_group([*SOURCES, "setup.py"], str(target)):
                command = [nvcc, *CUDA_FLAGS, *targets, "--threads=2", "-c", source, "-o", str(target)]
                subprocess.run(command, check=True)
            return str(target)

        def bindings():
            names = ",".join([*real, *(f"{name}-virtual" for name in virtual)])
            return self.compiler.compile(
                ["csrc/cuda/bindings.cpp"],
                output_dir=self.build_temp,
                include_dirs=extension.include_dirs,
                macros=[("FASTSAMPLE_CUDA_ARCHITECTURES", f'"{names}"')],
                extra_postargs=["-std=c++17", *COMMON],
                depends=SOURCES,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            others = pool.submit(bindings)
            sources = [source for source in extension.sources if not source.endswith("bindings.cpp")]
            sources.sort(key=lambda source: not source.endswith("step.cu"))  # what takes longest first
            objects = [*pool.map(compiled, sources), *others.result()]
        path = Path(self.get_ext_fullpath(extension.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        # The runtime's symbols stay inside: torch loads a runtime of its own, whose names must not take their place.
        hidden = ["-Xlinker", "--exclude-libs=ALL"]
        subprocess.run([nvcc, "-shared", "-cudart=static", *hidden, *objects, "-o", str(path)], check=True)

    def _can_compile(self, flags=(), text="#include <Python.h>\n#include <thread>\nint main() { return 0; }\n"):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(text)
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-std=c++17", *flags])
            except (CompileError, OSError):
                return False
        return True


def cuda_wanted():
    """FASTSAMPLE_CUDA: "0", "1" or "auto"."""
    wanted = os.environ.get("FASTSAMPLE_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FASTSAMPLE_CUDA must be 0, 1 or auto, got {wanted!r}")
    return wanted


def find_nvcc():
    """Path of the CUDA compiler, that of CUDA_HOME first; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")


def cuda_extensions():
    """fastsample._cuda, where it is to be built."""
    if cuda_wanted() == "0":
        return []
    missing = "" if find_nvcc() else "nvcc was found neither in CUDA_HOME/bin nor on PATH"
    if sys.platform != "linux":
        missing = "they are built on Linux only"
    if missing:
        if cuda_wanted() == "1":
            raise SystemExit(f"FASTSAMPLE_CUDA=1 asks for the CUDA kernels: {missing}")
        return []
    sources = [str(path) for kind in ("*.cu", "*.cpp") for path in sorted(Path("csrc/cuda").glob(kind))]
    return [Pybind11Extension("fastsample._cuda", sources, depends=SOURCES)]


cpu = Pybind11Extension(
    "fastsample._cpu",
    [
        *(
            f"csrc/cpu/{name}.cpp"
            for name in ("bindings", "lora_bindings", "bend", "noise", "step", "streams", "lora_linear")
        ),
        *(f"csrc/cpu/{name}.cpp" for name in ("amx", "dispatch", "memory", "threads")),
    ],
    depends=SOURCES,
    extra_compile_args=COMMON,
    extra_link_args=["-ldl", "-pthread"] if sys.platform == "linux" else [],
    cxx_std=17,
)
setup(ext_modules=[cpu, *cuda_extensions()], cmdclass={"build_ext": BuildExtension})
