"""The command `fastsample selftest`: every op on every backend that is here, against float64, with times beside it."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import fastsample
from fastsample.ops.backend import backends
from fastsample.samplers import DDIM
from fastsample.schedule import Schedule
from fastsample.selftest.cases import ELEMENT_WISE, LATENTS, ODD, SEED, Call, Case, Wanted, cases

REPEATS = 5
# Of the sampler: its rows; its model, which multiplies x by the gain; the other half's gain and w under guidance.
STEPS, GAIN, UNCONDITIONAL, WEIGHT = 5, 0.5, 0.25, 3.0


@dataclass(frozen=True)
class Place:
    """A backend and the device it is tried on.

    Attributes:
        interpreted: Triton kernels that Python runs: small shapes only, and no times.
    """

    backend: str
    device: torch.device
    interpreted: bool = False


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        error, allowed: in unit roundoffs, of the output that comes nearest to what it is allowed.
        bits: "same" as the first compiled backend's, "differ", or empty where nothing is promised.
        microseconds: median of a call; None where it means nothing.
        failure: an exception's text.
    """

    case: Case
    backend: str
    error: float = 0.0
    allowed: float = 0.0
    bits: str = ""
    microseconds: float | None = None
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within what is allowed, and promised bits are there."""
        return not self.failure and self.error <= self.allowed and self.bits != "differ"


def run(arguments: argparse.Namespace) -> int:
    """Prints the table.

    Returns:
        0 where every check passed, 1 where one failed, 2 where there is no such device or backend.
    """
    try:
        places, absent = places_on(arguments.device, arguments.backend)
    except (ValueError, RuntimeError) as error:
        print(f"fastsample selftest: {error}", file=sys.stderr)
        return 2
    titles = _LINE.format("op", "mode", "dtype", "shape", "backend", "error u", "allowed", "bits", "us")
    print(f"{_heading(places, absent)}\n\n{_NOTES}\n\n{titles} verdict")
    results: list[Result] = []
    has: dict[str, frozenset[str]] = {}
    loops = [
        sampler_case(shape, captured, guided)
        for shape in ((ODD,) if arguments.quick else (ODD, LATENTS))
        for captured, guided in ((False, False), (True, False), (True, True))
    ]
    for case in (*cases(arguments.quick), *loops):
        has.setdefault(case.op, case.backends)
        for result in results_of(case, places):
            print(_row(result), flush=True)
            results.append(result)
    failed = [one for one in results if not one.passed]
    print(f"\n{_summary(results, has, places, absent)}")
    for one in failed:
        print(_row(one), *([f"  {one.failure}"] if one.failure else []), sep="\n")
    return 1 if failed or not results else 0


def _summary(
    results: Sequence[Result], has: Mapping[str, frozenset[str]], places: Sequence[Place], absent: Mapping[str, str]
) -> str:
    """How many checks passed, and what was not checked; `has` tells the backends of each op."""
    counts = Counter(one.backend for one in results)
    each = ", ".join(f"{count} on {name}" for name, count in counts.items())
    failed = sum(not one.passed for one in results)
    lines = [f"{len(results)} checks, {failed} failed: {each}"]
    lacking = [
        f"{op} on {place.backend}" for op, those in has.items() for place in places if place.backend not in those
    ]
    if lacking:
        lines.append(f"no kernel to check: {', '.join(lacking)}")
    if absent:
        lines.append(f"not checked, as absent: {', '.join(absent)}")
    return "\n".join(lines)


def places_on(device: str | None, backend: str | None) -> tuple[list[Place], dict[str, str]]:
    """(where to run, why each other backend is absent).

    Raises:
        ValueError: for an unknown or absent backend. RuntimeError: for a device that torch does not have.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {chosen}: torch finds no such GPU")
        torch.empty(0, device=chosen)
    status = backends()
    if backend is not None and backend not in status:
        raise ValueError(f"--backend must be one of {', '.join(status)}, got {backend!r}")
    absent = {name: one["reason"] for name, one in status.items() if not one["available"]}
    interpreted = bool(status["triton"]["interpreted"])
    if chosen.type == "cpu":
        absent.setdefault("cuda", "it runs on a GPU, and --device is cpu")
        if not interpreted:
            absent.setdefault("triton", "it runs on a GPU, and --device is cpu; or with TRITON_INTERPRET=1, slowly")
    if backend in absent:
        raise ValueError(f"--backend {backend} cannot run here: {absent[backend]}")
    on_cpu = torch.device("cpu")
    every = [
        Place("reference", chosen),
        Place("cpu", on_cpu),
        Place("triton", chosen, interpreted),
        Place("cuda", chosen),
    ]
    here = [place for place in every if place.backend not in absent]
    compiled = [place for place in here if place.backend != "reference"]
    wanted = [place for place in here if backend in (None, place.backend) or place in compiled[:1]]
    return wanted, absent


def results_of(case: Case, places: Sequence[Place]) -> Iterator[Result]:
    """The case on each backend that has the op."""
    first: list[Tensor] | None = None
    for place in places:
        if place.backend not in case.backends or (place.interpreted and not case.small):
            continue
        # A graph holds what a GPU runs, and the interpreter runs on the host.
        if case.on_gpu and (place.device.type == "cpu" or place.interpreted):
            continue
        try:
            call = case.prepare(place.backend, place.device)
            found = [one.detach().cpu().clone() for one in call()]
            microseconds = None if place.interpreted else _microseconds(call, place.device)
        except Exception as problem:  # one op that cannot run must not hide how the others do
            yield Result(case, place.backend, failure=f"{type(problem).__name__}: {problem}")
            continue
        error, allowed = _worst(case.wanted, found, twice=place.backend == "reference")
        bits = ""
        if case.same_bits and place.backend != "reference":
            if first is None:
                first = found
            else:
                same = all(map(_same_bits, found, first))
                bits = "same" if same else "differ"
        yield Result(case, place.backend, error, allowed, bits, microseconds)


