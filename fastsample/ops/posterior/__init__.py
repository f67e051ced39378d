"""The distribution that one row of a table samples from."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Never

from fastsample.checks import not_a_tensor
from fastsample.hints import answering, no_such_argument
from fastsample.ops.backend import Backend
from fastsample.ops.posterior.compiled import traced_posterior
from fastsample.ops.posterior.launch import posterior_once
from fastsample.ops.tracing import differentiable, no_compiled_gradients, traced
from fastsample.tables import Table


@answering
def posterior(
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int | Tensor,
    *,
    backend: Backend | None = None,
    **unknown: Never,
) -> tuple[Tensor, Tensor]:
    """(mean, log variance) of the Gaussian that `step` draws x' from; the columns are those of fastsample.Table.

        mean         = a*x + b*limit(p*x + q*m) + d*m
        log_variance = 2 (g0 + g1*v) + 2 log s

    In a row with s = 0 that has a variance all the same, DDPM's last one, it is 2 (g0 + g1*v): what the likelihood of
    the data is computed with. The mean is one pass, 12 bytes an element in float32; a learned variance adds 8, with the
    CUDA kernels in the same pass. Under torch.compile this is one registered op, as `step` is.

    Args:
        x: the state, shape (B, ...), float32; float64 with the reference backend. Any strides.
        model_output: the model's output for x, of its shape, or (B, 2C, ...) where x is (B, C, ...): the second half is
            v.
        table: the sampler's coefficients, such as DDPM(schedule, variance="learned_range").table.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,) on
            the CPU for one row per sample: len(table) - 1 - t where the table visits all timesteps t. One on a GPU, ()
            or (B,), is not read by the host: every row of the table must have a variance then.
        backend: see fastsample.backends(). Gradients and float64 are served by the reference alone.

    Returns:
        Two tensors of x's shape and dtype. A variance that the model does not tell is an expanded view of one number
        per row: clone it before writing into it.

    Raises:
        ValueError: for a wrong shape, device or row, a row that is deterministic (s = g0 = g1 = 0), one that reads the
            x0 of earlier rows, and a model_output without the variance half that a row reads.
        TypeError: for a wrong dtype.

    Example:
        >>> table = Table([500, 0], a=0.5, s=[0.1, 0.0], g0=-1.0)
        >>> mean, log_variance = posterior(torch.ones(1, 2), torch.zeros(1, 2), table, 1)
        >>> mean, log_variance
        (tensor([[0.5000, 0.5000]]), tensor([[-2., -2.]]))
    """
    if unknown:
        raise no_such_argument(posterior, unknown)
    for name, tensor in (("x", x), ("model_output", model_output)):
        if not isinstance(tensor, Tensor):
            raise not_a_tensor(name, tensor)
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    if traced(x, model_output):
        if not differentiable(x, model_output):
            return traced_posterior(x, model_output, table, row, backend)
        no_compiled_gradients("posterior")
    mean, log_variance = posterior_once(x, model_output, table, row, backend)
    return mean, log_variance if log_variance.shape == x.shape else log_variance.expand(x.shape)
