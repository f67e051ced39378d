"""Live schedulers of diffusers that fastsample.from_diffusers has an equivalent of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        scheduler, options: the class, without "Scheduler", and what it is made with.
        steps, arguments: of its set_timesteps.
        eta: of its `step`; None for the default.
        float64: why its chain in float32 is too far from its own in float64 to be the judge; empty where it is not.
    """

    scheduler: str
    options: Options = field(default_factory=dict)
    steps: int | None = 20
    arguments: Options = field(default_factory=dict)
    eta: float | None = None
    float64: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """All of it, as it would be written."""
        calls = [f"{self.scheduler}({_written(self.options)})"]
        given = {} if self.steps is None else {"steps": self.steps}
        given |= dict(self.arguments) | ({} if self.eta is None else {"eta": self.eta})
        return f"{calls[0]}, {_written(given)}"


def _written(arguments: Options) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


ZERO_SNR: Options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
STABLE_DIFFUSION: Options = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
FLOW: Options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SIGMAS: Sequence[Options] = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential")]
BETA: Options = {"use_beta_sigmas": True}
NEAR = "its first and last sigmas are so near each other that differences of lambda cancel"
THRESHOLD: Options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}


def _ddim() -> Iterator[Case]:
    for scheduler in ("DDIM", "DDIMParallel"):
        yield Case(scheduler)
        yield Case(scheduler, {"clip_sample": False, "set_alpha_to_one": False, **STABLE_DIFFUSION}, eta=1.0)
    yield Case("DDIM", {"clip_sample_range": 0.8}, 50, eta=0.5)
    yield Case("DDIM", THRESHOLD)
    yield Case("DDIM", {"clip_sample": False, "timestep_spacing": "linspace"})
    yield Case("DDIM", {"clip_sample": False, "timestep_spacing": "linspace", "prediction_type": "sample"}, 13, eta=1.0)
    yield Case("DDIM", {"clip_sample": False, "timestep_spacing": "trailing"}, 7)
    yield Case("DDIM", {"clip_sample": False, **ZERO_SNR})
    yield Case("DDIM", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}, eta=0.3)


def _ddpm() -> Iterator[Case]:
    for variance in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        yield Case("DDPM", {"variance_type": variance})
        yield Case("DDPM", {"variance_type": variance, "timestep_spacing": "trailing", "clip_sample": False}, 7)
    rounded = "1 - alpha bar of neighbouring timesteps cancels"
    yield Case("DDPM", {"num_train_timesteps": 50}, None, float64=rounded)
    yield Case("DDPM", {"clip_sample_range": 2.0, **STABLE_DIFFUSION})
    yield Case("DDPM", {"timestep_spacing": "linspace", "prediction_type": "sample", "clip_sample": False})
    yield Case("DDPM", THRESHOLD)
    yield Case("DDPM", ZERO_SNR)
    yield Case("DDPM", {"beta_schedule": "sigmoid", "variance_type": "fixed_large"})
    yield Case("DDPM", {}, None, {"timesteps": [900, 500, 100]})
    yield Case("DDPMParallel", {"variance_type": "learned_range"})


def _distilled() -> Iterator[Case]:
    for options in (
        {},
        {"clip_sample": True},
        {"prediction_type": "v_prediction"},
        THRESHOLD,
        {"timestep_scaling": 3.0},
    ):
        yield Case("LCM", options, 4)
    yield Case("LCM", {"rescale_betas_zero_snr": True, "prediction_type": "sample"}, 8)
    yield Case("LCM", {"original_inference_steps": 100}, 5, {"strength": 0.5})
    yield Case("LCM", {}, None, {"timesteps": [999, 501, 77]})
    for eta in (None, 0.0, 0.7, 1.0):
        yield Case("TCD", {}, 4, eta=eta)
    yield Case("TCD", {"prediction_type": "v_prediction"}, 8)
    yield Case("TCD", {"prediction_type": "sample", "clip_sample": True}, 3)
    for steps in (1, 2, 5):
        yield Case("CMStochasticIterative", {}, steps)
    yield Case("CMStochasticIterative", {"s_noise": 0.5, "clip_denoised": False, "sigma_max": 40.0}, 4)
    yield Case("CMStochasticIterative", {"num_train_timesteps": 201}, None, {"timesteps": [106, 0]})


