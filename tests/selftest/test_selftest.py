"""fastsample selftest: that it passes here, and that it would not if something were wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import selftest
from fastsample.cli import main
from fastsample.selftest import targets as targets_module
from fastsample.selftest.case import LATENTS, ODD, TAIL, TINY, Call, Case, Wanted
from fastsample.selftest.cases import cases
from fastsample.selftest.results import results_of
from fastsample.selftest.sampler_cases import sampler_case
from fastsample.selftest.step_cases import MODES, Mode
from fastsample.selftest.targets import Target, targets_on
from support.levels import needs_cpu

CPU = torch.device("cpu")
HAS_CPU = fastsample.backends()["cpu"]["available"]


def case_of(op: str, mode: str = "", dtype: torch.dtype = torch.float32) -> Case:
    return next(
        one for one in cases() if one.op == op and mode in one.mode and one.dtype == dtype and one.shape != (1, 3)
    )


def changed(case: Case, change: dict[str, float]) -> Case:
    """The case with its first result off by so many times the largest value, on some backends."""

    def prepare(backend: str, device: torch.device) -> Call:
        call = case.prepare(backend, device)

        def wrong() -> Sequence[Tensor]:
            first, *rest = call()
            return [first + change.get(backend, 0.0) * first.abs().max(), *rest]

        return wrong

    return replace(case, prepare=prepare)


@needs_cpu
def test_it_passes_here_and_shows_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--quick", "--device", "cpu", "--backend", "cpu"]) == 0
    shown = capsys.readouterr().out
    checks = [line for line in shown.splitlines() if line.endswith(" ok")]
    assert {line.split()[0] for line in checks} >= {"randn", "step", "posterior", "lora_linear", "sampler"}
    assert all(mode.name in shown for mode in MODES if not mode.rows_there)
    assert f"{len(checks)} checks, 0 failed" in shown
    absent = {name: one["reason"] for name, one in fastsample.backends().items() if not one["available"]}
    assert all(f"  {name:<10} absent: {reason}\n" in shown for name, reason in absent.items())
    assert "no kernel to check: likelihood on cpu" in shown
    assert not absent or f"not checked, as absent: {', '.join(absent)}" in shown


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name.replace(" ", "-"))
def test_what_is_allowed_is_less_than_one_rounding_to_bfloat16(mode: Mode) -> None:
    """A kernel that computed x' in half precision would be found, in every mode."""
    found = mode.case(torch.float32, TAIL).wanted[0]
    rounded = found.value.to(torch.bfloat16).float()
    assert found.error(rounded) > 10 * found.allowed


