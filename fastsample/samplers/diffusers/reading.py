"""A scheduler of diffusers as it is read: recognised, its timesteps set on a copy, its options by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsample.checks import integer, real_array
from fastsample.samplers.limits import Clip, DynamicThreshold, limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array
from fastsample.times.predictions import Prediction

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
_LEAST_QUANTILE = 1e-30
# Options that are in a scheduler's timesteps, alpha bars and sigmas, which are read off it.
READ_OFF = frozenset(
    (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
        *("timestep_spacing", "timestep_type", "steps_offset", "original_inference_steps", "interpolation_type"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "lambda_min_clipped"),
        *("sigma_min", "sigma_max", "rho", "final_sigmas_type", "set_alpha_to_one"),
        *("flow_shift", "shift", "shift_terminal", "use_dynamic_shifting", "time_shift_type"),
        *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    )
)
# Methods that what is read does not depend on, or depends on by way of set_timesteps.
_FREE = frozenset(
    (
        *("set_timesteps", "_sigma_to_t", "time_shift", "stretch_shift_to_terminal"),
        *("_convert_to_karras", "_convert_to_exponential", "_convert_to_beta", "_convert_to_lu"),
        *("add_noise", "scale_noise", "get_velocity", "_compatibles"),
    )
)


@dataclass(frozen=True)
class Reading:
    """What a scheduler computes with, once its timesteps are set.

    Attributes:
        name: of its class in diffusers.
        scheduler: a copy of it.
        options: of its class, by name, with their values. What else its config holds it does not look at.
        eta: as its `step` is given it.
    """

    name: str
    scheduler: Any
    options: Mapping[str, Any]
    eta: float

    def refused(self, option: str, why: str) -> ValueError:
        """The error to raise for the value of an option."""
        return ValueError(f"{self.name}({option}={self.options.get(option)!r}) has no equivalent: {why}")

    @property
    def is_ours(self) -> bool:
        """Whether this is one of fastsample.integrations.diffusers."""
        return hasattr(self.scheduler, "corrects")

    @property
    def corrects(self) -> bool:
        """Whether it is one that does not repeat diffusers' mistakes."""
        return self.is_ours and bool(self.scheduler.corrects)

    def array(self, name: str) -> Float64Array:
        """An attribute of the scheduler, in float64."""
        return real_array(name, getattr(self.scheduler, name)).astype(np.float64)

    @property
    def t(self) -> NDArray[Any]:
        """What the model is given in each step, as the scheduler has it."""
        return real_array("timesteps", self.scheduler.timesteps)

    @property
    def T(self) -> int:
        """How many timesteps the schedule has."""
        return int(self.options["num_train_timesteps"])

    def prediction(self, *known: str) -> Prediction:
        """What the model predicts, by its name here; one of those that the scheduler's step knows."""
        value = self.options.get("prediction_type", "epsilon")
        if value not in known:
            raise self.refused("prediction_type", f"its step knows {', '.join(known)}")
        return PREDICTIONS[value]

    def clip(self) -> Clip:
        """The limit of x0: by thresholding, else by clipping, else none."""
        if self.options.get("thresholding"):
            largest = self.options["sample_max_value"]
            if not largest >= 1:
                raise self.refused("sample_max_value", "a threshold is at least 1")
            return DynamicThreshold(self.options["dynamic_thresholding_ratio"], max=largest)
        if not self.options.get("clip_sample"):
            return None
        limit = self.options.get("clip_sample_range", 1.0)
        if not limit > 0:
            raise self.refused("clip_sample_range", "a limit is positive")
        return float(limit)

    def limits(self) -> dict[str, Any]:
        """The columns of a table for the limit of x0."""
        if not (self.is_ours and self.options.get("thresholding")):
            return limit_columns(self.clip())
        # Also where a threshold is below 1; and a quantile of 0, the smallest value, means none in a table.
        quantile = max(self.options["dynamic_thresholding_ratio"], _LEAST_QUANTILE)
        return {"limit": float(self.options["sample_max_value"]), "quantile": quantile}


class Kind(NamedTuple):
    """A class of schedulers that has an equivalent.

    Attributes:
        make: the sampler of a scheduler that is read.
        options: those of the class that `make` looks at; READ_OFF are known everywhere.
        eta: the default of its `step`; None where that takes none.
    """

    make: Callable[[Reading], Sampler]
    options: frozenset[str]
    eta: float | None = None


