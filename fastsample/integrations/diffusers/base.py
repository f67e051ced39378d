"""What fastsample's drop-in schedulers share: the class of diffusers that each derives from has all but the step."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastsample.checks import check_floating, one_of
from fastsample.integrations.diffusers.compiled import in_one_op
from fastsample.integrations.diffusers.passes import Operand, apply, in_dtype
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.samplers.diffusers.reading import Kind, Reading, options_of
from fastsample.tables import COLUMNS, Table
from fastsample.versions import version_of

Compat = Literal["diffusers"] | None
Generator = torch.Generator | list[torch.Generator] | None

_MOST = 8  # rows that a scheduler keeps, each for other timesteps or options of a step
_LEVELS = ("sigmas", "alphas_cumprod")  # what rows are made from: the first that a scheduler has


class Rows(NamedTuple):
    """The rows of a scheduler's timesteps.

    Attributes:
        table: their coefficients.
        row_of: the row of each timestep that is there once. What has no row takes diffusers' own step.
        draws: of each row whether a step there asks for noise.
        there: of each row whether it is one; where its coefficients are not finite it is none.
        input_scale: of each row what the model's input is divided by.
        passes: what a method with more than one pass a step has beside the table.
    """

    table: Table
    row_of: Mapping[float, int]
    draws: Sequence[bool]
    there: Sequence[bool] = ()
    input_scale: Sequence[float] = ()
    passes: Any = None


class Noise(NamedTuple):
    """Where a step's noise comes from.

    Attributes:
        dtype: what torch draws in.
        generator: torch's, one or a list with one for each sample.
        given: the noise itself.
        seed, index: of fastsample's own noise, see fastsample.Options.
    """

    dtype: torch.dtype
    generator: Generator = None
    given: Tensor | None = None
    seed: Seed | None = None
    index: Index = 0  # type: ignore[assignment]  # a tuple's method of that name is not missed

    def for_state(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(z, keys): the noise, or what the pass draws it from.

        Raises:
            ValueError: for more than one source, and a list of another length than the batch.
        """
        if self.given is not None and self.generator is not None:
            raise ValueError("Cannot pass both generator and variance_noise: give one of them")
        if self.seed is not None:
            if self.given is not None or self.generator is not None:
                raise ValueError("noise comes from seed or from generator and variance_noise: give one of them")
            return None, sample_keys(self.seed, self.index, len(x), x.device)
        if self.given is not None:
            return self.given, None
        if isinstance(self.generator, list) and len(self.generator) not in (1, len(x)):
            raise ValueError(f"generator must be one or {len(x)}, one per sample; got a list of {len(self.generator)}")
        return randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=self.dtype), None