def test_what_lora_is_allowed_is_less_than_tensor_float_32_loses() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 80, generator=draw) for _ in range(2))
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # TF32 keeps 10 bits of each factor.
    short = [(one.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for one in (x, weight)]
    (wanted, *_) = case_of("lora_linear").wanted
    tf32 = Wanted(exact, size, wanted.roundings)
    assert tf32.error((short[0].double() @ short[1].double().T).float()) > tf32.allowed > tf32.error(x @ weight.T)


@needs_cpu
@pytest.mark.parametrize(
    ("op", "mode"), [("randn", ""), ("step", "clipped"), ("posterior", ""), ("lora_linear", ""), ("sampler", "")]
)
def test_a_wrong_result_is_found(op: str, mode: str) -> None:
    case = sampler_case(ODD) if op == "sampler" else case_of(op, mode)
    good, bad = (list(results_of(changed(case, {"cpu": off}), [Target("cpu", CPU)])) for off in (0.0, 1e-3))
    assert good[0].passed and not bad[0].passed and bad[0].error > bad[0].allowed


@needs_cpu
def test_bits_that_differ_are_found_within_the_tolerance() -> None:
    case = case_of("step", "noise")
    # Twice the same backend, the second time half a unit off: less than is allowed.
    slightly = changed(case, {"cpu": 2.0**-25})
    calls = iter([case.prepare, slightly.prepare])
    result = list(
        results_of(replace(case, prepare=lambda *at: next(calls)(*at)), [Target("cpu", CPU), Target("cpu", CPU)])
    )
    assert [one.error <= one.allowed for one in result] == [True, True]
    assert [(one.bits, one.passed) for one in result] == [("", True), ("differ", False)]


def test_missing_values_shapes_and_exceptions_fail() -> None:
    case = case_of("step", "folded")
    wanted = case.wanted[0]
    assert wanted.error(torch.full(wanted.value.shape, float("nan"))) == float("inf")
    assert wanted.error(wanted.value.float()[:1]) == float("inf")
    assert wanted.error(wanted.value.half()) == float("inf")

    def broken(backend: str, device: torch.device) -> Call:
        raise RuntimeError("no kernel image")

    (result,) = results_of(replace(case, prepare=broken), [Target("reference", CPU)])
    assert not result.passed and "no kernel image" in result.failure


def test_a_failure_is_counted_and_sets_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = changed(case_of("step", "folded"), {"reference": 1e-3})
    monkeypatch.setattr(selftest, "cases", lambda quick: [bad])
    assert main(["selftest", "--quick", "--device", "cpu", "--backend", "reference"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and ", 1 failed: " in shown


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        pytest.param(["--backend", "abacus"], "--backend must be one of reference, cpu, triton, cuda", id="unknown"),
        pytest.param(["--device", "mps"], "--device must be cpu or cuda", id="device"),
        pytest.param(["--device", "nonsense"], "nonsense", id="no device"),
    ],
)
def test_it_refuses(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", *flags]) == 2
    assert reason in capsys.readouterr().err


def pretend(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    """A machine with a GPU, where Triton is there."""
    found = fastsample.backends()
    found["triton"] = {"available": True, "reason": "", "interpreted": interpreted}
    found["cuda"] = {"available": True, "reason": "", "architectures": []}
    monkeypatch.setattr(targets_module, "backends", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))


@pytest.mark.parametrize("interpreted", [False, True], ids=["", "interpreted"])
def test_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    pretend(monkeypatch, interpreted)
    targets, absent = targets_on(None, None)
    gpu = torch.device("cuda")
    assert Target("triton", gpu, interpreted) in targets and Target("cuda", gpu) in targets
    assert "triton" not in absent and "cuda" not in absent


def test_gpu_backends_are_absent_from_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, interpreted=False)
    targets, absent = targets_on("cpu", None)
    assert not {"triton", "cuda"} & {target.backend for target in targets}
    assert all("it runs on a GPU, and --device is cpu" in absent[name] for name in ("triton", "cuda"))
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"--backend {name} cannot run here: it runs on a GPU"):
            targets_on("cpu", name)


def test_the_interpreter_runs_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, interpreted=True)
    targets, absent = targets_on("cpu", "triton")
    assert targets[-1] == Target("triton", CPU, interpreted=True) and "cuda" in absent


def test_the_interpreter_is_given_neither_graphs_nor_large_shapes() -> None:
    gpu = Target("triton", torch.device("cuda"), interpreted=True)
    every = (sampler_case(ODD, captured=True), sampler_case(LATENTS))
    assert [list(results_of(case, [gpu])) for case in every] == [[], []]
    shapes = {case.shape for case in cases() if case.small}
    assert shapes == {TINY, ODD, (3, 5, 24)}


@needs_cpu
def test_guided_runs_and_rows_on_the_device_need_no_gpu_to_be_right() -> None:
    """Only the command leaves them to GPUs: there they are more than the other cases again."""
    there = next(mode for mode in MODES if mode.rows_there).case(torch.float32, ODD)
    guided = sampler_case(ODD, guided=True)
    for case in (replace(there, on_gpu=False), guided):
        results = list(results_of(case, [Target("reference", CPU), Target("cpu", CPU)]))
        assert len(results) == 2 and all(one.passed for one in results), results


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cuda"]) == 2
    assert "fastsample selftest: --device cuda: torch finds no such GPU" in capsys.readouterr().err
    assert main(["selftest", "--backend", "cuda"]) == 2
    assert fastsample.backends()["cuda"]["reason"] in capsys.readouterr().err


@pytest.mark.skipif(not fastsample.backends()["triton"].get("interpreted"), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("op", "dtype"), [*product(("step", "lora_linear"), (torch.float32, torch.float16)), ("randn", torch.float32)]
)
def test_interpreted_kernels_take_part(op: str, dtype: torch.dtype) -> None:
    interpreter = Target("triton", CPU, interpreted=True)
    targets = [Target("cpu", CPU), interpreter] if HAS_CPU else [interpreter]
    mode = "noise" if op == "step" else ""
    results = list(results_of(case_of(op, mode, dtype), targets))
    assert [one.backend for one in results] == [target.backend for target in targets]
    assert all(one.passed for one in results), results
    assert results[-1].microseconds is None


@pytest.mark.gpu
def test_it_passes_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cuda"]) == 0, capsys.readouterr().out