def base_of(scheduler: Any) -> type:
    """The class of diffusers that a scheduler is of, or that its class derives from without a change to its steps.

    Raises:
        TypeError: for anything else.
    """
    classes = type(scheduler).__mro__
    own = [kind for kind in classes if kind.__module__.partition(".")[0] == "diffusers"]
    if not own or not hasattr(own[0], "set_timesteps"):
        hint = ": give its .scheduler" if hasattr(scheduler, "scheduler") else ""
        hint = hint or (": give an instance of it" if isinstance(scheduler, type) else "")
        raise TypeError(f"scheduler must be a scheduler of diffusers, got {type(scheduler).__name__}{hint}")
    base = own[0]
    changing = [kind for kind in classes[: classes.index(base)] if kind.__module__.partition(".")[0] != "fastsample"]
    derived = {name for kind in changing for name in vars(kind)}
    patched = {name for name, value in vars(scheduler).items() if callable(value)}
    changed = sorted(
        name for name in derived | patched if hasattr(base, name) and not name.startswith("__") and name not in _FREE
    )
    if changed:
        raise TypeError(
            f"scheduler is of {type(scheduler).__name__}, which has {', '.join(changed)} of its own: only what "
            f"{base.__name__} itself computes is known here; a method of your own is a fastsample.Table of its rows"
        )
    return base


def read(scheduler: Any, base: type, kind: Kind, steps: int | None, arguments: dict[str, Any], eta: float) -> Reading:
    """The scheduler, its timesteps set by these steps and arguments, or as they are where there are none.

    Raises:
        TypeError: for arguments that its set_timesteps does not take.
        ValueError: where that refuses them, for options without an equivalent, and where no timesteps have been set.
    """
    name = base.__name__
    own = _copied(scheduler)
    if steps is not None or arguments:
        _set_timesteps(own, name, steps, arguments)
    elif not (_has_timesteps(own) or name in ("DDPMScheduler", "DDPMParallelScheduler")):  # which go through all
        raise ValueError(f"the {name} has no timesteps yet: give steps=")
    options = options_of(own, base, kind.options)
    t = real_array("timesteps", own.timesteps)
    if t.size == 0:
        raise ValueError(f"the {name} has an empty list of timesteps: give steps=")
    if (t[1:] == t[0]).any():
        raise ValueError(f"the {name} has its first timestep {t[0]:g} twice, where its steps lose count: give others")
    return Reading(name, own, options, eta)


def options_of(scheduler: Any, base: type, known: frozenset[str]) -> dict[str, Any]:
    """The values of the options that the class has.

    Raises:
        ValueError: for one that is neither `known` nor READ_OFF, unless it has its default.
    """
    options = {}
    for option, parameter in inspect.signature(base.__init__).parameters.items():  # type: ignore[misc]
        if option == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        options[option] = value = getattr(scheduler.config, option, parameter.default)
        if option not in known | READ_OFF and not _same(value, parameter.default):
            raise ValueError(f"{base.__name__}({option}={value!r}) has no equivalent: the option is not known here")
    return options


def _copied(scheduler: Any) -> Any:
    """The scheduler, so that its timesteps can be set without a change to the one that was given."""
    own = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        # Not what it keeps of its last steps, which may be part of a graph of gradients.
        if isinstance(value, Tensor):
            vars(own)[name] = value.detach().clone()
        elif isinstance(value, dict):  # the config, which set_timesteps of some writes to
            vars(own)[name] = copy.deepcopy(value)
    return own


def _set_timesteps(own: Any, name: str, steps: int | None, arguments: dict[str, Any]) -> None:
    taken = inspect.signature(own.set_timesteps).parameters.keys() - {"num_inference_steps", "device"}
    if unknown := sorted(arguments.keys() - taken):
        known = f"it takes {', '.join(sorted(taken))}" if taken else "it takes steps alone"
        raise TypeError(f"{name}.set_timesteps has no argument {', '.join(unknown)}: {known}")
    given = arguments if steps is None else {"num_inference_steps": integer("steps", steps, 1), **arguments}
    try:
        own.set_timesteps(**given)
    except Exception as error:
        shown = ", ".join(f"{argument}={value!r}" for argument, value in given.items())
        raise ValueError(f"{name}.set_timesteps({shown}) fails: {error or type(error).__name__}") from error


def _has_timesteps(own: Any) -> bool:
    return getattr(own, "num_inference_steps", None) is not None or getattr(own, "custom_timesteps", False)


def _same(value: Any, default: Any) -> bool:
    return value is default or bool(np.array_equal(value, default))
