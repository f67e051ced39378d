"""What the ops refuse, before they write anything."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from fastsample.checks import check_has_values, checked_shape, integer, not_a_tensor, real, real_array
from fastsample.ops.address import check_strided, check_written, start_of
from fastsample.ops.tracing import followed, outside, recording, transformed
from fastsample.tables import HISTORY

_ANY_FLOAT = 3e38  # float32 holds it


def check_state(x: Tensor) -> None:
    check_strided("x", x)
    checked_shape("x", x.shape)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 (or float64 with the reference backend), got {x.dtype}")


def check_output(m: Tensor, x: Tensor, *, guided: bool) -> None:
    """Raises unless m is a model's output for x: of its shape, or twice axis 1, or twice the batch where guided."""
    check_strided("model_output", m)
    batches = (x.shape[0], 2 * x.shape[0]) if guided else (x.shape[0],)
    shapes = [torch.Size((batch, *rest)) for batch in batches for rest in (x.shape[1:], _doubled(x.shape[1:]))]
    if m.shape not in shapes:
        twice = ", with twice the batch under guidance" if guided else ""
        raise ValueError(
            f"model_output must have x's shape {tuple(x.shape)} or twice its axis 1{twice}, got {tuple(m.shape)}"
        )
    if m.device != x.device:
        raise ValueError(f"model_output lies on {m.device}, x on {x.device}")
    if not m.is_floating_point():
        raise TypeError(f"model_output must be floating point, got {m.dtype}")


def check_like(name: str, tensor: Tensor | None, x: Tensor, *, dtype: torch.dtype | None, copies: int = 1) -> None:
    """Raises unless the tensor has x's shape (or up to `copies` batches of it), device and this dtype."""
    if not isinstance(tensor, Tensor):
        raise not_a_tensor(name, tensor)
    check_strided(name, tensor)
    if not any(tensor.shape == (count * x.shape[0], *x.shape[1:]) for count in range(1, copies + 1)):
        or_twice = " or twice its batch" if copies > 1 else ""
        raise ValueError(f"{name} must have x's shape {tuple(x.shape)}{or_twice}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} lies on {tensor.device}, x on {x.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} as x is, got {tensor.dtype}")


def check_log_prob(log_prob: Tensor, x: Tensor) -> None:
    """Raises unless one number per sample can be written there."""
    if not isinstance(log_prob, Tensor):
        raise not_a_tensor("log_prob_out", log_prob)
    check_strided("log_prob_out", log_prob)
    if log_prob.shape != x.shape[:1]:
        raise ValueError(f"log_prob_out must have shape ({len(x)},), one per sample, got {tuple(log_prob.shape)}")
    if log_prob.device != x.device:
        raise ValueError(f"log_prob_out lies on {log_prob.device}, x on {x.device}")
    if log_prob.dtype != x.dtype:
        raise TypeError(f"log_prob_out must be {x.dtype} as x is, got {log_prob.dtype}")


def checked_noise(noise: Tensor | None, x: Tensor) -> Tensor:
    """The noise, once it is known to fit the state."""
    check_like("noise", noise, x, dtype=x.dtype)
    assert noise is not None
    return noise


def check_variance(m: Tensor, x: Tensor, *, name: str = "model_output") -> None:
    """Raises unless m has a variance half."""
    if x.ndim < 2 or m.shape[1] != 2 * x.shape[1]:
        raise ValueError(
            f"the table reads a learned variance: {name} must have {2 * x.shape[1] if x.ndim > 1 else 'twice'} "
            f"channels in axis 1, got shape {tuple(m.shape)}"
        )


def checked_rows(row: int | Tensor, table: Sized, x: Tensor) -> tuple[Tensor | None, int]:
    """(rows of the samples or None, the row they share else 0); those on the CPU inside the table, none negative."""
    batch = x.shape[0]
    if isinstance(row, Tensor) and transformed() and followed(row):
        raise TypeError("row is followed by a transform, such as vmap: it must be an int or a tensor with values")
    if isinstance(row, Tensor) and row.is_meta:
        check_has_values("row", row)
    if isinstance(row, Tensor) and (row.ndim > 0 or not row.is_cpu):
        if row.dtype != torch.int64 or not (row.is_cpu or row.device == x.device):
            raise TypeError(f"row must be an int or an int64 tensor on the CPU or beside x, got {_kind(row)}")
        if row.shape not in ((batch,), () if not row.is_cpu else (batch,)):
            raise ValueError(f"row must be one int or {batch}, one per sample; got shape {tuple(row.shape)}")
        if not row.is_cpu:
            return row.expand(batch).contiguous(), 0
        if not ((row >= -len(table)) & (row < len(table))).all():
            raise ValueError(f"rows {row.tolist()} are not all inside a table of {len(table)} rows")
        return row % len(table), 0
    try:
        shared = integer("row", row)
    except TypeError:
        raise TypeError(f"row must be an int or an int64 tensor on the CPU or beside x, got {row!r}") from None
    if not -len(table) <= shared < len(table):
        raise ValueError(f"row {row} is outside a table of {len(table)} rows")
    return None, shared % len(table)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"


