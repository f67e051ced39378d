"""A sampler with its model, its options and the memory of a run, for many runs one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

from torch import Tensor

from fastsample.checks import not_a_tensor
from fastsample.hints import no_argument
from fastsample.loop.copies import copied
from fastsample.loop.drive import Hooks, drive
from fastsample.loop.loop import Loop
from fastsample.loop.options import Decoded, Options
from fastsample.loop.start import checked_start
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.tracing import recording, transformed
from fastsample.vocabulary import OF_SAMPLERS

COPIED = ("seed", "index", "guidance", "mask", "known")  # of the options of a run, what later calls read again

_OF_PREPARED = ("x", "seed", "index", "model_kwargs", "cond", "uncond", "out")
_ARGUMENTS = {
    **dict.fromkeys(OF_SAMPLERS, "the sampler"),
    **dict.fromkeys(Options.__annotations__, "prepare(...)"),
    **dict.fromkeys(_OF_PREPARED, ""),
}


class Prepared(Generic[Decoded]):
    """A run that can be made again and again: what `Sampler.prepare` returns.

    Arguments are checked, buffers made and kernels planned once; what the model computes in is asked once too, so
    prepare again after model.half(). A call that begins while another one runs, in another thread or inside the model,
    gets memory of its own; results are always memory of their own. Of tensors that `prepare` was given, those among the
    model's keywords count as they are at a call; all others are copied.
    """

    def __init__(
        self,
        make: Callable[[], Loop],
        x: Tensor | Sequence[int],
        seed: Seed | None,
        index: Index,
        keywords: Mapping[str, Any],
        hooks: Hooks,
    ) -> None:
        self._make, self._seed, self._index, self._hooks = make, seed, index, hooks
        self._x = copied(x) if isinstance(x, Tensor) else checked_start(x)
        self._keywords = {name: keywords.get(name) for name in ("model_kwargs", "cond", "uncond")}
        self._asks = any(value is not None for value in self._keywords.values())
        loop = make()
        sample_keys(0 if seed is None else seed, index, loop.state.shape[0], loop.state.device)  # raises for bad ones
        self._waiting = [] if loop.in_fresh_tensors else [loop]

    def __call__(
        self,
        x: Tensor | None = None,
        *,
        seed: Seed | None = None,
        index: Index | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        out: Tensor | None = None,
        **others: Any,
    ) -> Decoded:
        """A sample: as sampler(model, x, seed=seed, index=index, **options) makes it.

        Args:
            x: as the sampler's, of the shape that was prepared. Default what was given there: a shape, so that x_T is
                drawn from the seed, or a tensor.
            seed: default that of `prepare`; a fresh one at every call where it had none.
            index: default that of `prepare`.
            model_kwargs, cond, uncond: for this call instead of those of `prepare`, each as a whole. As there, cond
                and uncond go before model_kwargs. Those of `prepare` count as they are at the call.
            out: tensor that receives the result.

        Returns:
            `out`, a fresh tensor, or what `decode` made of it.

        Raises:
            ValueError, TypeError: for an x or out of another shape or dtype, seeds that are none, and keywords that
                cannot be batched, before the model is called.
        """
        if others:
            name = min(others)
            otherwise = f"keywords of its model go into model_kwargs={{{name!r}: ...}}"
            raise TypeError(no_argument("a prepared run", name, _ARGUMENTS, otherwise=otherwise))
        followed = recording() or transformed()
        loop = self._waiting.pop() if self._waiting and not followed else self._make()
        loop.warn_of_training()
        try:
            if x is not None:
                if not isinstance(x, Tensor):
                    raise not_a_tensor("x", x)
                loop.check_x(x)
            if not self._asks and model_kwargs is None and cond is None and uncond is None:
                result = self._drive(loop, x, seed, index, out)
            else:
                own = loop.guidance
                self._ask(loop, model_kwargs=model_kwargs, cond=cond, uncond=uncond)
                result = self._drive(loop, x, seed, index, out)
                loop.guidance = own
        except BaseException:
            del loop  # which may not be what it was; another is made when it is needed
            raise
        if not loop.in_fresh_tensors:
            self._waiting.append(loop)
        return result

    def _drive(
        self,
        loop: Loop,
        x: Tensor | None,
        seed: Seed | None,
        index: Index | None,
        out: Tensor | None,
    ) -> Any:
        own_seed, own_index = self._seed if seed is None else seed, self._index if index is None else index
        return drive(loop, self._x if x is None else x, own_seed, own_index, out, self._hooks)

    def _ask(self, loop: Loop, **given: Mapping[str, Any] | None) -> None:
        loop.ask(**{name: own if given.get(name) is None else given[name] for name, own in self._keywords.items()})
