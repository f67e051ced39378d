"""The guidance scale as an input of models that were distilled with guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsample.checks import check_has_values, checked_shape
from fastsample.model import Model, Predictor
from fastsample.model.called_modules import attribute


def guidance_scale_embedding(w: float | Sequence[float] | Tensor, dim: int) -> Tensor:
    """What a guidance-distilled model is told of the guidance scale: sines, then cosines, of 1000 (w - 1) f_i.

    f_i = 10000^(-i / (dim/2 - 1)), i = 0 .. dim/2 - 1, as in the training script of latent consistency models.

    Args:
        w: the guidance scale m_u + w (m_c - m_u), a number or one per sample.
        dim: length of an embedding, even and at least 4: the model's `config.time_cond_proj_dim`.

    Returns:
        float32 of shape (1, dim) for a number, else (B, dim).

    Raises:
        TypeError: for a w that is neither. ValueError: for another shape of w or a dim that is odd or below 4.

    Example:
        >>> guidance_scale_embedding([1.0, 8.0], 256)[0, [0, -1]]
        tensor([0., 1.])
    """
    if isinstance(w, Tensor):
        check_has_values("the guidance scale", w)
    try:
        scale = torch.as_tensor(w, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the guidance scale must be a number or one per sample, got {w!r}") from None
    if scale.ndim > 1:
        raise ValueError(f"the guidance scale must be a number or one per sample, got shape {tuple(scale.shape)}")
    if dim < 4 or dim % 2:
        raise ValueError(f"dim must be even and at least 4, got {dim}")
    # In float32, as the models were trained: at these angles float64 would differ in the fourth digit.
    frequency = torch.exp(
        torch.arange(dim // 2, dtype=torch.float32, device="cpu") * -(math.log(10000.0) / (dim // 2 - 1))
    )
    angle = (scale.reshape(-1, 1) - 1) * 1000 * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def told_guidance(
    model: Model, x: Tensor | Sequence[int], w: float | Sequence[float] | Tensor | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The options with the embedding of w among the model's keywords."""
    if w is None:
        return options
    dim = getattr(attribute(model, "config", object), "time_cond_proj_dim", None)
    if not isinstance(dim, int):
        raise ValueError(
            "guidance_embedding needs a model with config.time_cond_proj_dim; for another pass model_kwargs="
            "{'timestep_cond': fastsample.guidance_scale_embedding(w, dim)}"
        )
    batch = checked_shape("x", x.shape if isinstance(x, Tensor) else x)[0]
    embedding = guidance_scale_embedding(w, dim)
    if len(embedding) not in (1, batch):
        raise ValueError(f"guidance_embedding must be a number or {batch}, one per sample; got {len(embedding)}")
    predictor = Predictor(model, options.get("model_dtype"))
    embedding = embedding.expand(batch, -1).to(predictor.device or options.get("device"), predictor.dtype)
    return {**options, "model_kwargs": {**(options.get("model_kwargs") or {}), "timestep_cond": embedding}}
