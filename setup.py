"""Builds fastsample._cpu: one object per instruction set, linked into one pybind11 module.

Without a working C++ compiler the package still installs, without the extension: the reference backend then serves.
"""

import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# No contraction: every level must round where the source says so.
COMMON = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
LEVELS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [
        *LEVELS["avx2"],
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    ]


class BuildExtension(build_ext):
    """setuptools has no flags per source file, so the kernels are compiled here and handed over as objects."""

    def build_extension(self, extension):
        for level, flags in LEVELS.items():
            extension.extra_objects += self.compiler.compile(
                [f"csrc/cpu/kernels_{level}.cpp"],
                output_dir=self.build_temp,
                extra_postargs=["-std=c++17", *COMMON, *flags],
                depends=[str(path) for path in [*Path("csrc/cpu").glob("*"), *Path("csrc/common").glob("*")]],
            )
        super().build_extension(extension)

    def run(self):
        try:
            super().run()
        except Exception as error:
            # Whatever went wrong, a slower fastsample is better than none; its first import says so.
            print(f"warning: fastsample is installed WITHOUT its CPU kernels: {error}", file=sys.stderr)


cpu = Pybind11Extension(
    "fastsample._cpu",
    ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/memory.cpp", "csrc/cpu/threads.cpp"],
    depends=[str(path) for path in Path("csrc").rglob("*") if path.is_file()],
    extra_compile_args=COMMON,
    extra_link_args=["-ldl", "-pthread"] if sys.platform == "linux" else [],
    cxx_std=17,
)
setup(ext_modules=[cpu], cmdclass={"build_ext": BuildExtension})
