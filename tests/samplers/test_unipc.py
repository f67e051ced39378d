"""UniPC: whole chains against diffusers, what its corrector reads, starts part-way, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsample import Schedule
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.dpm_solver import DPMSolver
from fastsample.samplers.limits import DynamicThreshold
from fastsample.samplers.unipc import UniPC, unipc
from fastsample.times.flow import flow_levels
from support import diffusers_runs
from support.chains import toy_model
from support.diffusers_runs import start

SCHEDULE = Schedule.scaled_linear()
FINAL = float(SCHEDULE.alphas_cumprod[0])
PEER_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
OFF = list(range(1000))  # the steps after which diffusers does not correct
# diffusers' bh1 gives NaN where the last level has no noise.
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bh1": ({"final_alpha_cumprod": FINAL}, {"final_sigmas_type": "sigma_min"}),
    "bh2": ({}, {}),
}


def peer(variant: str, order: int, prediction: str = "epsilon", corrector: bool = True, **options: Any) -> Any:
    return diffusers_runs.scheduler_of(
        "UniPCMultistepScheduler",
        solver_type=variant,
        solver_order=order,
        prediction_type=PEER_PREDICTION[prediction],
        disable_corrector=[] if corrector else OFF,
        **options,
    )


@pytest.mark.parametrize("corrector", [True, False], ids=["corrected", "predictor-alone"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_diffusers_chains(prediction: str, variant: str, order: int, corrector: bool) -> None:
    """Within 1e-4 of the largest value: diffusers' levels and each of its up to 25 steps are rounded to float32."""
    ours, theirs = ENDS[variant]
    scheduler = peer(variant, order, prediction, corrector, **theirs)
    for steps in (1, 5, 10, 25):
        scheduler.set_timesteps(steps)
        sampler = UniPC(
            SCHEDULE,
            steps=steps,
            timesteps=scheduler.timesteps.tolist(),
            order=order,
            variant=variant,
            corrector=corrector,
            prediction=prediction,
            **ours,
        )
        want = diffusers_runs.chain(scheduler, toy_model, start())
        assert (sampler(toy_model, start()) - want).abs().max() <= 1e-4 * want.abs().max(), steps


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        pytest.param({"timesteps": "karras"}, {"use_karras_sigmas": True}, id="karras"),
        pytest.param({"timesteps": "trailing"}, {"timestep_spacing": "trailing"}, id="trailing"),
        pytest.param(
            {"lower_order_final": False, "final_alpha_cumprod": FINAL},
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            id="higher-order-final",
        ),
        pytest.param(
            {"clip": DynamicThreshold(0.9, max=3.0)},
            {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
            id="thresholding",
        ),
    ],
)
@pytest.mark.parametrize("order", [2, 3])
def test_diffusers_options(backend: str, arguments: dict[str, Any], options: dict[str, Any], order: int) -> None:
    scheduler = peer("bh2", order, **options)
    scheduler.set_timesteps(7)
    want = diffusers_runs.chain(scheduler, toy_model, start())
    given = {"timesteps": "linspace", **arguments}
    got = unipc(toy_model, start(), steps=7, **given, order=order, schedule=SCHEDULE, backend=backend)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_flow_chains(order: int) -> None:
    """From a level just below pure noise, which diffusers' formula cannot start from."""
    scheduler = peer("bh2", order, "flow", use_flow_sigmas=True)
    scheduler.set_timesteps(12)
    t, _, sigma = flow_levels([950, 800, 700, 610, 500, 420, 300, 240, 150, 90, 40, 10], 12, 1.0)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(sigma).float(), torch.tensor(t).float()
    want = diffusers_runs.chain(scheduler, toy_model, start())
    got = unipc(toy_model, start(), timesteps=t.tolist(), order=order, prediction="flow")
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["flow", "v"])
def test_from_pure_noise(prediction: str, order: int, variant: str) -> None:
    """At alpha 0 the first width is infinite: that row is DDIM's, and later ones do without its difference."""
    schedule = None if prediction == "flow" else Schedule.linear().rescale_zero_terminal_snr()
    sampler = UniPC(schedule, steps=6, timesteps="trailing", order=order, variant=variant, prediction=prediction)
    assert sampler.table.alpha is not None and sampler.table.alpha[0] == 0
    assert sampler(toy_model, start()).isfinite().all()


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_a_last_row_that_stays_where_it_is(variant: str) -> None:
    options: dict[str, Any] = {"final_alpha_cumprod": FINAL, "lower_order_final": False, "timesteps": "karras"}
    sampler = UniPC(SCHEDULE, steps=6, order=3, variant=variant, **options)
    steps = [step.x.clone() for step in sampler.iterate(toy_model, start())]
    assert steps[-1].isfinite().all()


def test_order_1_without_a_corrector_is_ddim() -> None:
    one = UniPC(SCHEDULE, steps=8, order=1, corrector=False, timesteps="trailing")(toy_model, start())
    other = DDIM(SCHEDULE, steps=8, timesteps="trailing")(toy_model, start())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_is_read() -> None:
    def reads(**options: Any) -> tuple[int, ...]:
        return UniPC(SCHEDULE, steps=6, lower_order_final=False, final_alpha_cumprod=FINAL, **options).table.reads

    assert reads(order=2, corrector=False) == (0, 1, 1, 1, 1, 1)
    assert reads(order=2) == (0, 1, 2, 2, 2, 2)
    assert reads(order=3, corrector=False) == (0, 1, 2, 2, 2, 2)
    assert reads(order=3) == (0, 1, 2, 3, 3, 3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_start_part_way_is_a_run_of_its_own(order: int) -> None:
    sampler = UniPC(SCHEDULE, timesteps=[900, 700, 500, 300, 100], order=order)
    later = UniPC(SCHEDULE, timesteps=[500, 300, 100], order=order)
    assert torch.equal(sampler(toy_model, start(), start_step=2), later(toy_model, start()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"order": 4}, "order must be 1, 2 or 3, got 4", id="order"),
        pytest.param({"variant": "bh3"}, "variant must be one of", id="variant"),
        pytest.param({"clip": -1.0}, "clip", id="clip"),
    ],
)
@pytest.mark.parametrize("solver", [UniPC])
def test_bad_arguments(solver: type[Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(SCHEDULE, steps=5, **arguments)


def test_it_is_no_dpm_solver() -> None:
    """A corrector changes what comes out: order 2 differs from DPM-Solver++ of order 2 on the same levels."""
    one, other = (
        kind(SCHEDULE, steps=8, order=2, timesteps="trailing")(toy_model, start()) for kind in (UniPC, DPMSolver)
    )
    assert (one - other).abs().max() > 1e-3
