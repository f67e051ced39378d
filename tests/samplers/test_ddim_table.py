"""DDIM's rows against diffusers' formulas written a second time, in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastsample import DDIM, Schedule, Table, spaced_timesteps
from fastsample.times.levels import noise_levels

# Noise levels


@pytest.mark.parametrize("final", [0.0, -0.5, 1.0 + 1e-9, math.nan, math.inf, 0.99])
def test_final_alpha_cumprod_out_of_range(final: float) -> None:
    schedule = Schedule.linear()
    with pytest.raises(ValueError, match=r"in \(0, 1\] and not below 0.9999, .* timestep 0; got"):
        noise_levels(schedule, np.array([500, 0]), final)
    with pytest.raises(ValueError, match="final_alpha_cumprod"):
        DDIM(schedule, steps=5, timesteps="leading", final_alpha_cumprod=final)


@pytest.mark.parametrize(
    ("timesteps", "steps"),
    [("trailing", 7), ("trailing", 30), ("linspace", 10), ("quad", 9), ("10,10,5", 25), ([990, 17, 3], 3)],
    ids=str,
)
def test_the_previous_alpha_bar_is_that_of_the_next_entry(timesteps: Any, steps: int) -> None:
    """Where T // N is not the distance of neighbours, t - T // N would miss (diffusers #9261, #11347)."""
    schedule = Schedule.linear()
    table = DDIM(schedule, timesteps=timesteps, steps=steps).table
    # eta = 0: x' = sqrt(abar') x0 + ..., so b is sqrt(abar').
    expected = np.sqrt([*schedule.alphas_cumprod[table.t[1:]], 1.0])
    np.testing.assert_allclose(table.b, expected, rtol=1e-15)
    strided = table.t - 1000 // steps
    assert (strided[:-1] != table.t[1:]).any(), "a list that could not tell the two apart"


# DDIM against diffusers' formulas


def diffusers_ddim(
    x: float, m: float, z: float, a: float, a_prev: float, prediction: str, clip: float | None, reuse: bool, eta: float
) -> float:
    """DDIMScheduler.step on one number; reuse is use_clipped_model_output."""
    b = 1 - a
    if prediction == "epsilon":
        x0, epsilon = (x - math.sqrt(b) * m) / math.sqrt(a), m
    elif prediction == "v":
        x0, epsilon = math.sqrt(a) * x - math.sqrt(b) * m, math.sqrt(a) * m + math.sqrt(b) * x
    else:
        x0, epsilon = m, (x - math.sqrt(a) * m) / math.sqrt(b)
    if clip is not None:
        x0 = min(max(x0, -clip), clip)
    sigma = eta * math.sqrt((1 - a_prev) / b * (1 - a / a_prev))
    if reuse:
        epsilon = (x - math.sqrt(a) * x0) / math.sqrt(b)
    return math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0.0)) * epsilon + sigma * z


def apply_row(row: dict[str, float], x: float, m: float, z: float) -> float:
    x0 = min(max(row["p"] * x + row["q"] * m, -row["limit"]), row["limit"])
    return row["a"] * x + row["b"] * x0 + row["d"] * m + row["s"] * z


