"""The distribution that a row samples from, what fastsample/ops/posterior specifies.

The mean is the step without noise, 12 bytes an element in float32. The log variance is a pass of its own, 8 bytes: the
two share nothing.
"""

from __future__ import annotations

from torch import Tensor

from fastsample.kernels.arithmetic import fma, tl, triton
from fastsample.kernels.blocks import blocks_of, on, own_part, sample_size, tile_offsets
from fastsample.kernels.coefficients import NEVER, SOMETIMES
from fastsample.kernels.step import step_kernel

# The host does not know the rows: every coefficient may be 0.
_MEAN = dict.fromkeys(("C1", "C2", "C3", "S", "G1", "ENTRY"), NEVER.value) | dict.fromkeys("PQABD", SOMETIMES.value)


@triton.jit(do_not_specialize=["batch", "size", "parts"])
def log_variance_kernel(
    m,  # [batch, 2, size]
    constant,  # [batch]
    slope,  # [batch]
    out,  # [batch, size]
    batch: tl.int64,
    size: tl.int64,
    parts: tl.int64,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """constant + slope v of each element."""
    size = sample_size(size, ALIGNED)
    sample, first, end = own_part(batch, size, parts, QUADS)
    own_constant, own_slope = tl.load(constant + sample), tl.load(slope + sample)
    at = tile_offsets(QUADS)
    for begin in range(first, end, QUADS * 4):
        inside = at < size - begin
        read = at < tl.where(own_slope != 0.0, size - begin, 0)
        v = tl.load(m + (sample * (size * 2) + size + begin) + at, mask=read, other=0.0).to(tl.float32)  # [QUADS, 4]
        tl.store(out + (sample * size + begin) + at, fma(v, own_slope, own_constant), mask=inside)


def posterior(
    rows: Tensor,
    row_of: Tensor | None,
    row: int,
    x: Tensor,
    m: Tensor,
    m_stride: int,
    constant: Tensor,
    slope: Tensor | None,
    mean: Tensor,
    log_variance: Tensor | None,
) -> None:
    """The mean, and constant + slope v (rounded once) where the model tells v; tensors contiguous and on one device.

    Args:
        rows: Table.packed on the device, float32 (N, 16), without quantiles.
        row_of: int64 (B,), the row of each sample; a row outside the table gives NaN for the mean. Or None.
        row: the row of all samples where row_of is None.
        x: float32 (B, ...).
        m: the model's output, m_stride elements a sample: the size of one, or twice that with the variance half.
        constant, slope: float32 (B,); slope is None where nothing is learned.
        mean: like x.
        log_variance: like x, or None.
    """
    blocks = blocks_of(len(x), x.numel() // len(x))
    division = {"QUADS": blocks.quads, "ALIGNED": blocks.aligned, "num_warps": blocks.num_warps}
    with on(x):
        step_kernel[blocks.grid](
            *(rows, row_of, len(rows), row, x, m),
            *(None, None, None, None, None, None, None, None),  # keys, z, guidance, factors, bounds, h1, h2, h3
            *(mean, None, None, None, None, None),  # x0_out, input_out, low, high, log_prob_sums
            *(blocks.batch, blocks.size, blocks.parts),
            **_MEAN,
            LIMITED=SOMETIMES.value,
            M_PARTS=m_stride // blocks.size,
            INPUTS=0,
            **division,
            enable_fp_fusion=False,
        )
        if log_variance is not None:
            log_variance_kernel[blocks.grid](
                *(m, constant, slope, log_variance, blocks.batch, blocks.size, blocks.parts),
                **division,
                enable_fp_fusion=False,
            )
