"""`fastsample info`: what it tells of the installation, of the machine and of models."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample
from fastsample import zoo
from fastsample.cli import main
from fastsample.commands import info, machine
from fastsample.commands.about import about, schedule_text
from support.generated import TEXT, unet


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """What is printed, by name; a value of several lines is one."""
    assert main(["info", *arguments]) == 0
    values: dict[str, str] = {}
    name = ""
    lines = capsys.readouterr().out.splitlines()
    width = max(len(match[0]) for line in lines if (match := re.match(r"\S+( \S+)? {2,}", line)))
    for line in lines:
        assert len(line) <= 120 or " " not in line[width:]
        name, value = line[:width].strip() or name, line[width:]
        values[name] = f"{values[name]} {value}" if name in values else value
    return values


def test_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    found, known = told(capsys), fastsample.backends()
    assert found["fastsample"] == fastsample.__version__
    assert found["torch"] == f"{torch.__version__}, {torch.get_num_threads()} threads"
    assert f"{machine.cpus()} CPUs, load " in found["cpu"]
    for name, status in known.items():
        assert f"{name}: {'yes' if status['available'] else 'no: ' + status['reason'][:20]}" in found["backends"]
    if known["cpu"]["available"]:
        assert found["level"].startswith(known["cpu"]["isa"])
    assert found["models"].startswith(str(Path(zoo.__file__).parent))
    assert all(f"zoo:{name}" in found["models"] for name in zoo.STUDENTS)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(zoo.FILES, "lcm", Path("gone"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = told(capsys)
    assert found["models"].endswith("missing: lcm (reinstall fastsample)")
    assert found["gpu"] == "none that torch finds, which was built for 12.8"


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_name", "H200")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert ("gpu", "H200, H200; torch was built for 12.8") in info.here()


def test_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "zoo:digits")
    assert found["shape"] == "1 x 28 x 28" and found["prediction"] == "epsilon, and a variance"
    assert found["schedule"].startswith("cosine, 1000 timesteps")
    assert found["classes"] == "10, as y=; 10 stands for none"
    count = sum(weight.numel() for weight in zoo.digits().parameters())
    assert found["parameters"].startswith(f"{count:,} (")
    assert "trained" not in found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        pytest.param(
            "trajectory-4", {"student of": "trajectory", "steps": "4, 2, 1", "guidance": "1.25 folded in"}, id="folded"
        ),
        pytest.param("lcm", {"shape": "4 x 7 x 7", "decoded to": "1 x 28 x 28", "guidance": "told, 1 to 8"}, id="told"),
    ],
)
def test_students(name: str, wanted: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, f"zoo:{name}")
    assert {key: found[key] for key in wanted} == wanted


def test_a_run_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the folder, of its model and of its checkpoint."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", images=np.zeros((4, 8, 8), np.uint8))
    small = ["--batch-size", "2", "--widths", "8", "--timesteps", "30", "--steps", "3", "--schedule", "linear"]
    assert main(["train", "--data", "data.npz", "--out", "run", *small]) == 0
    capsys.readouterr()
    found = told(capsys, "run")
    assert found["trained"] == "3 of 3 steps" and found["schedule"].startswith("linear, 30 timesteps")
    assert found["drawn by"] == "fastsample sample --model zoo:run/model.safetensors"
    assert found == told(capsys, "run/checkpoint.pt") == told(capsys, "run/model.safetensors")


@pytest.mark.parametrize("held", [torch.zeros(2), {"history": 3}, None], ids=["tensor", "mapping", "junk"])
def test_a_checkpoint_of_others(held: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.save(unet(), tmp_path / "model.safetensors")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"junk") if held is None else torch.save(held, path)
    assert told(capsys, str(tmp_path))["trained"] == "unknown: checkpoint.pt beside it is none of fastsample"


def test_a_model_that_says_little() -> None:
    lines = dict(about("python:test_info:bare"))
    assert lines["shape"].startswith("unknown") and lines["schedule"].startswith("unknown")
    assert lines["prediction"] == "epsilon" and lines["classes"] == "none" and "parameters" not in lines


def bare() -> object:
    return lambda x, t: x


def test_of_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, TEXT)
    assert found["shape"] == "3 x 8 x 6" and "file" not in found
    assert found["class"] == type(unet()).__name__


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        pytest.param(fastsample.Schedule.cosine(100), "cosine", id="cosine"),
        pytest.param(fastsample.Schedule.scaled_linear(), "scaled_linear", id="scaled-linear"),
        pytest.param(fastsample.Schedule.linear(1000, 1e-4, 0.03), "own", id="other-betas"),
        pytest.param(fastsample.Schedule.linear(10, 1e-4, 0.02), "own", id="short"),
    ],
)
def test_schedules_by_name(schedule: fastsample.Schedule, name: str) -> None:
    assert schedule_text(schedule).startswith(f"{name}, {schedule.T} timesteps")


def test_a_schedule_with_an_alpha_bar_of_0() -> None:
    assert schedule_text(fastsample.Schedule.linear().rescale_zero_terminal_snr()).endswith("to 0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digits", "model must be zoo:digits"),
        ("zoo:none", "no model at none"),
        ("python:support.generated:failing", "no weights"),
    ],
)
def test_refuses(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["info", text]) == 2
    shown = capsys.readouterr()
    assert not shown.out and message in shown.err and len(shown.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "unknown"), (0.0, "0 % of the CPUs"), (0.494, "49 % of the CPUs"), (1.7, "170 % of the CPUs")],
)
def test_load(share: float | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def averages() -> tuple[float, float, float]:
        if share is None:
            raise OSError
        return share * machine.cpus(), 9.0, 9.0

    monkeypatch.setattr(os, "getloadavg", averages)
    found = machine.load()
    assert found == pytest.approx(share) if share is not None else found is None
    assert machine.load_text(found).startswith(text)


def test_the_cpu_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 1\n\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == "AMD EPYC 1"
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "missing")
    assert machine.cpu_name()
