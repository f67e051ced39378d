"""Several adapters in one call: two at once against one of the summed rank, one per sample against one for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.lora import Case, layer, tolerance
from benchmarks.common.harness import Candidate, Spread, measure, ratio
from benchmarks.common.options import Run, Shape, label
from benchmarks.common.report import Row, rows_of, table
from benchmarks.sections.projections import geometric, name_of

RANK, SAMPLES, KINDS = 16, 8, 4
TWO, SUMMED = f"two adapters of rank {RANK}", f"one of rank {2 * RANK}"
EACH, SHARED = f"{KINDS} adapters over {SAMPLES} samples", "one adapter for all"


def section(run: Run, dtype: torch.dtype) -> list[Row]:
    """Times both comparisons in every shape; with another adapter for each sample, `rows` rows a sample."""
    rows: list[Row] = []
    ratios: dict[str, list[Spread]] = {TWO: [], EACH: []}
    for shape in run.shapes:
        for ours, baseline, candidates, case in (_at_once(run, shape, dtype), _each(run, shape, dtype)):
            timings = measure(candidates, run.rounds, clock=run.clock)
            new_rows = rows_of(f"adapters {name_of(dtype)}", case, timings, {ours: baseline})
            print(table(new_rows), flush=True)
            ratios[ours].append(ratio(timings[ours], timings[baseline]))
            rows += new_rows
    for ours, baseline in ((TWO, SUMMED), (EACH, SHARED)):
        low, middle, high = geometric(ratios[ours])
        print(f"\n{dtype}: {ours} / {baseline}, geometric mean {middle:.3f} ({low:.3f} .. {high:.3f})", flush=True)
    return rows


def _at_once(run: Run, shape: Shape, dtype: torch.dtype) -> tuple[str, str, list[Candidate], str]:
    case = Case.of(shape, dtype, run.device)
    first, second = (case.pairs(RANK, seed) for seed in (1, 2))
    summed = [(torch.cat([a, c]), torch.cat([b, d], 1)) for (a, b), (c, d) in zip(first, second, strict=True)]
    two, single = layer(case, {"first": first, "second": second}), layer(case, {"summed": summed})
    _check(two(case.x), single(case.x))
    return TWO, SUMMED, [Candidate(TWO, partial(two, case.x)), Candidate(SUMMED, partial(single, case.x))], label(shape)


def _each(run: Run, shape: Shape, dtype: torch.dtype) -> tuple[str, str, list[Candidate], str]:
    case = Case.of(shape, dtype, run.device)
    x = torch.randn(SAMPLES, *case.x.shape).to(case.x)
    pairs = {f"adapter {i}": case.pairs(RANK, i) for i in range(KINDS)}
    index = torch.arange(SAMPLES, device=run.device) % KINDS
    each, shared = layer(case, pairs), layer(case, {"adapter 0": pairs["adapter 0"]})
    for i in range(SAMPLES):
        alone = layer(case, {"own": pairs[f"adapter {index[i]}"]})
        few = x[i : i + 1, :64]
        _check([y[i : i + 1] for y in each(x[:, :64].contiguous(), adapter_index=index)], alone(few))
    candidates = [Candidate(EACH, partial(each, x, adapter_index=index)), Candidate(SHARED, partial(shared, x))]
    return EACH, SHARED, candidates, label((SAMPLES, *shape))


def _check(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for y, want in zip(outputs, wanted, strict=True):
        most = tolerance(y.dtype)
        torch.testing.assert_close(y, want, rtol=most, atol=most)
