"""What decides a generated set: the model, its sampler, and how the set is cut into chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from typing_extensions import TypedDict

from fastsample.checks import integer, one_of, real
from fastsample.generation.formats import FORMATS
from fastsample.schedule import Schedule

_MOST = 10**12
_MOST_CHUNKS = 10**6
_MOST_CLASS = 2**63 - 1
SCHEDULES = {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear, "cosine": Schedule.cosine}
_MOST_THREADS = 4096


class Choices(TypedDict, total=False):
    """What a recipe takes beside the model; see Recipe."""

    num: int
    sampler: str | None
    steps: int | None
    guidance: float | None
    classes: Sequence[int] | None
    null_class: int | None
    shape: Sequence[int] | None
    schedule: str | None
    arguments: Mapping[str, Any]
    seed: int
    batch: int
    model_batch: int
    threads: int
    format: str


@dataclass(frozen=True)
class Recipe:
    """A set of samples. Sample i of it has place i of the set of noise that the seed names, however it is drawn.

    Args:
        model: its text (see generation.named.FORMS), or a name for one that is given itself.
        num: samples.
        sampler: a name such as "ddim"; None is ddim, or what a student was distilled for.
        steps: of the sampler; None is 50, or the most that a student was distilled for.
        guidance: classifier-free guidance, or None.
        classes: place i has class classes[i mod len(classes)]; None takes all that the model has, in turn.
        null_class: of the unconditional half under guidance; None is the model's own, the one after the last.
        shape: of one sample, (C, H, W); None is the model's own.
        schedule: of a model that says none: one of SCHEDULES, of 1,000 timesteps.
        arguments: further ones of the sampler by name, such as {"eta": 1.0}: numbers, texts and lists.
        seed: of all noise, below 2^64.
        batch: samples of a chunk, which is drawn, written and handed out as a whole.
        model_batch: samples of each call of the model.
        threads: of the CPU, for every process.
        format: of the chunks, one of FORMATS.

    Raises:
        ValueError, TypeError: a value out of its range, or of another type.
    """

    model: str
    num: int = 50_000
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    classes: Sequence[int] | None = None
    null_class: int | None = None
    shape: Sequence[int] | None = None
    schedule: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch: int = 256
    model_batch: int = 64
    threads: int = 1
    format: str = "npz"

    def __post_init__(self) -> None:
        # As Python's own numbers, which JSON holds.
        limits = {"num": (1, _MOST), "batch": (1, 2**31 - 1), "model_batch": (1, 2**31 - 1)}
        limits |= {"threads": (1, _MOST_THREADS), "seed": (0, 2**64 - 1)}
        for name, (low, high) in limits.items():
            self._set(name, integer(name, getattr(self, name), low, high))
        for name, low in (("steps", 1), ("null_class", 0)):
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), low, _MOST_CLASS))
        for name, low in (("classes", 0), ("shape", 1)):
            if getattr(self, name) is not None:
                values = tuple(integer(name, value, low, _MOST_CLASS) for value in getattr(self, name))
                if not values:
                    raise ValueError(f"{name} must not be empty")
                self._set(name, values)
        if self.guidance is not None:
            self._set("guidance", real("guidance", self.guidance))
            if not math.isfinite(self.guidance):
                raise ValueError(f"guidance must be finite, got {self.guidance}")
        one_of("format", self.format, tuple(FORMATS))
        if self.schedule is not None:
            one_of("schedule", self.schedule, tuple(SCHEDULES))
        if self.chunks > _MOST_CHUNKS:
            raise ValueError(f"batch must be larger: {self.chunks:,} chunks are more than {_MOST_CHUNKS:,}")
        try:
            self._set("arguments", json.loads(json.dumps(dict(self.arguments), allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"arguments must be numbers, texts and lists by name: {error}") from error

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.num // self.batch)

    def parts(self) -> Iterator[range]:
        """The places of all chunks."""
        return map(self.places, range(self.chunks))

    def places(self, chunk: int) -> range:
        """The places of the samples of a chunk."""
        return range(chunk * self.batch, min((chunk + 1) * self.batch, self.num))

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values
