"""What a user's own type checker says of samplers. Run by mypy, which reports every `ignore` that is not needed."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import fastsample
from fastsample import DDIM, Schedule, ddim


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


assert_type(ddim(model, (1, 2), steps=5, eta=1.0, seed=3, clip=fastsample.DynamicThreshold()), Tensor)
assert_type(fastsample.ddpm(model, torch.ones(1, 2), schedule=Schedule.linear(), steps=None), Tensor)
assert_type(fastsample.dpm_solver(model, (1, 2), timesteps=[900.0, 500.0], order=3, guidance=[2.0]), Tensor)
assert_type(fastsample.euler(model, (1, 2), prediction="flow", shift=3.0), Tensor)
assert_type(fastsample.lcm(model, (1, 2), guidance_embedding=[2.0]), Tensor)
assert_type(fastsample.consistency(model, (1, 2), sigmas=[80.0, 2.0]), Tensor)
assert_type(fastsample.ddim_invert(model, torch.ones(1, 2), convention="improved"), Tensor)
assert_type(DDIM(Schedule.linear(), steps=5).steps, int)
assert_type(fastsample.Euler(prediction="flow").table, fastsample.Table)

ddim(model, (1, 2), steps="5")  # type: ignore[arg-type]
ddim(model, (1, 2), eta=None)  # type: ignore[arg-type]
ddim(model, (1, 2), seed="3")  # type: ignore[arg-type]
ddim(model, (1, 2), etta=1.0)  # type: ignore[call-arg]
ddim(model, (1, 2), 5)  # type: ignore[call-arg]
ddim(model)  # type: ignore[call-arg]
fastsample.euler(model, (1, 2), schedule=1000)  # type: ignore[arg-type]
fastsample.lcm(model, (1, 2), guidance_embedding="3")  # type: ignore[arg-type]
fastsample.ddim_invert(model, (1, 2))  # type: ignore[arg-type]
fastsample.ddim_invert(model, x=torch.ones(1, 2))  # type: ignore[call-arg]
DDIM(Schedule.linear(), variance="learned")  # type: ignore[call-arg]
fastsample.dddim(model, (1, 2))  # type: ignore[attr-defined]