PROCESSES: dict[str, tuple[Schedule, str, int, int, float]] = {
    "linear-leading-10": (Schedule.linear(), "leading", 10, 0, 1.0),
    "linear-trailing-7": (Schedule.linear(), "trailing", 7, 0, 1.0),
    "linear-every-step": (Schedule.linear(100), "leading", 100, 0, 1.0),
    "cosine-linspace-20": (Schedule.cosine(), "linspace", 20, 0, 1.0),
    "stable-diffusion": (Schedule.scaled_linear(), "leading", 50, 1, float(Schedule.scaled_linear().alphas_cumprod[0])),
    "zero-terminal-snr": (Schedule.scaled_linear().rescale_zero_terminal_snr(), "trailing", 6, 0, 1.0),
}


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("clip", "rederive"),
    [(None, False), (None, True), (1.0, False), (1.0, True), (0.5, True)],
    ids=["no-clip", "no-clip-rederive", "clip", "clip-rederive", "clip-0.5-rederive"],
)
@pytest.mark.parametrize(
    ("process", "prediction"),
    # Epsilon cannot work at alpha bar 0: asserted on its own.
    [(p, m) for p in PROCESSES for m in ("epsilon", "v", "x0") if (p, m) != ("zero-terminal-snr", "epsilon")],
)
def test_ddim_rows_follow_diffusers(
    process: str, prediction: str, clip: float | None, rederive: bool, eta: float
) -> None:
    schedule, spacing, steps, offset, final = PROCESSES[process]
    t = spaced_timesteps(schedule.T, spacing, steps, steps_offset=offset)
    alpha_bar = [*schedule.alphas_cumprod[t].tolist(), final]
    shape = {"eta": eta, "prediction": prediction, "clip": clip, "rederive_epsilon": rederive}
    table = DDIM(schedule, timesteps=t, final_alpha_cumprod=final, **shape).table
    generator = np.random.default_rng(0)
    for row, a, a_prev in zip(table, alpha_bar, alpha_bar[1:], strict=False):
        for x, m, z in generator.standard_normal((4, 3)).tolist():
            reuse = rederive and clip is not None
            expected = diffusers_ddim(x, m, z, a, a_prev, prediction, clip, reuse, eta)
            # x0 is as large as 1 / alpha and epsilon as 1 / sigma; each passes a dozen roundings of 1.1e-16, and the
            # differences 1 - a / a' and 1 - a' - s^2 lose up to 4 digits next to the data.
            scale = 1 / math.sqrt(max(a, 1e-12)) if prediction == "epsilon" else 1 / math.sqrt(1 - a)
            assert apply_row(row, x, m, z) == pytest.approx(expected, rel=0, abs=1e-12 * (1 + scale)), row
    assert table.stochastic == tuple(eta > 0 and 0 < later < 1 for later in alpha_bar[1:])


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no-clip", "clip"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_rows_that_let_x0_be_corrected_say_the_same_while_it_is_not(prediction: str, clip: float | None) -> None:
    common: dict[str, Any] = dict(timesteps=[900, 500, 100, 0], eta=0.3, prediction=prediction, clip=clip)
    plain = DDIM(Schedule.linear(), **common).table
    corrected = DDIM(Schedule.linear(), **common, correct_x0=lambda x0, t: x0).table
    assert (corrected.d == 0).all(), "epsilon comes from x0 alone"
    for one, other in zip(plain, corrected, strict=True):
        for x, m, z in np.random.default_rng(1).standard_normal((4, 3)).tolist():
            # 1 / alpha is 66 at t = 900.
            assert apply_row(one, x, m, z) == pytest.approx(apply_row(other, x, m, z), rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("t", "previous", "variance"), [(420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)]
)
def test_published_variances(t: int, previous: int, variance: float) -> None:
    table = DDIM(Schedule.linear(), timesteps=[t, previous], eta=1.0).table
    # Published with five digits.
    assert table.s[0] ** 2 == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine], ids=lambda f: f.__name__)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1e6])
def test_a_last_level_that_repeats_is_the_identity(make: Callable[[], Schedule], eta: float) -> None:
    """final_alpha_cumprod = alphas_cumprod[0] after t = 0: rounding must not make the variance negative."""
    schedule = make()
    table = DDIM(schedule, timesteps=[0], eta=eta, final_alpha_cumprod=float(schedule.alphas_cumprod[0])).table
    assert table.s[0] == 0.0
    assert apply_row(next(iter(table)), 0.7, -1.3, 9.0) == pytest.approx(0.7, abs=1e-15)


# eta


ETAS = [
    pytest.param(schedule, spacing, steps, id=f"{name}-{spacing}-{steps}")
    for name, schedule in (("linear", Schedule.linear()), ("cosine", Schedule.cosine()))
    for spacing, steps in (("leading", 10), ("trailing", 3), ("trailing", 7), ("trailing", 50), ("linspace", 20))
]


