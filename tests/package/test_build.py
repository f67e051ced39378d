"""FASTSAMPLE_CUDA, as setup.py reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT


def setup(folder: Path, wanted: str) -> "subprocess.CompletedProcess[str]":
    """What setup.py says where neither CUDA_HOME nor PATH has an nvcc."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    environment.update(FASTSAMPLE_CUDA=wanted, PATH=str(folder))
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("wanted", ["0", "auto"])
def test_no_nvcc_is_no_error(wanted: str, tmp_path: Path) -> None:
    result = setup(tmp_path, wanted)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["fastsample"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("1", "FASTSAMPLE_CUDA=1 asks for the CUDA kernels: nvcc was found neither"), ("yes", "0, 1 or auto, got 'yes'")],
    ids=["insisted-on", "misspelt"],
)
def test_what_cannot_be_built_as_asked_ends_the_build(wanted: str, message: str, tmp_path: Path) -> None:
    result = setup(tmp_path, wanted)
    assert result.returncode != 0
    assert message in result.stderr
