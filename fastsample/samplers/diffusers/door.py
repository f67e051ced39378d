"""fastsample.from_diffusers: the sampler of a live scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from fastsample.checks import check_number
from fastsample.hints import no_argument
from fastsample.loop.options import Options
from fastsample.samplers.diffusers import alpha_bars, distilled, flow, multistep, sigmas
from fastsample.samplers.diffusers.reading import Kind, base_of, read
from fastsample.samplers.sampler import Sampler
from fastsample.vocabulary import OF_SAMPLERS

KINDS = {**alpha_bars.KINDS, **distilled.KINDS, **sigmas.KINDS, **flow.KINDS, **multistep.KINDS}

_OF_OTHERS = ("mu", "original_inference_steps", "sigmas", "timesteps")  # what set_timesteps of some takes
_NOT_TAKEN = {"num_inference_steps", "device", "args", "kwargs"}  # which are `steps`, and no concern of a sampler

# Those that have none, and what comes close.
_INSTEAD = {
    "DDIMInverseScheduler": "fastsample.ddim_invert encodes samples as noise",
    "DPMSolverMultistepInverseScheduler": "fastsample.ddim_invert encodes samples as noise",
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++' solves an SDE too",
    "IPNDMScheduler": "fastsample.ipndm has the method, on the schedule and prediction of a model",
    "PNDMScheduler": "fastsample.ipndm has the method, without its Runge-Kutta steps",
    # Their configurations say the same noise levels there; those of EDM, of VE and of UnCLIP do not.
    **dict.fromkeys(
        (
            *("DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
            *("LMSDiscreteScheduler", "SASolverScheduler"),
        ),
        "DPMSolverMultistepScheduler.from_config(scheduler.config) has one",
    ),
}


def from_diffusers(scheduler: Any, steps: int | None = None, *, eta: float | None = None, **arguments: Any) -> Sampler:
    """The sampler that computes what a live scheduler of diffusers computes, step by step.

    Its times and noise levels are read off a copy of the scheduler once its own set_timesteps has been called, so that
    every spacing, shift and set of sigmas that diffusers has is exact. So are what the model predicts, clipping and
    thresholding, variances and orders. In float32 the two agree to rounding.

    The state is the scheduler's: drawn noise is multiplied by its init_noise_sigma, the model is given what its
    scale_model_input gives, and an x that is passed as a tensor is what its first `step` would be given.

    diffusers is not needed for this function itself. Of a class that derives from one of diffusers' nothing may differ
    but its set_timesteps, its add_noise and how it is made.

    Args:
        scheduler: one of DDIM, DDPM (both also as Parallel), LCM, TCD, CMStochasticIterative, EulerDiscrete,
            EulerAncestralDiscrete, HeunDiscrete, DPMSolverMultistep, UniPCMultistep, DEISMultistep,
            FlowMatchEulerDiscrete and FlowMatchHeunDiscrete, each followed by "Scheduler". It is not changed.
        steps: its num_inference_steps; None where `arguments` say which timesteps, and for those that it has already.
        eta: what its `step` is given, for DDIM and TCD alone; None for their defaults, 0 and 0.3.
        **arguments: what its set_timesteps takes beside, such as `mu` of Flux, `sigmas`, `timesteps` or
            `original_inference_steps`.

    Raises:
        TypeError: for what is no scheduler of diffusers, one whose class has no equivalent or whose steps are changed,
            and for arguments that its set_timesteps does not take.
        ValueError: for options without an equivalent, which are named, and for steps that its set_timesteps refuses.

    Example:
        >>> from diffusers import UniPCMultistepScheduler
        >>> flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        >>> sampler = from_diffusers(UniPCMultistepScheduler(flow_shift=3.0, **flow), steps=8)
        >>> sampler.table.t.tolist()
        [999, 954, 900, 833, 750, 643, 500, 301]
        >>> sampler(lambda x, t: 0.1 * x, (2, 4, 8, 8), seed=0).shape
        torch.Size([2, 4, 8, 8])
    """
    base = base_of(scheduler)
    kind = KINDS.get(base.__name__)
    if kind is None:
        instead = _INSTEAD.get(base.__name__, "")
        raise TypeError(
            f"{base.__name__} has no equivalent in fastsample"
            f"{f': {instead}' if instead else ''}; a method of your own is a fastsample.Table of its rows"
        )
    if eta is not None:
        check_number("eta", eta)
        if kind.eta is None:
            raise TypeError(f"eta belongs to DDIMScheduler and TCDScheduler, not to {base.__name__}")
    _check_arguments(scheduler, base, kind, arguments)
    own_eta = kind.eta if eta is None else float(eta)
    sampler = kind.make(read(scheduler, base, kind, steps, arguments, own_eta or 0.0))
    sampler._set(scheduler=base.__name__)
    return sampler


def _check_arguments(scheduler: Any, base: type, kind: Kind, arguments: Iterable[str]) -> None:
    """Raises TypeError for what neither this function nor the scheduler's set_timesteps takes."""
    taken = sorted(inspect.signature(scheduler.set_timesteps).parameters.keys() - _NOT_TAKEN)
    own = dict.fromkeys(("scheduler", "steps", *(["eta"] if kind.eta is not None else []), *taken), "")
    of_scheduler = inspect.signature(base.__init__).parameters.keys()  # type: ignore[misc]
    for name in arguments:
        if name in own:
            continue
        known = f"it takes {', '.join(taken)}" if taken else "it takes steps alone"
        if name in _OF_OTHERS:
            raise TypeError(f"{base.__name__}.set_timesteps has no argument {name}: {known}")
        if (name in of_scheduler or name in OF_SAMPLERS) and name not in Options.__annotations__:
            option = f"{name}=..." if name in of_scheduler else "..."
            raise TypeError(
                f"{name} is read off the scheduler: change it there, {base.__name__}.from_config(scheduler.config, "
                f"{option})"
            )
        elsewhere = dict.fromkeys(("model", "x", *Options.__annotations__), "the sampler's call")
        otherwise = f"beside steps and eta there is what {base.__name__}.set_timesteps has, and {known}"
        raise TypeError(no_argument("from_diffusers", name, elsewhere | own, otherwise=otherwise))
