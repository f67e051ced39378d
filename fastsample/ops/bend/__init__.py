"""Guidance by other methods than the plain one: one output of the model's two halves."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.address import address
from fastsample.ops.backend import choose, cpu_module
from fastsample.ops.bend.reference import METHODS, Method, Settings, bend_reference
from fastsample.ops.dtypes import DTYPE_CODES

__all__ = ["METHODS", "Bend", "Method", "Settings", "bend_reference"]


class Bend:
    """m of both halves of the model's output, call after call, as `Settings` has it.

    Two passes over memory: the first reads both halves for all sums that a method needs, the second reads them again
    and writes m. With momentum both read what moves too, and the first writes it. Sums are added up in float64.

    Args:
        settings: the method.
        weights: w, one per sample, on the device of the outputs.
        backend: see fastsample.backends(); `cuda` has no kernel of its own and takes Triton's.
    """

    def __init__(self, settings: Settings, weights: Tensor, backend: str) -> None:
        self.settings, self._weights = settings, weights
        native = weights.dtype is torch.float32
        asked = None if backend == "cuda" else backend
        self._backend = choose(asked, weights.device, native=native, offers=("cpu", "triton"), op="bend")
        self._moved: Tensor | None = None
        self._out: Tensor | None = None

    def begin(self) -> None:
        """Forgets what moves: before the first call of every run."""
        if self._backend == "reference":
            self._moved = None
        elif self._moved is not None:
            self._moved.zero_()

    def __call__(self, output: Tensor, channels: int) -> Tensor:
        """m, shape (B, ...), of `output` with both halves, (2B, ...), the unconditional one first.

        Kernels write it into one buffer at every call.

        Args:
            channels: of the state; what axis 1 has beyond them is a variance half, and the conditional one's is kept.
        """
        if self._backend == "reference":
            m, self._moved = bend_reference(output, channels, self._weights, self.settings, self._moved)
            return m
        if output.dtype not in DTYPE_CODES:
            output = output.float()
        output = output.contiguous().resolve_neg()
        batch, shape = len(output) // 2, output.shape[1:]
        if self._out is None or self._out.shape[1:] != shape:
            self._out = torch.empty(batch, *shape, dtype=torch.float32, device=output.device)
        m_stride = self._out[0].numel()
        size = m_stride if output.ndim == 1 or shape[0] == channels else m_stride // 2
        if self.settings.momentum != 0 and self._moved is None:
            self._moved = torch.zeros(batch, size, dtype=torch.float32, device=output.device)
        if self._backend == "triton":
            from fastsample.kernels.bend import bend

            bend(output, m_stride, size, self._weights, self.settings, self._moved, self._out)
        else:
            self._on_cpu(output, m_stride, size, self._out)
        return self._out

    def _on_cpu(self, output: Tensor, m_stride: int, size: int, out: Tensor) -> None:
        settings = self.settings
        cpu_module().bend(
            *(address("model_output", output), m_stride, DTYPE_CODES[output.dtype], len(out), size),
            *(address("guidance", self._weights), address("momentum", self._moved), settings.momentum),
            *(address("out", out), METHODS.index(settings.method)),
            *(settings.rescale, settings.eta, settings.norm_threshold, torch.get_num_threads()),
        )