def _sigmas() -> Iterator[Case]:
    for scheduler in ("EulerDiscrete", "HeunDiscrete"):
        for options in ({}, *SIGMAS, BETA):
            yield Case(scheduler, options)
        yield Case(scheduler, {"timestep_spacing": "leading", **STABLE_DIFFUSION})
        yield Case(scheduler, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 7)
        yield Case(scheduler, {"prediction_type": "sample"})
        yield Case(scheduler, {}, None, {"timesteps": [990, 500, 250, 1]})
    yield Case("EulerDiscrete", {"interpolation_type": "log_linear"})
    yield Case("EulerDiscrete", {"final_sigmas_type": "sigma_min"})
    yield Case("EulerDiscrete", ZERO_SNR)
    yield Case("EulerDiscrete", {**STABLE_DIFFUSION}, None, {"sigmas": [14.6, 5.0, 1.0, 0.1, 0.0]})
    continuous = {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    }
    yield Case("EulerDiscrete", {**continuous, "use_karras_sigmas": True})
    yield Case("HeunDiscrete", {"clip_sample": True, "clip_sample_range": 0.8})
    yield Case("HeunDiscrete", {"beta_schedule": "exp", "prediction_type": "v_prediction"})
    for options in ({}, {"timestep_spacing": "leading", **STABLE_DIFFUSION}, ZERO_SNR):
        yield Case("EulerAncestralDiscrete", options)


def _flow() -> Iterator[Case]:
    for options in (
        {},
        {"shift": 3.0},
        *SIGMAS,
        BETA,
        {"invert_sigmas": True},
        {"stochastic_sampling": True, "shift": 3.0},
    ):
        yield Case("FlowMatchEulerDiscrete", options)
    for kind in ("exponential", "linear"):
        shifting = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.02}
        yield Case("FlowMatchEulerDiscrete", shifting, 12, {"mu": 0.8})
    yield Case(
        "FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, None, {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 1.1}
    )
    yield Case("FlowMatchHeunDiscrete")
    yield Case("FlowMatchHeunDiscrete", {"shift": 3.0}, 7)


def _dpm_solver() -> Iterator[Case]:
    name = "DPMSolverMultistep"
    for algorithm, orders in {"dpmsolver++": 3, "sde-dpmsolver++": 3, "dpmsolver": 3, "sde-dpmsolver": 2}.items():
        final = {} if algorithm.endswith("++") else {"final_sigmas_type": "sigma_min"}
        for order in range(1, orders + 1):
            for solver in ("midpoint", "heun") if order == 2 else ("midpoint",):
                solved = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
                yield Case(name, {**solved, **final}, 8 if order == 3 else 20)
    for options in (*SIGMAS, {"use_lu_lambdas": True}, THRESHOLD, ZERO_SNR, {"variance_type": "learned_range"}):
        yield Case(name, options)
    yield Case(name, BETA, float64=NEAR)
    yield Case(name, {"timestep_spacing": "leading", **STABLE_DIFFUSION}, 25)
    yield Case(name, {"timestep_spacing": "trailing", "euler_at_final": True, "prediction_type": "sample"})
    yield Case(name, {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_order": 3}, 9)
    yield Case(name, {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"})
    yield Case(name, {**FLOW, "flow_shift": 3.0})
    yield Case(name, {**FLOW, "use_dynamic_shifting": True, "algorithm_type": "sde-dpmsolver++"}, 12, {"mu": 1.1})
    yield Case(name, {}, None, {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]})


def _unipc() -> Iterator[Case]:
    name = "UniPCMultistep"
    for order in (1, 2, 3):
        yield Case(name, {"solver_order": order}, 10)
        yield Case(name, {"solver_order": order, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 9)
        yield Case(name, {"solver_order": order, "predict_x0": False, "final_sigmas_type": "sigma_min"}, 9)
    for options in (*SIGMAS, {"disable_corrector": [0, 1, 4]}, THRESHOLD, ZERO_SNR, {**FLOW, "flow_shift": 5.0}):
        yield Case(name, options, 12)
    yield Case(name, BETA)
    yield Case(name, {**FLOW, "use_karras_sigmas": True, "shift_terminal": 0.1}, 12)
    yield Case(name, {**FLOW, "use_dynamic_shifting": True}, 12, {"mu": 1.1})
    yield Case(name, {"timestep_spacing": "leading", "prediction_type": "sample", **STABLE_DIFFUSION})


def _deis() -> Iterator[Case]:
    name = "DEISMultistep"
    cancels = "its coefficients are differences of logarithms that cancel"
    grows = "epsilon next to sigma = 1 is a difference that cancels, and grows by the quotient of two alphas"
    for order in (1, 2, 3):
        yield Case(name, {"solver_order": order}, 10)
        yield Case(name, {"solver_order": order, **FLOW, "flow_shift": 5.0}, 10, float64=grows)
    for options in (*SIGMAS, THRESHOLD, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}):
        yield Case(name, options)
    yield Case(name, BETA, float64=NEAR)
    yield Case(name, {"solver_order": 3, "prediction_type": "sample"}, float64=cancels)
    yield Case(name, {"lower_order_final": False, "prediction_type": "sample"}, 14)
    yield Case(name, {"timestep_spacing": "leading", **STABLE_DIFFUSION})


CASES = (
    *(*_ddim(), *_ddpm(), *_distilled(), *_sigmas(), *_flow()),
    *(*_dpm_solver(), *_unipc(), *_deis()),
)
