"""What accelerate did with a pipeline and what it left, by component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastsample.lora.files.refused import first_few


@dataclass(frozen=True)
class ComponentReport:
    """What accelerate did with one network.

    Attributes:
        name: of the component, such as "unet".
        fused: the attention projections that run as one product, by the path of their block: "to_q, to_k, to_v".
        moved: the layers that each adapter was moved to, by the adapter's name.
        weights: the active adapters with their weights as they are now, in PEFT's order. 1 where layers differ in
            theirs: then the weights of the layers are part of their factors.
        left: why something was left, and the layers or blocks that this is about; none where it is the whole component.
    """

    name: str
    fused: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What was done, then what was left, a sentence a line."""
        done = [f"{projections} as one product in {_counted(n, 'block')}" for projections, n in _numbers(self.fused)]
        for adapter, paths in self.moved.items():
            how = f"weight {self.weights[adapter]:.4g}" if adapter in self.weights else "not active"
            done.append(f"LoRA {adapter!r} moved from PEFT, {_counted(len(paths), 'layer')}, {how}")
        left = [f"left: {reason}{': ' if paths else ''}{first_few(paths)}" for reason, paths in self.left.items()]
        return [f"{self.name}: {line}" for line in (*done, *left)] or [f"{self.name}: nothing to do"]


@dataclass(frozen=True, repr=False)
class Report:
    """What accelerate did with a pipeline. It prints as a sentence a line.

    Attributes:
        swapped: whether the pipeline's scheduler is now one that accelerate made.
        scheduler: what was done with it, in words.
        components: the networks that were looked at, in the pipeline's order.

    Example:
        >>> unet = ComponentReport("unet", {"attn": "to_q, to_k, to_v"}, {"style": ("attn.to_q",)}, {"style": 0.5})
        >>> Report(True, "DDIMScheduler of fastsample in the place of diffusers'", (unet,))
        scheduler: DDIMScheduler of fastsample in the place of diffusers'
        unet: to_q, to_k, to_v as one product in 1 block
        unet: LoRA 'style' moved from PEFT, 1 layer, weight 0.5
    """

    swapped: bool
    scheduler: str
    components: tuple[ComponentReport, ...]

    def __repr__(self) -> str:
        lines = [line for component in self.components for line in component.lines()]
        return "\n".join([f"scheduler: {self.scheduler}", *lines])


def _numbers(fused: Mapping[str, str]) -> list[tuple[str, int]]:
    kinds = list(fused.values())
    return [(kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
