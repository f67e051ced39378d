"""Square root and quotient of the CUDA kernels, which start from approximations that differ from GPU to GPU."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from support.cuda_on_cpu import build

FOLDER = Path(build.__file__).parent


@pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())
def test_any_allowed_approximation_rounds_right(tmp_path: Path) -> None:
    """Every radius of Box-Muller, and quotients of all sizes, from every approximation within PTX's bound."""
    program = tmp_path / "arithmetic"
    # With the fma instruction where the compiler would call a function: eight times as fast.
    fma = ["-mfma"] if "fma" in _features() else []
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-DFASTSAMPLE_CUDA_ON_CPU", f"-I{FOLDER}", *fma]
    sources = [FOLDER / "arithmetic.cpp", FOLDER / "cuda_on_cpu.cpp"]
    subprocess.run(["g++", *flags, *sources, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    assert printed[::3] == ["radii", "quotients"]
    assert int(printed[1]) > 2 * 2**24 and int(printed[4]) > 2_000_000, "looked at"
    assert printed[2] == printed[5] == "0", "wrong"


def _features() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().split() if platform.machine() == "x86_64" and info.exists() else []
