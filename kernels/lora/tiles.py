"""How lora_linear's kernels cut up a problem: one launch or two, and tiles from short lists, timed once per shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastsample.kernels.arithmetic import INTERPRETED, triton
from fastsample.kernels.lora.layout import RANK_STEP


class Blocks(NamedTuple):
    """A program's tile of the output, the features it takes at a time, its warps, and loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Problem(NamedTuple):
    """Rows per sample, samples, K, the N_i, the largest padded rank of a linear (width) and of a group (columns)."""

    rows: int
    samples: int
    k: int
    ns: tuple[int, ...]
    width: int
    columns: int
    dtype: torch.dtype
    device: torch.device


# Each list starts with one that fits every GPU. Few rows: the weights' way from memory is the limit, so narrow tiles,
# to have many programs, and deep ones, to have many bytes in flight. Many rows: large tiles read operands less often. A
# kernel with its own t keeps a second accumulator, so its tiles are smaller. 128 x 256 has room only where a block may
# have 163 KB of shared memory (sm_80) or 227 KB (sm_90, sm_100). Float32 without tf32 goes through registers: shallow.
_FEW_ROWS = 32
FEW = {
    "half": (Blocks(16, 32, 64, 4, 4), Blocks(16, 32, 128, 4, 4), Blocks(16, 64, 128, 4, 3), Blocks(32, 64, 64, 4, 4)),
    "float": (Blocks(16, 32, 32, 4, 3), Blocks(16, 64, 32, 4, 3), Blocks(32, 64, 32, 4, 3)),
}
MANY_ALONE = {
    "half": (Blocks(32, 64, 64, 4, 3), Blocks(64, 64, 64, 4, 3), Blocks(128, 64, 64, 8, 3)),
    "float": (Blocks(64, 64, 16, 4, 3), Blocks(32, 64, 32, 4, 3), Blocks(128, 64, 16, 8, 3)),
}
MANY = {
    "half": (
        Blocks(64, 64, 64, 4, 3),
        Blocks(64, 128, 64, 4, 3),
        Blocks(128, 64, 64, 4, 3),
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 256, 64, 8, 3),
    ),
    "float": (
        Blocks(64, 64, 16, 4, 3),
        Blocks(64, 64, 32, 4, 3),
        Blocks(128, 64, 16, 8, 3),
        Blocks(128, 128, 16, 8, 3),
    ),
}
# t is narrow and its product short: what counts is that enough programs read x. `columns` is an upper bound.
SHRINK = {
    "half": (Blocks(16, 64, 64, 4, 4), Blocks(32, 64, 64, 4, 4), Blocks(64, 64, 64, 4, 3)),
    "float": (Blocks(16, 64, 32, 4, 3), Blocks(32, 64, 32, 4, 3), Blocks(64, 64, 16, 4, 3)),
}
# An interpreted program costs a millisecond whatever its size, and nothing is to be gained by timing it.
_INTERPRETED = (Blocks(64, 64, 64, 4, 1),)

REGISTERS = 255
"""Of a thread, at most, on NVIDIA GPUs: where nothing is said ptxas spills one or two for the sake of occupancy."""
_WIDEST = 64
"""Ranks that one product of expand sums over."""
# Of a linear with its t in the same launch; wider ones have no registers left for y (float32, 64: spills on sm_120).
_WIDEST_ALONE = {"half": 64, "float": 32}

# What a launch is taken to cost, in FLOPs of the products it may save: some microseconds' worth. Assumed, not measured.
_LAUNCH = {"half": 1 << 30, "float": 1 << 26}


