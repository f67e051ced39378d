"""Timings as rows, and rows as a table on the screen, a CSV file and a plot."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import fastsample
from benchmarks.common import cpu, gpu
from benchmarks.common.harness import Spread, Timing, ratio, spread
from fastsample.storage.writing import replace_text, replacing

OURS = "fastsample"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One candidate in one case.

    Attributes:
        benchmark, case, provider: what was measured.
        p20_us, p50_us, p80_us: microseconds a call, over the rounds.
        rounds, calls: rounds, and calls in each.
        gb_per_s: counted bytes by p50; None where none are counted.
        baseline: the provider that the ratio refers to; empty where there is none.
        ratio_p20, ratio_p50, ratio_p80: time by the baseline's time, formed within each round.
        claim: "slower" or "faster" than the baseline, or "no claim" where ratio_p20 .. ratio_p80 holds 1; "share" where
            the baseline is the whole of which this is a part.
    """

    benchmark: str
    case: str
    provider: str
    p20_us: float
    p50_us: float
    p80_us: float
    rounds: int
    calls: int
    gb_per_s: float | None
    baseline: str = ""
    ratio_p20: float | None = None
    ratio_p50: float | None = None
    ratio_p80: float | None = None
    claim: str = ""


def rows_of(benchmark: str, case: str, timings: Mapping[str, Timing], baselines: Mapping[str, str]) -> list[Row]:
    """A row for each timing; `baselines` says for a provider which other one it is compared with."""
    rows = []
    for provider, timing in timings.items():
        time = spread(timing.seconds * 1e6)
        speed = timing.bytes / time.p50 * 1e-3 if timing.bytes else None
        row = Row(benchmark, case, provider, *time, len(timing.seconds), timing.calls, speed)
        baseline = baselines.get(provider)
        if baseline is not None:
            compared = ratio(timing, timings[baseline])
            row = replace(
                row,
                baseline=baseline,
                ratio_p20=compared.p20,
                ratio_p50=compared.p50,
                ratio_p80=compared.p80,
                claim=compared.claim,
            )
        rows.append(row)
    return rows


def against(baseline: str, timings: Mapping[str, Timing]) -> dict[str, str]:
    """`baselines` for rows_of where all others are compared with one provider."""
    return {provider: baseline for provider in timings if provider != baseline}


def table(rows: Sequence[Row]) -> str:
    """Rows as text, a block for each case."""
    lines: list[str] = []
    title = ""
    for row in rows:
        if title != (title := f"{row.benchmark} {row.case}"):
            lines.append(f"\n{title:<41} {'p20 us':>10} {'p50 us':>10} {'p80 us':>10} {'GB/s':>7}")
        speed = "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}"
        times = f"{row.p20_us:>10.2f} {row.p50_us:>10.2f} {row.p80_us:>10.2f} {speed:>7}"
        line = f"  {row.provider:<39} {times}"
        if row.baseline:
            interval = f"{row.ratio_p50:.3g} ({row.ratio_p20:.3g} .. {row.ratio_p80:.3g})"
            line += f"   {interval} x {row.baseline}: {row.claim}"
        lines.append(line)
    return "\n".join(lines)


def machine(device: torch.device = CPU) -> dict[str, str | int]:
    """Where and with what a result was measured: the columns that every result file carries, on a GPU with its own."""
    of_gpu: dict[str, str | int] = {}
    if device.type != "cpu":
        backends = os.environ.get("FASTSAMPLE_BACKEND") or "automatic"
        of_gpu = {"device": gpu.name_of(device), "driver": gpu.driver(), "backend": backends}
    return {
        **of_gpu,
        "cpu": cpu.model(),
        "cpu_family": cpu.family(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "fastsample": fastsample.__version__,
        "isa": fastsample.backends()["cpu"].get("isa", ""),
        "git": _revision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_csv(path: Path, rows: Sequence[Any], device: torch.device = CPU) -> None:
    """Writes dataclass rows, each with the machine's columns. All or nothing: a reader never sees half a file."""
    here = machine(device)
    records = [{**asdict(row), **here} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _rounded(value) for key, value in record.items()} for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


def pyplot_for(path: Path) -> Any:
    """matplotlib's pyplot without a display, or None, and a note that this picture is left out."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is left out")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(path: Path, rows: Sequence[Row], title: str, device: torch.device = CPU) -> None:
    """Median microseconds a call by case and provider, with bars from p20 to p80, a panel a benchmark, as a PNG."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    panels = {name: [row for row in rows if row.benchmark == name] for name in dict.fromkeys(r.benchmark for r in rows)}
    bars = max(map(len, panels.values()))
    size = (max(7, 2 + 0.3 * bars), 1 + 3.5 * len(panels))
    figure, axes = pyplot.subplots(len(panels), figsize=size, layout="constrained", squeeze=False)
    for panel, (name, panel_rows) in zip(axes[:, 0], panels.items(), strict=True):
        _draw(panel, panel_rows)
        panel.set_title(name, fontsize=9, loc="left")
    here = machine(device)
    where = here.get("device") or f"{here['cpu_family']} ({here['cpu']}), threads {here['threads']}, {here['isa']}"
    figure.suptitle(f"{title}\n{where}, torch {here['torch']}", fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)


def percent(fraction: Spread, factor: float = 1.0) -> str:
    """A share as text."""
    low, middle, high = (100 * factor * value for value in fraction)
    return f"{middle:.0f} % ({low:.0f} .. {high:.0f})"


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    # Bars side by side, an empty place between cases.
    places = [place + cases.index(row.case) for place, row in enumerate(rows)]
    for provider in dict.fromkeys(row.provider for row in rows):
        bars = [i for i, row in enumerate(rows) if row.provider == provider]
        axes.bar(
            [places[i] for i in bars],
            [rows[i].p50_us for i in bars],
            yerr=[[rows[i].p50_us - rows[i].p20_us for i in bars], [rows[i].p80_us - rows[i].p50_us for i in bars]],
            label=provider,
        )
    centres = [fmean(place for place, row in zip(places, rows, strict=True) if row.case == case) for case in cases]
    axes.set(yscale="log", ylabel="microseconds a call", xticks=centres)
    axes.set_xticklabels(cases, rotation=20 if len(cases) > 5 else 0)
    axes.legend(fontsize=7)


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _revision() -> str:
    """The commit, with "+" where the code differs from it; results of earlier runs do not count as code."""
    root = Path(__file__).parents[2]
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()
