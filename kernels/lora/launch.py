"""Launches lora_linear's kernels on tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastsample.kernels.arithmetic import INTERPRETED
from fastsample.kernels.blocks import on
from fastsample.kernels.lora import tiles
from fastsample.kernels.lora.kernels import expand_kernel, shrink_kernel
from fastsample.kernels.lora.layout import padded
from fastsample.kernels.lora.tiles import Blocks, Problem

_Factors = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]


def launch(
    x: Tensor,
    samples: int,
    weights: Tensor,
    bias: Tensor | None,
    out_features: Sequence[int],
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scale: Sequence[Tensor],
    ranks: Sequence[int],
    adapter_index: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    """Writes y_i into outputs.

    The first call of a shape times a short list of tiles (tiles.py), unless a CUDA graph is being captured.

    Args:
        x: (M, K), the columns of a row next to one another.
        samples: over how many samples the rows are spread evenly.
        weights: all (N_i, K) behind one another.
        bias: float32, all biases behind one another, or None.
        out_features: N_i.
        down, up, scale, ranks: as PackedAdapters has them row by row; empty without adapters.
        adapter_index: int64 (samples,), or None for group 0. An index that is neither -1 nor a group makes its
            sample's outputs NaN.
        outputs: one contiguous tensor of M N_i elements each.
    """
    (rows, k), ns, groups = x.shape, tuple(out_features), len(down)
    if not rows:
        return
    widths = [padded(rank) for rank in ranks]
    columns = max((sum(widths[g * len(ns) : (g + 1) * len(ns)]) for g in range(groups)), default=0)
    problem = Problem(rows // samples, samples, k, ns, max(widths, default=0), columns, x.dtype, x.device)
    alone = not columns or tiles.one_launch(problem)
    own_ranks = tuple(float(rank) for rank in ranks)
    factors = tuple(down), tuple(up), tuple(scale)
    with on(x):
        t = None if alone else x.new_empty(rows, columns)
        if t is not None:
            _shrink(problem, x, factors, t, adapter_index, own_ranks)
        _expand(problem, x, weights, bias, factors, t, adapter_index, tuple(outputs), own_ranks)


def _shrink(
    problem: Problem, x: Tensor, factors: _Factors, t: Tensor, index: Tensor | None, ranks: tuple[float, ...]
) -> None:
    down, _, scale = factors

    def run(blocks: Blocks) -> None:
        grid = problem.samples * -(-problem.rows // blocks.rows), -(-problem.columns // blocks.columns)
        shrink_kernel[grid](
            x,
            down,
            scale,
            t,
            index,
            ranks,
            problem.rows,
            problem.k,
            x.stride(0),
            problem.columns,
            blocks.rows,
            blocks.columns,
            *_constants(problem, blocks),
            **tiles.options(blocks),
        )

    run(tiles.fastest("shrink", problem, tiles.shrink_blocks(problem), run))


def _expand(
    problem: Problem,
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    factors: _Factors,
    t: Tensor | None,
    index: Tensor | None,
    outputs: tuple[Tensor, ...],
    ranks: tuple[float, ...],
) -> None:
    ranks_at_a_time = tiles.ranks_at_a_time(problem)

    def run(blocks: Blocks) -> None:
        columns = sum(-(-n // blocks.columns) for n in problem.ns)
        expand_kernel[(problem.samples * -(-problem.rows // blocks.rows) * columns,)](
            x,
            weights,
            bias,
            *factors,
            t,
            index,
            outputs,
            problem.ns,
            ranks,
            problem.rows,
            problem.k,
            x.stride(0),
            problem.columns,
            blocks.rows,
            blocks.columns,
            ranks_at_a_time,
            *_constants(problem, blocks),
            **tiles.options(blocks),
        )

    name = "expand with its own t" if t is None else "expand"
    run(tiles.fastest(name, problem, tiles.expand_blocks(problem, t is None), run))


def _constants(problem: Problem, blocks: Blocks) -> tuple[int, bool, str, bool]:
    """DEPTH, WHOLE, PRECISION and UPCAST."""
    return blocks.depth, problem.k % blocks.depth == 0, tiles.precision(problem.dtype, problem.device), INTERPRETED
