"""Attention projections with low-rank adapters: q, k and v of one input, against three bare nn.Linear and peers.

The candidates of a shape, all ranks of ours among them, run in one measurement, beside bare multiply-adds in registers:
what these reach in the same round is the peak that a share refers to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Candidate, Spread, Timing, measure, ratio, spread
from benchmarks.options import CPU, Run, Shape, label
from benchmarks.peers import compiled
from benchmarks.report import OURS, Row, against, percent, rows_of, table
from fastsample.lora import QKVProjection
from fastsample.ops.backend import _cpu

SHAPES: tuple[Shape, ...] = ((4096, 320), (1024, 640), (256, 1280), (77, 768, 320), (4096, 1536))
QUICK_SHAPES: tuple[Shape, ...] = ((29, 32), (13, 24, 40))
RANKS = (4, 16, 64, 128)
PEER_RANK = 16
DTYPES = (torch.float32, torch.bfloat16)
SCALE = 0.5
BASELINE = "nn.Linear"
BARE = f"{OURS} without LoRA"
PEAK = "FMA peak"
PEFT_FLOAT32 = "PEFT float32 factors"

Pair = tuple[Tensor, Tensor]
Outputs = Sequence[Tensor]
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class FlopRow(Row):
    """A row with what it computes.

    Attributes:
        gflop_per_s: multiplications and additions of base product, shrink and expansion, by p50.
        peak_p20, peak_p50, peak_p80: share of the peak, formed within each round; None where it cannot be measured.
    """

    gflop_per_s: float = 0.0
    peak_p20: float | None = None
    peak_p50: float | None = None
    peak_p80: float | None = None


class Projections(nn.Module):
    """Three linears without bias, as attention's to_q, to_k and to_v are, with an adapter each: plain torch."""

    def __init__(self, weights: Sequence[Tensor], pairs: Sequence[Pair] = ()) -> None:
        super().__init__()
        self.q, self.k, self.v = (_linear(weight) for weight in weights)
        self.downs = nn.ParameterList([down for down, _ in pairs])
        self.ups = nn.ParameterList([up for _, up in pairs])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linears = (self.q, self.k, self.v)
        if not len(self.downs):
            return tuple(linear(x) for linear in linears)
        factors = zip(self.downs, self.ups, strict=True)
        return tuple(
            linear(x) + SCALE * functional.linear(functional.linear(x, down), up)
            for linear, (down, up) in zip(linears, factors, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Case:
    """One shape in one dtype: x (rows, in) and three weights (out, in), results of order 1."""

    x: Tensor
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: torch.device = CPU) -> Case:
        """Shape (rows, width), or (rows, in, out)."""
        rows, k, n = (*shape, shape[-1])[:3]
        made = torch.Generator().manual_seed(0)
        weights = tuple(torch.randn(n, k, generator=made).div(k**0.5).to(device, dtype) for _ in range(3))
        return cls(torch.randn(rows, k, generator=made).to(device, dtype), weights)

    def pairs(self, rank: int, seed: int = 1) -> list[Pair]:
        """(A, B) of each linear."""
        made, k = torch.Generator().manual_seed(seed), self.x.shape[-1]
        return [
            (
                torch.randn(rank, k, generator=made).div(k**0.5).to(weight),
                torch.randn(len(weight), rank, generator=made).div(rank**0.5).to(weight),
            )
            for weight in self.weights
        ]

    def flops(self, rank: int = 0) -> int:
        """Two for each multiplication and addition: 2 M (K N + K R + N r), N and R summed over the linears."""
        k, n, count = self.x.shape[-1], sum(map(len, self.weights)), len(self.weights)
        return 2 * (self.x.numel() // k) * (k * n + count * k * rank + n * rank)


def section(run: Run) -> list[Row]:
    """Times all candidates in every shape and dtype, and prints the means that the aims speak of."""
    rows: list[Row] = []
    for dtype in DTYPES:
        own: list[FlopRow] = []
        measured: dict[Shape, dict[str, Timing]] = {}
        for shape in run.shapes:
            case, name = Case.of(shape, dtype, run.device), f"projections {_name(dtype)}"
            calls = calls_of(case, every_rank=shape == run.shapes[0], with_compile=not run.quick)
            check_agreement(calls)
            candidates, flops = [Candidate(provider, call) for provider, call in calls.items()], flops_of(case, calls)
            if run.device.type == "cpu" and (found := peak(dtype)) is not None:
                run_peak, flops[PEAK] = found
                candidates.append(Candidate(PEAK, run_peak))
            timings = measured[shape] = measure(candidates, run.rounds, clock=run.clock)
            baselines = {who: base for who, base in against(BASELINE, timings).items() if who != PEAK}
            made = with_flops(rows_of(name, label(shape), timings, baselines), timings, flops)
            print(table(made))
            for row in made:
                share = ""
                if row.peak_p20 is not None and row.peak_p50 is not None and row.peak_p80 is not None:
                    share = f", {percent(Spread(row.peak_p20, row.peak_p50, row.peak_p80))} of the peak"
                print(f"  {row.provider:<39} {row.gflop_per_s:>8.1f} GFLOP/s{share}")
            own += made
        summarise(dtype, measured, own)
        rows += own
    return rows


def calls_of(case: Case, *, every_rank: bool, with_compile: bool) -> dict[str, Call]:
    """Everything to be compared, by provider; `every_rank` of peers too."""
    bare = [_linear(weight) for weight in case.weights]
    calls: dict[str, Call] = {BASELINE: partial(each, bare, case.x), BARE: partial(layer(case, {}), case.x)}
    for rank in RANKS:
        pairs = case.pairs(rank)
        calls[provider(OURS, rank)] = partial(layer(case, {"own": pairs}), case.x)
        if rank == PEER_RANK or every_rank:
            calls[provider("addmm", rank)] = partial(by_hand, case.x, case.weights, pairs)
            # Merged it costs the same at every rank.
            for merged in (False, True) if rank == PEER_RANK else (False,):
                if (theirs := with_peft(case.weights, pairs, merged)) is not None:
                    calls[provider("PEFT merged" if merged else "PEFT", rank)] = partial(each, theirs, case.x)
        if rank == PEER_RANK and case.x.dtype != torch.float32:
            # get_peft_model keeps half-precision adapters in float32; diffusers' loaders keep the weights' dtype.
            wide = [(down.float(), up.float()) for down, up in pairs]
            if (theirs := with_peft(case.weights, wide, merged=False)) is not None:
                calls[provider(PEFT_FLOAT32, rank)] = partial(each, theirs, case.x)
        if rank == PEER_RANK and with_compile:
            # Freezing folds weights that a graph would otherwise take as inputs; it acts while the graph is compiled.
            with torch._inductor.config.patch(freezing=True):
                made = compiled(Projections(case.weights, pairs).eval(), [case.x])
            if made is not None:
                calls[provider("torch.compile", rank)] = made  # type: ignore[assignment]
    return calls


def provider(name: str, rank: int) -> str:
    """A candidate's name beside its other ranks."""
    return f"{name} rank {rank}"


def layer(case: Case, adapters: Mapping[str, Sequence[Pair]]) -> QKVProjection:
    """The fused layer of the case's linears with all of these adapters active."""
    made = QKVProjection.from_linears([_linear(weight) for weight in case.weights])
    for name, pairs in adapters.items():
        made.add_adapter(name, pairs, scale=SCALE)
    return made


def each(linears: Sequence[nn.Module], x: Tensor) -> Outputs:
    """One after the other, without the cost of a module around them."""
    return [linear(x) for linear in linears]


def by_hand(x: Tensor, weights: Sequence[Tensor], pairs: Sequence[Pair]) -> Outputs:
    """What one writes who wants no pass more than torch needs."""
    return [
        torch.addmm(functional.linear(x, weight), x @ down.T, up.T, alpha=SCALE)
        for weight, (down, up) in zip(weights, pairs, strict=True)
    ]


def with_peft(weights: Sequence[Tensor], pairs: Sequence[Pair], merged: bool) -> list[nn.Module] | None:
    """PEFT's layers around the same weights, or around copies where it adds the adapter to them; None without PEFT."""
    peft = peft_if_there()
    if peft is None:
        return None
    made = Projections([weight.clone() for weight in weights] if merged else weights).eval()
    rank = len(pairs[0][0])
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["q", "k", "v"]), made)
    for layer, (down, up) in zip((made.q, made.k, made.v), pairs, strict=True):
        set_peft(layer, down, up)
        if merged:
            layer.merge()
    return [made.q, made.k, made.v]


