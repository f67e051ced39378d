"""Fine-tuning on few images, by a LoRA and whole: loss on held-out images, and what a style costs and is worth.

The images are digits that lean to the left, 10 of each class to train on and 10 held out. Every run has a folder under
--out; one that was stopped continues. Then digits are drawn by the model alone, with the LoRA of the style, with the
package's LCM-LoRA and with both, and their slant is measured. --install puts the style into the package.
"""

from __future__ import annotations

import csv
import io
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch

import fastsample
from benchmarks.common.report import machine
from benchmarks.sections import finetune_page
from benchmarks.sections.style import leaning
from fastsample import lora
from fastsample.storage.writing import replace_text
from fastsample.train import FinetuneSettings, finetune, load_data
from fastsample.zoo import LORAS

RESULTS = Path(__file__).with_name("results") / "finetune.csv"
EACH = 10
# By name: the rank, where there is one, and the learning rate.
RUNS = {"LoRA, rank 8": (8, 2e-3), "LoRA, rank 2": (2, 2e-3), "whole, 1e-4": (None, 1e-4), "whole, 1e-3": (None, 1e-3)}
STYLE = "LoRA, rank 8"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, and writes the table and the picture."""
    options = ArgumentParser("python -m benchmarks.finetune", description=__doc__)
    options.add_argument("--out", type=Path, required=True, help="the folder of the runs' folders")
    options.add_argument("--steps", type=int, default=1000, help="of every run (%(default)s)")
    options.add_argument("--quick", action="store_true", help="a few steps and samples: a smoke run")
    options.add_argument("--install", action="store_true", help="put the style into the package")
    options.add_argument("--write", action="store_true", help="results, picture and the table of docs/finetuning.md")
    arguments = options.parse_args(argv)
    if arguments.quick and (arguments.install or arguments.write):
        options.error("--install and --write are for whole runs")
    torch.set_num_threads(1)
    steps = 4 if arguments.quick else arguments.steps
    source = load_data("mnist5k-train")
    data, held_out = leaning(source, EACH), leaning(source, EACH, skip=EACH)
    runs = {}
    for name, (rank, lr) in RUNS.items():
        print(name, flush=True)
        out = arguments.out / name.replace(", ", "-").replace(" ", "-")
        settings = FinetuneSettings(steps=steps, lr=lr)
        model = fastsample.zoo.digits()
        made = finetune(model, data, out, held_out=held_out, rank=rank, settings=settings)
        runs[name] = finetune_page.course(made, out, settings)
        if name == STYLE:
            style = made
    assert isinstance(style, lora.Trainable)
    if arguments.install:
        lora.save(style.lora(), LORAS["leaning"], dtype=torch.float16)
    rows = finetune_page.styles(style.lora(), 10 if arguments.quick else 500)
    print(finetune_page.table_of(runs, rows))
    if arguments.write:
        finetune_page.write(runs, rows, style.lora())
        write_courses(runs)
    return 0


def write_courses(runs: dict[str, finetune_page.Course]) -> None:
    """All measured losses, and the machine, as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "trained", "step", "loss", "held_out_loss", *machine()])
    for name, course in runs.items():
        for step, loss, held_out in course.losses:
            figures = (f"{loss:.6g}", f"{held_out:.6g}")
            writer.writerow([name, course.trained, step, *figures, *machine().values()])
    replace_text(RESULTS, text.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