def _worst(wanted: Sequence[Wanted], found: Sequence[Tensor], twice: bool) -> tuple[float, float]:
    # Plain torch rounds each product before it adds it.
    factor = 2 if twice else 1
    pairs = [(one.error(value), factor * one.allowed) for one, value in zip(wanted, found, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def sampler_case(shape: tuple[int, ...], captured: bool = False, guided: bool = False) -> Case:
    """A whole run of DDIM with eta 1 and the model m = g x, so that the state is the same on every machine.

    Also captured as a CUDA graph, on GPUs.

    A row makes x' = (folded_x + folded_m g) x + s z: its roundings, at most 6 of the largest state it can have and 3 of
    guidance, are multiplied by what the rows after it multiply x by.
    """
    sampler = DDIM(Schedule.linear(), steps=STEPS, eta=1.0)

    def options(device: torch.device) -> dict[str, Any]:
        halves = (torch.full((shape[0], *(1,) * (len(shape) - 1)), g, device=device) for g in (GAIN, UNCONDITIONAL))
        cond, uncond = ({"gain": half} for half in halves)
        return {"guidance": WEIGHT, "cond": cond, "uncond": uncond} if guided else {"model_kwargs": cond}

    def prepare(backend: str, device: torch.device) -> Call:
        given = {**options(device), "backend": backend, "device": device}
        if captured:
            # Another seed first: what a replay draws must come from its own.
            replay = fastsample.graph(sampler, _linear, shape, seed=SEED + 1, **given)
            return lambda: [replay(seed=SEED)]
        return lambda: [sampler(_linear, shape, seed=SEED, **given)]

    gain, size_of_m, roundings = GAIN, GAIN, 6
    if guided:
        gain += (WEIGHT - 1) * (GAIN - UNCONDITIONAL)
        size_of_m += (WEIGHT - 1) * (GAIN + UNCONDITIONAL)
        roundings += 3
    table, largest, bound = sampler.table, 6.0, 0.0
    for k in range(len(table)):
        of_x, of_m = table.a[k] + table.b[k] * table.p[k], table.b[k] * table.q[k] + table.d[k]
        size = (abs(of_x) + abs(of_m) * size_of_m) * largest + abs(table.s[k]) * 6.0
        growth = abs(of_x + of_m * gain)
        bound, largest = growth * bound + roundings * size, growth * largest + abs(table.s[k]) * 6.0
    x = fastsample.ops.randn(shape, seed=SEED, backend="reference").double()
    value: Tensor = sampler(_linear, x, seed=SEED, backend="reference", **options(x.device))
    wanted = Wanted(value, torch.ones_like(value), bound)
    mode = f"ddim{', guided' if guided else ''}{', a graph' if captured else ''}"
    backends = frozenset({"triton", "cuda"}) if captured else ELEMENT_WISE
    return Case("sampler", mode, torch.float32, shape, prepare, [wanted], True, backends, on_gpu=captured)


def _linear(x: Tensor, t: Tensor, gain: Tensor) -> Tensor:
    return gain * x


def _microseconds(call: Call, device: torch.device) -> float:
    """The median of a few calls; on a GPU by events, each after a write to more memory than its cache holds."""
    if device.type == "cpu":
        times = []
        for _ in range(REPEATS):
            begun = perf_counter()
            call()
            times.append(perf_counter() - begun)
        return 1e6 * statistics.median(times)
    # While it is written, the host prepares the call: what is timed is the device, not Python.
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    with torch.cuda.device(device):
        for start, end in pairs:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs)


_LINE = "{:<11} {:<27} {:<8} {:<10} {:<9} {:>8} {:>8} {:<6} {:>9}"
_NOTES = """\
error u: of the worst element, in unit roundoffs of the result's dtype (2^-24 in float32) times the size of the terms
         that are added up
allowed: the roundings on the way, twice as many for plain torch, which rounds products too
bits:    those of the first compiled backend, where they must be the same
us:      one call of the public op, nothing prepared"""


def _row(result: Result) -> str:
    case = result.case
    if result.failure:
        columns = ["", "", "", ""]
    else:
        time = "" if result.microseconds is None else f"{result.microseconds:.1f}"
        columns = [f"{result.error:.3g}", f"{result.allowed:.3g}", result.bits, time]
    dtype, shape = str(case.dtype).removeprefix("torch."), "x".join(map(str, case.shape))
    verdict = "ok" if result.passed else "FAILED"
    return f"{_LINE.format(case.op, case.mode, dtype, shape, result.backend, *columns)} {verdict}"


def _heading(places: Sequence[Place], absent: Mapping[str, str]) -> str:
    lines = [f"fastsample {fastsample.__version__}, torch {torch.__version__}"]
    for place in places:
        where = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else str(place.device)
        note = ", in Triton's interpreter: small shapes only, and no times" if place.interpreted else ""
        isa = f", {_cpu_levels()}" if place.backend == "cpu" else ""
        lines.append(f"  {place.backend:<10} on {where}{isa}{note}")
    lines += [f"  {name:<10} absent: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _cpu_levels() -> str:
    cpu = backends()["cpu"]
    chosen = ", ".join(f"{dtype} {name}" for dtype, name in cpu["lora"].items())
    return f"{cpu['isa']}; lora_linear: {chosen}{cpu['amx'] and '; no AMX: '}{cpu['amx']}"
