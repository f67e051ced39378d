"""What a user's own type checker says of samplers. Run by mypy, which reports every `ignore` that is not needed."""

from typing import Any, Literal

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


class Decoder:
    """As diffusers' VAEs: what comes out holds the sample."""

    class Output:
        sample: Tensor

    def decode(self, x: Tensor) -> Output:
        return self.Output()


def pixels(x: Tensor) -> list[int]:
    return [int(x.sum())]


# What a call returns is what its decoder makes.
sampler, vae = DDIM(Schedule.linear(), steps=5, prediction="v", timesteps="trailing"), Decoder()
options: fastsample.Options = {"seed": 3, "backend": "reference"}
assert_type(sampler(model, (1, 2)), Tensor)
assert_type(sampler(model, (1, 2), **options), Any)  # they may have a decoder
assert_type(sampler(model, (1, 2), decode=torch.exp), Tensor)
assert_type(sampler(model, (1, 2), decode=lambda x: vae.decode(x / 2)), Tensor)
assert_type(sampler(model, (1, 2), decode=pixels), list[int])
assert_type(ddim(model, (1, 2), decode=lambda x: vae.decode(x)), Tensor)
assert_type(ddim(model, (1, 2), decode=pixels, seed=3), list[int])
assert_type(fastsample.lcm(model, (1, 2), decode=pixels), list[int])
assert_type(fastsample.LCM(Schedule.linear())(model, (1, 2), guidance_embedding=2.0), Tensor)
assert_type(sampler.prepare(model, (1, 2))(seed=1), Tensor)
assert_type(sampler.prepare(model, (1, 2), decode=pixels)(seed=1), list[int])
assert_type(fastsample.interpolate(model, torch.ones(1, 2), torch.ones(1, 2), 3), Tensor)
assert_type(fastsample.interpolate(model, torch.ones(1, 2), torch.ones(1, 2), 3, decode=pixels), list[int])
assert_type(next(sampler.iterate(model, (1, 2))), fastsample.Step)
assert_type(fastsample.Batcher(model, sampler, batch=2, backend="cpu").submit((2,)).result(), Tensor)
assert_type(fastsample.ops.posterior(torch.ones(1), model_output=torch.ones(1), table=sampler.table, row=0)[0], Tensor)
assert_type(fastsample.zoo.UNetConfig(prediction="v").prediction, Literal["epsilon", "v", "x0"])
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

# Arguments that are one of a few names.
ddim(model, (1, 2), prediction="v_prediction")  # type: ignore[arg-type]
ddim(model, (1, 2), backend="gpu")  # type: ignore[arg-type]
sampler(model, (1, 2), backend="gpu")  # type: ignore[arg-type]
DDIM(Schedule.linear(), prediction="sample")  # type: ignore[arg-type]
fastsample.DDPM(Schedule.linear(), variance="fixed_small_log")  # type: ignore[arg-type]
fastsample.UniPC(Schedule.linear(), variant="tab")  # type: ignore[arg-type]
fastsample.DDIMInverse(Schedule.linear(), convention="mirrored")  # type: ignore[arg-type]
fastsample.velocity(torch.ones(1), torch.ones(1), 5, prediction="epsilon")  # type: ignore[arg-type]
fastsample.ops.randn((1, 2), backend="torch")  # type: ignore[arg-type]
fastsample.dddim(model, (1, 2))  # type: ignore[attr-defined]
