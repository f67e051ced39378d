"""torch's count of the writes to a tensor."""

from __future__ import annotations

from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """How often torch has seen the tensor written to; 0 for inference tensors, which keep no count."""
    return 0 if tensor.is_inference() else tensor._version
