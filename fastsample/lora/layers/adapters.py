"""Which adapters a layer has, and which of them are active."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastsample.lora.layers.factors import Layer, Pair, Part, check_ranks, low_rank, merged, stacked
from fastsample.ops.lora.adapters import LowRank
from fastsample.ops.lora.checks import check_range

T = TypeVar("T")
_LARGEST = torch.finfo(torch.float32).max
DETACHED = (
    "the layer was detached: lora.detach gave its place, weights and bias back to the module that it had replaced; "
    "call that one, or attach again. A model that still holds the layer gets the module from lora.detach(model)"
)


class Adapters:
    """The adapters of layers that have them in common: a linear, a convolution, or the linears that read one input.

    Attributes:
        layers: the layers, whose `weight` is theirs.
        parts: of each adapter, one entry per layer, None where it leaves a layer alone.
        active: the weights of the active adapters, in the order that an adapter index counts. A name without parts
            holds a place: the module tree knows the adapter, this layer does not.
        index: the adapter of each sample, where forward is given none; None for the sum of all.
        unmerged: the weights as they were before merge(); None where adapters are not merged.
        made_by_attach: whether attach put the layers in their places, so that detach takes them away.
        names_by_attach: the adapters that attach added to layers it found.
        detached: the layers' weights are others' now: whoever still holds the layers is refused.
    """

    def __init__(self, layers: Sequence[Layer], capacity: int | None) -> None:
        self.layers = list(layers)
        self.parts: dict[str, tuple[Part | None, ...]] = {}
        self.active: dict[str, float] = {}
        self.index: Tensor | None = None
        self.unmerged: list[Tensor] | None = None
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
        """Takes an adapter, and these as the active ones: by default it joins them."""
        self.check_attached()
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a non-empty str, got {name!r}")
        if name in self.parts:
            raise ValueError(f"name must be new, {name!r} is one of {', '.join(self.parts)}")
        parts = self._checked(pairs, scale, alpha)
        if not any(parts):
            raise ValueError("pairs holds no (A, B)")
        capacity = self._capacity if capacity is None else capacity
        padded = [part and part._replace(capacity=capacity or part.capacity) for part in parts]
        check_ranks(padded)
        self.change({**self.parts, name: tuple(padded)}, dict(active or {**self.active, name: 1.0}))

    def replace(
        self,
        name: str,
        pairs: Sequence[Pair | None],
        scale: float | Sequence[float] = 1.0,
        alpha: float | None = None,
    ) -> None:
        """Other factors for an adapter, of at most its capacity; a layer whose pair is None gets zeros."""
        parts = []
        for i, (old, new) in enumerate(zip(self.parts[name], self._checked(pairs, scale, alpha), strict=True)):
            if old is None and new is not None:
                raise ValueError(f"pairs[{i}]: adapter {name!r} has no factors for this layer")
            if old is not None:
                none = Part(old.down.detach()[:0], old.up.detach()[:, :0], 0.0, 0)
                old = (new or none)._replace(capacity=old.capacity)
            parts.append(old)
        check_ranks(parts)
        self.change({**self.parts, name: tuple(parts)}, self.active)

    def activate(self, weights: Mapping[str, float]) -> None:
        """Unknown names hold a place; see `active`."""
        self.change(self.parts, {name: float(weight) for name, weight in weights.items()})

    def remove(self, name: str) -> None:
        check_names([name], self.parts)
        self.check_order(_without(self.active, [name]))
        self.forget([name])
        self.names_by_attach.discard(name)

    def forget(self, names: Iterable[str]) -> None:
        """Removes adapters, and names that hold a place."""
        names = list(names)
        self.change(_without(self.parts, names), _without(self.active, names))

    def change(self, parts: dict[str, tuple[Part | None, ...]], active: dict[str, float]) -> None:
        """Takes these, or raises and stays as it was."""
        self.check_attached()
        self.check_not_merged()
        before = self.parts, self.active
        self.parts, self.active = parts, active
        try:
            self.refresh()
        except BaseException:
            self.parts, self.active = before
            self.refresh()
            raise

    def groups(self, per_sample: bool) -> list[list[LowRank | None]]:
        """The active adapters, each a group of one entry per layer, or all stacked along the rank as one group."""
        none = (None,) * len(self.layers)
        groups = [
            [
                part and low_rank(part, weight, layer)
                for part, layer in zip(self.parts.get(name, none), self.layers, strict=True)
            ]
            for name, weight in self.active.items()
        ]
        if per_sample:
            return groups
        return [[stacked(own) for own in zip(*groups, strict=True)] if groups else list(none)]

    def weights(self) -> list[Tensor]:
        """The weights that forward multiplies by."""
        return [layer.weight.detach() for layer in self.layers]

    @torch.no_grad()
    def merge(self) -> None:
        self.check_attached()
        self.check_not_merged()
        with torch.inference_mode(False):
            weights = self.weights()
            [group] = self.groups(per_sample=False)
            sums = [merged(weight, one) for weight, one in zip(weights, group, strict=True)]
            self.unmerged = weights
            self._set_weights(sums)

    def unmerge(self) -> None:
        self.check_attached()
        if self.unmerged is None:
            raise RuntimeError("unmerge: the adapters are not merged")
        weights, self.unmerged = self.unmerged, None
        self._set_weights(weights)

    def check_not_merged(self) -> None:
        if self.unmerged is not None:
            raise RuntimeError("the adapters are merged into the weights: call unmerge() first")

    def check_order(self, names: Iterable[str]) -> None:
        """Raises where other active adapters would give a per-sample choice another meaning."""
        new = list(names)
        if self.index is not None and new[: len(self.active)] != list(self.active):
            raise ValueError(
                f"an adapter_index is set and counts the active adapters {', '.join(self.active)}, which would become "
                f"{', '.join(new) or 'none'}: call set_adapter_index(module, None) first"
            )

    def check_index(self, x: Tensor, index: Tensor) -> None:
        """Raises unless index chooses an active adapter or none for each sample of x; its values only on the CPU."""
        if x.ndim < 2 or index.dtype != torch.int64 or index.shape != x.shape[:1]:
            raise ValueError(
                f"adapter_index must hold one int64 per sample of x, whose shape is {tuple(x.shape)}; got "
                f"{index.dtype} of shape {tuple(index.shape)}"
            )
        if index.is_cpu and not torch.compiler.is_compiling():
            check_range(index, len(self.active))

    def check_attached(self) -> None:
        if self.detached:
            raise RuntimeError(DETACHED)

    def restore(self) -> None:
        """Brings the layers' parameters back where they are kept in another form."""

    def free(self) -> None:
        """After restore, or merged: the weights are those from before merge, and nobody's here any more."""
        if self.unmerged is not None:
            for layer, weight in zip(self.layers, self.unmerged, strict=True):
                layer.weight.data = weight
        self.detached, self.unmerged, self.index = True, None, None
        self.parts, self.active = {}, {}
        self._factors, self._factor_marks, self._trainable = [], [], False

    def refresh(self) -> None:
        """Brings what is kept for forward up to date with the parts and the active weights."""
        raise NotImplementedError

    def parameters(self, i: int) -> dict[str, nn.Parameter | None]:
        """The i-th layer's, with their storage."""
        self.check_attached()
        return self.layers[i]._parameters

    def changed(self, i: int) -> None:
        """The i-th layer's parameters were moved, cast or loaded."""
        raise NotImplementedError

    def _live(self) -> bool:
        """Whether gradients must reach A and B, so that forward reads them as they are now.

        Under torch.compile nothing tells that they have changed since refresh(): those in training are always read.
        """
        return self._trainable and (torch.is_grad_enabled() or torch.compiler.is_compiling())

    def _refresh_if_trained(self) -> None:
        if self._marks_of_factors() != self._factor_marks:
            self.refresh()

    def _note_factors(self) -> None:
        parts = [part for name in self.active for part in self.parts.get(name, ()) if part]
        self._factors = [factor for part in parts for factor in (part.down, part.up)]
        self._factor_marks = self._marks_of_factors()
        self._trainable = any(requires_grad for *_, requires_grad in self._factor_marks)

    def _marks_of_factors(self) -> list[tuple[int, int, int, bool]]:
        return [(*mark(factor), factor.requires_grad) for factor in self._factors]

    def _set_weights(self, weights: Sequence[Tensor]) -> None:
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data = weight
        self.refresh()

    def _checked(
        self, pairs: Sequence[Pair | None], scale: float | Sequence[float], alpha: float | None
    ) -> list[Part | None]:
        count = len(self.layers)
        if not isinstance(pairs, Sequence) or len(pairs) != count:
            got = len(pairs) if isinstance(pairs, Sequence) else type(pairs).__name__
            raise ValueError(f"pairs must be a list of {count} entries, (A, B) or None for each linear; got {got}")
        scales = [finite("scale", own) for own in (scale if isinstance(scale, Sequence) else [scale] * count)]
        if alpha is not None:
            alpha = finite("alpha", alpha)
        parts: list[Part | None] = []
        for i, (pair, layer, own) in enumerate(zip(pairs, self.layers, scales, strict=True)):
            if pair is None:
                parts.append(None)
                continue
            if len(pair) != 2 or not all(isinstance(one, Tensor) and one.is_floating_point() for one in pair):
                raise TypeError(f"pairs[{i}] must be two floating-point tensors, A and B")
            down, up = pair
            out, into = layer.weight.shape[0], tuple(layer.weight.shape[1:])
            rank = down.shape[0] if down.ndim else 0
            want_down, want_up = (rank, *into), (out, rank, *(1 for _ in into[1:]))
            if not rank or tuple(down.shape) != want_down or tuple(up.shape) != want_up:
                want = f"A (r, {', '.join(map(str, into))}) and B ({', '.join(map(str, (out, 'r', *want_up[2:])))})"
                raise ValueError(f"pairs[{i}] must be {want}, got {tuple(down.shape)} and {tuple(up.shape)}")
            factor = own * (1.0 if alpha is None else alpha / rank)
            if abs(factor) > _LARGEST:
                raise ValueError(f"scale * alpha / r of pairs[{i}] is {factor:g}, more than float32 holds")
            parts.append(Part(down, up, factor, rank))
        return parts


def _without(values: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    return {key: value for key, value in values.items() if key not in names}


def mark(tensor: Tensor) -> tuple[int, int, int]:
    """Differs after most changes: another object, other memory, a write that autograd has counted."""
    try:
        version = tensor._version
    except RuntimeError:  # inference tensors keep no count
        version = 0
    return id(tensor), tensor.data_ptr(), version


def finite(name: str, number: object) -> float:
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise TypeError(f"{name} must be a number, got {number!r}")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number!r}")
    return float(number)


def check_names(names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter is named {name!r}, there is {', '.join(map(repr, known)) or 'none'}")


def check_weights(weights: Mapping[str, float], known: Mapping[str, object]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must map names of adapters to numbers, got {type(weights).__name__}")
    check_names(list(weights), known)
    for name, weight in weights.items():
        finite(f"the weight of {name!r}", weight)
