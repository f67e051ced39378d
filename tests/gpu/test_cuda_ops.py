"""backend="cuda" through the public functions, its kernels run on the CPU: whole runs of every sampler."""

from __future__ import annotations

import pytest
import torch

from support.cuda_on_cpu.build import CudaOnCpu
from support.whole_runs import RUNS

pytest_plugins = ["support.cuda_on_cpu.fixtures"]


# Unclipped on purpose.
@pytest.mark.filterwarnings("ignore:the row at t = 999.0 multiplies")
@pytest.mark.usefixtures("scalar", "cuda_on_cpu")
@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_have_the_bits_of_the_cpu(on_cpu: CudaOnCpu, name: str) -> None:
    make, options, model, x = RUNS[name]
    want = make()(model, x, backend="cpu", **options)
    on_cpu.launches()
    got = make()(model, x, backend="cuda", **options)
    kernels = {launch.kernel.split("<")[0].split("(")[1].rpartition("::")[2] for launch in on_cpu.launches()}
    assert torch.equal(got, want)
    assert "step_kernel" in kernels
    assert "normals_kernel" in kernels or isinstance(x, torch.Tensor)
