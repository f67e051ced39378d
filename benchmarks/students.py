"""Distils the students of the bundled digits model that come with the package, and notes what that costs.

Each has a folder under --out. A run that was stopped continues, and one that is finished is left alone. --install puts
a finished student into the package, in half precision, and its minutes into the table of results. The guided students
of two steps and of one go into DIR, as digits-guided-2.safetensors and so on, for `benchmarks.quality --students --also
FILE ...`.
"""

from __future__ import annotations

import csv
import io
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastsample
from benchmarks.common.report import machine
from fastsample import distill
from fastsample.distill.network import untrained
from fastsample.storage.writing import replace_text
from fastsample.train import load_data
from fastsample.zoo import STUDENTS

GUIDANCE, RANGE = 1.25, (1.0, 8.0)
CLASSES, NONE = {"y": torch.arange(10)}, {"y": torch.tensor([10])}
RESULTS = Path(__file__).with_name("results") / "students.csv"
Make = Callable[[Path, int | None], distill.Student]


def trajectory(out: Path, short: int | None) -> distill.Student:
    """A student of four steps, of two and of one, which it is told."""
    return _trajectory(out, short, 1200, None)


def half(out: Path, short: int | None) -> distill.Student:
    """The same of half the width, a quarter of the weights, which begins with nothing."""
    return _trajectory(out, short, 4000, untrained(fastsample.zoo.digits(), (24, 48), seed=0))


def _trajectory(out: Path, short: int | None, iterations: int, student: fastsample.zoo.UNet | None) -> distill.Student:
    return distill.trajectory(
        fastsample.zoo.digits(),
        (1, 28, 28),
        out,
        steps=(4, 2, 1),
        paths=short or 4096,
        cond=CLASSES,
        uncond=NONE,
        guidance=GUIDANCE,
        clip=1.0,
        student=student,
        settings=distill.Settings(iterations=short or iterations),
    )


def progressive(out: Path, short: int | None) -> distill.Student:
    """Students of 16 steps down to 1; the last is returned, the others lie in the folder."""
    return distill.progressive(
        fastsample.zoo.digits(),
        load_data("mnist5k-train"),
        out,
        start=16,
        uncond=NONE,
        guidance=GUIDANCE,
        clip=1.0,
        settings=distill.Settings(iterations=short or 500, batch_size=64 if short is None else 8),
    )


def consistency(out: Path, short: int | None) -> distill.Student:
    """A student that jumps from anywhere to the end; it begins as the one that does so from noise."""
    return distill.consistency(
        fastsample.zoo.digits(),
        load_data("mnist5k-train"),
        out,
        scales=8,
        loss="huber",
        target_decay=0.95,
        student=fastsample.zoo.digits("progressive-1"),
        uncond=NONE,
        guidance=GUIDANCE,
        clip=1.0,
        settings=distill.Settings(iterations=short or 3000, lr=2e-4, batch_size=64 if short is None else 8),
    )


def guided(out: Path, short: int | None) -> distill.Student:
    """Students of all weights of guidance, of 16 steps down to 1."""
    return _guided(out, short, fastsample.zoo.digits(), clip=1.0)


def guided_latent(out: Path, short: int | None) -> distill.Student:
    """The same of latents."""
    teacher, autoencoder = fastsample.zoo.latent_digits()
    return _guided(out, short, teacher, autoencoder=autoencoder)


def _guided(out: Path, short: int | None, teacher: fastsample.zoo.UNet, **common: Any) -> distill.Student:
    return distill.guided(
        teacher,
        load_data("mnist5k-train"),
        out,
        start=16,
        uncond=NONE,
        guidance=RANGE,
        settings=distill.Settings(iterations=short or 800, batch_size=64 if short is None else 8),
        **common,
    )


def lcm(out: Path, short: int | None) -> distill.Student:
    """A latent consistency model, told its guidance."""
    teacher, autoencoder = fastsample.zoo.latent_digits()
    return distill.lcm(
        teacher,
        load_data("mnist5k-train"),
        out,
        scales=16,
        target_decay=0.95,
        uncond=NONE,
        guidance=RANGE,
        autoencoder=autoencoder,
        settings=distill.Settings(iterations=short or 4000, lr=3e-4, batch_size=64 if short is None else 8),
    )


def lcm_lora(out: Path, short: int | None) -> distill.Student:
    """The same of pixels, in a LoRA."""
    return distill.lcm_lora(
        fastsample.zoo.digits(),
        load_data("mnist5k-train"),
        out,
        rank=8,
        scales=16,
        target_decay=0.95,
        uncond=NONE,
        guidance=GUIDANCE,
        clip=1.0,
        settings=distill.Settings(iterations=short or 1500, lr=1e-3, batch_size=64 if short is None else 8),
    )


# By the folder of their run: what makes them, and the files that the package has of them.
RUNS: Mapping[str, tuple[Make, Mapping[str, str]]] = {
    "trajectory-4": (trajectory, {"trajectory-4": "student"}),
    "trajectory-4-half": (half, {"trajectory-4-half": "student"}),
    "progressive": (progressive, {f"progressive-{steps}": f"student-{steps}" for steps in (4, 2, 1)}),
    "consistency": (consistency, {"consistency": "student"}),
    "guided": (guided, {"guided-4": "student-4"}),
    "guided-latent": (guided_latent, {"guided-4-latent": "student-4"}),
    "lcm": (lcm, {"lcm": "student"}),
    "lcm-lora": (lcm_lora, {"lcm-lora": "student"}),
}


# Students that are measured, and would make the package too large: by name, run and file.
MEASURED = {
    **{f"guided-{steps}": ("guided", f"student-{steps}") for steps in (2, 1)},
    **{f"guided-{steps}-latent": ("guided-latent", f"student-{steps}") for steps in (2, 1)},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Distils the students one after the other."""
    options = ArgumentParser("python -m benchmarks.students", description=__doc__)
    options.add_argument("--out", type=Path, required=True, help="the folder of their folders")
    options.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS), help="which ones (all)")
    options.add_argument("--quick", action="store_true", help="a few iterations each: a smoke run")
    options.add_argument("--install", action="store_true", help="put them into the package")
    arguments = options.parse_args(argv)
    if arguments.quick and arguments.install:
        options.error("--install is for whole runs")
    torch.set_num_threads(1)
    for name in arguments.only:
        make, files = RUNS[name]
        print(name, flush=True)
        make(arguments.out / name, 8 if arguments.quick else None)
        if arguments.install:
            install(arguments.out / name, name, files)
    return 0


def install(out: Path, run: str, files: Mapping[str, str]) -> None:
    """Puts the students of a run into the package, and its minutes into the table."""
    for name, file in files.items():
        base = fastsample.zoo.digits() if name == "lcm-lora" else None
        student = distill.load(out / f"{file}.safetensors", base)
        student.decode_with(None)  # the package has it once, for all
        distill.save(student, STUDENTS[name], torch.float16)
    for name, (of_run, file) in MEASURED.items():
        if of_run == run:
            student = distill.load(out / f"{file}.safetensors")
            distill.save(student, out.parent / f"digits-{name}.safetensors", torch.float16)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    row = {"run": run, "updates": len(state["history"]), "minutes": f"{state['seconds'] / 60:.1f}"} | {
        name: str(value) for name, value in machine().items()
    }
    rows = [row]
    if RESULTS.is_file():
        with RESULTS.open(newline="") as file_of_rows:
            rows = [*(old for old in csv.DictReader(file_of_rows) if old["run"] != run), row]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_text(RESULTS, text.getvalue())


if __name__ == "__main__":
    raise SystemExit(main())
