"""What a run of any sampler takes, and what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from typing_extensions import TypedDict

from fastsample.ops.keys import Index, Seed

Noise = Callable[[int], Tensor] | Generator | Sequence[Generator]


@dataclass(slots=True, repr=False)
class Step:
    """What a callback or iterator sees after a row: `x` may be changed in place, and the change counts.

    Attributes:
        index: the row, 0 = the noisiest.
        t: the time the model was given in this row.
        x: the state after the row, float32. The loop's own buffer, overwritten by the next row: clone what you keep,
            and write into it (`step.x[...] = ...`) instead of replacing it.
        x0: the row's estimate of the clean sample, after clipping or correction; likewise a reused buffer.
        alpha, sigma: the noise level of `x`, alpha*x0 + sigma*z; NaN for a hand-made table without levels.
    """

    index: int
    t: int | float
    x: Tensor
    x0: Tensor
    alpha: float
    sigma: float

    def __repr__(self) -> str:
        return f"Step(index={self.index}, t={self.t}, x of shape {tuple(self.x.shape)})"


class Options(TypedDict, total=False):
    """What every sampler takes beside its own arguments.

    Attributes:
        seed: names an endless set of samples: an int, modulo 2^64; or one per sample, each the one at place `index` of
            a set of its own. Default a fresh one from torch's default generator: two calls differ, and
            torch.manual_seed governs what they draw (processes that set the same one draw the same samples).
        index: the place of the first sample in the set, default 0: sample i of the call is sample index + i of the set.
            A sample does not depend on the batch it is in, but for what the model itself makes of batches, so parts of
            a set may be drawn in any order and process: rank r of B samples each takes index=r * B. Or one per sample.
        noise: None draws z from `seed` inside the step. Or a function of the row (0 = the noisiest) that returns z, or
            a torch.Generator, or one per sample. Used only for rows that add noise; x_T comes from `seed` all the same,
            unless it is given as x.
        model_dtype: dtype of the model's input; default that of its first floating-point parameter, else float32.
        model_kwargs: passed to every model call as they are: `model_dtype` does not cast them.
        guidance: classifier-free guidance m = m_u + w (m_c - m_u): w as a number, or one per sample. The model is
            called once for both, with the batch [unconditional, conditional]. Without it, and where every w is 1, only
            the conditional half is evaluated.
        cond, uncond: with `guidance`, the keywords of the two halves, over those of `model_kwargs`. Tensors whose first
            axis is the batch are concatenated, mappings and lists are gone through, all else must be equal in both.
        guidance_rescale: phi in [0, 1], default 0: the guided output is scaled by phi std(m_c) / std(m) + 1 - phi, per
            sample (Lin et al. 2023).
        guidance_interval: (t_lo, t_hi): guide only where t_lo <= t <= t_hi (Kynkaanniemi et al. 2024), in the model's
            own times; elsewhere only the conditional half is evaluated.
        mask, known: inpainting. After every row x becomes mask*x + (1 - mask)*(alpha known + sigma z), with noise of
            stream 2, and after the last one mask*x + (1 - mask)*known; both broadcast to the shape of x. 1 in `mask` is
            what is to be filled in.
        strength: in (0, 1]: x is a clean sample; noise is added to it and the last floor(steps strength) steps are run
            (for heun, two rows each). A flow runs a step that only a part is left of too. `lcm` makes all its steps,
            among the first `strength` of the distillation's timesteps. All of it as in diffusers' pipelines.
        start_step: x is the state before this row; the rows before it are left out.
        callback: called with a fastsample.Step after every row; may change `step.x` in place.
        progress: show a tqdm bar.
        decode: called with the result; what it returns is returned (its `.sample`, where that is a tensor), as with
            `decode=lambda x: vae.decode(x / vae.config.scaling_factor)`.
        out: tensor that receives the result, written only when sampling is complete.
        backend: see fastsample.backends().
        device: of the result; default that of x, else of the model, else CPU.
    """

    seed: Seed | None
    index: Index
    noise: Noise | None
    model_dtype: torch.dtype | None
    model_kwargs: Mapping[str, Any] | None
    guidance: float | Sequence[float] | Tensor | None
    cond: Mapping[str, Any] | None
    uncond: Mapping[str, Any] | None
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    mask: Tensor | None
    known: Tensor | None
    strength: float | None
    start_step: int
    callback: Callable[[Step], object] | None
    progress: bool
    decode: Callable[[Tensor], Any] | None
    out: Tensor | None
    backend: str | None
    device: torch.device | str | None
