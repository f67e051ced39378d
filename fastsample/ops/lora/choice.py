"""Which arithmetic lora_linear uses on this CPU for a dtype: a level of the kernels, or torch's own product."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from fastsample.ops.backend import cpu_module
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.lora.layout import pack, packed_size, products_of_parts

BY_TORCH = "torch"

FACTOR = 1.5  # how many times faster another candidate must be to overrule the fixed order
BUDGET = 2e-3  # seconds of the calls that count
FEWEST_ROUNDS, WANTED_ROUNDS = 3, 8
K = N = 256
ROW_COUNTS, WARM_UPS = (64, 32, 16, 8), 3


class Choice(NamedTuple):
    """The choice for a dtype, and the times that it rests on.

    Attributes:
        name: a level, or "torch".
        first: the level that the fixed order names.
        seconds: of each candidate its time in every round, CPU time of one thread; empty where nothing was measured.
        rows: the rows of x in the problem that was timed.
    """

    name: str
    first: str
    seconds: Mapping[str, Sequence[float]]
    rows: int


_made: dict[torch.dtype, Choice] = {}
_lock = threading.Lock()


def chosen(dtype: torch.dtype) -> str:
    """The name of the level that lora_linear uses for weights of this dtype, or "torch"; made at first need.

    Where FASTSAMPLE_CPU_ISA or _cpu.set_isa named a level it is that one, and nothing is measured.
    """
    if cpu_module().isa_is_forced():
        return str(cpu_module().lora_isa(DTYPE_CODES[dtype]))
    return choice(dtype).name


# Dynamo does not look inside (as in backend.choose): a frame that packs weights may be traced.
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choice(dtype: torch.dtype) -> Choice:
    """The choice that `chosen` rests on: made once in a process, by the first thread that asks, and kept.

    The fixed order (CPUID, vendor, permission) names a first candidate. A small product is then timed on it, on the
    levels that might beat it and on torch. Another one is taken where its best round is more than 1.5 times
    faster than the first candidate's. Products alone are timed, without adapters and without the op around them: on a
    problem this small the time between torch's calls would hide how fast it multiplies.

    Every process on a machine shall choose alike, without a file that remembers. Four things see to it:

    - Time is the CPU time of one thread, and each candidate runs on it alone. A busy machine takes the CPU away, which
      this clock does not count; how many threads torch has makes no difference.
    - Candidates take turns in rounds, and the best round of each counts: what slows one down for a while (caches, the
      clock, a neighbour on the same core) slows all down, or is gone in another round.
    - Without three rounds of all candidates the fixed order stands.
    - In 50 processes on loaded cores the ratio of two candidates lay within 0.75 to 1.4 times its median. On CPUs that
      are known the fixed order's first one is the fastest or nearly so, far from losing by 1.5: that takes a unit that
      this build or the fixed order does not know, and those differ by more (AMX is 5 times and more the others).

    Where another candidate's true advantage is between 1.1 and 2, processes can differ, and either choice costs at most
    that much. `python -m benchmarks.choice` shows whether they do on a machine.

    The rounds take 2 ms: a round is begun only if it would end within them when it is as fast as the fastest. Beside
    them come once per dtype the packing, a thread's start and three warm-up calls of each candidate, for up to four
    numbers of rows, until eight rounds fit. torch compiles its product in its first call. In all a choice took 5 to
    25 ms on a Zen 4, and 40 to 100 on busy cores.
    """
    with _lock:
        if dtype not in _made:
            _made[dtype] = new = _make(dtype)
            if new.name not in (new.first, BY_TORCH):
                cpu_module().set_lora_isa(DTYPE_CODES[dtype], new.name)
        return _made[dtype]


def choices() -> dict[str, str]:
    """`chosen` for every dtype that has kernels, by its name."""
    return {str(dtype).removeprefix("torch."): chosen(dtype) for dtype in DTYPE_CODES}


def candidates(levels: Sequence[str]) -> list[str]:
    """Of the levels, the fixed order's first one ahead, those that may be the fastest, and torch.

    avx2 and scalar do what the others do with shorter registers: they are there where nothing else is.
    """
    return [levels[0], *(name for name in levels[1:] if name not in ("avx2", "scalar")), BY_TORCH]


def decide(first: str, seconds: Mapping[str, Sequence[float]]) -> str:
    """`first`, unless another candidate's least time, times FACTOR, is less than its least time."""
    if min(map(len, seconds.values()), default=0) < FEWEST_ROUNDS:
        return first
    least = {name: min(times) for name, times in seconds.items()}
    fastest = min(least, key=least.__getitem__)
    return fastest if FACTOR * least[fastest] < least[first] else first