def set_peft(layer: Any, down: Tensor, up: Tensor) -> None:
    """Gives PEFT's layer these factors."""
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down, up


@cache
def peft_if_there() -> Any:
    """The module peft; without it None, and one note."""
    try:
        import peft
    except ImportError as error:
        print(f"PEFT is left out, it cannot be imported: {error}")
        return None
    return peft


def peak(dtype: torch.dtype) -> tuple[Callable[[], int], int] | None:
    """A call of some 2 ms that multiplies and adds in registers alone, and its FLOPs; None where the CPU cannot."""
    code, threads, iterations = {torch.float32: 0, torch.bfloat16: 2}[dtype], torch.get_num_threads(), 1000
    try:
        _cpu.fma_peak(iterations, code, threads)
    except ValueError as error:
        print(f"shares of the peak are left out: {error}")
        return None
    # The least of a few: what waits for a core on a busy machine says nothing about how long the work is.
    while (seconds := min(_seconds(partial(_cpu.fma_peak, iterations, code, threads)) for _ in range(5))) < 1e-3:
        iterations *= 2
    run = partial(_cpu.fma_peak, max(1, round(iterations * 2e-3 / seconds)), code, threads)
    return run, run()


def check_agreement(calls: Mapping[str, Call]) -> None:
    """Fails unless candidates of one rank compute the same: in bfloat16 some roundings of values up to 5 or so."""
    wanted: dict[str, Outputs] = {}
    for name, call in calls.items():
        rank, outputs = name.partition(" rank ")[2], call()
        tolerance = 1e-4 if outputs[0].dtype == torch.float32 else 0.04
        for y, want in zip(outputs, wanted.setdefault(rank, outputs), strict=True):
            note = partial("{}: {}".format, name)
            torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance, msg=note)


