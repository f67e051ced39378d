"""benchmarks.lora: smoke runs, what it counts, and what it refuses to time."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastsample
from benchmarks import choice, lora
from benchmarks.cases.lora import Case, error
from benchmarks.common import cpu, precision
from benchmarks.common.harness import Spread
from benchmarks.common.optional import optional
from benchmarks.peers import openvino as openvino_peer
from benchmarks.sections import projections, unets
from support.levels import needs_cpu
from support.results import read

FAMILY = cpu.slug(cpu.family())


@needs_cpu
def test_lora_projections(has_peft: bool, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora.main([*quick, "--only", "projections", "--shapes", "15x16,3x8x34"]) == 0
    shown = capsys.readouterr().out
    assert "rank 16 / nn.Linear: " in shown and "GFLOP/s, " in shown
    assert ("PEFT is left out" in shown, "PEFT rank 16 / fastsample rank 16: " in shown) == (not has_peft, has_peft)
    peers = {"addmm", "PEFT", "PEFT merged"} if has_peft else {"addmm"}
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"\n{dtype}, 2 shapes: " in shown
        name = f"lora-projections-{dtype}-{FAMILY}-quick"
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        written = read(tmp_path / f"{name}.csv")
        assert {row["benchmark"] for row in written} == {f"projections {dtype}"}
        for case in ("15x16", "3x8x34"):
            own = [row for row in written if row["case"] == case]
            assert {f"{name} rank 16" for name in (*peers, "fastsample")} < {row["provider"] for row in own}
            assert all(float(row["gflop_per_s"]) > 0 for row in own)
            assert {row["baseline"] for row in own} == {"", "nn.Linear"}
            # Half of the last place is 2^-24, 2^-9 or 2^-12 of a value; the intermediate t and torch's sum add theirs.
            most = {"float32": 2**-20, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
            assert all(0 < float(row["error"]) < most for row in own if row["provider"] != "FMA peak")


@needs_cpu
def test_one_dtype_leaves_the_files_of_others_alone(quick: list[str], tmp_path: Path) -> None:
    flags = [*quick, "--only", "projections", "--shapes", "15x16"]
    assert lora.main([*flags, "--dtypes", "float16,float32"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert lora.main([*flags, "--dtypes", "bfloat16"]) == 0
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    dtypes = {path.name.removesuffix(f"-{FAMILY}-quick.csv").rpartition("-")[2] for path in tmp_path.glob("*.csv")}
    assert dtypes == {"float32", "float16", "bfloat16"}


@needs_cpu
def test_the_switch_for_float32_products_is_set_for_the_run_alone(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := precision.refusal("bf16"):
        pytest.skip(reason)
    seen: list[tuple[str, torch.dtype]] = []
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision

    def section(run: object, dtype: torch.dtype) -> list[object]:
        seen.append((switch.fp32_precision, dtype))
        return projections.section(run, dtype)  # type: ignore[arg-type, return-value]

    measured = lora.SECTIONS["projections"]._replace(measured=section)  # type: ignore[arg-type]
    monkeypatch.setattr(lora, "SECTIONS", {"projections": measured})
    assert lora.main([*quick, "--only", "projections", "--shapes", "15x16", "--fp32-precision", "bf16"]) == 0
    assert seen == [("bf16", torch.float32)] and switch.fp32_precision == before
    assert {path.stem for path in tmp_path.iterdir()} == {f"lora-projections-float32-precision-bf16-{FAMILY}-quick"}


def test_a_torch_without_the_switch_is_refused(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "torch", SimpleNamespace(backends=SimpleNamespace(mkldnn=None), __version__="2.6"))
    assert precision.is_strict()
    assert "torch 2.6 cannot set" in precision.refusal("bf16")
    if fastsample.backends()["cpu"]["available"]:
        with pytest.raises(SystemExit, match="2"):
            lora.main([*quick, "--fp32-precision", "bf16"])
        assert "refused: --fp32-precision: torch 2.6 cannot set" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_openvino_fuses_and_agrees(dtype: torch.dtype) -> None:
    pytest.importorskip("openvino")
    optional.cache_clear()
    case = Case.of((29, 24, 40), dtype)
    call = openvino_peer.with_openvino(case, case.pairs(4))
    assert call is not None
    assert error(call(), case.exact(4)) < (2**-20 if dtype == torch.float32 else 2**-7)


def test_without_openvino_it_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    optional.cache_clear()
    case = Case.of((3, 8), torch.float32)
    assert openvino_peer.with_openvino(case, case.pairs(4)) is None
    assert "OpenVINO is left out" in capsys.readouterr().out
    optional.cache_clear()


@needs_cpu
def test_lora_adapters(quick: list[str], tmp_path: Path) -> None:
    assert lora.main([*quick, "--only", "adapters", "--shapes", "15x16"]) == 0
    for dtype in ("float32", "bfloat16", "float16"):
        written = read(tmp_path / f"lora-adapters-{dtype}-{FAMILY}-quick.csv")
        assert {row["case"] for row in written} == {"15x16", "8x15x16"}
        assert {row["baseline"] for row in written} == {"", "one of rank 32", "one adapter for all"}


@needs_cpu
def test_lora_unet(has_diffusers: bool, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora.main([*quick, "--only", "unet"]) == 0
    shown = capsys.readouterr().out
    assert ("the UNet is left out" in shown) != has_diffusers
    for dtype in ("float32", "bfloat16"):
        result = tmp_path / f"lora-unet-{dtype}-{FAMILY}-quick.csv"
        assert result.exists() == has_diffusers
        if has_diffusers:
            assert "rank 64: " in shown and "of the time without LoRA; its FLOPs make 1." in shown
            assert {"no LoRA", "fastsample rank 16", "fastsample rank 64"} <= {row["provider"] for row in read(result)}
            assert {row["benchmark"] for row in read(result)} == {f"unet {dtype}"}


def test_flops_of_projections() -> None:
    """Of M rows: M K N for each product, M K r and M r N for each adapter, times two."""
    case = Case.of((3, 8, 33), torch.float32)
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


def test_unets_that_differ_by_more_than_roundings_are_found() -> None:
    base, effect, roundings = torch.randn(3, 4096)
    with_lora = base + effect
    calls = {
        "no LoRA": base,
        "fastsample rank 16": with_lora,
        "fastsample rank 64": with_lora,
        "PEFT rank 16": with_lora + 0.05 * roundings,  # 0.05 sqrt(1/2) of the output's deviation
    }
    unets.check_agreement({name: lambda y=y: y for name, y in calls.items()}, rounding=0.03)
    with pytest.raises(AssertionError, match=r"fastsample rank 16 and PEFT differ by 0\.03"):
        unets.check_agreement({name: lambda y=y: y for name, y in calls.items()}, rounding=0.01)


def test_errors_are_relative_and_of_all_outputs_together() -> None:
    exact = [torch.tensor([3.0], dtype=torch.float64), torch.tensor([0.0, 4.0], dtype=torch.float64)]
    assert error([torch.tensor([3.0]), torch.tensor([0.3, 4.4])], exact) == pytest.approx(0.1)


def test_the_exact_result_holds_the_adapter() -> None:
    case = Case.of((3, 8, 5), torch.float32)
    down, up = case.pairs(4)[0]
    merged = case.weights[0].double() + 0.5 * up.double() @ down.double()
    torch.testing.assert_close(case.exact(4)[0], case.x.double() @ merged.T)
    torch.testing.assert_close(case.exact()[0], case.x.double() @ case.weights[0].double().T)


@needs_cpu
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--shapes", "4x4"], "say with --only"),
        (["--only", "unet", "--shapes", "4x4"], "unet takes shapes of 4 sizes"),
        (["--only", "adapters", "--shapes", "4"], "adapters takes shapes of 2 or 3 sizes"),
        (["--dtypes", "float16"], "unet takes float32, bfloat16; choose a section with --only"),
        (["--dtypes", "float64"], "argument --dtypes"),
        (["--dtypes", "float32,bfloat16", "--fp32-precision", "bf16"], "this switch is for float32 on CPUs"),
        (["--fp32-precision", "fp8"], "argument --fp32-precision"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
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