@pytest.mark.parametrize(("schedule", "spacing", "steps"), ETAS)
def test_the_largest_eta_in_the_message_works_and_more_does_not(schedule: Schedule, spacing: str, steps: int) -> None:
    def make(eta: float) -> Table:
        return DDIM(schedule, timesteps=spacing, steps=steps, eta=eta).table

    with pytest.raises(ValueError, match="the largest valid eta here is") as caught:
        make(1000.0)
    assert "eta=1000.0" in str(caught.value)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    assert largest >= 1.0, "ancestral sampling is always possible"
    table = make(largest)
    # There the last noisy row is all noise: nothing of epsilon is left.
    assert np.isfinite(table.packed[:, :6]).all()
    _, sigma = noise_levels(schedule, spaced_timesteps(schedule.T, spacing, steps))
    assert (table.s <= sigma[1:] * (1 + 1e-12)).all()
    assert (table.s / np.where(sigma[1:] > 0, sigma[1:], 1)).max() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="needs more noise"):
        make(1.001 * largest)


# Predictions that cannot work, and those that can


@pytest.fixture
def zero_terminal() -> Schedule:
    return Schedule.scaled_linear().rescale_zero_terminal_snr()


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no-clip", "clip"])
def test_epsilon_at_alpha_bar_zero_is_refused(zero_terminal: Schedule, clip: float | None) -> None:
    with pytest.raises(ValueError, match=r"epsilon.*alpha bar is 0.*v or x0"):
        DDIM(zero_terminal, timesteps="trailing", steps=5, clip=clip)
    assert len(DDIM(zero_terminal, timesteps="leading", steps=5, clip=clip).table) == 5, "800 is not the last timestep"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no-clip", "clip"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_other_predictions_work_at_alpha_bar_zero(
    zero_terminal: Schedule, prediction: str, clip: float | None, eta: float
) -> None:
    table = DDIM(zero_terminal, timesteps="trailing", steps=5, prediction=prediction, clip=clip, eta=eta).table
    alpha, sigma = noise_levels(zero_terminal, spaced_timesteps(1000, "trailing", 5))
    assert alpha[0] == 0.0
    x, m, z = 0.7, 0.4, -1.1
    # Pure noise: epsilon is x, and v is -x0. diffusers gets 0 / 0 here.
    x0 = -m if prediction == "v" else m
    s = eta * sigma[1]
    expected = alpha[1] * x0 + math.sqrt(sigma[1] ** 2 - s**2) * x + s * z
    assert apply_row(next(iter(table)), x, m, z) == pytest.approx(expected, abs=1e-15)


def test_clean_data_do_not_tell_the_noise() -> None:
    """alphas_cumprod[0] = 1 makes sigma 0 at t = 0, where diffusers divides by 0."""
    schedule = Schedule.from_alphas_cumprod([1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="alpha bar is 1: leave that timestep out"):
        DDIM(schedule, timesteps=[2, 1, 0], prediction="x0")
    with pytest.raises(ValueError, match="alpha bar is 1: leave that timestep out"):
        DDIM(schedule, timesteps=[2, 1, 0], prediction="v", clip=1.0)
    assert apply_row(list(DDIM(schedule, timesteps=[2, 1, 0], eta=1.0).table)[-1], 0.7, -1.3, 9.0) == 0.7
    assert len(DDIM(schedule, timesteps=[2, 1], prediction="x0").table) == 2


BAD_OPTIONS = [
    *[("eta", value, f"eta.*{value}") for value in (-1e-9, -1.0, math.nan, math.inf, -math.inf)],
    *[("clip", value, "clip must be positive or None") for value in (0.0, -1.0, math.nan)],
    *[
        ("prediction", value, f"one of epsilon, v, x0, flow, got {value!r}")
        for value in ("eps", "v_prediction", "sample", "")
    ],
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("option", "value", "message"), BAD_OPTIONS, ids=[f"{o}={v!r}" for o, v, _ in BAD_OPTIONS])
def test_ddim_refuses(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDIM(Schedule.linear(), steps=5, **{option: value})