def flops_of(case: Case, providers: Iterable[str]) -> dict[str, int]:
    """Of each call. Merged weights cost what bare ones do."""
    ranks = {name: 0 if "merged" in name else int(name.partition(" rank ")[2] or 0) for name in providers}
    return {name: case.flops(rank) for name, rank in ranks.items()}


def with_flops(rows: Sequence[Row], timings: Mapping[str, Timing], flops: Mapping[str, int]) -> list[FlopRow]:
    """The rows with their speed, and their share of the peak where it was timed."""
    made = []
    for row in rows:
        count, timing = flops[row.provider], timings[row.provider]
        found = FlopRow(**asdict(row), gflop_per_s=count / row.p50_us * 1e-3)
        if PEAK in timings:
            share = spread(count / timing.seconds / (flops[PEAK] / timings[PEAK].seconds))
            found = replace(found, peak_p20=share.p20, peak_p50=share.p50, peak_p80=share.p80)
        made.append(found)
    return made


def geometric(spreads: Sequence[Spread]) -> Spread:
    """Geometric means of each quantile: an interval as wide as if all cases had their bad rounds at once."""
    return Spread(*(math.exp(math.fsum(map(math.log, values)) / len(values)) for values in zip(*spreads, strict=True)))


def summarise(dtype: torch.dtype, measured: Mapping[Shape, Mapping[str, Timing]], rows: Sequence[FlopRow]) -> None:
    """Prints geometric means over the shapes, the largest ratio, and the least share of the peak."""
    print(f"\n{_name(dtype)}, {len(measured)} shapes: geometric means of medians (of 20 % and 80 % quantiles)")
    for rank in RANKS:
        ours = provider(OURS, rank)
        over = {shape: ratio(timings[ours], timings[BASELINE]) for shape, timings in measured.items()}
        print(f"  {ours} / {BASELINE}: {_mean_and_largest(over)}")
        beyond = {shape: Spread(*(v / _added(shape, rank) for v in one)) for shape, one in over.items()}
        print(f"    by the FLOPs of both: {_mean_and_largest(beyond)}")
        shares = {row.case: row.peak_p50 for row in rows if row.provider == ours and row.peak_p50 is not None}
        if shares:
            least = min(shares, key=shares.__getitem__)
            print(f"    at least {100 * shares[least]:.0f} % of the peak, at {least}")
    for name in ("PEFT", PEFT_FLOAT32, "PEFT merged", "addmm", "torch.compile"):
        theirs, ours = provider(name, PEER_RANK), provider(OURS, PEER_RANK)
        if all(theirs in timings for timings in measured.values()):
            found = {shape: ratio(timings[theirs], timings[ours]) for shape, timings in measured.items()}
            print(f"  {theirs} / {ours}: {_interval(geometric(list(found.values())))}")
    print(flush=True)


def _mean_and_largest(found: Mapping[Shape, Spread]) -> str:
    worst = max(found, key=lambda shape: found[shape].p50)
    return f"{_interval(geometric(list(found.values())))}, largest {_interval(found[worst])} at {label(worst)}"


def _added(shape: Shape, rank: int) -> float:
    k, n = shape[1], shape[-1]
    return (k * n + rank * (k + n)) / (k * n)


def _interval(one: Spread) -> str:
    return f"{one.p50:.3f} ({one.p20:.3f} .. {one.p80:.3f})"


def _linear(weight: Tensor) -> Any:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
