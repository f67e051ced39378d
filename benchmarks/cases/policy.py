"""Chunks of Diffusion Policy's actions: by its own loop, by that with a drop-in scheduler, and by prepared runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsample
from benchmarks.common.report import OURS
from benchmarks.models.action_unet import ACTIONS, HORIZON, OBSERVATION
from benchmarks.peers.policy import Model, plain_ipndm, published_loop

SHAPE = (1, HORIZON, ACTIONS)
PEER, DROP_IN, PLAIN, OWN_LEVELS = "diffusers", "drop-in", "plain torch loop", "diffusers, its own levels"
RECEDING = "DDIM, receding"
SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
DONE = 8  # of a chunk's actions, before the next chunk is asked for
STRENGTH = 0.4  # of the steps are left where a run starts from what is left of the last chunk

Policy = Callable[[Tensor, Tensor, Tensor], Tensor]
Chunk = Callable[[Tensor], Tensor]  # given an observation


class Ranges(NamedTuple):
    """The least and the largest of each number in the data, (D,): what a policy was trained on lies in [-1, 1]."""

    least: Tensor
    largest: Tensor

    def normalised(self, values: Tensor) -> Tensor:
        """2 (v - least) / (largest - least) - 1."""
        return (values - self.least) / (self.largest - self.least) * 2 - 1

    def in_units(self, values: Tensor) -> Tensor:
        """Its inverse."""
        return (values + 1) / 2 * (self.largest - self.least) + self.least


STATES = Ranges(-torch.linspace(2, 3, OBSERVATION), torch.linspace(2, 4, OBSERVATION))
JOINTS = Ranges(-torch.linspace(0.5, 2, ACTIONS), torch.linspace(1, 3, ACTIONS))


class Episode:
    """A robot's ticks: each does the first actions of a chunk, and the next chunk begins from what is left of it.

    Args:
        chunk: makes a chunk from what is left of the last one, and a normalised observation.
    """

    def __init__(self, chunk: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.chunk, self.ahead = chunk, torch.zeros(SHAPE)

    def __call__(self, observation: Tensor) -> Tensor:
        """The actions (1, DONE, ACTIONS), clipped and in the joints' units, for an observation in its own."""
        chunk = self.chunk(self.ahead, STATES.normalised(observation))
        self.ahead = torch.cat([chunk[:, DONE:], chunk[:, -1:].expand(-1, DONE, -1)], dim=1)
        return JOINTS.in_units(chunk[:, :DONE].clamp(-1, 1))


def kinds_of(name: str, steps: int, policy: Policy) -> dict[str, Chunk]:
    """By kind what makes the policy's chunks, each with noise of its own; the others are compared with the first."""
    if name == "iPNDM":
        ipndm = ipndm_of(steps)
        return {
            OWN_LEVELS: published("IPNDM", steps, policy),
            PLAIN: lambda observation: plain_ipndm(ipndm, given_to(policy, observation), torch.randn(SHAPE)),
            OURS: prepared(ipndm, policy),
        }
    if name == RECEDING:
        return {
            PEER: Episode(warm("DDIM", steps, policy)),
            DROP_IN: Episode(warm("DDIM", steps, policy, drop_in=True)),
            OURS: Episode(warm_prepared(fastsample.from_diffusers(scheduler_of("DDIM", steps)), policy)),
        }
    return {
        PEER: published(name, steps, policy),
        DROP_IN: published(name, steps, policy, drop_in=True),
        OURS: prepared(fastsample.from_diffusers(scheduler_of(name, steps)), policy),
    }


def published(name: str, steps: int, policy: Policy, *, drop_in: bool = False) -> Chunk:
    """Diffusion Policy's loop, with a scheduler of diffusers or ours."""
    scheduler, draws = scheduler_of(name, steps, drop_in=drop_in), torch.Generator().manual_seed(0)
    given = {} if name == "IPNDM" else {"generator": draws}

    def chunk(observation: Tensor) -> Tensor:
        start = torch.randn(SHAPE, generator=draws)
        return published_loop(scheduler, steps, given_to(policy, observation), start, given)

    return chunk


def prepared(sampler: fastsample.Sampler, policy: Policy) -> Chunk:
    """A prepared run, given the observation at the call."""
    run = sampler.prepare(policy, SHAPE, model_kwargs={"observation": torch.zeros(1, OBSERVATION)})
    return lambda observation: run(model_kwargs={"observation": observation})


def warm(name: str, steps: int, policy: Policy, *, drop_in: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Diffusion Policy's loop over the last steps, from a clean chunk with noise."""
    scheduler, draws = scheduler_of(name, steps, drop_in=drop_in), torch.Generator().manual_seed(0)
    skipped = steps - int(STRENGTH * steps)

    def chunk(ahead: Tensor, observation: Tensor) -> Tensor:
        model = given_to(policy, observation)
        return published_loop(scheduler, steps, model, ahead, {"generator": draws}, skipped)

    return chunk


def warm_prepared(sampler: fastsample.Sampler, policy: Policy) -> Callable[[Tensor, Tensor], Tensor]:
    """A prepared run that starts from a clean chunk."""
    given = {"observation": torch.zeros(1, OBSERVATION)}
    run = sampler.prepare(policy, torch.zeros(SHAPE), strength=STRENGTH, model_kwargs=given)
    return lambda ahead, observation: run(ahead, model_kwargs={"observation": observation})


def given_to(policy: Policy, observation: Tensor) -> Model:
    """The policy for one observation."""
    return lambda x, t: policy(x, t, observation)


def ipndm_of(steps: int) -> fastsample.IPNDM:
    """iPNDM on the alpha bars of the schedule."""
    schedule = fastsample.Schedule.from_alphas_cumprod(scheduler_of("DDIM", steps).alphas_cumprod)
    return fastsample.IPNDM(schedule, steps=steps, clip=1.0)


def scheduler_of(name: str, steps: int, *, drop_in: bool = False) -> Any:
    """The scheduler as Diffusion Policy configures it, diffusers' or ours; iPNDM has levels of its own there."""
    import diffusers

    from fastsample.integrations import diffusers as drop_ins

    options = {"num_train_timesteps": SCHEDULE["num_train_timesteps"]} if name == "IPNDM" else SCHEDULE
    scheduler = getattr(drop_ins if drop_in else diffusers, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(steps)
    return scheduler
