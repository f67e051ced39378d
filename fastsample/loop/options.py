"""What a run of any sampler takes, and what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from typing_extensions import TypedDict, TypeVar

from fastsample.checks import check_floating
from fastsample.hints import of_step
from fastsample.loop.guidance_methods import Guidance
from fastsample.ops.backend import Backend
from fastsample.ops.noise.keys import Index, Seed

CorrectX0 = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor] | Generator | Sequence[Generator]
Decoded = TypeVar("Decoded", default=Tensor)  # what a call returns
Sample = TypeVar("Sample", covariant=True)


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

    if not TYPE_CHECKING:  # whom these would tell that there is any attribute and any key

        def __getattr__(self, name):
            raise AttributeError(f"a fastsample.Step has no {name!r}: {of_step(name)}", name=name, obj=self)

        def __getitem__(self, key):
            raise TypeError(f"a fastsample.Step has no key {key!r}, only attributes: {of_step(key)}")


class Stop(Exception):  # noqa: N818 - like StopIteration it is no error
    """Raised by a callback, it ends the run after this row, which then returns the sample so far.

    To `out` and `decode` that is the result as any other, and a prepared run can be called again. A callback raises it
    instead of returning something: what callbacks return has never counted, and many return what is true without
    meaning anything by it, as `bar.update()` of tqdm does. Raised anywhere else, by the model, say, it is an exception
    as any other. In the loop over `sampler.iterate(...)` a plain `break` does the same.

    Args:
        sample: the result, of the shape of `step.x`, such as `step.x0`. Default `step.x`, the state after the row,
            which is as noisy as its level says; `start_step=step.index + 1` goes on from there, and Options says what
            that is for samplers that read earlier rows.

    Raises:
        TypeError: for a sample that is no floating-point tensor. ValueError, by the run: for one of another shape.

    Example:
        >>> import fastsample
        >>> def settled(step):
        ...     if step.sigma < 0.5:
        ...         raise fastsample.Stop(step.x0)
        >>> fastsample.ddim(lambda x, t: 0.1 * x, (2, 3), steps=50, seed=0, callback=settled).shape
        torch.Size([2, 3])
    """

    def __init__(self, sample: Tensor | None = None) -> None:
        if sample is not None:
            check_floating("sample", sample)
        super().__init__(*(() if sample is None else (sample,)))  # by which it is copied and pickled
        self.sample = sample


class HasSample(Protocol[Sample]):
    """What the decoders of diffusers return."""

    @property
    def sample(self) -> Sample: ...


Decode = Callable[[Tensor], Decoded | HasSample[Decoded]]


class Undecoded(TypedDict, total=False):
    """The options but decode, which tells what a call returns."""

    seed: Seed | None
    index: Index
    noise: Noise | None
    model_dtype: torch.dtype | None
    model_kwargs: Mapping[str, Any] | None
    cast_kwargs: bool
    guidance: float | Sequence[float] | Tensor | Guidance | None
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
    out: Tensor | None
    backend: Backend | None
    device: torch.device | str | None


class Options(Undecoded, total=False):
    """What every sampler takes beside its own arguments.

    An exception that ends a run carries the state that it had come to as its attribute `sample`, whoever raised it: the
    model, callback, decode, or a user who pressed Ctrl-C.

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
        model_dtype: dtype of the model's input. Default what the model wants: the compute dtype of layerwise casting,
            its attribute `dtype`, else what its first convolution or most of its linears hold; never float8 or
            integers. Wrappers are looked through: torch.compile, DataParallel, partial applications, methods, functions
            and lambdas that call one module, or several of one dtype. float32 for a function that is not seen to call
            any, and for modules that differ.
        model_kwargs: the model's keywords, passed to every call.
        cast_kwargs: default True: floating-point tensors among all keywords, in mappings, lists and tuples too, are
            cast to the dtype of the model's input, like x, once a run. Not where that dtype is unknown (a function that
            is not seen to call a module, without model_dtype). Integers, bools and all else stay as they are, and
            nothing is moved to another device. False passes everything as it is, such as rotary tables that are to
            stay float32 beside words that you cast yourself.
        guidance: classifier-free guidance m = m_u + w (m_c - m_u): w as a number, or one per sample. The model is
            called once for both, with the batch [unconditional, conditional]. Without it, and where every w is 1, only
            the conditional half is evaluated. Or a fastsample.Guidance, which has the two below and other methods too.
        cond, uncond: with `guidance`, the keywords of the two halves, over those of `model_kwargs`. What they are is
            told by their types, never by sizes. A tensor has an entry per sample along its first axis, B of them, and
            so does a list: both are concatenated, [unconditional, conditional]. Mappings and tuples are gone through.
            Tensors without axes, numbers, texts and all else must be equal in both. fastsample.Shared(value) stands for
            a tensor or list that all samples share, and the model is given the value.
        guidance_rescale: phi in [0, 1], default 0: the guided output is scaled by phi std(m_c) / std(m) + 1 - phi, per
            sample (Lin et al. 2023).
        guidance_interval: (t_lo, t_hi): guide only where t_lo <= t <= t_hi (Kynkaanniemi et al. 2024), in the model's
            own times; elsewhere only the conditional half is evaluated.
        mask, known: inpainting. After every row x becomes mask*x + (1 - mask)*(alpha known + sigma z), with noise of
            stream 2, and after the last one mask*x + (1 - mask)*known. 1 in `mask` is what is to be filled in. For x of
            shape (B, C, H, W) a mask is (B or 1, C or 1, H, W); with three axes it is (B or 1, H, W), for all channels;
            with fewer (H, W), for all samples too, or a single value. `known` is the same but for three axes, which
            could be those of one sample: give known[None]. The same holds for x with other axes behind C; for x without
            any, (B, D), give both of them. Axes of size 1 are repeated.
        strength: in (0, 1]: x is a clean sample; noise is added to it and the last floor(steps strength) steps are run
            (for heun, two rows each). A flow runs a step that only a part is left of too. `lcm` makes all its steps,
            among the first `strength` of the distillation's timesteps. All of it as in diffusers' pipelines.
        start_step: x is the state before this row; the rows before it are left out. What they remembered is missing:
            a solver that reads earlier rows (DPMSolver, UniPC, DEIS, IPNDM) has order 1 in this row, 2 in the next one,
            and so on up to its own, so that its result is near that of the whole run and not the same. That of all
            others is the same, for the same seed. `heun` starts where a step does, at an even row, and a hand-made
            table where no row from there on reads one from before.
        callback: called with a fastsample.Step after every row; may change `step.x` in place. What it returns does not
            matter; it ends the run early by `raise fastsample.Stop`.
        progress: show a tqdm bar.
        decode: called with the result; what it returns is returned (its `.sample`, where that is a tensor), as with
            `decode=lambda x: vae.decode(x / vae.config.scaling_factor)`. It is given the result in the dtype that the
            module wants which it is or is seen to call, as for `model_dtype`, so that this line serves a VAE in half
            precision; else in the result's own.
        out: tensor that receives the result, written only when sampling is complete.
        backend: see fastsample.backends().
        device: of the result; default that of x, else of the model, else CPU.
    """

    decode: Callable[[Tensor], Any] | None


class RunOptions(NamedTuple):
    """The options of one run as they travel: those of `Options`, with its defaults for what the caller left out."""

    seed: Seed | None = None
    index: Index = 0  # type: ignore[assignment]  # a tuple's method of that name is not missed
    noise: Noise | None = None
    model_dtype: torch.dtype | None = None
    model_kwargs: Mapping[str, Any] | None = None
    cast_kwargs: bool = True
    guidance: float | Sequence[float] | Tensor | Guidance | None = None
    cond: Mapping[str, Any] | None = None
    uncond: Mapping[str, Any] | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    strength: float | None = None
    start_step: int = 0
    callback: Callable[[Step], object] | None = None
    progress: bool = False
    decode: Callable[[Tensor], Any] | None = None
    out: Tensor | None = None
    backend: Backend | None = None
    device: torch.device | str | None = None
