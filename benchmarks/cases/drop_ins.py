"""Configurations of the schedulers that fastsample.integrations.diffusers has: all their options, on grids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]
Axis = Sequence[Options]


@dataclass(frozen=True)
class Run:
    """A scheduler's whole loop.

    Attributes:
        scheduler, options: the class and what it is made with.
        timesteps: the arguments of its set_timesteps.
        given: those of its step, beside what every step is given.
        compat: of the drop-in; None where diffusers has no mistake that it would repeat.
    """

    scheduler: str
    options: Options = field(default_factory=dict)
    timesteps: Options = field(default_factory=dict)
    given: Options = field(default_factory=dict)
    compat: str | None = None

    @property
    def name(self) -> str:
        """All of it, as it would be written."""
        compat = {} if self.compat is None else {"compat": self.compat}
        calls = [f"{self.scheduler}({_written({**self.options, **compat})})", _written(self.timesteps)]
        return "; ".join([*calls, _written(self.given)] if self.given else calls)

    @property
    def steps(self) -> int:
        """How many steps it is given."""
        listed: Sequence[float] = next((self.timesteps[name] for name in _LISTS if name in self.timesteps), ())
        return len(listed) or int(self.timesteps["num_inference_steps"])


_LISTS = ("timesteps", "sigmas")


def _written(arguments: Options) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def each(name: str, *values: Any) -> Axis:
    """One option with each of these values."""
    return [{name: value} for value in values]


def steps(*counts: int) -> Axis:
    """So many steps."""
    return each("num_inference_steps", *counts)


NONE: Axis = [{}]
ALL = steps(1, 2, 4, 10, 50, 1000)
MOST = steps(1, 2, 4, 10, 50)
SOLVED = steps(1, 2, 4, 10, 20, 50)
PREDICTIONS = each("prediction_type", "epsilon", "v_prediction", "sample")
SPACINGS = each("timestep_spacing", "leading", "trailing", "linspace")
ZERO_SNR = each("rescale_betas_zero_snr", False, True)
FINAL = each("set_alpha_to_one", True, False)
FINAL_SIGMA = each("final_sigmas_type", "zero", "sigma_min")
THRESHOLD: Options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
LIMITS: Axis = [{"clip_sample": False}, {"clip_sample": True}, {"clip_sample": False, **THRESHOLD}]
STABLE_DIFFUSION: Options = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
COSINE: Options = {"beta_schedule": "squaredcos_cap_v2"}
KINDS_OF_SIGMAS: Axis = [{}, *({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))]


@dataclass(frozen=True)
class Grid:
    """All combinations of a value from each axis.

    Attributes:
        scheduler: the class.
        options: axes of what it is made with.
        timesteps: of its set_timesteps' arguments.
        given: of its step's.
        leaves_out: which of them diffusers refuses, or has no finite last step for.
    """

    scheduler: str
    options: Sequence[Axis]
    timesteps: Axis
    given: Axis = ({},)
    leaves_out: Callable[[Run], bool] = lambda run: False

    def __iter__(self) -> Iterator[Run]:
        for *axes, timesteps, given in itertools.product(*self.options, self.timesteps, self.given):
            options = {name: value for axis in axes for name, value in axis.items()}
            run = Run(self.scheduler, options, timesteps, given, "diffusers")
            if not self.leaves_out(run):
                yield run
                if agrees(run):
                    yield Run(self.scheduler, options, timesteps, given)


def agrees(run: Run) -> bool:
    """Whether diffusers has no mistake in this run that a drop-in corrects by default."""
    options, count = run.options, run.steps
    if options.get("rescale_betas_zero_snr") and options.get("prediction_type", "epsilon") == "epsilon":
        return run.scheduler not in ("DDIMScheduler", "DDIMInverseScheduler", "DDPMScheduler", *_JUMPS)
    if run.scheduler == "DDIMScheduler" and options.get("rescale_betas_zero_snr") and run.given.get("eta") == 1:
        return False
    if count + options.get("steps_offset", 0) > 1000 and options.get("timestep_spacing", "leading") == "leading":
        return False
    spacing = options.get("timestep_spacing", "leading")
    if run.scheduler in ("DDIMScheduler", "DDIMInverseScheduler"):
        return bool(spacing == "leading" or (spacing == "trailing" and 1000 % count == 0) or count == 1000)
    return True


_JUMPS = ("LCMScheduler", "TCDScheduler")


def _beyond(run: Run) -> bool:
    """Timestep 1000, which diffusers has no alpha bar of."""
    return run.options.get("timestep_spacing", "leading") == "leading" and (
        run.options.get("steps_offset", 0) + run.steps > 1000
    )


DDIM = [
    Grid("DDIMScheduler", [PREDICTIONS, SPACINGS, LIMITS, ZERO_SNR], ALL, each("eta", 0.0, 0.5, 1.0)),
    Grid(
        "DDIMScheduler",
        [PREDICTIONS, [STABLE_DIFFUSION, COSINE], LIMITS, FINAL],
        ALL,
        [{"use_clipped_model_output": True}, {"use_clipped_model_output": True, "eta": 1.0}],
        _beyond,
    ),
]
INVERSE = [
    Grid(
        "DDIMInverseScheduler",
        [PREDICTIONS, each("timestep_spacing", "leading", "trailing"), LIMITS[:2], ZERO_SNR, FINAL],
        ALL,
    ),
    Grid("DDIMInverseScheduler", [PREDICTIONS, [STABLE_DIFFUSION, COSINE], LIMITS[:2], FINAL], MOST),
]
VARIANCES = each("variance_type", "fixed_small", "fixed_small_log", "fixed_large", "learned_range", "other")
DDPM = [
    Grid("DDPMScheduler", [PREDICTIONS, SPACINGS, LIMITS, VARIANCES, ZERO_SNR], MOST),
    Grid("DDPMScheduler", [PREDICTIONS, LIMITS[:2], VARIANCES[::2]], steps(1000)),
    Grid("DDPMScheduler", [PREDICTIONS, [STABLE_DIFFUSION, COSINE], LIMITS, VARIANCES], steps(1, 10)),
    Grid("DDPMScheduler", [PREDICTIONS, VARIANCES], each("timesteps", [100, 87, 50, 1, 0], [999, 3, 2], [7])),
]
LCM = [
    Grid("LCMScheduler", [PREDICTIONS, LIMITS, ZERO_SNR], MOST),
    Grid(
        "LCMScheduler",
        [PREDICTIONS, FINAL, each("timestep_scaling", 10.0, 0.1)],
        [
            *({"num_inference_steps": 4, "original_inference_steps": 100, "strength": share} for share in (1.0, 0.6)),
            {"timesteps": [999, 500, 3]},
        ],
    ),
]
TCD = [
    Grid("TCDScheduler", [PREDICTIONS, ZERO_SNR, FINAL], MOST, each("eta", 0.0, 0.3, 1.0)),
    Grid("TCDScheduler", [PREDICTIONS, [COSINE]], [{"timesteps": [999, 500, 3, 0]}], each("eta", 0.0, 0.3, 1.0)),
]
CONSISTENCY = [
    Grid(
        "CMStochasticIterativeScheduler",
        [each("clip_denoised", True, False), each("s_noise", 1.0, 0.9), each("sigma_data", 0.5, 1.0)],
        [*steps(1, 2, 4, 10, 40), *each("timesteps", [22, 0], [39, 17, 2])],
    )
]
CHURN: Axis = [{}, {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 20.0, "s_noise": 1.01}, {"s_churn": 1e3}]
EULER = [
    Grid("EulerDiscreteScheduler", [PREDICTIONS, SPACINGS, KINDS_OF_SIGMAS, ZERO_SNR, FINAL_SIGMA], MOST, CHURN),
    Grid("EulerDiscreteScheduler", [PREDICTIONS, SPACINGS, ZERO_SNR], steps(1000)),
    Grid(
        "EulerDiscreteScheduler",
        [PREDICTIONS, [STABLE_DIFFUSION, {"interpolation_type": "log_linear"}, {"timestep_type": "continuous"}]],
        [*MOST, *each("timesteps", [900, 500, 20])],
        CHURN[:2],
        lambda run: "timesteps" in run.timesteps and "timestep_type" in run.options,
    ),
    Grid("EulerDiscreteScheduler", [PREDICTIONS[:2]], each("sigmas", [80.0, 7.0, 0.5], [14.6, 0.03])),
]
ANCESTRAL = [
    Grid("EulerAncestralDiscreteScheduler", [PREDICTIONS[:2], SPACINGS, ZERO_SNR], ALL),
    Grid("EulerAncestralDiscreteScheduler", [PREDICTIONS[:2], [STABLE_DIFFUSION, COSINE]], MOST),
]


def _no_solution(run: Run) -> bool:
    """What has no finite last step in diffusers, or no such solver there."""
    options = run.options
    algorithm, last = options.get("algorithm_type", "dpmsolver++"), options.get("final_sigmas_type", "zero")
    if not algorithm.endswith("++") and last == "zero":
        return True
    if options.get("use_beta_sigmas") and options.get("rescale_betas_zero_snr"):
        return True  # the first timestep is there twice
    third = options.get("solver_order", 2) == 3
    if options.get("prediction_type") == "flow_prediction" and (
        not algorithm.endswith("++") or not options.get("predict_x0", True)
    ):
        return True
    if run.scheduler == "UniPCMultistepScheduler":
        of_x0 = options.get("predict_x0", True)
        return last == "zero" and (not of_x0 or options.get("solver_type") == "bh1")
    return bool(algorithm == "sde-dpmsolver" and third)


ORDERS = each("solver_order", 1, 2, 3)
ALGORITHMS = each("algorithm_type", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
TWO_KINDS = each("use_karras_sigmas", False, True)
FLOWS: Axis = [
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift} for shift in (1.0, 3.0)
]
LU: Axis = [*KINDS_OF_SIGMAS[2:], {"use_lu_lambdas": True}]
DPM = [
    Grid(
        "DPMSolverMultistepScheduler",
        [PREDICTIONS, ALGORITHMS, ORDERS, each("solver_type", "midpoint", "heun"), FINAL_SIGMA, TWO_KINDS],
        SOLVED,
        leaves_out=_no_solution,
    ),
    Grid(
        "DPMSolverMultistepScheduler",
        [PREDICTIONS, ALGORITHMS, ORDERS[1:], LU, FINAL_SIGMA],
        steps(2, 10, 20),
        leaves_out=_no_solution,
    ),
    Grid(
        "DPMSolverMultistepScheduler",
        [PREDICTIONS, ALGORITHMS[:2], SPACINGS, ZERO_SNR, [{}, THRESHOLD], each("euler_at_final", False, True)],
        steps(1, 4, 20),
    ),
    Grid(
        "DPMSolverMultistepScheduler",
        [FLOWS, ALGORITHMS[:2], ORDERS, [*FINAL_SIGMA, {"euler_at_final": True}], each("lower_order_final", True)],
        steps(1, 4, 20),
    ),
    Grid(
        "DPMSolverMultistepScheduler",
        [
            ORDERS,
            [
                {**STABLE_DIFFUSION, "timestep_spacing": "leading"},
                {**COSINE, "lambda_min_clipped": -5.1},
                {"lower_order_final": False, "final_sigmas_type": "sigma_min", "euler_at_final": True},
                {"variance_type": "learned_range"},
            ],
        ],
        [*SOLVED, *each("timesteps", [900, 500, 20])],
    ),
]
CORRECTORS = each("disable_corrector", [], [0, 2])
UNIPC = [
    Grid(
        "UniPCMultistepScheduler",
        [
            *(PREDICTIONS, ORDERS, each("solver_type", "bh1", "bh2"), each("predict_x0", True, False)),
            *(FINAL_SIGMA, CORRECTORS, [{}, THRESHOLD]),
        ],
        SOLVED,
        leaves_out=_no_solution,
    ),
    Grid(
        "UniPCMultistepScheduler",
        [PREDICTIONS, ORDERS, SPACINGS, KINDS_OF_SIGMAS, ZERO_SNR],
        steps(2, 10, 20),
        leaves_out=_no_solution,
    ),
    Grid("UniPCMultistepScheduler", [FLOWS, ORDERS, CORRECTORS], SOLVED),
    Grid("UniPCMultistepScheduler", [ORDERS, [STABLE_DIFFUSION, COSINE], CORRECTORS], SOLVED),
]
DYNAMIC: Options = {"use_dynamic_shifting": True}
FLOW = [
    Grid(
        "FlowMatchEulerDiscreteScheduler",
        [
            each("shift", 1.0, 3.0),
            each("stochastic_sampling", False, True),
            each("invert_sigmas", False, True),
            KINDS_OF_SIGMAS,
            [{}, {"shift_terminal": 0.1}],
        ],
        ALL,
        leaves_out=lambda run: run.steps == 1 and "shift_terminal" in run.options,
    ),
    Grid(
        "FlowMatchEulerDiscreteScheduler",
        [[DYNAMIC], each("time_shift_type", "exponential", "linear"), each("stochastic_sampling", False, True)],
        [
            *({"num_inference_steps": count, "mu": mu} for count in (2, 10, 50) for mu in (0.5, 1.15)),
            {"sigmas": [1.0, 0.6, 0.25], "mu": 0.8},
        ],
    ),
]
GRIDS: Mapping[str, Sequence[Grid]] = {
    grids[0].scheduler: grids
    for grids in (DDIM, INVERSE, DDPM, LCM, TCD, CONSISTENCY, EULER, ANCESTRAL, DPM, UNIPC, FLOW)
}
