"""Builds fastsample._cpu: one object per instruction set, linked into one pybind11 module.

Without a working C++ compiler the package still installs, without the extension: the reference backend then serves.
"""

import platform
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# No contraction: every level must round where the source says so.
COMMON = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
LEVELS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [
        *LEVELS["avx2"],
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    ]
    LEVELS["avx512_bf16"] = [*LEVELS["avx512"], "-mavx512bf16"]  # where the compiler knows it: GCC from 10 on


class BuildExtension(build_ext):
    """setuptools has no flags per source file, so the kernels are compiled here and handed over as objects."""

    def build_extension(self, extension):
        for level, flags in LEVELS.items():
            if level == "avx512_bf16":
                if not self._can_compile(flags):
                    continue
                extension.define_macros.append(("FASTSAMPLE_AVX512_BF16", None))
            extension.extra_objects += self.compiler.compile(
                [str(path) for path in Path("csrc/cpu").glob(f"*_{level}.cpp")],
                output_dir=self.build_temp,
                extra_postargs=["-std=c++17", *COMMON, *flags],
                depends=[str(path) for path in [*Path("csrc/cpu").glob("*"), *Path("csrc/common").glob("*")]],
            )
        super().build_extension(extension)

    def build_extensions(self):
        if self._can_compile():
            super().build_extensions()
        else:
            # A slower fastsample is better than none; its first import says so. Errors in our own sources still fail.
            print("warning: no working C++ compiler: fastsample is installed WITHOUT its CPU kernels", file=sys.stderr)
            self.extensions = []

    def _can_compile(self, flags=()):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <Python.h>\n#include <thread>\nint main() { return 0; }\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-std=c++17", *flags])
            except (CompileError, OSError):
                return False
        return True


cpu = Pybind11Extension(
    "fastsample._cpu",
    ["csrc/bindings.cpp", *[f"csrc/cpu/{name}.cpp" for name in ("dispatch", "lora_linear", "memory", "threads")]],
    depends=[str(path) for path in Path("csrc").rglob("*") if path.is_file()],
    extra_compile_args=COMMON,
    extra_link_args=["-ldl", "-pthread"] if sys.platform == "linux" else [],
    cxx_std=17,
)
setup(ext_modules=[cpu], cmdclass={"build_ext": BuildExtension})
