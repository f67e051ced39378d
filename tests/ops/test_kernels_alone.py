"""The CPU kernels in a program without Python give the references' values, built for this CPU and for aarch64."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from support.ahead import Ahead
from support.kernels_alone.values import FILE, text
from support.paths import ROOT

TOOL = ROOT / "tools" / "aarch64.sh"
COMPILERS = {"here": ("g++",), "aarch64": ("aarch64-linux-gnu-g++", "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")}


def why_not(target: str) -> str:
    """Why the program cannot be built or run here; empty where it can."""
    missing = [name for name in COMPILERS[target][:2] if shutil.which(name) is None]
    if sys.platform != "linux":
        return "the program is set up for Linux"
    return f"there is no {' and no '.join(missing)}" if missing else ""


def held(target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *COMPILERS[target]], capture_output=True, text=True)


def target(name: str) -> object:
    """A parameter whose program is built ahead of its test."""
    job, reason = Ahead(lambda: held(name)), why_not(name)
    return pytest.param(job, id=name, marks=[pytest.mark.ahead(job), pytest.mark.skipif(bool(reason), reason=reason)])


@pytest.mark.parametrize("job", [target(name) for name in COMPILERS])
def test_kernels_give_the_golden_values(job: Ahead[subprocess.CompletedProcess[str]]) -> None:
    done = job.result()
    assert done.returncode == 0, done.stdout + done.stderr
    cases = FILE.read_text().count("\n\n") - 1  # behind the head and behind each case
    assert done.stdout.startswith(f"{cases} cases at level scalar: ") and done.stdout.endswith(" values, 0 wrong\n")


def test_the_golden_values_are_those_of_the_references() -> None:
    """Whole numbers exactly; another numpy may round the last bit of its float64 otherwise."""
    for line, renewed in zip(FILE.read_text().splitlines(), text().splitlines(), strict=True):
        for old, new in zip(line.split(" "), renewed.split(" "), strict=True):
            assert old == new or float(old) == pytest.approx(float(new), rel=3e-11), line[:60]