def guidance_weights(guidance: float | Sequence[float] | Tensor, x: Tensor, name: str = "guidance") -> Tensor:
    """One guidance weight per sample, in x's dtype on its device; those that lie on a GPU are not read."""
    if isinstance(guidance, int | float) and not isinstance(guidance, bool) and abs(guidance) <= _ANY_FLOAT:
        return torch.full((x.shape[0],), float(guidance), dtype=x.dtype, device=x.device)  # others have an error below
    if isinstance(guidance, Tensor) and transformed() and followed(guidance):  # whose values nobody can read
        _check_one_each(name, guidance, x.shape[0])
        return guidance.to(x.device, x.dtype).expand(x.shape[0])
    on_gpu = isinstance(guidance, Tensor) and not guidance.is_cpu
    weights = _tensor_of_weights(name, guidance)
    _check_one_each(name, weights, x.shape[0])
    if not on_gpu:
        check_finite_guidance(weights.to(x.dtype), guidance, name)
    # A copy: the caller may change his own later.
    return torch.empty(x.shape[0], dtype=x.dtype, device=x.device).copy_(weights)


def check_weights(name: str, guidance: float | Sequence[float] | Tensor) -> None:
    """Raises unless these may be guidance weights, for however many samples: a finite number, or a vector of them."""
    if isinstance(guidance, int | float) and not isinstance(guidance, bool) and abs(guidance) <= _ANY_FLOAT:
        return
    weights = _tensor_of_weights(name, guidance)
    if weights.ndim > 1 or weights.numel() == 0:
        raise ValueError(f"{name} must be a number or one per sample, got shape {tuple(weights.shape)}")
    if not (recording() or (transformed() and followed(guidance))):  # in which nobody can read values
        check_finite_guidance(weights, guidance, name)


def check_finite_guidance(weights: Tensor, given: object, name: str = "guidance") -> None:
    """Raises ValueError unless all of these weights, in the dtype that they are used in, are finite."""
    if not weights.isfinite().all():
        raise ValueError(f"{name} must be finite, got {given} as {weights.dtype}")


def _check_one_each(name: str, weights: Tensor, batch: int) -> None:
    if weights.shape not in ((), (batch,)):
        raise ValueError(f"{name} must be one number or {batch}, one per sample; got {tuple(weights.shape)}")


def _tensor_of_weights(name: str, guidance: float | Sequence[float] | Tensor) -> Tensor:
    """The weights as they are given, as a tensor."""
    if isinstance(guidance, Tensor):
        if guidance.is_complex() or guidance.dtype == torch.bool:
            raise TypeError(f"{name} must be a number or one per sample, got {guidance!r}")
        check_has_values(name, guidance)
        return guidance
    try:
        with outside():  # NumPy's memory is none of a transform's
            return torch.from_numpy(real_array(name, guidance))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or one per sample, got {guidance!r}") from None


def check_rescale(rescale: float, *, guided: bool, name: str = "guidance_rescale") -> None:
    """Raises unless this is a guidance_rescale, 0 where nothing is guided."""
    if not 0 <= real(name, rescale) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {rescale}")
    if rescale != 0 and not guided:
        raise ValueError(f"{name} needs guidance=")


def check_history(history: Sequence[Tensor]) -> None:
    """Raises unless this is a list or tuple of at most three tensors."""
    if not isinstance(history, list | tuple):
        raise TypeError(f"history must be a list or tuple of tensors, got {type(history).__name__}")
    if len(history) > len(HISTORY):
        raise ValueError(f"history holds the entries of at most {len(HISTORY)} earlier rows, got {len(history)}")
    for i, one in enumerate(history):
        if not isinstance(one, Tensor):
            raise not_a_tensor(f"history[{i}]", one)


def check_memory(inputs: dict[str, Tensor | None], outputs: dict[str, Tensor | None]) -> None:
    """Raises where an output would destroy what is still to be read.

    A kernel works block by block: `out` may coincide with any input and `x0_out` with history, element for element;
    nothing else may overlap.
    """
    others = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, Tensor)}
    for name, tensor in outputs.items():
        if not isinstance(tensor, Tensor):
            continue
        check_written(name, tensor)
        for other_name, other in others.items():
            may_coincide = name == "out" or (name == "x0_out" and other_name.startswith("history"))
            coincides = may_coincide and (tensor is other or _layout(tensor) == _layout(other))
            if not coincides and _overlap(tensor, other):
                raise ValueError(f"{name} overlaps {other_name} in memory")
        others[name] = tensor


def _doubled(rest: Sequence[int]) -> tuple[int, ...]:
    return (2 * rest[0], *rest[1:]) if rest else ()


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return start_of(tensor), tensor.shape, tensor.stride(), tensor.dtype


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, other_first = start_of(a), start_of(b)
    if first == 0 or other_first == 0 or a.device != b.device:  # nothing there, or another machine's addresses
        return False
    return first < other_first + _reach(b) and other_first < first + _reach(a)


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
