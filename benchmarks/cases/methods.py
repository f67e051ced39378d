"""Sampling methods: our sampler, and the diffusers scheduler that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from benchmarks.common.optional import optional
from fastsample import DDIM, DDPM, DEIS, IPNDM, LCM, TCD, DPMSolver, Sampler, Schedule


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        sampler: makes ours, as sampler(schedule, steps=...).
        scheduler, settings: the name of the diffusers class, "" where there is none, and what it is made with.
        step_options: for its `step`.
    """

    sampler: Callable[..., Sampler]
    scheduler: str
    settings: Mapping[str, Any]
    step_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def theirs(self, schedule: Schedule, steps: int) -> Any:
        """The diffusers scheduler, ready for `steps` steps on the same schedule; None where there is none."""
        diffusers = optional("diffusers", "diffusers") if self.scheduler else None
        if diffusers is None:
            return None
        scheduler = getattr(diffusers, self.scheduler)(
            num_train_timesteps=schedule.T, trained_betas=schedule.betas.tolist(), **self.settings
        )
        scheduler.set_timesteps(steps)
        return scheduler


DDIM_FREE = Method(partial(DDIM, timesteps="leading"), "DDIMScheduler", {"clip_sample": False})
DDIM_CLIP = Method(
    partial(DDIM, timesteps="leading", clip=1.0, rederive_epsilon=False), "DDIMScheduler", {"clip_sample": True}
)
ANCESTRAL = Method(
    partial(DDIM, timesteps="leading", eta=1.0, clip=1.0, rederive_epsilon=False),
    "DDIMScheduler",
    {"clip_sample": True},
    {"eta": 1.0},
)
# Not "linspace", their default: at the last timestep of a cosine schedule an error in epsilon grows 20,000-fold.
DPM_SOLVER = Method(
    partial(DPMSolver, order=2, timesteps="leading"),
    "DPMSolverMultistepScheduler",
    {"solver_order": 2, "timestep_spacing": "leading"},
)
DEIS_LOG = Method(
    partial(DEIS, order=3, variant="log_rho", timesteps="leading"),
    "DEISMultistepScheduler",
    {"solver_order": 3, "timestep_spacing": "leading"},
)
# diffusers' knows no schedule.
IPNDM_FREE = Method(partial(IPNDM, order=4, timesteps="leading"), "", {})
DDPM_SMALL = Method(
    partial(DDPM, variance="fixed_small", clip=1.0, timesteps="leading"),
    "DDPMScheduler",
    {"variance_type": "fixed_small"},
)
DDPM_LEARNED = Method(
    partial(DDPM, variance="learned_range", clip=1.0, timesteps="leading"),
    "DDPMScheduler",
    {"variance_type": "learned_range"},
)
LCM_FREE = Method(LCM, "LCMScheduler", {})
TCD_FREE = Method(partial(TCD, gamma=0.3), "TCDScheduler", {}, {"eta": 0.3})