def one_launch(problem: Problem) -> bool:
    """Whether expand sums t itself: where repeating t's products for every 128 columns of y costs less than a launch.

    That holds for few rows and low ranks. Ranks above 64, in float32 above 32, always take two launches.
    """
    kind = kind_of(problem.dtype)
    tiles = sum(-(-n // 128) for n in problem.ns)
    repeated = 2 * problem.rows * problem.samples * problem.k * problem.width * tiles
    return problem.width <= _WIDEST_ALONE[kind] and repeated <= _LAUNCH[kind]


def ranks_at_a_time(problem: Problem) -> int:
    """How many ranks one product of expand sums over."""
    return min(triton.next_power_of_2(max(problem.width, RANK_STEP)), _WIDEST)


def expand_blocks(problem: Problem, alone: bool) -> Sequence[Blocks]:
    """The tiles to choose from for expand."""
    if INTERPRETED:
        return _INTERPRETED
    own_t = alone and problem.width > 0
    lists = FEW if problem.rows <= _FEW_ROWS else MANY_ALONE if own_t else MANY
    extra = ranks_at_a_time(problem) if own_t else 0
    return _fitting(problem, lists[kind_of(problem.dtype)], extra)


def shrink_blocks(problem: Problem) -> Sequence[Blocks]:
    """The tiles to choose from for shrink."""
    if INTERPRETED:
        return _INTERPRETED
    columns = triton.next_power_of_2(problem.columns)
    blocks = [tile._replace(columns=min(tile.columns, columns)) for tile in SHRINK[kind_of(problem.dtype)]]
    return _fitting(problem, blocks, 0)


def shared_memory(blocks: Blocks, extra: int, itemsize: int) -> int:
    """Bytes that a pipelined loop keeps of x, weights and `extra` rows of down factors, and its barriers."""
    return 64 + blocks.stages * (blocks.rows + blocks.columns + extra) * blocks.depth * itemsize


def _fitting(problem: Problem, blocks: Sequence[Blocks], extra: int) -> Sequence[Blocks]:
    limit = _shared_memory_of(problem.device)
    return [tile for tile in blocks if shared_memory(tile, extra, problem.dtype.itemsize) <= limit] or blocks[:1]


@functools.cache
def _shared_memory_of(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def kind_of(dtype: torch.dtype) -> str:
    """Which of the lists."""
    return "half" if dtype.itemsize == 2 else "float"


def options(blocks: Blocks) -> dict[str, Any]:
    """For the launch. The sums are products' own; nothing else may be contracted, as in all kernels here."""
    registers = {} if torch.version.hip else {"maxnreg": REGISTERS}
    return {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": False, **registers}


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """ "tf32" for float32 products on tensor cores, where torch allows it for its own; else "ieee"."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip or not _has_tf32(device):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # allow_tf32 raises where a program has used the newer setting.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


@functools.cache
def _has_tf32(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 8


_best: dict[tuple[object, ...], Blocks] = {}


def fastest(name: str, problem: Problem, blocks: Sequence[Blocks], run: Callable[[Blocks], None]) -> Blocks:
    """The fastest of these, timed at the first call and remembered for problems of about as many rows.

    One that does not compile or run is passed over; where none does, the first one's error is raised. While a CUDA
    graph is being captured nothing can be timed: what an earlier call found serves, else the first.
    """
    if len(blocks) == 1:
        return blocks[0]
    rows = triton.next_power_of_2(problem.rows), triton.next_power_of_2(problem.samples)
    key = name, *rows, *problem[2:], precision(problem.dtype, problem.device)
    if key not in _best:
        if torch.cuda.is_current_stream_capturing():
            return blocks[0]
        times: dict[Blocks, float] = {}
        failed: Exception | None = None
        for tile in blocks:
            try:
                times[tile] = _milliseconds(run, tile)
            except torch.OutOfMemoryError:  # timing empties the L2 cache by means of a large tensor
                return blocks[0]
            # Triton's own errors, and those of LLVM's passes and of the driver.
            except (triton.TritonError, RuntimeError) as error:
                failed = failed or error
        if failed and not times:
            raise failed
        _best[key] = min(times, key=times.__getitem__)
    return _best[key]


def _milliseconds(run: Callable[[Blocks], None], blocks: Blocks) -> float:
    return float(triton.testing.do_bench(lambda: run(blocks), warmup=5, rep=20, return_mode="median"))