class DropIn:
    """A base of classes that derive from it first, and then from the class of diffusers whose step they replace.

    Subclasses have `step`, with the peer's arguments and then `seed` and `index`, and `_make_rows`.

    Attributes:
        kind: which of the peer's options are covered.
        output: the class of what a step returns.
        compat: "diffusers" where its mistakes are repeated.
        corrects: whether they are not.
    """

    kind: ClassVar[Kind]
    output: ClassVar[Any]
    _peer: ClassVar[Any]
    _returns: ClassVar[int]
    _moves_sigmas: ClassVar[bool] = False  # whether set_timesteps puts sigmas on its device too
    timesteps: Tensor
    num_inference_steps: int | None
    _step_index: int | None
    _begin_index: int | None
    _internal_dict: Any

    def __init_subclass__(cls) -> None:
        if not hasattr(cls, "config_name"):  # a base of some of them
            return
        # Pipelines look in this module for the class, and for the name SchedulerMixin.
        cls.__module__ = __package__
        cls._peer = next(kind for kind in cls.__mro__ if kind.__module__.startswith("diffusers."))
        cls.__init__ = _with_compat(cls._peer.__init__)  # type: ignore[method-assign]
        cls.set_timesteps = _on_the_host_first(cls._peer.set_timesteps)  # type: ignore[attr-defined]
        cls.step = in_one_op(cls.step)  # type: ignore[attr-defined]
        cls._returns = len(fields(cls.output))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """diffusers' from_config, which also keeps options that somebody has changed since the constructor.

        Pipelines do so with the schedulers of old checkpoints; diffusers' goes back to the default values.
        """
        return super().from_config(_with_changes(config), return_unused_kwargs, **kwargs)  # type: ignore[misc]

    @property
    def compat(self) -> Compat:
        found: Compat = self._internal_dict.get("compat")
        return found

    @property
    def corrects(self) -> bool:
        return self.compat is None

    def output_dtypes(self, model_output: torch.dtype, sample: torch.dtype) -> tuple[torch.dtype, ...]:
        """Those of what a step returns."""
        return (torch.promote_types(model_output, sample),) * self._returns

    def _results(self, model_output: Tensor, sample: Tensor, *computed: Tensor) -> tuple[Tensor, ...]:
        """What a step returns, of what its pass has computed."""
        dtypes = self.output_dtypes(model_output.dtype, sample.dtype)
        return tuple(in_dtype(one, dtype) for one, dtype in zip(computed, dtypes, strict=True))

    def _check_options(self) -> None:
        """Raises ValueError for an option, of the newest diffusers perhaps, that is not covered."""
        options_of(self, self._peer, self.kind.options)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        """The rows for the reading's timesteps and eta, and for options of a step of this class."""
        raise NotImplementedError

    def _rows(self, eta: float = 0.0, *options: object) -> Rows:
        """The rows of the timesteps, levels and configuration as they are now, for these options of a step."""
        state = self._state()
        made = self.__dict__.get("_made")
        if made is None or made[0] != state:
            # What the state numbers must not be freed while it is compared with.
            numbered = self.timesteps, self.__dict__[self._levels], self._internal_dict
            made = self.__dict__["_made"] = state, {}, numbered
        of_options: dict[tuple[object, ...], Rows] = made[1]
        given: tuple[object, ...] = (eta, *options)
        rows = of_options.get(given)
        if rows is None:
            rows = of_options[given] = self._kept_rows(eta, *options)
        return rows

    def _state(self) -> tuple[int, ...]:
        """What is another one where rows have to be made anew: what it numbers lives as long as `_made`."""
        levels = self.__dict__[self._levels]
        return id(self.timesteps), version_of(self.timesteps), id(levels), version_of(levels), id(self._internal_dict)

    @property
    def _levels(self) -> str:
        return next(name for name in _LEVELS if name in self.__dict__)

    def _kept_rows(self, eta: float, *options: object) -> Rows:
        """The same, which a run with as many steps as an earlier one finds made."""
        schedule = self.__dict__.get("alphas_cumprod")
        now = schedule, None if schedule is None else version_of(schedule), self._internal_dict
        known = self.__dict__.get("_known")
        if known is None or any(one is not other for one, other in zip(known[0], now, strict=True)):
            known = now, {}
        content = [self._on_host(name).numpy().tobytes() for name in ("timesteps", "sigmas") if name in self.__dict__]
        key = *content, self.num_inference_steps, eta, *options
        rows: dict[object, Rows] = known[1]
        if key not in rows:
            while len(rows) >= _MOST:
                rows.pop(next(iter(rows)), None)
            host = copy.copy(self)
            host.__dict__.update({name: self._on_host(name) for name in ("timesteps", self._levels)})
            covered = options_of(self, self._peer, self.kind.options)
            rows[key] = self._make_rows(Reading(self._peer.__name__, host, covered, eta), *options)
        self.__dict__["_known"] = known
        return rows[key]

    def _on_host(self, name: str) -> Tensor:
        """Timesteps or levels where they can be read, as a rule without waiting for a device."""
        tensor: Tensor = getattr(self, name)
        there, here = self.__dict__.get("_host", {}).get(name, (None, None))
        return here if tensor is there else tensor.detach().cpu()

    def _place(self, timestep: float | Tensor, rows: Rows) -> int | None:
        """The row of a timestep, None where it has none or lies on a device, from which it is not fetched."""
        if not isinstance(timestep, Tensor):
            return rows.row_of.get(timestep)
        if timestep.is_cpu:
            return rows.row_of.get(timestep.item())
        steps = self.timesteps
        if timestep.untyped_storage().data_ptr() != steps.untyped_storage().data_ptr() or timestep.ndim:
            return None
        # One of `for t in scheduler.timesteps`.
        return int(timestep.storage_offset() - steps.storage_offset())

    def _index(self, timestep: float | Tensor, rows: Rows) -> int:
        """The row of a timestep, for schedulers that count their steps: the next one where it does not tell."""
        row = self._place(timestep, rows)
        if row is None:
            if self._step_index is None:
                self._init_step_index(timestep)  # type: ignore[attr-defined]  # of the peer
                if self.corrects and self._begin_index is None and bool(timestep == self.timesteps[0]):
                    # The first timestep may be there twice: diffusers takes the second, and has too few for a run.
                    self._step_index = 0
            row = self._step_index
        if row is None or row >= len(rows.table):
            raise ValueError(f"all {len(rows.table)} steps have been taken: call set_timesteps for another run")
        self._step_index = row
        return row

    def _advanced(
        self,
        rows: Rows,
        row: int | Tensor,
        model_output: Tensor,
        sample: Tensor,
        noise: Noise | None = None,
        history: Sequence[Tensor] = (),
        *,
        keeps_entry: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(x', h) of a row, in the dtype that is computed in; h has no meaning where it is not kept."""
        z = keys = None
        if noise is not None and (rows.draws[row] if isinstance(row, int) else any(rows.draws)):
            z, keys = noise.for_state(sample)
        return apply(rows.table, row, model_output, Operand(sample, z, keys, history, keeps_entry))


def counted_rows(t: NDArray[Any], columns: Mapping[str, Any], draws: ArrayLike, input_scale: ArrayLike = ()) -> Rows:
    """The rows of these columns, one for each timestep in its order; not there where a coefficient is not finite."""
    full = {name: np.broadcast_to(np.asarray(values, np.float64), t.shape) for name, values in columns.items()}
    there = np.logical_and.reduce([np.isfinite(values) | (name == "limit") for name, values in full.items()])
    valid: dict[str, Any] = {name: np.where(there, values, COLUMNS[name]) for name, values in full.items()}
    times, counts = np.unique(t, return_counts=True)
    once = set(times[counts == 1].tolist())
    row_of = {time: row for row, time in enumerate(t.tolist()) if time in once}
    drawing = np.broadcast_to(draws, t.shape).tolist()
    return Rows(Table(t, **valid), row_of, drawing, there.tolist(), np.asarray(input_scale).tolist())


def check_given(model_output: object, sample: object) -> None:
    """Raises TypeError unless both are floating-point tensors."""
    check_floating("model_output", model_output)
    check_floating("sample", sample)


def check_is_time(scheduler: object, timestep: object) -> None:
    """Raises ValueError, as diffusers does, for an index in the place of one of the timesteps, which are floats."""
    whole = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
    if whole:
        raise ValueError(
            "Passing integer indices (e.g. from `enumerate(timesteps)`) as timesteps to "
            f"`{type(scheduler).__name__}.step()` is not supported: pass one of `scheduler.timesteps`"
        )


def check_begun(steps: int | None) -> None:
    """Raises ValueError, as diffusers does, where no timesteps have been set."""
    if steps is None:
        raise ValueError(
            "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler: "
            "scheduler.set_timesteps(num_inference_steps)"
        )


def _with_changes(config: Any) -> Any:
    """A configuration whose options count as left out only where they still have their default values."""
    kind = getattr(diffusers, str(config.get("_class_name")), None) if isinstance(config, Mapping) else None
    if kind is None or "_use_default_values" not in config:
        return config
    parameters = inspect.signature(kind.__init__).parameters
    unchanged = [
        name
        for name in config["_use_default_values"]
        if name not in parameters or parameters[name].default == config.get(name)
    ]
    return {**config, "_use_default_values": unchanged}


def _with_compat(init: Callable[..., None]) -> Callable[..., None]:
    """The peer's constructor with one more keyword, which the configuration has where it is not None."""

    @functools.wraps(init)
    def own(self: Any, *args: Any, compat: Compat = None, **options: Any) -> None:
        if compat is not None:
            one_of("compat", compat, ("diffusers",))
        init(self, *args, **options)
        if compat is not None:
            self.register_to_config(compat=compat)
        self._check_options()

    signature = inspect.signature(init)
    compat = inspect.Parameter("compat", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Compat)
    *others, last = signature.parameters.values()
    rest = [last] if last.kind is last.VAR_KEYWORD else []
    # from_config and configurations look for the names here.
    own.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*others, *([] if rest else [last]), compat, *rest]
    )
    return own


def _on_the_host_first(set_timesteps: Callable[..., None]) -> Callable[..., None]:
    """The peer's set_timesteps, whose results stay readable on the host when they are moved to a device."""
    place = [*inspect.signature(set_timesteps).parameters].index("device") - 1

    @functools.wraps(set_timesteps)
    def own(self: Any, *args: Any, **options: Any) -> None:
        device = options.pop("device", None)
        if len(args) > place:
            device, args = args[place], (*args[:place], None, *args[place + 1 :])
        steps = args[0] if args else options.get("num_inference_steps")
        if isinstance(steps, int) and steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        set_timesteps(self, *args, **options)
        if self.corrects and not self.timesteps.is_floating_point():
            # Otherwise steps_offset takes a run of all timesteps beyond the schedule.
            self.timesteps -= max(int(self.timesteps.max()) - self._internal_dict["num_train_timesteps"] + 1, 0)
        self._host = {}
        if device is None:
            return
        for name in ("timesteps", "sigmas"):
            here = self.__dict__.get(name)
            if here is not None and (name == "timesteps" or self._moves_sigmas):
                self.__dict__[name] = there = here.to(device)
                self._host[name] = there, here

    return own
