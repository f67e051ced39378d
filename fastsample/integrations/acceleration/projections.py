"""Attention's projections of one input as one product, whatever processor calls them.

A processor calls to_q, to_k and to_v one after the other on the same tensor. The first of them computes all three, and
the others hand over what is theirs. So the processor need not be known, and attention with added projections, such as
that of SD3 and Flux, has two such products a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsample.lora.layers.attention import runs_fused
from fastsample.lora.layers.frozen_linears import FrozenLinears
from fastsample.lora.layers.linear import LoRALinear
from fastsample.versions import version_of

_OWN, _CONTEXT = ("to_q", "to_k", "to_v"), ("to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
# So many results that nobody has asked for show that a block's projections read different inputs.
_MOST_UNCLAIMED = 3


class Group(NamedTuple):
    """Projections of a block that read one input.

    Attributes:
        path: of the block.
        names: the block's children.
        children: these, PEFT's layers perhaps.
        linears: the linears in them.
        reason: why they cannot run as one; empty where they can.
    """

    path: str
    names: tuple[str, ...]
    children: tuple[nn.Module, ...]
    linears: tuple[nn.Linear, ...]
    reason: str


def groups_of(module: nn.Module, linear_of: Callable[[nn.Module], nn.Linear | str]) -> Iterator[Group]:
    """The projections of a network's attention that read one input, each once.

    `linear_of` gives a child's linear, or why it has none that could be replaced.
    """
    taken = set[nn.Module]()
    for path, block in module.named_modules():
        for names in _names(block):
            children = tuple(block.get_submodule(name) for name in names)
            if taken.isdisjoint(children):
                taken.update(children)
                yield _group(path, block, names, children, linear_of)


def _names(block: nn.Module) -> Iterator[tuple[str, ...]]:
    """By input the names of a block's projections, where there are several."""
    for names in (_CONTEXT if _reads_context(block) else _OWN, _ADDED):
        present = tuple(name for name in names if block._modules.get(name) is not None)
        if len(present) > 1:
            yield present


def _reads_context(block: nn.Module) -> bool:
    """Whether k and v are made of another tensor than q."""
    stated = getattr(block, "is_cross_attention", None)
    if stated is not None:
        return bool(stated)
    q, k = (getattr(block._modules.get(name), "weight", None) for name in ("to_q", "to_k"))
    return isinstance(q, Tensor) and isinstance(k, Tensor) and q.shape[1:] != k.shape[1:]


def _group(
    path: str,
    block: nn.Module,
    names: tuple[str, ...],
    children: tuple[nn.Module, ...],
    linear_of: Callable[[nn.Module], nn.Linear | str],
) -> Group:
    found = [linear_of(child) for child in children]
    linears = tuple(linear for linear in found if isinstance(linear, nn.Linear))
    reason = _why_not_called(block) or next((why for why in found if isinstance(why, str)), "")
    if not reason and len({(linear.in_features, linear.weight.dtype, linear.weight.device) for linear in linears}) > 1:
        reason = "the projections differ in width, dtype or device"
    if not reason and len({*linears}) < len(linears):
        reason = "one linear serves as several projections"
    return Group(path, names, children, linears, reason)


def _why_not_called(block: nn.Module) -> str:
    """Why it is unknown whether a block calls its projections, or known that it does not."""
    if runs_fused(block):
        return "fuse_qkv_projections() has fused the projections already"
    processor = getattr(block, "processor", None)
    if processor is None:
        return "attention without a processor of diffusers"
    if not type(processor).__module__.startswith("diffusers."):
        return f"the attention processor {type(processor).__qualname__} is not one of diffusers'"
    return ""


def shared_layers(linears: Sequence[nn.Linear]) -> list[LoRALinear]:
    """Layers in the place of linears that read one input: the call of the first computes for all."""
    layers = [LoRALinear._in_place_of(linear) for linear in linears]
    frozen = SharedLinears(layers, keep_weight=True, capacity=None)
    for i, layer in enumerate(layers):
        layer._frozen, layer._i = frozen, i
    return layers


class _Unclaimed(NamedTuple):
    """What the first linear has computed for the others, of which input, and who has not asked for it yet."""

    x: Tensor
    version: int
    outputs: tuple[Tensor, ...]
    places: frozenset[int]


class SharedLinears(FrozenLinears):
    """Linears that are called one by one on the same tensor, the first of them first.

    Each is called singly where its input is another one, and for good where nobody asks for what was computed for it.
    """

    _unclaimed: _Unclaimed | None = None
    _claimed = False
    _left_over = 0

    def __call__(self, x: Tensor, index: Tensor | None, i: int | None = None) -> tuple[Tensor, ...]:
        if i is None or index is not None or self.weights_move or self._left_over >= _MOST_UNCLAIMED:
            return super().__call__(x, index, i)
        if i == 0:
            return self._all(x)
        unclaimed = self._unclaimed
        if unclaimed is None or unclaimed.x is not x or i not in unclaimed.places or _version(x) != unclaimed.version:
            return super().__call__(x, index, i)
        places = unclaimed.places - {i}
        self._unclaimed = unclaimed._replace(places=places) if places else None
        self._claimed = True
        return (unclaimed.outputs[i],)

    def _all(self, x: Tensor) -> tuple[Tensor, ...]:
        if self._unclaimed is not None and not self._claimed:
            self._left_over += 1
        self._unclaimed = None
        if self._left_over >= _MOST_UNCLAIMED:
            return super().__call__(x, None, 0)
        outputs = super().__call__(x, None)
        self._unclaimed = _Unclaimed(x, _version(x), outputs, frozenset(range(1, len(outputs))))
        return outputs[:1]

    def refresh(self) -> None:
        self._unclaimed = None
        super().refresh()

    def free(self) -> None:
        self._unclaimed = None
        super().free()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_unclaimed": None}


def _version(x: Tensor) -> int:
    # Compiled code counts no writes, and writes nothing in place that is read again.
    return 0 if torch.compiler.is_compiling() else version_of(x)
