"""The benchmarks' --device: its refusals, the clocks and the names of results, on a machine that may have no GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastsample
from benchmarks import convergence, digits, lora, nll, noise, sampler, step
from benchmarks.common import cpu, gpu, options, report
from benchmarks.common.harness import Candidate, measure

CUDA = torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [step, sampler, noise, lora, digits, nll], ids=lambda script: script.__name__[11:])
def test_without_a_gpu_scripts_refuse(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--quick", "--device", "cuda", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "refused: --device cuda: torch finds no such GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "reason"), [("mps", "it is neither a CPU nor a GPU of CUDA or ROCm"), ("nonsense", "argument --device")]
)
def test_other_devices_are_refused(device: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        noise.main(["--quick", "--device", device])
    assert reason in capsys.readouterr().err


def test_a_study_that_times_nothing_takes_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        convergence.main(["--device", "cuda"])
    assert "--device" in capsys.readouterr().err


def test_a_gpu_without_kernels_or_with_another_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    here = {
        name: {"available": name in ("cpu", "triton"), "reason": f"no {name}"} for name in ("cpu", "triton", "cuda")
    }
    monkeypatch.setattr(fastsample, "backends", lambda: here)
    assert gpu.refusal(CUDA) == "" and gpu.refusal(torch.device("cuda:3")) == "torch finds 1 GPUs"
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "cpu")
    with pytest.raises(SystemExit, match="2"):
        options.require_gpu(CUDA)
    assert "FASTSAMPLE_BACKEND is 'cpu'" in capsys.readouterr().err
    here["triton"]["available"] = False
    assert gpu.refusal(CUDA) == "cuda: no cuda; triton: no triton"


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that only keeps a log and whose clock counts the entries."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, other: Event) -> float:
            assert log[-1] == "wait", "read before the device was waited for"
            return float(other.at - self.at - 1)  # what was logged in between, in milliseconds

    def flush(size: int, dtype: torch.dtype, device: torch.device) -> Any:
        assert size == gpu.FLUSH_BYTES
        return SimpleNamespace(zero_=lambda: log.append("flush"))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "driver", lambda: "580.1")
    monkeypatch.setattr(torch, "empty", flush)
    return log


def test_kernels_are_timed_by_events_with_cold_caches(fake_gpu: list[str]) -> None:
    clock = gpu.events(CUDA)
    call = Candidate("three", lambda: fake_gpu.extend("kkk"), before=lambda: fake_gpu.append("before"))
    assert clock(call, 2) == pytest.approx(2 * 3e-3)
    assert fake_gpu == ["before", "flush", "event", *"kkk", "event"] * 2 + ["wait"]


def test_whole_runs_are_timed_by_the_host_that_waits(fake_gpu: list[str]) -> None:
    gpu.synchronised(CUDA)(Candidate("run", lambda: fake_gpu.append("run"), lambda: fake_gpu.append("before")), 2)
    assert fake_gpu == ["before", "wait", "run", "wait"] * 2


def test_the_harness_uses_the_clock_it_is_given() -> None:
    taken = {"A": 2.0, "B": 6.0}
    found = measure([Candidate(name, lambda: None) for name in taken], 3, 0, lambda one, n: n * taken[one.provider])
    assert {name: list(one.seconds) for name, one in found.items()} == {"A": [2.0] * 3, "B": [6.0] * 3}


def test_results_carry_the_gpu_s_name(fake_gpu: list[str], tmp_path: Path) -> None:
    run = options.Run((), 30, False, tmp_path, CUDA)
    assert run.path("noise", ".csv").name == "noise-nvidia-h100-80gb-hbm3.csv"
    assert options.Run((), 30, True, tmp_path).path("noise", ".csv").name == f"noise-{cpu.slug(cpu.family())}-quick.csv"
    here = report.machine(CUDA)
    assert (here["device"], here["driver"], here["backend"]) == ("NVIDIA H100 80GB HBM3", "580.1", "automatic")
    assert "device" not in report.machine()


@pytest.mark.gpu
@pytest.mark.parametrize("script", [step, sampler, noise, lora, digits, nll], ids=lambda script: script.__name__[11:])
def test_scripts_run_on_a_gpu(script: Any, tmp_path: Path) -> None:
    assert script.main(["--quick", "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob(f"*-{gpu.slug(CUDA)}-quick.csv"))
