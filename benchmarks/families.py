"""What was measured, by CPU family: a table of the result files there are, a column for each family.

Figures of one family never stand for another's: what has no file is "not measured". With --write the table also
replaces the one in docs/performance.md.
"""

from __future__ import annotations

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import torch

from benchmarks.common import cpu
from benchmarks.common.markers import replace_between
from benchmarks.common.report import OURS
from benchmarks.sections import projections, unets
from benchmarks.sections.projections import (
    BASELINE,
    LARGE_RANK,
    PEER_RANK,
    PEFT_FLOAT32,
    added_flops,
    name_of,
    provider,
)
from fastsample.storage.writing import replace_text

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- table of benchmarks.families: begin -->", "<!-- table of benchmarks.families: end -->"
# These have a column even where nothing was measured on them.
EXPECTED = ("Zen 4", "Sapphire Rapids")
NOT_MEASURED = "not measured"
LARGE = ("8x3x256x256", "16x3x512x512")  # whose steps take what the last-level cache and the memory take
OURS_16, PEFT_16, ADDMM_16 = (provider(name, PEER_RANK) for name in (OURS, "PEFT", "addmm"))

Row = Mapping[str, str]
Rows = Sequence[Row]
Results = Mapping[str, Mapping[str, Rows]]


class Target(NamedTuple):
    """A row of the table: what it is called, which file it comes from, and its figure; empty where rows lack it."""

    name: str
    file: str
    figure: Callable[[Rows], str]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    flags = ArgumentParser(
        "python -m benchmarks.families", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    flags.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    flags.add_argument("--write", action="store_true", help=f"also write it to {DOCS.name}")
    arguments = flags.parse_args(argv)
    text = table(read(arguments.results))
    print(text)
    if arguments.write:
        replace_text(DOCS, replaced(DOCS.read_text(), text))
    return 0


def read(folder: Path) -> dict[str, dict[str, Rows]]:
    """The rows of each family's result files by their names without the family. GPUs' and quick results are no part.

    Files from before there was a column for the family have it in their names alone.
    """
    results_of: dict[str, dict[str, Rows]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or "device" in rows[0]:
            continue
        named = (name for name in cpu.NAMES if path.stem.endswith(f"-{cpu.slug(name)}"))
        family = rows[0].get("cpu_family") or next(named, None)
        if family is not None and path.stem.endswith(end := f"-{cpu.slug(family)}"):
            results_of.setdefault(family, {})[path.stem.removesuffix(end)] = rows
    return results_of


def table(results: Results) -> str:
    """The results as Markdown: a row for each target, a column for each family."""
    families = list(dict.fromkeys((*EXPECTED, *sorted(results))))
    lines = [f"| | {' | '.join(families)} |", f"| --- |{' --- |' * len(families)}"]
    for target in targets():
        cells = (target.figure(results.get(name, {}).get(target.file, ())) or NOT_MEASURED for name in families)
        lines.append(f"| {target.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(document: str, text: str) -> str:
    """The document with this table between its markers."""
    return replace_between(document, BEGIN, END, text)


def targets() -> list[Target]:
    """What the table shows."""
    steps = [
        Target(f"step without noise, float32, {' and '.join(LARGE)}: share of the triad's speed", "step-noise-free",
               partial(share_of_triad, cases=LARGE)),
        Target("step without noise: diffusers / ours", "step-noise-free", partial(over_ours, them="diffusers")),
        Target("step with noise: diffusers / ours", "step-noisy", partial(over_ours, them="diffusers")),
        *(
            Target(f"step of a {name} model: share of the triad's speed", "step-dtypes",
                   partial(share_of_triad, of=f", {name} model"))
            for name in ("float16", "bfloat16")
        ),
        Target("DDIM loop beyond the model, 1x16x7, 1000 steps: time a step", "sampler-loop",
               partial(time_of, benchmark="loop ddim", case="1x16x7, 1000 steps")),
        Target("normals into a buffer, 16x3x512x512: torch / ours", "noise",
               partial(over_ours, them="torch normal_", cases=("16x3x512x512 in a buffer",))),
    ]  # fmt: skip
    linears = [target for dtype in projections.DTYPES for target in _of_linears(dtype)]
    lax = [
        Target(f"float32 with `--fp32-precision {name}`: {what}", f"lora-projections-float32-precision-{name}", figure)
        for name in ("bf16",)
        for what, figure in (
            (f"rank {PEER_RANK} / three bare `{BASELINE}`", ratio_of),
            ("largest error of ours / addmm's", error_ratio),
        )
    ]
    return [*steps, *linears, *lax, *(target for dtype in unets.DTYPES for target in _of_unets(dtype))]


def _of_linears(dtype: torch.dtype) -> list[Target]:
    name = name_of(dtype)
    figures: dict[str, Callable[[Rows], str]] = {
        f"rank {PEER_RANK} / three bare `{BASELINE}`": ratio_of,
        f"rank {LARGE_RANK} / three bare `{BASELINE}`, divided by the FLOPs it adds": partial(
            ratio_of, rank=LARGE_RANK
        ),
        f"PEFT / ours, rank {PEER_RANK}": partial(quotient, them=PEFT_16, us=OURS_16),
        f"PEFT with float32 factors / ours, rank {PEER_RANK}": partial(
            quotient, them=provider(PEFT_FLOAT32, PEER_RANK), us=OURS_16
        ),
        f"rank {PEER_RANK}, share of the multiply-add peak": share_of_peak,
        f"rank {PEER_RANK}, largest error of ours / addmm's": error_ratio,
    }
    return [
        Target(f"q, k, v in {name}: {what}", f"lora-projections-{name}", figure)
        for what, figure in figures.items()
        # With weights in float32 its factors are in float32 anyhow.
        if dtype != torch.float32 or "float32 factors" not in what
    ]


def _of_unets(dtype: torch.dtype) -> list[Target]:
    name, bare = name_of(dtype), unets.BARE
    return [
        Target(f"UNet in {name}: {who} / {bare}", f"lora-unet-{name}", partial(quotient, them=who, us=bare))
        for who in (OURS_16, PEFT_16)
    ]


def share_of_triad(rows: Rows, *, cases: Sequence[str] = (), of: str = "") -> str:
    """The least and the largest, of medians, in all cases or some; `of` is how the benchmark's name ends."""
    compared = (row for row in rows if (row["provider"], row["baseline"]) == (OURS, "triad"))
    named = [row for row in compared if row["benchmark"].endswith(of) and (not cases or row["case"] in cases)]
    return _percents([1 / float(row["ratio_p50"]) for row in named])


def share_of_peak(rows: Rows) -> str:
    """The least and the largest, of medians."""
    return _percents([float(row["peak_p50"]) for row in rows if row["provider"] == OURS_16 and row["peak_p50"]])


def over_ours(rows: Rows, *, them: str, cases: Sequence[str] = ()) -> str:
    """Their time by ours: geometric mean."""
    compared = [row for row in rows if row["provider"] == them and row["baseline"] == OURS]
    return _mean([float(row["ratio_p50"]) for row in compared if not cases or row["case"] in cases], "cases")


def ratio_of(rows: Rows, *, rank: int = PEER_RANK) -> str:
    """Of ours to the bare linears: geometric mean and largest; of other ranks than PEER_RANK by the FLOPs they add."""
    compared = [row for row in rows if row["provider"] == provider(OURS, rank) and row["baseline"] == BASELINE]
    ratios = {}
    for row in compared:
        shape = tuple(map(int, row["case"].split("x")))
        ratios[row["case"]] = float(row["ratio_p50"]) / (1 if rank == PEER_RANK else added_flops(shape, rank))
    if not ratios:
        return ""
    worst = max(ratios, key=ratios.__getitem__)
    return f"{_mean(list(ratios.values()), 'shapes')}, largest {ratios[worst]:.2f} at {worst}"


def quotient(rows: Rows, *, them: str, us: str) -> str:
    """Of two providers in each case: the ratio within rounds where the rows have it, or of medians; geometric mean."""
    by_case = {(row["case"], row["provider"]): row for row in rows}
    ratios = []
    for (case, who), row in by_case.items():
        if who == them and (case, us) in by_case:
            direct = row["baseline"] == us
            ratios.append(
                float(row["ratio_p50"]) if direct else float(row["p50_us"]) / float(by_case[case, us]["p50_us"])
            )
    return _mean(ratios, "shapes")


def error_ratio(rows: Rows) -> str:
    """Our error by addmm's, both against float64: the largest over the cases."""
    errors = {(row["case"], row["provider"]): float(row["error"]) for row in rows if row.get("error")}
    ratios = {case: errors[case, OURS_16] / errors[case, ADDMM_16] for case, who in errors if who == OURS_16}
    if not ratios:
        return ""
    worst = max(ratios, key=ratios.__getitem__)
    return f"{ratios[worst]:.2f} at {worst} ({errors[worst, OURS_16]:.1e})"


def time_of(rows: Rows, *, benchmark: str, case: str) -> str:
    """Our median."""
    compared = (row for row in rows if (row["benchmark"], row["case"], row["provider"]) == (benchmark, case, OURS))
    return next((f"{float(row['p50_us']):.1f} us" for row in compared), "")


def _mean(values: Sequence[float], of: str) -> str:
    if not values:
        return ""
    return f"{geometric_mean(values):.3g}" + (f" ({len(values)} {of})" if len(values) > 1 else "")


def _percents(shares: Sequence[float]) -> str:
    return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %" if shares else ""


if __name__ == "__main__":
    raise SystemExit(main())