def rounds(calls: Mapping[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Times all calls in rounds, until a round as short as the shortest would not end within BUDGET."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spent = shortest = 0.0
    while spent + shortest <= BUDGET:
        took = 0.0
        for name, call in calls.items():
            seconds[name].append(_time_of(call, clock))
            took += seconds[name][-1]
        spent, shortest = spent + took, min(shortest or took, took)
    return seconds


def _make(dtype: torch.dtype) -> Choice:
    levels = cpu_module().lora_isas(DTYPE_CODES[dtype])
    unmeasured = Choice(levels[0], levels[0], {}, 0)
    # A new thread has none of the modes (fake tensors, functorch, autocast, gradients) that the caller may have set.
    with ThreadPoolExecutor(1) as pool:
        try:
            measured = pool.submit(_measure, dtype, candidates(levels))
        except RuntimeError:  # the system, or an interpreter that is about to end, starts no more threads
            return unmeasured
        return measured.result() or unmeasured


@torch.inference_mode()
def _measure(dtype: torch.dtype, names: Sequence[str]) -> Choice | None:
    torch.get_num_threads()  # at its first use in a thread torch sets the number that the next line changes
    if not cpu_module().keep_to_this_thread():
        return None
    clock = time.thread_time
    runs = {name: _prepared(dtype, name) for name in names}
    for rows in ROW_COUNTS:  # fewer where a unit is slow, so that enough rounds fit
        warm = [[_time_of(partial(run, rows), clock) for _ in range(WARM_UPS)] for run in runs.values()]
        if WANTED_ROUNDS * sum(map(min, warm)) <= BUDGET:
            break
    seconds = rounds({name: partial(run, rows) for name, run in runs.items()}, clock)
    return Choice(decide(names[0], seconds), names[0], seconds, rows)


def _prepared(dtype: torch.dtype, name: str) -> Callable[[int], object]:
    """A call that takes the number of rows of x and computes x W^T on this candidate; all else is done before."""
    cpu, code = cpu_module(), DTYPE_CODES[dtype]
    values = torch.linspace(-1, 1, (ROW_COUNTS[0] + N) * K, device="cpu", dtype=torch.float32).to(dtype).view(-1, K)
    x, weight = values.split([ROW_COUNTS[0], N])
    y = x.new_empty(ROW_COUNTS[0], N)
    if name == BY_TORCH:
        return lambda rows: torch.mm(x[:rows], weight.T, out=y[:rows])
    with _on_level(code, name):
        layout = int(cpu.lora_layout(code))
        packed = x.new_empty(packed_size(N, K, layout))
        pack(weight, packed, layout)
    factors: tuple[object, ...] = ([], [], [], (), 0)  # no adapter

    def run(rows: int) -> None:
        with _on_level(code, name):
            address, out = x.data_ptr(), [y.data_ptr()]
            cpu.lora_linear(
                address, 1, rows, K, layout, products_of_parts(), K, packed.data_ptr(), (N,), 0, *factors, out, 1
            )

    return run


@contextmanager
def _on_level(code: int, name: str) -> Iterator[None]:
    cpu = cpu_module()
    before = cpu.lora_isa(code)
    cpu.set_lora_isa(code, name)
    try:
        yield
    finally:
        cpu.set_lora_isa(code, before)


def _time_of(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
