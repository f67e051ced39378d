"""What fine-tuning shows: losses on held-out images, slants of digits, and the tables of docs/finetuning.md."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsample
from benchmarks.common.markers import replace_between
from benchmarks.common.report import pyplot_for
from benchmarks.sections.quality_page import table
from benchmarks.sections.style import slant
from fastsample import distill, lora
from fastsample.evaluate import Yardstick
from fastsample.storage.writing import replace_text, replacing
from fastsample.train import FinetuneSettings, ImageData
from fastsample.zoo import LORAS

ROOT = Path(__file__).parents[2]
DOCS, FIGURES = ROOT / "docs" / "finetuning.md", ROOT / "docs" / "figures"
BEGIN, END = "<!-- fine-tuning, written by benchmarks.finetune -->", "<!-- end of fine-tuning -->"
SHAPE = (1, 28, 28)
BATCH = 50


@dataclass(frozen=True)
class Course:
    """A run: how many numbers it trained, its learning rate, and (step, loss, loss on held-out images)."""

    trained: int
    lr: float
    losses: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Style:
    """Digits drawn in one way: their mean slant and its standard error, and how many are taken for their label."""

    name: str
    slant: float
    error: float
    agreement: float


def course(made: nn.Module, out: Path, settings: FinetuneSettings) -> Course:
    """What the folder of a run tells."""
    with (out / "held-out.csv").open(newline="") as file:
        held_out = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    with (out / "loss.csv").open(newline="") as file:
        losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    trained = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    rows = tuple((step, losses.get(step, float("nan")), loss) for step, loss in held_out.items())
    return Course(trained, settings.lr, rows)


@torch.no_grad()
def styles(style: Mapping[str, Tensor], count: int) -> list[Style]:
    """Digits of the model alone, with the LoRA of the style, with the LCM-LoRA, and with both."""
    yardstick = Yardstick("mnist5k-held-out", draws=2)
    rows = []
    ways = {"the model": {}, "style": {"style": 1.0}, "LCM-LoRA": {"lcm": 1.0}}
    ways |= {f"LCM-LoRA, style {weight:g}": {"lcm": 1.0, "style": weight} for weight in (0.8, 1.0)}
    for name, weights in ways.items():
        images, y = _drawn(style, weights, count)
        slants = slant(images)
        pixels = fastsample.to_uint8(images).permute(0, 3, 1, 2).contiguous()
        agreement = yardstick.measure(ImageData(pixels, y)).class_agreement
        assert agreement is not None
        rows.append(Style(name, float(slants.mean()), float(slants.std() / len(slants) ** 0.5), agreement.value))
    return rows


def _drawn(style: Mapping[str, Tensor], weights: Mapping[str, float], count: int) -> tuple[Tensor, Tensor]:
    """So many digits, all ten in turn: 4 steps of LCM with its LoRA, 20 of DDIM without."""
    model = fastsample.zoo.digits()
    times = distill.load(LORAS["lcm"], model).timesteps(4)
    for name, source in (("lcm", LORAS["lcm"]), ("style", style)):
        if name in weights:
            lora.attach(model, source, name=name)
    if weights:
        lora.set_adapters(model, weights)
    y, parts = torch.arange(count) % 10, []
    for index in torch.arange(count).split(BATCH):
        options: dict[str, Any] = {"clip": 1.0, "seed": 1, "index": index, "model_kwargs": {"y": y[index]}}
        shape = (len(index), *SHAPE)
        if "lcm" in weights:
            parts.append(fastsample.lcm(model, shape, timesteps=times, **options))
        else:
            parts.append(fastsample.ddim(model, shape, steps=20, **options))
    if weights:
        lora.detach(model)
    return torch.cat(parts), y


def table_of(runs: Mapping[str, Course], rows: list[Style]) -> str:
    """Two tables: the runs, and the styles."""
    lines = []
    for name, run in runs.items():
        first, best = run.losses[0][2], min(run.losses, key=lambda row: row[2])
        step, trained, held_out = run.losses[-1]
        figures = [f"{first:.4f}", f"{best[2]:.4f} at {best[0]}", f"{held_out:.4f}", f"{trained:.4f}"]
        lines.append([name, f"{run.trained:,}", f"{run.lr:g}", str(step), *figures])
    header = [
        "what is trained",
        "numbers",
        "lr",
        "steps",
        "held-out loss before",
        "lowest",
        "last",
        "last training loss",
    ]
    slants = [[row.name, f"{row.slant:.2f} ± {row.error:.2f}", f"{row.agreement:.3f}"] for row in rows]
    return table(header, lines) + "\n\n" + table(["digits drawn by", "mean slant", "class agreement"], slants)


def write(runs: Mapping[str, Course], rows: list[Style], style: Mapping[str, Tensor]) -> None:
    """Puts the tables into docs/finetuning.md, and draws its pictures."""
    replace_text(DOCS, replace_between(DOCS.read_text(), BEGIN, END, table_of(runs, rows)))
    _draw_courses(FIGURES / "finetuning-loss.png", runs)
    _draw_styles(FIGURES / "finetuning-styles.png", style)


def _draw_courses(path: Path, runs: Mapping[str, Course]) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, run in runs.items():
        steps, losses, held_out = zip(*run.losses, strict=True)
        [line] = axes.plot(steps, held_out, label=f"{name}, held out")
        axes.plot(steps, losses, ls=":", color=line.get_color(), label=f"{name}, training")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(fontsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def _draw_styles(path: Path, style: Mapping[str, Tensor]) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    ways = {"the model": {}, "style": {"style": 1.0}, "LCM-LoRA, 4 steps": {"lcm": 1.0}}
    ways["both, 1.0 and 0.8"] = {"lcm": 1.0, "style": 0.8}
    figure, panels = pyplot.subplots(len(ways), 10, figsize=(8, 0.85 * len(ways)), layout="constrained")
    for (name, weights), line in zip(ways.items(), panels, strict=True):
        with torch.no_grad():
            images, _ = _drawn(style, weights, 10)
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
