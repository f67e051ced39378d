"""Samplers side by side: ours, and the diffusers scheduler that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from fastsample import DDIM, DDPM, LCM, TCD, DPMSolver, Sampler, Schedule


@dataclass(frozen=True)
class Pair:
    """One method.

    Attributes:
        sampler: makes ours, as sampler(schedule, steps=...).
        scheduler, settings: the name of the diffusers class, and what it is made with.
        step_options: for its `step`.
    """

    sampler: Callable[..., Sampler]
    scheduler: str
    settings: Mapping[str, Any]
    step_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def theirs(self, schedule: Schedule, steps: int) -> Any:
        """The diffusers scheduler, ready for `steps` steps on the same schedule; None where diffusers is absent."""
        diffusers = _diffusers()
        if diffusers is None:
            return None
        made = getattr(diffusers, self.scheduler)(
            num_train_timesteps=schedule.T, trained_betas=schedule.betas.tolist(), **self.settings
        )
        made.set_timesteps(steps)
        return made


@cache
def _diffusers() -> Any:
    # Cached for the note, which is to be read once, not for every case.
    try:
        import diffusers
    except ImportError as error:
        print(f"diffusers is left out, it cannot be imported: {error}")
        return None
    return diffusers


DDIM_FREE = Pair(DDIM, "DDIMScheduler", {"clip_sample": False})
DDIM_CLIP = Pair(partial(DDIM, clip=1.0, rederive_epsilon=False), "DDIMScheduler", {"clip_sample": True})
ANCESTRAL = Pair(
    partial(DDIM, eta=1.0, clip=1.0, rederive_epsilon=False), "DDIMScheduler", {"clip_sample": True}, {"eta": 1.0}
)
# Not "linspace", the default of both: at the last timestep of a cosine schedule an error in epsilon grows 20,000-fold.
DPM_SOLVER = Pair(
    partial(DPMSolver, order=2, timesteps="leading"),
    "DPMSolverMultistepScheduler",
    {"solver_order": 2, "timestep_spacing": "leading"},
)
DDPM_SMALL = Pair(
    partial(DDPM, variance="fixed_small", clip=1.0, timesteps="leading"),
    "DDPMScheduler",
    {"variance_type": "fixed_small"},
)
DDPM_LEARNED = Pair(
    partial(DDPM, variance="learned_range", clip=1.0, timesteps="leading"),
    "DDPMScheduler",
    {"variance_type": "learned_range"},
)
LCM_FREE = Pair(LCM, "LCMScheduler", {})
TCD_FREE = Pair(partial(TCD, gamma=0.3), "TCDScheduler", {}, {"eta": 0.3})
