"""What users can call: every public name with its parameters, and the bits that every sampler gives for fixed seeds.

`cd tests && python -m support.public` writes both to tests/golden/public.json, for a change that is meant.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastsample
from fastsample import Schedule
from support.paths import GOLDEN

MODULES = ("fastsample", "fastsample.ops", "fastsample.lora", "fastsample.zoo")
FILE = GOLDEN / "public.json"


def signatures() -> dict[str, list[str]]:
    """The parameters of every public function, class and method, by name; keyword-only ones in alphabetical order."""
    return {name: parameters(thing) for name, thing in _callables()}


def parameters(thing: Callable[..., Any]) -> list[str]:
    """Each as `name: annotation = default`, behind its kind where that is not the usual one."""
    try:
        signature = inspect.signature(thing)
    except ValueError:  # what is written in C has none
        return []
    given = list(signature.parameters.values())
    named = sorted((one for one in given if one.kind is one.KEYWORD_ONLY), key=lambda one: one.name)
    others = [one for one in given if one.kind is not one.KEYWORD_ONLY]
    shown = [str(one) for one in others] + [f"{one} (keyword)" for one in named]
    returned = signature.return_annotation
    return [*shown, f"-> {returned}"] if returned is not signature.empty else shown


def _callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            if inspect.ismodule(thing):
                continue
            if callable(thing):
                yield f"{module}.{name}", thing
            if inspect.isclass(thing):
                for member, value in inspect.getmembers(thing, callable):
                    if _is_own(thing, member):
                        yield f"{module}.{name}.{member}", value


def _is_own(kind: type, member: str) -> bool:
    """Whether a class of this project defines this public method."""
    owners = [one for one in kind.__mro__ if member in vars(one)]
    ours = bool(owners) and owners[0].__module__.startswith("fastsample")
    return ours and (member == "__call__" or not member.startswith("_"))


def bits() -> dict[str, str]:
    """For every sampler a hash of what it gives; the model's products and sums are exact to the last bit on any CPU."""
    return {name: hashlib.sha256(run().numpy().tobytes()).hexdigest()[:16] for name, run in _RUNS.items()}


def _model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    of_sample = (-1, *[1] * (x.ndim - 1))
    m = x * (0.25 + t.to(x.dtype) * 2.0**-12).view(of_sample)
    return m if y is None else m + y.view(of_sample)


def _learned(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat((_model(x, t), x * 0.5), dim=1)


_SHAPE = (3, 2, 5, 7)
_HALF = {"cond": {"y": torch.zeros(3)}, "uncond": {"y": torch.ones(3)}}
_SCHEDULES = {"linear": Schedule.linear(), "cosine": Schedule.cosine()}


def _clean() -> Tensor:
    return fastsample.ops.randn(_SHAPE, seed=5) * 0.25


def _run(name: str, model: Any = _model, schedule: str | None = "linear", **arguments: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        known = None if schedule is None else _SCHEDULES[schedule]
        sample: Tensor = getattr(fastsample, name)(model, _SHAPE, seed=11, schedule=known, **{"clip": 1.0, **arguments})
        return sample

    return run


def _from_clean(name: str, **arguments: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        sample: Tensor = getattr(fastsample, name)(
            _model, _clean(), seed=11, schedule=_SCHEDULES["linear"], **arguments
        )
        return sample

    return run


def _flow(name: str, **arguments: Any) -> Callable[[], Tensor]:
    return _run(name, schedule=None, prediction="flow", steps=6, **arguments)


def _batched() -> Tensor:
    batcher = fastsample.Batcher(_model, fastsample.DDIM(_SCHEDULES["linear"], steps=5, eta=1.0), batch=2)
    return torch.stack([request.result() for request in [batcher.submit(_SHAPE[1:], 3, i) for i in range(3)]])


def _digits() -> Tensor:
    model = fastsample.zoo.digits()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


_RUNS: dict[str, Callable[[], Tensor]] = {
    "randn": lambda: fastsample.ops.randn((2, 1000), seed=7, index=3),
    "ddim": _run("ddim", steps=10),
    "ddim eta 1": _run("ddim", steps=10, eta=1.0),
    "ddim unclipped": _run("ddim", steps=10, clip=None),
    "ddim v": _run("ddim", steps=10, prediction="v", schedule="cosine"),
    "ddim x0": _run("ddim", steps=10, prediction="x0"),
    "ddim trailing": _run("ddim", steps=7, timesteps="trailing"),
    "ddim sections": _run("ddim", timesteps="4,3,2"),
    "ddim rederived": _run("ddim", steps=10, rederive_epsilon=False, final_alpha_cumprod=0.9999),
    "ddim thresholded": _run("ddim", steps=5, clip=fastsample.DynamicThreshold(0.9)),
    "ddim guided": _run("ddim", steps=5, guidance=3.0, **_HALF),
    "ddim guided interval": _run("ddim", steps=5, guidance=3.0, guidance_interval=(200, 700), **_HALF),
    "ddim painted": _run("ddim", steps=5, mask=torch.ones(5, 7).tril(), known=torch.zeros(_SHAPE)),
    "ddim strength": _from_clean("ddim", steps=10, strength=0.5),
    "ddim half": _run("ddim", steps=5, model_dtype=torch.float16),
    "ddpm": _run("ddpm", steps=10),
    "ddpm fixed large": _run("ddpm", steps=10, variance="fixed_large"),
    "ddpm learned": _run("ddpm", model=_learned, steps=10, variance="learned"),
    "ddpm learned range": _run("ddpm", model=_learned, steps=10, variance="learned_range"),
    "dpm_solver": _run("dpm_solver", steps=10),
    "dpm_solver order 3": _run("dpm_solver", steps=16, order=3, timesteps="log_snr"),
    "dpm_solver karras": _run("dpm_solver", steps=8, timesteps="karras"),
    "dpm_solver strength": _from_clean("dpm_solver", steps=10, strength=0.55),
    "dpm_solver flow": _flow("dpm_solver", shift=3.0),
    "dpm_solver sde": _run("dpm_solver", steps=10, sde=True),
    "unipc": _run("unipc", steps=8),
    "unipc order 3": _run("unipc", steps=8, order=3, variant="bh1", final_alpha_cumprod=0.9999),
    "deis": _run("deis", steps=8),
    "deis log rho": _run("deis", steps=8, order=2, variant="log_rho"),
    "ipndm": _run("ipndm", steps=8),
    "ipndm flow": _flow("ipndm"),
    "euler": _run("euler", steps=10),
    "euler karras": _run("euler", steps=10, timesteps="karras"),
    "euler flow": _flow("euler", timesteps="trailing"),
    "euler_ancestral": _run("euler_ancestral", steps=10),
    "heun": _run("heun", steps=5, timesteps="karras"),
    "heun flow": _flow("heun"),
    "lcm": _run("lcm", steps=4),
    "tcd": _run("tcd", steps=4),
    "consistency": lambda: fastsample.consistency(_model, _SHAPE, seed=11),
    "ddim_invert": _from_clean("ddim_invert", steps=10),
    "euler_invert": lambda: fastsample.euler_invert(_model, _clean(), steps=6, prediction="flow"),
    "batcher": _batched,
    "digits": _digits,
}


if __name__ == "__main__":
    FILE.write_text(json.dumps({"signatures": signatures(), "bits": bits()}, indent=1) + "\n")
