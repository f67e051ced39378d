"""benchmarks.lora: smoke runs, what it counts, and what it refuses to time."""

import csv
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

import fastsample
from benchmarks import choice, lora, projections, unets
from benchmarks.harness import Spread

needs_cpu = pytest.mark.skipif(not fastsample.backends()["cpu"]["available"], reason="no CPU kernels")


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Flags of a smoke run. On one thread: a busy machine makes two wait for each other."""
    monkeypatch.delenv("FASTSAMPLE_BACKEND", raising=False)
    threads = torch.get_num_threads()
    yield ["--quick", "--threads", "1", "--out", str(tmp_path)]
    torch.set_num_threads(threads)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=["with", "without"])
def has_diffusers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    return _there("diffusers", request.param, monkeypatch)


@pytest.fixture(params=["with", "without"])
def has_peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    projections.peft_if_there.cache_clear()
    yield _there("peft", request.param, monkeypatch)
    projections.peft_if_there.cache_clear()


def _there(package: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    if wanted == "with":
        pytest.importorskip(package)
        return True
    monkeypatch.setitem(sys.modules, package, None)
    return False


@needs_cpu
def test_lora_projections(has_peft: bool, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora.main([*quick, "--only", "projections", "--shapes", "15x16,3x8x33"]) == 0
    shown = capsys.readouterr().out
    assert "rank 16 / nn.Linear: " in shown and "GFLOP/s, " in shown
    assert ("PEFT is left out" in shown, "PEFT rank 16 / fastsample rank 16: " in shown) == (not has_peft, has_peft)
    assert (tmp_path / "lora-projections-quick.png").read_bytes().startswith(b"\x89PNG")
    written = read(tmp_path / "lora-projections-quick.csv")
    peers = {"addmm", "PEFT", "PEFT merged"} if has_peft else {"addmm"}
    for dtype, case in product(("float32", "bfloat16"), ("15x16", "3x8x33")):
        own = [row for row in written if row["benchmark"] == f"projections {dtype}" and row["case"] == case]
        assert {f"{name} rank 16" for name in (*peers, "fastsample")} < {row["provider"] for row in own}
        assert all(float(row["gflop_per_s"]) > 0 for row in own)
        assert {row["baseline"] for row in own} == {"", "nn.Linear"}


@needs_cpu
def test_lora_adapters(quick: list[str], tmp_path: Path) -> None:
    assert lora.main([*quick, "--only", "adapters", "--shapes", "15x16"]) == 0
    written = read(tmp_path / "lora-adapters-quick.csv")
    assert {row["case"] for row in written} == {"15x16", "8x15x16"}
    assert {row["baseline"] for row in written} == {"", "one of rank 32", "one adapter for all"}


@needs_cpu
def test_lora_unet(has_diffusers: bool, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora.main([*quick, "--only", "unet"]) == 0
    shown, result = capsys.readouterr().out, tmp_path / "lora-unet-quick.csv"
    assert ("the UNet is left out" in shown) != has_diffusers
    assert result.exists() == has_diffusers
    if has_diffusers:
        assert "rank 64: " in shown and "of the time without LoRA; its FLOPs make 1." in shown
        assert {"no LoRA", "fastsample rank 16", "fastsample rank 64"} <= {row["provider"] for row in read(result)}


def test_flops_of_projections() -> None:
    """Of M rows: M K N for each product, M K r and M r N for each adapter, times two."""
    case = projections.Case.of((3, 8, 33), torch.float32)
    assert case.flops() == 2 * 3 * 3 * 8 * 33
    assert case.flops(4) == case.flops() + 2 * 3 * 3 * 4 * (8 + 33)
    counted = {"nn.Linear": 0, "fastsample rank 4": 4, "PEFT merged rank 16": 0, "FMA peak": 0}
    assert projections.flops_of(case, counted) == {name: case.flops(rank) for name, rank in counted.items()}


def test_geometric_means() -> None:
    found = projections.geometric([Spread(1, 2, 4), Spread(4, 8, 9)])
    assert found == pytest.approx((2, 4, 6))


def test_projections_that_differ_are_found() -> None:
    calls = {"nn.Linear": lambda: [torch.ones(2)], "other": lambda: [torch.full((2,), 1.01)]}
    with pytest.raises(AssertionError, match="other: Tensor-likes are not close"):
        projections.check_agreement(calls)


def test_unets_that_ignore_their_adapter_are_found() -> None:
    same = torch.randn(8)
    with pytest.raises(AssertionError, match="fastsample rank 16 computes what the UNet without LoRA does"):
        unets.check_agreement({name: lambda: same for name in ("no LoRA", "fastsample rank 16", "fastsample rank 64")})


@needs_cpu
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--shapes", "4x4"], "say with --only"),
        (["--only", "unet", "--shapes", "4x4"], "unet takes shapes of 4 sizes"),
        (["--only", "adapters", "--shapes", "4"], "adapters takes shapes of 2 or 3 sizes"),
    ],
)
def test_shapes_of_other_sections_are_refused(
    flags: list[str], reason: str, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        lora.main([*quick, *flags])
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def _answer(name: str, first: float, other: float, rounds: int) -> dict[str, object]:
    seconds = {"avx512": [first] * rounds, "torch": [other] * rounds}
    return {"name": name, "first": "avx512", "rows": 64, "wall": 0.02, "seconds": seconds}


def test_choices_of_many_processes_are_counted() -> None:
    answers = [_answer("torch", 4e-5, 1e-5, 4), _answer("torch", 4e-5, 2e-5, 4), _answer("avx512", 4e-5, 1e-5, 2)]
    rows = {row.candidate: row for row in choice.rows_of("float32", answers)}
    assert {name: row.chosen for name, row in rows.items()} == {"torch": 2, "avx512": 1}
    assert all((row.processes, row.measured) == (3, 2) for row in rows.values())
    assert (rows["torch"].ratio_min, rows["torch"].ratio_max) == pytest.approx((0.25, 0.5))
    assert (rows["avx512"].ratio_min, rows["avx512"].ratio_max) == (1, 1)
    assert rows["torch"].probe_ms == pytest.approx(0.24) and rows["torch"].wall_ms_p50 == pytest.approx(20)
