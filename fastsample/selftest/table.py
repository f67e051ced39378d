"""The table that `fastsample selftest` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

import fastsample
from fastsample.ops.available import backends
from fastsample.selftest.results import Result
from fastsample.selftest.targets import Target

_LINE = "{:<11} {:<27} {:<8} {:<10} {:<9} {:>8} {:>8} {:<6} {:>9}"
NOTES = """\
error u: of the worst element, in unit roundoffs of the result's dtype (2^-24 in float32) times the size of the terms
         that are added up
allowed: the roundings on the way, twice as many for plain torch, which rounds products too
bits:    those of the first compiled backend, where they must be the same
us:      one call of the public op, nothing prepared"""
TITLES = f"{_LINE.format('op', 'mode', 'dtype', 'shape', 'backend', 'error u', 'allowed', 'bits', 'us')} verdict"


def row(result: Result) -> str:
    """One line of the table."""
    case = result.case
    if result.failure:
        columns = ["", "", "", ""]
    else:
        time = "" if result.microseconds is None else f"{result.microseconds:.1f}"
        columns = [f"{result.error:.3g}", f"{result.allowed:.3g}", result.bits, time]
    dtype, shape = str(case.dtype).removeprefix("torch."), "x".join(map(str, case.shape))
    verdict = "ok" if result.passed else "FAILED"
    return f"{_LINE.format(case.op, case.mode, dtype, shape, result.backend, *columns)} {verdict}"


def heading(targets: Sequence[Target], absent: Mapping[str, str]) -> str:
    """What runs here: versions, the backends with their devices, and why the others are absent."""
    lines = [f"fastsample {fastsample.__version__}, torch {torch.__version__}"]
    for target in targets:
        where = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else str(target.device)
        note = ", in Triton's interpreter: small shapes only, and no times" if target.interpreted else ""
        isa = f", {_cpu_levels()}" if target.backend == "cpu" else ""
        lines.append(f"  {target.backend:<10} on {where}{isa}{note}")
    lines += [f"  {name:<10} absent: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _cpu_levels() -> str:
    cpu = backends()["cpu"]
    lora_levels = ", ".join(f"{dtype} {name}" for dtype, name in cpu["lora"].items())
    return f"{cpu['isa']}; lora_linear: {lora_levels}{cpu['amx'] and '; no AMX: '}{cpu['amx']}"


def summary(
    results: Sequence[Result], has: Mapping[str, frozenset[str]], targets: Sequence[Target], absent: Mapping[str, str]
) -> str:
    """How many checks passed, and what was not checked; `has` tells the backends of each op."""
    counts = Counter(result.backend for result in results)
    each = ", ".join(f"{count} on {name}" for name, count in counts.items())
    failed = sum(not result.passed for result in results)
    lines = [f"{len(results)} checks, {failed} failed: {each}"]
    lacking = [
        f"{op} on {target.backend}" for op, those in has.items() for target in targets if target.backend not in those
    ]
    if lacking:
        lines.append(f"no kernel to check: {', '.join(lacking)}")
    if absent:
        lines.append(f"not checked, as absent: {', '.join(absent)}")
    return "\n".join(lines)
