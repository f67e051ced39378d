"""A whole sampling loop as one CUDA graph: the host launches it at once instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fastsample.checks import not_a_tensor
from fastsample.loop.cached import Cached
from fastsample.loop.copies import copied
from fastsample.loop.guidance import Shared
from fastsample.loop.options import Options
from fastsample.loop.start import checked_start
from fastsample.model import Model
from fastsample.ops.memory import ordinary_tensors
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.hints import not_a_sampler
from fastsample.samplers.sampler import Sampler, loop_of, options_of

_NOT_CAPTURED = {
    "noise": "noise is made outside of it: leave noise= out, and z is drawn from the seed",
    "callback": "nothing can look in between captured rows: leave callback= out",
    "progress": "nothing can look in between captured rows: leave progress= out",
    "decode": "the result comes after it: decode what the graph returns",
    "out": "each call has a result of its own: give out= to that call",
}
_KEYWORDS = ("model_kwargs", "cond", "uncond")
_INPUTS = (*_KEYWORDS, "guidance", "mask", "known")


def graph(sampler: Sampler, model: Model, example: Tensor | Sequence[int], **options: Unpack[Options]) -> Graph:
    """Captures sampler(model, example, **options), all its rows, as one CUDA graph.

    What it returns is called like the sampler, and gives the same bits for the same seed, while the host launches one
    graph instead of the kernels of every model call: worth its while where they are small. It samples once to warm up,
    and calls the model as often again while it captures.

    The model must be fit for capture, as torch describes it (https://docs.pytorch.org/docs/stable/notes/cuda.html,
    "CUDA Graphs"): work of a fixed shape on the current stream, nothing that reads results on the host (`.item()`,
    `if tensor`, boolean masks) or copies from pageable memory. The same holds for the sampler's correct_x0. Whatever
    Python does in them happens at capture only. Weights that are changed in place count in later calls; parameters
    must not be replaced or moved. The graph keeps the model, not the memory that was the model's at capture. So make
    another after attaching, detaching or repacking a LoRA, activating another set of adapters or loading other ranks:
    the old one would read freed memory. lora.swap to factors of the same ranks counts in later calls.

    Args:
        sampler: any.
        model: as for the sampler.
        example: the shape (B, ...) of the samples, which then start from x_T drawn from the seed; or x itself, of the
            shape that all later ones have.
        **options: those of the sampler's call: all in fastsample.Options but noise, callback, progress, decode and out.
            Tensors in model_kwargs, cond, uncond, mask and known are copied; `Graph.update` replaces them.

    Returns:
        A fastsample.Graph.

    Raises:
        ValueError: where the sample would not lie on a CUDA device, for an option that cannot be captured, for an x
            that requires gradients, and inside torch.autocast unless it was given cache_enabled=False. RuntimeError:
            where the model cannot be captured.

    Example:
        >>> from fastsample import DDIM, Schedule
        >>> sampler, model = DDIM(Schedule.linear(), steps=10), lambda x, t: 0.1 * x
        >>> if torch.cuda.is_available():
        ...     generate = graph(sampler, model, (4, 3, 8, 8), device="cuda")
        ...     assert torch.equal(generate(seed=7), sampler(model, (4, 3, 8, 8), device="cuda", seed=7))
        >>> graph(sampler, model, (4, 3, 8, 8), device="cpu")
        Traceback (most recent call last):
        ValueError: a graph needs a CUDA device, and this sample would lie on cpu: give device=, or a model on one
    """
    return Graph(sampler, model, example, options)


class Graph:
    """A captured sampling loop: what fastsample.graph returns. Not for several threads or streams at once.

    It keeps the memory of a run, the model's activations with it, for as long as it lives.
    """

    def __init__(
        self, sampler: Sampler, model: Model, example: Tensor | Sequence[int], options: Mapping[str, Any]
    ) -> None:
        if not isinstance(sampler, Sampler):
            raise not_a_sampler(sampler)
        if isinstance(model, Cached):
            raise ValueError("a graph cannot capture a cached model, which decides row by row what is called")
        run_options = dict(options)
        for name, reason in _NOT_CAPTURED.items():
            value = run_options.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"a graph cannot capture {name}: {reason}")
        asked = options_of(sampler, model, example, run_options)
        # Buffers must be ordinary tensors also where the caller is in inference mode.
        with torch.inference_mode(False):
            self._options = asked._replace(**{name: copied(getattr(asked, name)) for name in _INPUTS})
            self._loop = loop = loop_of(sampler, model, example, self._options)
        if loop.guidance.bending is not None:
            raise ValueError("a graph cannot capture guidance of a method other than plain, which remembers rows")
        if loop.differentiable:
            raise ValueError("example requires gradients, which a graph does not compute: give example.detach()")
        if loop.state.device.type != "cuda":
            raise ValueError(
                f"a graph needs a CUDA device, and this sample would lie on {loop.state.device}: give device=, or a "
                "model on one"
            )
        if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
            raise ValueError(
                "a graph cannot be made inside torch.autocast with its cache, which is freed where that ends: "
                'give torch.autocast("cuda", cache_enabled=False)'
            )
        self._seed: Seed | None = copied(asked.seed)
        self._index: Index = copied(asked.index)
        shape = checked_start(example)
        self._example = example.detach().to(loop.state.device, copy=True) if isinstance(example, Tensor) else shape
        self._capture()

    def __call__(
        self,
        x: Tensor | None = None,
        *,
        seed: Seed | None = None,
        index: Index | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """A sample: as sampler(model, x, seed=seed, index=index, **options) makes it.

        Args:
            x: as the sampler's, of the example's shape; a tensor that need not lie on the graph's device. Default the
                example: a shape, so that x_T is drawn from the seed, or the tensor that was given.
            seed: default that of the capture; a fresh one at every call where it had none.
            index: default that of the capture.
            out: tensor that receives the result.

        Returns:
            `out`, or a fresh tensor; later calls leave it alone.

        Raises:
            ValueError, TypeError: for an x or out of another shape or dtype, and seeds and places that are none.
        """
        loop = self._loop
        if x is not None:
            if not isinstance(x, Tensor):
                raise not_a_tensor("x", x)
            loop.check_x(x)
        start = self._example if x is None else x
        if out is not None:
            loop.check_out(out)
        with torch.no_grad():
            loop.start(start, self._seed if seed is None else seed, self._index if index is None else index)
            self._graph.replay()
            return loop.result() if out is None else out.copy_(loop.state)

    def update(self, **inputs: Any) -> None:
        """Replaces what later calls are conditioned on.

        Args:
            **inputs: model_kwargs, cond, uncond, guidance, mask and known, those of them that were given at capture.
                Mappings are whole, with the keywords of the capture. Tensors keep their shapes and dtypes, all else its
                values, but for guidance.

        Raises:
            ValueError, TypeError: for what differs in more than the values of tensors. Nothing changes then.
        """
        if unknown := sorted(set(inputs) - set(_INPUTS)):
            raise TypeError(f"a graph cannot change {', '.join(unknown)}; it can change {', '.join(_INPUTS)}")
        absent = [name for name, value in inputs.items() if value is None or getattr(self._options, name) is None]
        if absent:
            raise ValueError(f"{absent[0]} can be changed only to a value, and only where capture was given one")
        with ordinary_tensors(), torch.no_grad():
            pairs = list(self._replacements(inputs))
            for old, new in pairs:
                old.copy_(new)
        if "guidance" in inputs:
            self._options = self._options._replace(guidance=copied(inputs["guidance"]))

    def _replacements(self, inputs: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """(what the graph reads, what it is to become): the arguments are worked out anew, as for another run."""
        loop = self._loop
        for name in {*inputs} - {"guidance"}:
            yield from _pairs(getattr(self._options, name), inputs[name], name)
        now = self._options._replace(**inputs)
        if {*inputs} - {"mask", "known"}:
            old, new = loop.guidance, loop.guidance_for(now)
            if (new.weights is None) != (old.weights is None):
                raise ValueError(
                    "guidance other than 1 needs both halves of the model's batch, 1 only one, and which they are is "
                    "captured: make another graph"
                )
            if new.weights is not None and old.weights is not None:
                yield old.weights, new.weights
            yield from _pairs(old.conditional, new.conditional, "")
            yield from _pairs(old.both, new.both, "")
        if {*inputs} & {"mask", "known"} and loop.inpainting is not None:
            painted = loop.inpainting.like(now.mask, now.known)
            yield from zip(loop.inpainting.tensors, painted.tensors, strict=True)

    def _capture(self) -> None:
        device = self._loop.state.device
        with torch.cuda.device(device):
            with torch.no_grad():
                self._loop.start(self._example, self._seed, self._index)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream())
            # What the model compiles, tunes or allocates at first use comes before the capture.
            with torch.cuda.stream(stream):
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            try:
                # Other threads, such as those that load data, may allocate meanwhile.
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "the model cannot be captured: does it read results on the host, copy from the CPU, or use another "
                    "stream? https://docs.pytorch.org/docs/stable/notes/cuda.html tells what a CUDA graph can hold"
                ) from error

    def _run(self) -> None:
        """All rows, from the state to the sample: what is captured."""
        with torch.no_grad():
            for _ in self._loop.rows():
                pass


def _pairs(old: Any, new: Any, path: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two trees that differ in nothing else."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
            was, got = (f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}" for tensor in (old, new))
            raise ValueError(f"{path} must be {was}, as at capture; got {got}")
        if old is not new:
            yield old, new
    elif isinstance(old, Shared) and isinstance(new, Shared):
        yield from _pairs(old.value, new.value, path)
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        if unlike := sorted(set(old) ^ set(new)):
            raise ValueError(f"the model's keywords are captured; only one call has {', '.join(unlike)}")
        for name in old:
            yield from _pairs(old[name], new[name], f"{path}.{name}" if path else name)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for i, (entry, other) in enumerate(zip(old, new, strict=True)):
            yield from _pairs(entry, other, f"{path}[{i}]")
    elif not (old is new or (type(old) is type(new) and bool(np.all(old == new)))):
        raise ValueError(f"{path} is captured as it was and cannot change: only values of tensors can")
