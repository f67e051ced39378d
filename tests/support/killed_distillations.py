"""`python -m support.killed_distillations FOLDER`: by every method a run that is killed five times, and a whole one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastsample.distill import Settings
from fastsample.train import report
from support.distillation import SMALL, run, unet
from support.killed_runs import completed, killed_five_times

# Iterations of a stage, enough for five kills.
ITERATIONS = {"trajectory": 30, "progressive": 12, "consistency": 36, "guided": 12, "lcm": 36, "lcm_lora": 36}


def main(folder: Path) -> None:
    """Makes FOLDER/method/killed and FOLDER/method/straight."""
    torch.set_num_threads(1)
    report._plot = lambda *arguments: None  # which takes longer than all else
    teacher = unet()
    for method, iterations in ITERATIONS.items():
        settings = replace(SMALL, iterations=iterations)

        def go(out: Path, save_every: int, method: str = method, settings: Settings = settings) -> None:
            run(method, teacher, out, settings=settings, save_every=save_every)

        killed, straight = folder / method / "killed", folder / method / "straight"
        killed_five_times(lambda go=go, out=killed: go(out, 2), killed)  # type: ignore[misc]
        for out in (killed, straight):
            completed(lambda go=go, out=out: go(out, 50))  # type: ignore[misc]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
