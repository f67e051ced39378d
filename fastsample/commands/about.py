"""What a model is, as lines of text: its shape, schedule and size, how it was made, and how it is sampled."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastsample import zoo
from fastsample.commands.sampling import CHECKPOINTS, model_text
from fastsample.generation import named_model
from fastsample.generation.source import classes_of, shape_of
from fastsample.model import attribute, prediction_of
from fastsample.schedule import Schedule
from fastsample.storage.pickles import load_pickle
from fastsample.train.settings import SCHEDULES, Settings

Lines = list[tuple[str, str]]


def about(text: str) -> Lines:
    """(what, of which value) of the model that a text names, or a file or folder of a run.

    Raises:
        ValueError, ImportError, FileNotFoundError: the text names no model that can be had.
    """
    name = model_text(text)
    model, autoencoder = named_model(name)
    facts = getattr(model, "facts", None)
    autoencoder = autoencoder or getattr(model, "autoencoder", None)
    path = _path(name)
    lines: Lines = [("model", name), ("class", type(model).__name__)]
    if path is not None:
        lines.append(("file", str(path)))
    shape = tuple(facts.shape) if facts is not None else shape_of(model)
    lines.append(("shape", "unknown: --shape says it" if shape is None else _shape(shape)))
    if autoencoder is not None:
        lines.append(("decoded to", _shape(autoencoder.config.shape)))
    lines += _sampled(model) + ([] if facts is None else _distilled(facts))
    if isinstance(model, nn.Module):
        weights = list(model.parameters())
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        lines.append(("parameters", f"{sum(weight.numel() for weight in weights):,} ({size / 1e6:,.1f} MB)"))
    trained = [] if path is None else _trained(path.parent)
    return [*lines, *trained, ("drawn by", f"fastsample sample --model {shlex.quote(name)}")]


def schedule_text(schedule: Schedule) -> str:
    """A schedule in words.

    Example:
        >>> schedule_text(Schedule.linear())
        'linear, 1000 timesteps, alpha bar 0.9999 to 4.04e-05'
    """
    bars, names = schedule.alphas_cumprod, []
    for name in SCHEDULES:
        try:
            made = Settings(timesteps=schedule.T, schedule=name).forward_process()
        except ValueError:  # there is none of this length
            continue
        # A file holds betas, of which the products are formed anew.
        if np.allclose(made.alphas_cumprod, bars, rtol=1e-9, atol=0):
            names.append(name)
    return f"{(*names, 'own')[0]}, {schedule.T} timesteps, alpha bar {bars[0]:.5g} to {bars[-1]:.3g}"


def _sampled(model: Any) -> Lines:
    schedule, prediction = attribute(model, "schedule", Schedule), prediction_of(model, None)
    known = "none: a flow" if prediction == "flow" else "unknown: --schedule says it"
    config = getattr(model, "config", None)
    variance = ", and a variance" if getattr(config, "learned_variance", False) else ""
    count, keyword, none = classes_of(model)
    classes = f"{count}, as {keyword}=" + ("" if none is None else f"; {none} stands for none") if count else "none"
    return [
        ("schedule", known if schedule is None else schedule_text(schedule)),
        ("prediction", prediction + variance),
        ("classes", classes),
    ]


def _distilled(facts: Any) -> Lines:
    guidance = facts.guidance
    told = f"told, {guidance[0]:g} to {guidance[1]:g}" if isinstance(guidance, tuple) else f"{guidance:g} folded in"
    steps = ", ".join(map(str, sorted(facts.timesteps, reverse=True)))
    return [("student of", facts.method), ("steps", steps), ("guidance", told)]


def _trained(folder: Path) -> Lines:
    """Of the checkpoint of a run, where one lies in the folder."""
    path = folder / CHECKPOINTS[0]
    if not path.is_file():
        return []
    try:
        state = load_pickle(path)
    except (OSError, ValueError):
        state = None
    history = state.get("history") if isinstance(state, dict) else None
    if not isinstance(history, Tensor):
        return [("trained", f"unknown: {path.name} beside it is none of fastsample")]
    of = f" of {state['steps']:,}" if "steps" in state else ""
    return [("trained", f"{len(history):,}{of} steps")]


def _path(name: str) -> Path | None:
    """The file or folder of the model with this text."""
    kind, _, rest = name.partition(":")
    if kind == "python":
        return None
    return zoo.FILES.get(rest, Path(rest)) if kind == "zoo" else Path(rest)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
