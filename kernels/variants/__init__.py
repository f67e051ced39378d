"""What the kernels are when they are compiled ahead of time: a specialisation of each that stands for the others.

A module for each op has its `variants()`, which benchmarks.gpu_static compiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsample.kernels.arithmetic import INTERPRETED, triton

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""As Triton's signatures spell them."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Of one element."""


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, compiled without a GPU.

    Attributes:
        op: the op's name, such as "step".
        name: the specialisation, such as "guided, clipped".
        dtype: that of m (step), of x and the weights (lora_linear), of x (the others).
        kernel: the function under @triton.jit.
        signature: the type of every argument in order, as Triton spells it: "*fp32", "i64", "constexpr"; of a tuple, a
            tuple of its elements' types.
        constants: the values of the constexpr ones.
        aligned: the arguments that are divisible by 16, pointers above all; of a tuple, all elements.
        elements: how many a program takes, in one turn of its loop where it has one; 0 where that says nothing.
        bytes_per_element: to and from memory; 0 where that says nothing.
        registers: at most so many a thread, on NVIDIA GPUs; None for the compiler's own choice.
    """

    op: str
    name: str
    dtype: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    elements: int
    bytes_per_element: float
    num_warps: int = 4
    num_stages: int = 3
    registers: int | None = None

    @property
    def label(self) -> str:
        """The op, the specialisation and the dtype."""
        return " ".join(part for part in (self.op, self.name, self.dtype) if part)

    def compile(self, target: Any) -> Any:
        """The kernel for a triton GPUTarget: its `asm` and `metadata`. Needs neither GPU nor driver."""
        if INTERPRETED:
            raise RuntimeError("kernels imported under TRITON_INTERPRET=1 cannot be compiled: use a process without it")
        attributes = {path: [["tt.divisibility", 16]] for name in self.aligned for path in self._paths(name)}
        source = triton.compiler.ASTSource(self.kernel, self.signature, self.constants, attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        if self.registers and target.backend == "cuda":
            options["maxnreg"] = self.registers
        return triton.compile(source, target=target, options=options)

    def _paths(self, name: str) -> list[tuple[int, ...]]:
        """Where Triton looks for an argument, or a tuple's elements."""
        i, kind = self.kernel.arg_names.index(name), self.signature[name]
        return [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]


def chunked(
    types: Mapping[str, str],
    op: str,
    name: str,
    dtype: str,
    kernel: Any,
    constants: Mapping[str, Any],
    bytes_moved: int,
    warps: int,
) -> Variant:
    """A specialisation of a kernel whose programs take a chunk of BLOCK elements of a sample each.

    Args:
        types: of the arguments that are not among the constants, by name.
        bytes_moved: an element; 0 for a kernel that takes what the chunks have left.
    """
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    aligned = tuple(arg for arg, kind in signature.items() if kind[0] == "*" or arg in ("size", "m_stride"))
    elements = constants["BLOCK"] if bytes_moved else 0
    return Variant(op, name, dtype, kernel, signature, constants, aligned, elements, bytes_moved, warps)
