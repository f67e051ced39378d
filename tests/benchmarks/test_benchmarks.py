"""The benchmarks' harness, and smoke runs of every script."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample
from benchmarks import convergence, digits, lora, nll, noise, sampler, step
from benchmarks.cases.repeatable import repeatable
from benchmarks.cases.steps import NOISE_FREE, NOISY, Case
from benchmarks.common import cpu, harness, options, report
from benchmarks.common.harness import Candidate, Spread, Timing, measure
from benchmarks.models.mixture import Mixture
from benchmarks.peers.plain_torch import compiled
from support.levels import needs_cpu
from support.results import read

FAMILY = cpu.slug(cpu.family())


def timing(*seconds: float, bytes: int = 0) -> Timing:
    return Timing(np.array(seconds), 1, bytes)


def test_rounds_are_interleaved_and_rotated() -> None:
    turns: list[str] = []

    def candidate(name: str) -> Candidate:
        return Candidate(name, lambda: turns.append(name))

    timings = measure([candidate("A"), candidate("B"), candidate("C")], rounds=4, round_seconds=0)
    assert "".join(turns[-12:]) == "ABCBCACABABC"
    assert list(timings) == ["A", "B", "C"]
    assert all(one.seconds.shape == (4,) and one.calls == 1 for one in timings.values())


def test_a_cheap_call_is_repeated_within_its_round() -> None:
    found = measure([Candidate("cheap", lambda: None)], rounds=1, round_seconds=0.001)["cheap"]
    assert found.calls > 100
    assert found.seconds[0] < 1e-5  # of one call, not of the round


def test_before_runs_ahead_of_every_call_with_the_clock_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def takes(seconds: float) -> Callable[[], None]:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(harness, "perf_counter", lambda: clock[0])
    found = measure([Candidate("step", takes(2), before=takes(100)), Candidate("bare", takes(3))], 5, 1000)
    assert np.allclose(found["step"].seconds, 2)
    assert np.allclose(found["bare"].seconds, 3)
    assert found["step"].calls == 10  # the untimed part fills the round too


def test_garbage_collection_rests_while_measuring() -> None:
    seen: list[bool] = []
    measure([Candidate("look", lambda: seen.append(gc.isenabled()))], rounds=1, round_seconds=0)
    assert not any(seen)
    assert gc.isenabled()


def test_quantiles() -> None:
    assert harness.spread(np.arange(11.0)) == Spread(2, 5, 8)


def test_ratios_are_formed_within_rounds() -> None:
    # Each drifts by a factor of 4, yet one always takes twice as long as the other.
    assert harness.ratio(timing(2, 4, 8), timing(1, 2, 4)) == Spread(2, 2, 2)


@pytest.mark.parametrize(
    ("spread", "claim"), [((1.1, 2, 3), "slower"), ((0.1, 0.2, 0.9), "faster"), ((0.9, 2, 3), "no claim")]
)
def test_no_claim_where_the_interval_holds_1(spread: tuple[float, float, float], claim: str) -> None:
    assert Spread(*spread).claim == claim


def rows() -> list[report.Row]:
    timings = {"ours": timing(1e-6, 1e-6, bytes=12000), "peer": timing(3e-6, 3e-6), "same": timing(2e-6, 0.5e-6)}
    return report.rows_of("step", "1x4", timings, report.against("ours", timings))


def test_rows_and_table() -> None:
    ours, peer, same = rows()
    assert (ours.p50_us, ours.gb_per_s, ours.baseline, ours.ratio_p50) == (
        pytest.approx(1),
        pytest.approx(12),
        "",
        None,
    )
    assert (peer.gb_per_s, peer.baseline, peer.ratio_p50, peer.claim) == (None, "ours", pytest.approx(3), "slower")
    assert same.claim == "no claim"
    text = report.table(rows())
    assert "x ours: slower" in text
    assert "x ours: no claim" in text


def test_csv_carries_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step.csv"
    report.write_csv(path, rows())
    written = read(path)
    assert [row["provider"] for row in written] == ["ours", "peer", "same"]
    assert written[1]["ratio_p50"] == "3"
    assert all(row["cpu"] and row["torch"] and row["threads"] and row["date"] for row in written)
    assert {row["cpu_family"] for row in written} == {cpu.family()}


def test_csv_is_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.csv"
    path.write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        report.write_csv(path, rows())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("script", [step, sampler, noise, lora])
def test_an_absent_backend_is_refused(
    script: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"cpu": {"available": False, "reason": "nobody compiled it"}}
    monkeypatch.setattr(fastsample, "backends", lambda: absent)
    with pytest.raises(SystemExit) as stop:
        script.main(["--quick", "--out", str(tmp_path)])  # type: ignore[attr-defined]
    assert stop.value.code == 2
    assert "nobody compiled it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_cpu
def test_another_forced_backend_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTSAMPLE_BACKEND", "reference")
    with pytest.raises(SystemExit, match="2"):
        options.require_backend("cpu")
    assert "FASTSAMPLE_BACKEND is 'reference'" in capsys.readouterr().err


@needs_cpu
@pytest.mark.parametrize("flags", [["--isa", "abacus"], ["--rounds", "7"], ["--shapes", "1x0"], ["--shapes", "big"]])
def test_flags_that_cannot_work_are_refused(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        noise.main([*flags, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


CASES = [pytest.param(case, id=case.name.replace(" ", "-")) for case in (*NOISE_FREE, *NOISY)]


@needs_cpu
@pytest.mark.parametrize("case", CASES)
def test_fastsample_and_its_peers_compute_the_same_step(case: Case) -> None:
    pytest.importorskip("diffusers")
    step.check_agreement(case)


@needs_cpu
def test_steps_that_differ_are_found() -> None:
    case = NOISE_FREE[0]
    with pytest.raises(AssertionError, match="not close"):
        step.check_agreement(replace(case, plain=lambda x, m, p, q, b, d: case.plain(x, m, p, q, b, 2 * d)))


@needs_cpu
@pytest.mark.parametrize("case", CASES)
def test_a_step_can_be_timed_for_ever(case: Case) -> None:
    """Coefficients are 1/4, so |x'| <= (|x| + |m| + |h|)/4 + (|x| + |m|)/16 + |noise|, a contraction to below
    2 (|m| + |noise|); the noise stays below 5.9 exp(g0 + g1 v), and |v| below 5.
    """
    x = torch.randn(2, 4, 8, 8)
    operands, table = case.operands(x.shape), repeatable(case.table)
    original, row = case.table, case.row
    for name in ("p", "q", "a", "b", "c1", "c2", "d", "s", "g1"):
        assert (getattr(original, name)[row] != 0) == (getattr(table, name)[row] != 0), "another row, other work"
    plan = case.plan(x, operands.history, table, x)
    for _ in range(3000):
        plan(operands.m, row)
    assert x.isfinite().all() and x.abs().max() < 100
    assert x.abs().median() > 1e-3, "fades away"
    assert (x.abs() > 1e-30).all(), "denormal"


@pytest.mark.parametrize(
    ("name", "streams"),
    [("ddim", 3), ("guided ddim", 4), ("dpm_solver 2M", 5), ("ddpm", 3), ("ddpm learned_range", 4), ("lcm", 3)],
)
def test_streams_of_a_step(name: str, streams: int) -> None:
    assert next(case for case in (*NOISE_FREE, *NOISY) if case.name == name).streams == streams


def test_what_torch_compile_cannot_do_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object, **options: object) -> Callable[..., object]:
        raise_it = RuntimeError("no C++ compiler\nand more")
        return lambda *tensors: (_ for _ in ()).throw(raise_it)

    monkeypatch.setattr(torch, "compile", broken)
    assert compiled(torch.add, [torch.ones(1), torch.ones(1)]) is None
    assert "torch.compile is left out, it failed: no C++ compiler\n" in capsys.readouterr().out


@needs_cpu
def test_step_script(has_diffusers: bool, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*quick, "--shapes", "1x16x7"]) == 0
    assert ("diffusers is left out" in capsys.readouterr().out) != has_diffusers
    peers = {"diffusers"} if has_diffusers else set()
    for name, bound, others in (
        ("noise-free", "triad", {"copy"}),
        ("noisy", step.BOUND, {"noise-free", "randn"}),
        ("dtypes", "triad", set()),
    ):
        written = read(tmp_path / f"step-{name}-{FAMILY}-quick.csv")
        assert {row["provider"] for row in written} == {"fastsample", bound, *others, *peers}
        assert {row["baseline"] for row in written if row["provider"] == "fastsample"} == {bound}
        if name != "dtypes":
            cases = NOISE_FREE if name == "noise-free" else NOISY
            assert {row["benchmark"] for row in written} == {f"step {case.name}" for case in cases}
    for name in ("noise-free", "noisy", "dtypes", "matmul"):
        assert (tmp_path / f"step-{name}-{FAMILY}-quick.png").read_bytes().startswith(b"\x89PNG")


@needs_cpu
def test_a_state_without_channels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step.main(["--quick", "--shapes", "5", "--out", str(tmp_path)])
    assert "channels" in capsys.readouterr().err


@needs_cpu
def test_sampler_script(
    has_diffusers: bool, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampler.main(quick) == 0
    shown = capsys.readouterr().out
    assert ("diffusers is left out" in shown) != has_diffusers
    assert "fastsample: " in shown and "ms a run, the sampler's share" in shown
    for name in ("loop", "short", "actions", "digits"):
        assert (tmp_path / f"sampler-{name}-{FAMILY}-quick.png").read_bytes().startswith(b"\x89PNG")
        assert (
            "diffusers" in {row["provider"] for row in read(tmp_path / f"sampler-{name}-{FAMILY}-quick.csv")}
        ) == has_diffusers


def test_the_mixture_knows_its_noise_and_its_flow() -> None:
    """epsilon = -sigma d/dx log p(x), p the derivative of the distribution function; the flow keeps ranks."""
    schedule = fastsample.Schedule.linear(100)
    mixture = Mixture(schedule)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].requires_grad_()
    (density,) = torch.autograd.grad(mixture.cdf(x, 30).sum(), x, create_graph=True)
    (score,) = torch.autograd.grad(density.log().sum(), x)
    sigma = float(np.sqrt(1 - schedule.alphas_cumprod[30]))
    torch.testing.assert_close(mixture(x.detach(), torch.full((9,), 30)), -sigma * score, rtol=1e-9, atol=1e-12)
    there = mixture.flow(x.detach(), 30, 60)
    torch.testing.assert_close(mixture.flow(there, 60, 30), x.detach(), rtol=1e-9, atol=1e-12)


@needs_cpu
def test_convergence_script(quick: list[str], tmp_path: Path) -> None:
    """Errors fall with the order of the sampler already in these coarse runs, to a tenth of it."""
    assert convergence.main(quick) == 0
    assert (tmp_path / f"convergence-{FAMILY}-quick.png").read_bytes().startswith(b"\x89PNG")
    written = read(tmp_path / f"convergence-{FAMILY}-quick.csv")
    slopes = {row["sampler"]: float(row["slope"]) for row in written if row["study"] == "order"}
    expected = {"DDIM": -1, "DPM-Solver++ 2M": -2, "Heun": -2}
    assert {name: slopes[name] for name in expected} == pytest.approx(expected, rel=0.1)
    assert all(float(row["error"]) > 0 for row in written if row["study"] == "roundtrip")


@needs_cpu
def test_noise_script(quick: list[str], tmp_path: Path) -> None:
    assert noise.main([*quick, "--shapes", "2x3x5"]) == 0
    written = read(tmp_path / f"noise-{FAMILY}-quick.csv")
    assert {row["case"] for row in written} == {"2x3x5 in a buffer", "2x3x5 fresh"}


@needs_cpu
def test_digits_script(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main(quick) == 0
    assert "ms an image" in capsys.readouterr().out
    assert {row["provider"] for row in read(tmp_path / f"digits-{FAMILY}-quick.csv")} == {"forward", "step"}


@needs_cpu
def test_nll_script(quick: list[str], tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    assert nll.main(quick) == 0
    forward, ours = read(tmp_path / f"nll-{FAMILY}-quick.csv")
    assert (forward["provider"], ours["provider"], ours["baseline"]) == ("forward", "fastsample", "forward")


@needs_cpu
def test_noise_quality(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    assert noise.main([*quick, "--quality"]) == 0
    assert "smallest p" in capsys.readouterr().out
    # The seed is fixed, so this never fails by chance.
    assert all(float(row["p"]) > 1e-3 for row in read(tmp_path / f"noise-quality-{FAMILY}-quick.csv"))
