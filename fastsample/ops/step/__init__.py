"""The sampling step: one pass over memory for one row of a sampler's table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Never

from fastsample.checks import not_a_tensor
from fastsample.hints import answering, no_such_argument
from fastsample.ops.backend import Backend
from fastsample.ops.checks import check_history
from fastsample.ops.noise.keys import Index, Seed
from fastsample.ops.step.compiled import traced_step
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import step_once
from fastsample.ops.tracing import differentiable, no_compiled_gradients, traced
from fastsample.tables import Table


@answering
def step(
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int | Tensor,
    *,
    noise: Tensor | None = None,
    seed: Seed | None = None,
    index: Index = 0,
    guidance: float | Sequence[float] | Tensor | None = None,
    guidance_rescale: float = 0.0,
    history: Sequence[Tensor] = (),
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    input_out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
    backend: Backend | None = None,
    **unknown: Never,
) -> Tensor:
    """One row of a table applied to a batch; the columns are those of fastsample.Table.

        m  = m_u + w (m_c - m_u), times phi std(m_c) / std(m) + 1 - phi      where there is guidance
        x0 = limit(p*x + q*m)
        h  = hx*x + h0*x0                                                    x0 itself but for tables of epsilon
        x' = a*x + b*x0 + c1*h1 + c2*h2 + c3*h3 + d*m + s*exp(g0 + g1*v)*z   e^(g1 v) kept within 2^-126 and 2^127
        u' = e' x'                                                           e' of the next row
        log p(x') = sum of -z^2 / 2 - log(s*exp(g0 + g1*v)) - log(2 pi) / 2  per sample, of what was drawn

    Under torch.compile this is one registered op, which checks its arguments when it runs and has no gradients. With
    `row` as an int64 tensor, () or (B,), all rows share one graph; with an int the second row compiles a second one.

    One pass: x, m, its unconditional half under guidance, its variance half where g1 is not 0 and each history that the
    row uses are read once, x' is written once, 4 bytes an element each in float32 and 2 for a half-precision m; x0_out
    and input_out (once or twice x) add their own size. Guidance rescale reads both halves of m once more, dynamic
    thresholding x and m, and it writes |x0| and reads that four or five times. Arithmetic is float32 whatever the dtype
    of m. An operand whose coefficient is 0 is not read.

    Args:
        x: the state, shape (B, ...), float32; float64 with the reference backend. Any strides.
        model_output: m, of x's shape, or (B, 2C, ...) where x is (B, C, ...): the second half is the variance half v.
            Under guidance twice as many samples, first the B unconditional ones; v is then the conditional half's. Any
            floating dtype; float32, float16 and bfloat16 are converted in registers.
        table: the sampler's coefficients.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,) lets
            samples be at different rows. One on x's GPU, () or (B,), is not read by the host: what any row of the table
            needs must be given then, and a row that does not exist makes NaN of its sample.
        noise: z, of x's shape and dtype. Not read where s = 0.
        seed, index: instead of `noise`, z = randn(x.shape, seed=seed, index=index, step=row, stream=1), drawn in the
            pass. Without noise and seed, the seed is a fresh one from torch's default generator.
        guidance: w, a number or one per sample; None where the model was called without.
        guidance_rescale: phi in [0, 1].
        history: h of the last row (h1), of the one before (h2) and of that before (h3), of x's shape and dtype.
        out: receives x'; may be x. Otherwise x' is a fresh tensor.
        x0_out: receives h, which is x0 where table.remembers_x0; of x's dtype. May be one of `history`.
        input_out: receives u', the next model input, in any floating dtype; with twice x's batch it is written twice.
        log_prob_out: (B,) of x's dtype, receives log p(x') of each sample, which policy gradients on samplers need
            (Black et al. 2023, "Training Diffusion Models with Reinforcement Learning"). It is added up in float64 in
            the same pass. Its derivatives, which the reference has, are those of the density at the x' that was drawn:
            x' itself is held fixed. Where there are derivatives each row needs a fresh tensor. NaN in rows on a GPU
            that draw nothing.
        backend: see fastsample.backends(). Gradients and float64 are served by the reference alone.

    Returns:
        x' (`out` where given).

    Raises:
        ValueError: for a wrong shape, device or row, for history or a variance half that is needed and absent, where
            s > 0 and both noise and seed are given, and where s = 0 and log_prob_out is given. TypeError: for a dtype
            that does not fit. Nothing is written before.

    Example:
        >>> table = Table([500], p=1.0, q=-1.0, b=0.5, limit=1.0)
        >>> step(torch.full((1, 3), 4.0), torch.zeros(1, 3), table, 0)
        tensor([[0.5000, 0.5000, 0.5000]])
        >>> noisy, log_prob = Table([500], a=1.0, s=0.1), torch.empty(1)
        >>> drawn = step(torch.zeros(1, 3), torch.zeros(1, 3), noisy, 0, seed=0, log_prob_out=log_prob)
        >>> bool(log_prob.isclose(torch.distributions.Normal(0.0, 0.1).log_prob(drawn).sum()))
        True
    """
    if unknown:
        raise no_such_argument(step, unknown)
    for name, tensor in (("x", x), ("model_output", model_output)):
        if not isinstance(tensor, Tensor):
            raise not_a_tensor(name, tensor)
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    check_history(history)
    if not isinstance(noise, Tensor | None):
        raise not_a_tensor("noise", noise)
    operands = Operands(
        *(x, table),
        rescale=guidance_rescale,
        history=history,
        out=out,
        x0_out=x0_out,
        input_out=input_out,
        log_prob_out=log_prob_out,
    )
    if traced(x, model_output):
        given = noise, guidance, seed, index, row, *history, out, x0_out, input_out, log_prob_out
        if not differentiable(x, model_output, *given):
            return traced_step(operands, model_output, row, noise, backend, seed, index, guidance)
        no_compiled_gradients("step")
    return step_once(operands, model_output, row, noise, backend, seed, index, guidance)
