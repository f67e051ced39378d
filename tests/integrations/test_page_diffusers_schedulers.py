"""docs/diffusers-schedulers.md: its program runs, its classes are all there are, its times are those of the results."""

from __future__ import annotations

import csv
import re
from typing import Any

import diffusers
import numpy as np
import torch

import fastsample.integrations.diffusers as ours
from benchmarks.cases.drop_ins import GRIDS
from benchmarks.drop_ins import CASES, SHAPES, STEPS
from benchmarks.schedulers import runs_of
from support.paths import ROOT

PAGE = (ROOT / "docs" / "diffusers-schedulers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_its_program_runs_and_gives_diffusers_images() -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile("\n".join(BLOCKS), "diffusers-schedulers.md", "exec"), names)
    pipe, images = names["pipe"], names["images"]
    assert type(pipe.scheduler) is ours.DDIMScheduler and names["same"].compat == "diffusers"
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    theirs = pipe(num_inference_steps=5, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(np.int16(images[0]) - np.int16(theirs[0])).max() <= 1


def test_its_classes_are_all_there_are() -> None:
    rows = re.findall(r"^\| (`\w+Scheduler`.*?) \|", PAGE, flags=re.MULTILINE)
    named = re.findall(r"`(\w+Scheduler)`", " ".join(rows))
    assert sorted(named) == sorted(name for name in ours.__all__ if name.endswith("Scheduler"))


def test_its_number_of_loops_is_that_of_the_grid() -> None:
    (told,) = re.findall(r"benchmarks.schedulers` runs ([\d,]+) loops", PAGE)
    assert round(sum(len(runs_of(grids, 1000)) for grids in GRIDS.values()), -3) == int(told.replace(",", ""))


def test_its_times_are_those_of_the_results() -> None:
    with (ROOT / "benchmarks" / "results" / "drop-ins-zen4.csv").open() as file:
        rows = {(row["benchmark"], row["case"], row["provider"]): float(row["p50_us"]) for row in csv.DictReader(file)}
    table = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.count("|") == len(SHAPES) + 2]
    written = {name: cells for name, *cells in table}
    for name in CASES:
        for shape, cell in zip(SHAPES, written[name], strict=True):
            case = f"{'x'.join(map(str, shape))}, {STEPS} steps"
            own, theirs = (rows[f"drop-in {name}", case, provider] for provider in ("fastsample", "diffusers"))
            assert cell == f"{time(own)} / {time(theirs)}"


def time(us: float) -> str:
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms"
