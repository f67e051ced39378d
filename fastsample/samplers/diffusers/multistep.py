"""DPMSolverMultistepScheduler, UniPCMultistepScheduler and DEISMultistepScheduler."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.deis import DEIS, DEISVariant
from fastsample.samplers.diffusers.levels import GivenLevels, Levels, of_flow, of_ratios, sigmas_of
from fastsample.samplers.diffusers.reading import Kind, Reading
from fastsample.samplers.multistep import Multistep, lower_at_the_end, widths
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.unipc import Parts, UniPC
from fastsample.schedule import Float64Array

_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
_SOLVERS = ("midpoint", "heun")


@dataclass(frozen=True, kw_only=True, repr=False)
class DPMSolverMultistep(GivenLevels, Multistep):
    """DPM-Solver in all the variants of DPMSolverMultistepScheduler.

    With w the width of a row in lambda = log(alpha / sigma), n = 2 for SDEs and else 1, and m what rows remember:

        dpmsolver++: m = x0,       z = -n w,  x' = sigma'/sigma e^-(n-1)w x - alpha' (...)
        dpmsolver:   m = epsilon,  z = w,     x' = alpha'/alpha x - n sigma' (...)
        (...) = E m + I1 D1 + I2 D2,  E = e^z - 1

    where D1 and D2 are the first two derivatives of m by lambda, from divided differences, times w and w^2. In order 2
    I1 is E/2 ("midpoint") or E/z - 1 ("heun"), in order 3 the latter, and I2 = (E - z)/z^2 - 1/2. In order 3 of the SDE
    the scheduler has + 1/2, and so has this; fastsample.DPMSolver has k-diffusion's.

    Args:
        algorithm_type, solver_type, lower_order_final, euler_at_final: as the scheduler's options.
    """

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def _orders(self, rising: NDArray[np.int64], alpha: Float64Array, sigma: Float64Array) -> NDArray[np.int64]:
        orders = lower_at_the_end(rising) if self.lower_order_final and len(rising) < 15 else rising.copy()
        if self.euler_at_final or sigma[-1] == 0:
            orders[-1] = 1
        empty = widths(alpha, sigma) == 0
        if (orders[empty] > (1 if self.solver_type == "heun" else 2)).any():
            raise ValueError(
                "the scheduler's sigmas repeat in a step of higher order, which is not finite: take "
                "euler_at_final=True, or another final_sigmas_type"
            )
        orders[empty] = 1  # nothing is left to integrate
        return orders

    def _columns(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64], start: int
    ) -> dict[str, Any]:
        w, sde, of_x0 = widths(alpha, sigma), self.algorithm_type.startswith("sde"), self.algorithm_type.endswith("++")
        n = 2 if sde else 1
        z = -n * w if of_x0 else w
        e = np.expm1(z)
        shares = np.stack([e, np.zeros_like(e), np.zeros_like(e)])  # of m in this row and in the two before

        k = np.flatnonzero(orders == 2)
        first = (e[k] / 2 if self.solver_type == "midpoint" else e[k] / z[k] - 1) * w[k] / w[k - 1]
        shares[:, k] += [first, -first, np.zeros_like(first)]

        k = np.flatnonzero(orders == 3)
        w1, w2 = w[k - 1], w[k - 2]
        i1, i2 = e[k] / z[k] - 1, (e[k] - z[k]) / z[k] ** 2 + (0.5 if sde else -0.5)
        of_second = (i1 * w1 + i2 * w[k]) / (w1 + w2)  # of (m - h1)/w1 - (h1 - h2)/w2, times w
        first, second = (i1 + of_second) * w[k] / w1, of_second * w[k] / w2
        shares[:, k] += [first, -first - second, second]

        if of_x0:
            kept, scale, added = sigma[1:] / sigma[:-1], -alpha[1:], -np.expm1(-2 * w)
        else:
            kept, scale, added = alpha[1:] / alpha[:-1], -n * sigma[1:], np.expm1(2 * w)
        b, c1, c2 = scale * shares
        columns = {"a": kept, "b": b, "c1": c1, "c2": c2}
        if sde:
            columns |= {"a": kept * np.exp(-w) if of_x0 else kept, "s": sigma[1:] * np.sqrt(added)}
        return columns if of_x0 else remembering_epsilon(columns, alpha, sigma)


@dataclass(frozen=True, kw_only=True, repr=False)
class UniPCMultistep(GivenLevels, UniPC):
    """UniPC as UniPCMultistepScheduler has it.

    Args:
        disable_corrector: after which rows the state is not corrected.
        predict_x0: whether rows remember x0, else epsilon.
    """

    disable_corrector: Container[int] = ()
    predict_x0: bool = True

    def _corrects(self, k: int) -> bool:
        return k not in self.disable_corrector

    def _columns(
        self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, orders: NDArray[np.int64], start: int
    ) -> dict[str, Any]:
        if self.predict_x0:
            return super()._columns(t, alpha, sigma, orders, start)
        # x / alpha in epsilon is what x / sigma is in x0: the two change places.
        return remembering_epsilon(super()._columns(t, sigma, alpha, orders, start), alpha, sigma)

    def parts_from(self, start: int) -> Parts:
        """What predicts and what corrects in a run that starts at this row, in terms of what rows remember."""
        alpha, sigma = self.table.alpha, self.table.sigma
        assert alpha is not None and sigma is not None
        orders = self._orders_from(start, alpha, sigma)
        return self._parts(*((alpha, sigma) if self.predict_x0 else (sigma, alpha)), orders, start)


@dataclass(frozen=True, kw_only=True, repr=False)
class DEISMultistep(GivenLevels, DEIS):
    """DEIS as DEISMultistepScheduler has it."""

    variant: DEISVariant = "log_rho"


def remembering_epsilon(columns: dict[str, Any], alpha: Float64Array, sigma: Float64Array) -> dict[str, Any]:
    """The columns where b, c1, c2 and c3 are of epsilon, not of x0."""
    hx, h0 = 1 / sigma[:-1], -alpha[:-1] / sigma[:-1]
    return columns | {"a": columns["a"] + columns["b"] * hx, "b": columns["b"] * h0, "hx": hx, "h0": h0}


def _levels(reading: Reading, prediction: str) -> Levels:
    sigmas, flow = sigmas_of(reading), bool(reading.options.get("use_flow_sigmas"))
    if flow and (sigmas[:-1] >= 1).any():
        raise reading.refused("use_flow_sigmas", f"its sigmas must lie below 1 but come to {sigmas.max():.6g}")
    if flow and prediction == "v":
        raise reading.refused(
            "use_flow_sigmas", "a flow's alpha and sigma tell no x0 with prediction_type='v_prediction'"
        )
    if not flow and prediction == "flow":
        raise reading.refused("prediction_type", "only the sigmas of a flow tell x0 with it: use_flow_sigmas=True")
    return of_flow(reading.t, sigmas) if flow else of_ratios(reading.t, sigmas)


def _arguments(reading: Reading) -> dict[str, Any]:
    order = reading.options["solver_order"]
    if reading.name != "UniPCMultistepScheduler":
        order = min(order, 3)  # higher ones are of order 3 there
    if order not in (1, 2, 3):
        raise reading.refused("solver_order", "it must be 1, 2 or 3")
    prediction = reading.prediction("epsilon", "v_prediction", "sample", "flow_prediction")
    return {
        "visited": _levels(reading, prediction),
        "prediction": prediction,
        "clip": reading.clip(),
        "order": order,
        "lower_order_final": bool(reading.options["lower_order_final"]),
        "quiet": reading.is_ours,
    }


def _dpm_solver(reading: Reading) -> Sampler:
    options, arguments = reading.options, _arguments(reading)
    algorithm = options["algorithm_type"]
    if algorithm not in _ALGORITHMS:
        raise reading.refused("algorithm_type", f"it must be one of {', '.join(_ALGORITHMS)}")
    if options["solver_type"] not in _SOLVERS:
        raise reading.refused("solver_type", f"it must be one of {', '.join(_SOLVERS)}")
    if not algorithm.endswith("++") and arguments["prediction"] == "flow":
        raise reading.refused("algorithm_type", "it does not know prediction_type='flow_prediction'")
    if algorithm == "sde-dpmsolver" and arguments["order"] == 3:
        raise reading.refused("algorithm_type", "it has no solver_order=3")
    if not algorithm.endswith("++") and arguments["visited"].sigma[-1] == 0:
        raise reading.refused("algorithm_type", "it cannot reach clean data: take final_sigmas_type='sigma_min'")
    return DPMSolverMultistep(
        **arguments,
        algorithm_type=algorithm,
        solver_type=options["solver_type"],
        euler_at_final=bool(options["euler_at_final"]),
    )


def _unipc(reading: Reading) -> Sampler:
    options, arguments = reading.options, _arguments(reading)
    of_x0, levels = bool(options["predict_x0"]), arguments["visited"]
    if options["solver_p"] is not None:
        raise reading.refused("solver_p", "a predictor of another kind is not known here")
    if not of_x0 and arguments["prediction"] == "flow":
        raise reading.refused("predict_x0", "it does not know prediction_type='flow_prediction'")
    if levels.sigma[-1] == 0 and (not of_x0 or (options["solver_type"] == "bh1" and not reading.is_ours)):
        option = "solver_type" if of_x0 else "predict_x0"
        raise reading.refused(option, "its last step is not finite: take final_sigmas_type='sigma_min'")
    last = 1 if arguments["lower_order_final"] else min(arguments["order"], len(levels.t))
    if last > (1 if levels.sigma[-1] == 0 else 2 if levels.sigma[-1] == levels.sigma[-2] else 3):
        raise reading.refused("lower_order_final", "its last step is not finite: take lower_order_final=True")
    return UniPCMultistep(
        **arguments | ({} if of_x0 else {"clip": None}),  # which it does not look at then
        variant=options["solver_type"],
        disable_corrector=tuple(options["disable_corrector"]),
        predict_x0=of_x0,
    )


def _deis(reading: Reading) -> Sampler:
    return DEISMultistep(**_arguments(reading))


_OPTIONS = frozenset(
    (
        *("solver_order", "prediction_type", "lower_order_final", "use_flow_sigmas", "solver_type", "algorithm_type"),
        *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
    )
)
KINDS = {
    # Of a model with a learned variance its step drops that half, as every sampler here does.
    "DPMSolverMultistepScheduler": Kind(_dpm_solver, _OPTIONS | {"euler_at_final", "variance_type"}),
    "UniPCMultistepScheduler": Kind(_unipc, _OPTIONS | {"predict_x0", "disable_corrector", "solver_p"}),
    "DEISMultistepScheduler": Kind(_deis, _OPTIONS),
}
