"""Attention projections with low-rank adapters: q, k and v of one input, against three bare nn.Linear and peers.

The candidates of a shape, all ranks of ours among them, run in one measurement, beside bare multiply-adds in registers:
what these reach in the same round is the peak that a share refers to. Before it, each one's error against float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from benchmarks.cases.lora import Call, Case, Outputs, error, layer, linear, tolerance
from benchmarks.common.harness import Candidate, Spread, Timing, measure, ratio, spread
from benchmarks.common.options import Run, Shape, label
from benchmarks.common.report import OURS, Row, against, percent, rows_of, table
from benchmarks.machine_code.fma import PEAK, peak
from benchmarks.peers.lora import Projections, by_hand, each, with_peft
from benchmarks.peers.openvino import with_openvino
from benchmarks.peers.plain_torch import compiled

SHAPES: tuple[Shape, ...] = ((4096, 320), (1024, 640), (256, 1280), (2048, 1024), (77, 768, 320), (4096, 1536))
QUICK_SHAPES: tuple[Shape, ...] = ((29, 32), (13, 24, 40))
RANKS = (4, 16, 64, 128)
PEER_RANK, LARGE_RANK = 16, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASELINE = "nn.Linear"
BARE = f"{OURS} without LoRA"
PEFT_FLOAT32 = "PEFT float32 factors"


@dataclass(frozen=True)
class FlopRow(Row):
    """A row with what it computes.

    Attributes:
        gflop_per_s: multiplications and additions of base product, shrink and expansion, by p50.
        peak_p20, peak_p50, peak_p80: share of the peak, formed within each round; None where it cannot be measured.
        error: against float64, relative, in the Frobenius norm; None of what computes no product.
    """

    gflop_per_s: float = 0.0
    peak_p20: float | None = None
    peak_p50: float | None = None
    peak_p80: float | None = None
    error: float | None = None


def section(run: Run, dtype: torch.dtype) -> list[Row]:
    """Times all candidates in every shape, and prints the means that the aims speak of."""
    rows: list[FlopRow] = []
    measured: dict[Shape, dict[str, Timing]] = {}
    for shape in run.shapes:
        case = Case.of(shape, dtype, run.device)
        calls = calls_of(case, every_rank=shape == run.shapes[0], with_compile=not run.quick)
        check_agreement(calls)
        errors = errors_of(case, calls)
        candidates, flops = [Candidate(provider, call) for provider, call in calls.items()], flops_of(case, calls)
        if run.device.type == "cpu" and (found := peak(dtype)) is not None:
            run_peak, flops[PEAK] = found
            candidates.append(Candidate(PEAK, run_peak))
        timings = measured[shape] = measure(candidates, run.rounds, clock=run.clock)
        baselines = {who: base for who, base in against(BASELINE, timings).items() if who != PEAK}
        timed = rows_of(f"projections {name_of(dtype)}", label(shape), timings, baselines)
        made = [replace(row, error=errors.get(row.provider)) for row in with_flops(timed, timings, flops)]
        print(table(made))
        for row in made:
            share = "" if row.error is None else f", error {row.error:.2e}"
            if row.peak_p20 is not None and row.peak_p50 is not None and row.peak_p80 is not None:
                share += f", {percent(Spread(row.peak_p20, row.peak_p50, row.peak_p80))} of the peak"
            print(f"  {row.provider:<39} {row.gflop_per_s:>8.1f} GFLOP/s{share}")
        rows += made
    summarise(dtype, measured, rows)
    return list(rows)


def calls_of(case: Case, *, every_rank: bool, with_compile: bool) -> dict[str, Call]:
    """Everything to be compared, by provider; `every_rank` of peers too."""
    bare = [linear(weight) for weight in case.weights]
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
        if rank == PEER_RANK and (fused := with_openvino(case, pairs)) is not None:
            calls[provider("OpenVINO", rank)] = fused
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


def check_agreement(calls: Mapping[str, Call]) -> None:
    """Fails unless candidates of one rank compute the same."""
    wanted: dict[str, Outputs] = {}
    for name, call in calls.items():
        rank, outputs = name.partition(" rank ")[2], call()
        most = tolerance(outputs[0].dtype)
        for y, want in zip(outputs, wanted.setdefault(rank, outputs), strict=True):
            note = partial("{}: {}".format, name)
            torch.testing.assert_close(y, want, rtol=most, atol=most, msg=note)


def errors_of(case: Case, calls: Mapping[str, Call]) -> dict[str, float]:
    """Of each call's result, against the exact one of its operands."""
    exact, errors = {}, {}
    for name, call in calls.items():
        rank = int(name.partition(" rank ")[2] or 0)
        if rank not in exact:
            exact[rank] = case.exact(rank)
        errors[name] = error(call(), exact[rank])
    return errors


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
    """Prints geometric means over the shapes and the largest ratios, shares of the peak, and errors beside torch's."""
    ours = provider(OURS, PEER_RANK)
    print(f"\n{name_of(dtype)}, {len(measured)} shapes: geometric means of medians (of 20 % and 80 % quantiles)")
    for rank in (PEER_RANK, LARGE_RANK):
        over = {shape: ratio(timings[provider(OURS, rank)], timings[BASELINE]) for shape, timings in measured.items()}
        print(f"  {provider(OURS, rank)} / {BASELINE}: {_mean_and_largest(over)}")
        beyond = {shape: Spread(*(v / added_flops(shape, rank) for v in one)) for shape, one in over.items()}
        print(f"    divided by the FLOPs it adds: {_mean_and_largest(beyond)}")
    for name in ("PEFT", PEFT_FLOAT32, "PEFT merged", "addmm", "torch.compile", "OpenVINO"):
        theirs = provider(name, PEER_RANK)
        if all(theirs in timings for timings in measured.values()):
            found = {shape: ratio(timings[theirs], timings[ours]) for shape, timings in measured.items()}
            print(f"  {theirs} / {ours}: {_interval(geometric(list(found.values())))}")
    shares = {row.case: row.peak_p50 for row in rows if row.provider == ours and row.peak_p50 is not None}
    if shares:
        least, most = (choose(shares, key=shares.__getitem__) for choose in (min, max))
        low, high = 100 * shares[least], 100 * shares[most]
        print(f"  {ours}: {low:.0f} % of the peak at {least} to {high:.0f} % at {most}")
    errors = {(row.case, row.provider): row.error for row in rows if row.error is not None}
    for own, theirs in ((BARE, BASELINE), (ours, provider("addmm", PEER_RANK))):
        worst = max(measured, key=lambda shape: errors[label(shape), own] / errors[label(shape), theirs])
        own_error, their_error = (errors[label(worst), who] for who in (own, theirs))
        more = f"{own_error:.2e} against {their_error:.2e} at {label(worst)}"
        print(f"  error of {own} / {theirs}: at most {own_error / their_error:.3f}, {more}")
    print(flush=True)


def _mean_and_largest(found: Mapping[Shape, Spread]) -> str:
    worst = max(found, key=lambda shape: found[shape].p50)
    return f"{_interval(geometric(list(found.values())))}, largest {_interval(found[worst])} at {label(worst)}"


def added_flops(shape: Shape, rank: int) -> float:
    """The FLOPs of a linear with an adapter by those of the linear."""
    k, n = shape[1], shape[-1]
    return (k * n + rank * (k + n)) / (k * n)


def _interval(one: Spread) -> str:
    return f"{one.p50:.3f} ({one.p20:.3f} .. {one.p80:.3f})"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes_named(text: str, known: Sequence[torch.dtype]) -> tuple[torch.dtype, ...]:
    """Those of these dtypes that a text names, separated by commas. Raises ValueError for another name."""
    by_name = {name_of(dtype): dtype for dtype in known}
    names = text.split(",")
    # KeyError is nothing that argparse knows of.
    if any(name not in by_name for name in names):
        raise ValueError
    return tuple(by_name[name] for name in dict.fromkeys(names))
