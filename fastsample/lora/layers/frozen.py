"""Layers whose weights are frozen, and the adapters beside them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.lora.checks import check_names
from fastsample.lora.layers.adapter_set import AdapterSet
from fastsample.lora.layers.slots import Layer, Pair, groups_of, merged
from fastsample.ops.lora.checks import check_range
from fastsample.ops.memory import ordinary_tensors
from fastsample.versions import version_of

DETACHED = (
    "the layer was detached: lora.detach gave its place, weights and bias back to the module that it had replaced; "
    "call that one, or attach again. A model that still holds the layer gets the module from lora.detach(model)"
)
# Two threads may make the first call at once, and one may copy a model that another calls. Packing is rare, so that one
# lock serves all layers, and copies of layers need not take it along.
LOCK = threading.RLock()


class FrozenLayers:
    """Layers that have their adapters in common: a linear, a convolution, or the linears that read one input.

    Subclasses keep what a forward reads in a form of their own, and bring it up to date in refresh().

    Attributes:
        layers: the layers, whose parameters `weight` and `bias` are frozen.
        adapters: the adapters beside the weights.
        index: the adapter of each sample, where forward is given none; None for the sum of all.
        unmerged: the weights as they were before merge(); None where adapters are not merged.
        weights_move: whether hooks of accelerate or diffusers bring the weights to other devices and dtypes, so that
            forward reads the parameters as they are at the call.
        made_by_attach: whether attach put the layers in their places, so that detach takes them away.
        names_by_attach: the adapters that attach added, for detach to take from layers that stay.
        detached: whether the layers gave their weights away; every later use of them raises RuntimeError.
    """

    def __init__(self, layers: Sequence[Layer], capacity: int | None) -> None:
        self.layers = list(layers)
        self.adapters = AdapterSet(self.layers)
        self.index: Tensor | None = None
        self.unmerged: list[Tensor] | None = None
        self.weights_move = False
        self.made_by_attach = False
        self.names_by_attach: set[str] = set()
        self.detached = False
        self._capacity = capacity
        self._trainable = False
        self._factors: list[Tensor] = []
        self._factor_marks: list[tuple[int, int, int, bool]] = []

    def add(
        self,
        name: str,
        pairs: Sequence[Pair | None],
        scale: float | Sequence[float] = 1.0,
        alpha: float | None = None,
        capacity: int | None = None,
        active: Mapping[str, float] | None = None,
    ) -> None:
        """Adds an adapter and makes `active` the active ones; by default the new adapter joins them."""
        self.check_attached()
        capacity = self._capacity if capacity is None else capacity
        self.change(self.adapters.added(name, pairs, scale, alpha, capacity, active))

    def replace(
        self,
        name: str,
        pairs: Sequence[Pair | None],
        scale: float | Sequence[float] = 1.0,
        alpha: float | None = None,
    ) -> None:
        """Gives an adapter other factors, of at most its capacity; a layer whose pair is None gets zeros."""
        self.change(self.adapters.replaced(name, pairs, scale, alpha))

    def activate(self, weights: Mapping[str, float]) -> None:
        """Makes these adapters the active ones; unknown names hold a place."""
        self.change(self.adapters.activated(weights))

    def remove(self, name: str) -> None:
        """Forgets an adapter, unless an index counts it."""
        check_names([name], self.adapters.slots)
        adapters = self.adapters.without([name])
        self.check_order(adapters.active)
        self.change(adapters)
        self.names_by_attach.discard(name)

    def change(self, adapters: AdapterSet) -> None:
        """Puts another AdapterSet in the place of the present one, or raises and keeps the present one."""
        self.check_attached()
        self.check_not_merged()
        before, self.adapters = self.adapters, adapters
        try:
            self.refresh()
        except BaseException:
            self.adapters = before
            self.refresh()
            raise

    def weights(self) -> list[Tensor]:
        """The weights that forward multiplies by."""
        return [layer.weight.detach() for layer in self.layers]

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the active adapters to the weights."""
        self.check_attached()
        self.check_not_merged()
        if self.weights_move:
            raise RuntimeError(
                "merge: hooks of accelerate or diffusers move or cast the weights: remove the hooks first"
            )
        with ordinary_tensors():
            weights = self.weights()
            [group] = self.adapters.groups(per_sample=False)
            if any(
                low_rank is not None and groups_of(layer) > 1
                for low_rank, layer in zip(group, self.layers, strict=True)
            ):
                raise RuntimeError(
                    "merge: adapters of a convolution with groups read channels that its weight does not"
                )
            sums = [merged(weight, low_rank) for weight, low_rank in zip(weights, group, strict=True)]
            self.unmerged = weights
            self._set_weights(sums)

    def unmerge(self) -> None:
        """Gives the weights their bits from before merge()."""
        self.check_attached()
        if self.unmerged is None:
            raise RuntimeError("unmerge: the adapters are not merged")
        weights, self.unmerged = self.unmerged, None
        self._set_weights(weights)

    def check_not_merged(self) -> None:
        """Raises where adapters are merged."""
        if self.unmerged is not None:
            raise RuntimeError("the adapters are merged into the weights: call unmerge() first")

    def check_order(self, names: Iterable[str]) -> None:
        """Raises where other active adapters would give a per-sample choice another meaning."""
        new, active = list(names), list(self.adapters.active)
        if self.index is not None and new[: len(active)] != active:
            raise ValueError(
                f"an adapter_index is set and counts the active adapters {', '.join(active)}, which would become "
                f"{', '.join(new) or 'none'}: call set_adapter_index(module, None) first"
            )

    def check_index(self, x: Tensor, index: Tensor) -> None:
        """Raises unless index has a place, or -1, for each sample of x; values are only looked at on the CPU."""
        if x.ndim < 2 or index.dtype != torch.int64 or index.shape != x.shape[:1]:
            raise ValueError(
                f"adapter_index must hold one int64 per sample of x, whose shape is {tuple(x.shape)}; got "
                f"{index.dtype} of shape {tuple(index.shape)}"
            )
        if index.is_cpu and not torch.compiler.is_compiling():
            check_range(index, len(self.adapters.active))

    def check_attached(self) -> None:
        """Raises where the layers were detached."""
        if self.detached:
            raise RuntimeError(DETACHED)

    def expect_moves(self) -> None:
        """Takes note that hooks will move or cast the weights between calls and in them."""
        self.check_attached()
        self.check_not_merged()
        self.restore()
        self.weights_move = True

    def restore(self) -> None:
        """Brings the layers' parameters back where they are kept in another form."""

    def free(self) -> None:
        """Gives the weights from before merge() back and forgets all else. Not merged, it comes after restore()."""
        if self.unmerged is not None:
            for layer, weight in zip(self.layers, self.unmerged, strict=True):
                layer.weight.data = weight
        self.detached, self.unmerged, self.index = True, None, None
        self.adapters = AdapterSet(self.layers)
        self._factors, self._factor_marks, self._trainable = [], [], False

    def refresh(self) -> None:
        """Brings what is kept for forward up to date with the adapters."""
        raise NotImplementedError

    def parameters(self, i: int) -> dict[str, nn.Parameter | None]:
        """The i-th layer's parameters, with their storage."""
        self.check_attached()
        return self.layers[i]._parameters

    def changed(self, i: int) -> None:
        """Takes note that the i-th layer's parameters were moved, cast or loaded."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "parts" in state:  # pickled before there was an AdapterSet
            state["adapters"] = AdapterSet(state["layers"], state.pop("parts"), state.pop("active"))
        state.setdefault("weights_move", False)  # pickled before hooks were allowed
        self.__dict__.update(state)

    def _live(self) -> bool:
        """Whether A and B are trained, so that forward reads them as they are now, without gradients too.

        Nothing tells that they have changed since refresh() where torch does not count the write: under torch.compile,
        and after a step of a fused optimizer.
        """
        return self._trainable

    def _refresh_if_trained(self) -> None:
        if self._marks_of_factors() != self._factor_marks:
            self.refresh()

    def _note_factors(self) -> None:
        self._factors = self.adapters.active_factors()
        self._factor_marks = self._marks_of_factors()
        self._trainable = any(requires_grad for *_, requires_grad in self._factor_marks)

    def _marks_of_factors(self) -> list[tuple[int, int, int, bool]]:
        return [(*mark(factor), factor.requires_grad) for factor in self._factors]

    def _set_weights(self, weights: Sequence[Tensor]) -> None:
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data = weight
        self.refresh()


def release(all_frozen: Iterable[FrozenLayers]) -> None:
    """Gives layers their weights back for good, or raises and leaves them in use."""
    with LOCK:
        attached = [frozen for frozen in all_frozen if not frozen.detached]
        try:
            # Marked first: a call in another thread would pack, and release, what is restored here.
            for frozen in attached:
                frozen.detached = True
            for frozen in attached:
                if frozen.unmerged is None:
                    frozen.restore()
        except BaseException:
            for frozen in attached:
                frozen.detached = False
            raise
        for frozen in attached:
            frozen.free()


def mark(tensor: Tensor) -> tuple[int, int, int]:
    """A mark that differs after most changes: another object, other memory, a write that autograd has counted."""
    return id(tensor), tensor.data_ptr(), version_of(tensor)
