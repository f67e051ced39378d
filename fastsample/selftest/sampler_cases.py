"""Whole runs of a sampler, plain, guided and captured as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsample.graph import graph
from fastsample.ops import randn
from fastsample.ops.backend import Backend
from fastsample.samplers import DDIM
from fastsample.schedule import Schedule
from fastsample.selftest.case import ELEMENT_WISE, SEED, Call, Case, Wanted

# The sampler's rows; its model, which multiplies x by the gain; the other half's gain and w under guidance.
STEPS, GAIN, UNCONDITIONAL, WEIGHT = 5, 0.5, 0.25, 3.0


def sampler_case(shape: tuple[int, ...], captured: bool = False, guided: bool = False) -> Case:
    """A whole run of DDIM with eta 1 and the model m = g x, so that the state is the same on every machine.

    Also captured as a CUDA graph, on GPUs.

    A row makes x' = (a + b p + (b q + d) g) x + s z: its roundings, at most 6 of the largest state it can have and 3 of
    guidance, are multiplied by what the rows after it multiply x by.
    """
    sampler = DDIM(Schedule.linear(), steps=STEPS, eta=1.0)

    def options(device: torch.device) -> dict[str, Any]:
        halves = (torch.full((shape[0], *(1,) * (len(shape) - 1)), g, device=device) for g in (GAIN, UNCONDITIONAL))
        cond, uncond = ({"gain": half} for half in halves)
        return {"guidance": WEIGHT, "cond": cond, "uncond": uncond} if guided else {"model_kwargs": cond}

    def prepare(backend: Backend, device: torch.device) -> Call:
        arguments = {**options(device), "backend": backend, "device": device}
        if captured:
            # Captured with another seed: a replay must draw from the seed that it is given.
            replay = graph(sampler, _linear, shape, seed=SEED + 1, **arguments)
            return lambda: [replay(seed=SEED)]
        return lambda: [sampler(_linear, shape, seed=SEED, **arguments)]

    gain, size_of_m, roundings = GAIN, GAIN, 6
    if guided:
        gain += (WEIGHT - 1) * (GAIN - UNCONDITIONAL)
        size_of_m += (WEIGHT - 1) * (GAIN + UNCONDITIONAL)
        roundings += 3
    table, largest, bound = sampler.table, 6.0, 0.0
    for k in range(len(table)):
        of_x, of_m = table.a[k] + table.b[k] * table.p[k], table.b[k] * table.q[k] + table.d[k]
        size = (abs(of_x) + abs(of_m) * size_of_m) * largest + abs(table.s[k]) * 6.0
        growth = abs(of_x + of_m * gain)
        bound, largest = growth * bound + roundings * size, growth * largest + abs(table.s[k]) * 6.0
    x = randn(shape, seed=SEED, backend="reference").double()
    value: Tensor = sampler(_linear, x, seed=SEED, backend="reference", **options(x.device))
    wanted = Wanted(value, torch.ones_like(value), bound)
    mode = f"ddim{', guided' if guided else ''}{', a graph' if captured else ''}"
    backends = frozenset({"triton", "cuda"}) if captured else ELEMENT_WISE
    return Case("sampler", mode, torch.float32, shape, prepare, [wanted], True, backends, on_gpu=captured)


def _linear(x: Tensor, t: Tensor, gain: Tensor) -> Tensor:
    return gain * x
