"""Which adapters layers have, and which of them are active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from fastsample.lora.layers.slots import Layer, Pair, Slot, check_ranks, slots_of, stacked
from fastsample.ops.lora.adapters import LowRank

T = TypeVar("T")


class AdapterSet:
    """The adapters that layers have in common. A set never changes: what adds, replaces or forgets makes another.

    Attributes:
        layers: the layers, to whose weights the adapters add.
        slots: of each adapter, by its name, one slot per layer, None where it leaves a layer alone.
        active: the weights of the active adapters, in the order that an adapter index counts. A name without slots
            holds a place: the module tree knows the adapter, these layers do not.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        slots: dict[str, tuple[Slot | None, ...]] | None = None,
        active: dict[str, float] | None = None,
    ) -> None:
        self.layers = layers
        self.slots = {} if slots is None else slots
        self.active = {} if active is None else active

    def added(
        self,
        name: str,
        pairs: Sequence[Pair | None],
        scale: float | Sequence[float] = 1.0,
        alpha: float | None = None,
        capacity: int | None = None,
        active: Mapping[str, float] | None = None,
    ) -> AdapterSet:
        """A set with one adapter more, and `active` as the active ones; by default the new adapter joins them."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a non-empty str, got {name!r}")
        if name in self.slots:
            raise ValueError(f"name must be new, {name!r} is one of {', '.join(self.slots)}")
        slots = slots_of(pairs, self.layers, scale, alpha)
        if not any(slots):
            raise ValueError("pairs holds no (A, B)")
        roomy = tuple(slot and slot._replace(capacity=capacity or slot.capacity) for slot in slots)
        check_ranks(roomy)
        return AdapterSet(self.layers, {**self.slots, name: roomy}, dict(active or {**self.active, name: 1.0}))

    def replaced(
        self,
        name: str,
        pairs: Sequence[Pair | None],
        scale: float | Sequence[float] = 1.0,
        alpha: float | None = None,
    ) -> AdapterSet:
        """A set with other factors in an adapter's slots, of at most their capacity; none where the pair is None."""
        slots: list[Slot | None] = []
        for i, (old, new) in enumerate(zip(self.slots[name], slots_of(pairs, self.layers, scale, alpha), strict=True)):
            if old is None and new is not None:
                raise ValueError(f"pairs[{i}]: adapter {name!r} has no factors for this layer")
            slots.append(old and (new or old.emptied())._replace(capacity=old.capacity))
        check_ranks(slots)
        return AdapterSet(self.layers, {**self.slots, name: tuple(slots)}, self.active)

    def activated(self, weights: Mapping[str, float]) -> AdapterSet:
        """A set with the named adapters active. Unknown names hold a place; see `active`."""
        return AdapterSet(self.layers, self.slots, {name: float(weight) for name, weight in weights.items()})

    def without(self, names: Iterable[str]) -> AdapterSet:
        """A set without the named adapters, and without the names among these that hold a place."""
        names = set(names)
        return AdapterSet(self.layers, _without(self.slots, names), _without(self.active, names))

    def groups(self, per_sample: bool) -> list[list[LowRank | None]]:
        """The active adapters, each a group of one entry per layer, or all stacked along the rank as one group."""
        none = (None,) * len(self.layers)
        groups = [
            [
                slot and slot.low_rank(weight, layer)
                for slot, layer in zip(self.slots.get(name, none), self.layers, strict=True)
            ]
            for name, weight in self.active.items()
        ]
        if per_sample:
            return groups
        return [[stacked(low_ranks) for low_ranks in zip(*groups, strict=True)] if groups else list(none)]

    def active_factors(self) -> list[Tensor]:
        """A and B of every slot of the active adapters, as they were given."""
        slots = [slot for name in self.active for slot in self.slots.get(name, ()) if slot]
        return [factor for slot in slots for factor in (slot.down, slot.up)]


def _without(values: Mapping[str, T], names: set[str]) -> dict[str, T]:
    return {key: value for key, value in values.items() if key not in names}
