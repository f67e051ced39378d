"""The ops beside `step`: noise, posterior, likelihood and lora_linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsample.ops import LowRank, lora_linear, pack_adapters, pack_linear, posterior, randn, step
from fastsample.ops.backend import Backend
from fastsample.ops.likelihood import likelihood
from fastsample.ops.lora import lora_linear_reference
from fastsample.ops.noise import STEP
from fastsample.ops.step.reference import step_reference
from fastsample.selftest.case import ELEMENT_WISE, SEED, SINGLE, Call, Case, Shape, Wanted, normals
from fastsample.selftest.step_cases import LEARNED, Mode


def noise_case(
    shape: Shape, mode: str = "normals", *, seed: int = SEED, index: int = 0, row: int = 3, strided: bool = False
) -> Case:
    """`randn`, into a strided `out` where asked."""

    def prepare(backend: Backend, device: torch.device) -> Call:
        out = torch.empty((*shape[:-1], 2 * shape[-1] + 1), device=device)[..., 1::2] if strided else None
        into = {"device": device} if out is None else {"out": out}
        return lambda: [randn(shape, seed=seed, index=index, step=row, stream=STEP, backend=backend, **into)]

    value = normals(shape, seed, index, row).double()
    # One unit in the last place, which is two unit roundoffs at most.
    return Case("randn", mode, torch.float32, shape, prepare, [Wanted(value, value.abs(), 2)])


def posterior_case(dtype: torch.dtype, shape: Shape) -> Case:
    """`posterior` with a learned variance."""
    row, draw = 5, torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw)
    m = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=draw).to(dtype)

    def prepare(backend: Backend, device: torch.device) -> Call:
        there = x.to(device), m.to(device)
        return lambda: posterior(*there, LEARNED, row, backend=backend)

    mean, log_variance = posterior(x.double(), m.double(), LEARNED, row)
    quiet = LEARNED.replace(s=0.0, g0=0.0, g1=0.0)
    mode = Mode("mean and log variance", quiet, row, 3 + 3)
    size = mode.wanted(x, m[:, : shape[1]], row, (), None)[0].size
    # Constant and slope are rounded once, the product and the sum once each.
    slope_v = 2 * float(LEARNED.g1[row]) * m[:, shape[1] :].double()
    size_of_log = (log_variance - slope_v).abs() + slope_v.abs()
    wanted = [Wanted(mean, size, mode.roundings), Wanted(log_variance, size_of_log, 3)]
    return Case("posterior", mode.name, dtype, shape, prepare, wanted)


def log_prob_case(dtype: torch.dtype, shape: Shape) -> Case:
    """The log density of what `step` draws, with a learned variance."""
    row, draw = 5, torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw)
    m = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=draw).to(dtype)

    def prepare(backend: Backend, device: torch.device) -> Call:
        there, log_prob = (x.to(device), m.to(device)), torch.empty(shape[0], device=device)

        def call() -> list[Tensor]:
            step(*there, LEARNED, row, seed=SEED, log_prob_out=log_prob, backend=backend)
            return [log_prob]

        return call

    z = normals(shape, SEED, 0, row).double()
    value = step_reference(x.double(), m.double(), LEARNED, row, z, with_log_prob=True).log_prob
    assert value is not None
    # Of each element: s 1 and its product 1, g1 v 2, and z 2, which is squared; the sum itself once.
    exponents = float(LEARNED.g1[row]) * m[:, shape[1] :].double()
    size = (2 + 2 * exponents.abs() + 4 * z * z).reshape(shape[0], -1).sum(1) + value.abs()
    return Case("step", "log density", dtype, shape, prepare, [Wanted(value, size, 1)], False)


def likelihood_case(dtype: torch.dtype, shape: Shape, row: int) -> Case:
    """`likelihood` of 8-bit images and a model that is nearly right."""
    draw, table = torch.Generator().manual_seed(0), LEARNED
    assert table.alpha is not None and table.sigma is not None
    pixels = torch.randint(256, shape, generator=draw) / 127.5 - 1
    z, miss = (torch.randn(shape, generator=draw) for _ in range(2))
    x = float(table.alpha[row]) * pixels + float(table.sigma[row]) * z
    m = torch.cat([z + 0.2 * miss, torch.rand(shape, generator=draw) * 2 - 1], dim=1).to(dtype)

    def prepare(backend: Backend, device: torch.device) -> Call:
        data, state, output = (tensor.to(device) for tensor in (pixels, x, m))
        return lambda: [likelihood(data, state, output, table, row, backend=backend)]

    data, state, output = operands = [tensor.double().requires_grad_() for tensor in (pixels, x, m)]
    bits = likelihood(data, state, output, table, row)
    gradients = torch.autograd.grad(bits.sum(), operands)
    # What a rounding of every operand, and of the term itself, does to the result; each goes through at most 16.
    size = sum((g * operand).abs().reshape(shape[0], -1).sum(1) for g, operand in zip(gradients, operands, strict=True))
    wanted = Wanted(bits.detach(), (size + bits.abs()).detach(), 16)
    mode = "pixels' bins" if row == len(table) - 1 else "divergence"
    return Case("likelihood", mode, dtype, shape, prepare, [wanted], False, frozenset({"reference", "triton"}))


def lora_case(dtype: torch.dtype, batch: int, rows: int, width: int) -> Case:
    """`lora_linear` of three weights, and samples with adapters of different ranks or none."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(dtype)

    x = torch.randn(batch, rows, width, generator=draw).to(dtype)
    features, ranks = (width, width // 2 + 1, 2 * width), (4, 16)
    weights = [normal(n, width) for n in features]
    groups = [[LowRank(normal(r, width), normal(n, r), torch.tensor(0.5)) for n in features] for r in ranks]
    index = torch.tensor([0, 1, -1][:batch])

    def prepare(backend: Backend, device: torch.device) -> Call:
        packed = pack_linear([weight.to(device) for weight in weights])
        there = [[LowRank(*(factor.to(device) for factor in pair)) for pair in group] for group in groups]
        adapters, index_there, x_there = pack_adapters(packed, there), index.to(device), x.to(device)
        return lambda: lora_linear(x_there, packed, adapters, adapter_index=index_there, backend=backend)

    def in_float64(change: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        wide = [change(weight.double()) for weight in weights]
        factors = [[LowRank(*(change(factor.double()) for factor in pair)) for pair in group] for group in groups]
        return lora_linear_reference(change(x.double()), wide, None, factors, index)

    # Every product and every sum of the dot products, in whatever order; t once more in half precision.
    roundings = width + max(ranks) + 4
    extra = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 / SINGLE
    values, sizes = in_float64(lambda weight: weight), in_float64(torch.abs)
    wanted = [Wanted(y, size, roundings + extra, dtype) for y, size in zip(values, sizes, strict=True)]
    mode = "q, k, v, adapter per sample"
    return Case("lora_linear", mode, dtype, (batch, rows, width), prepare, wanted, False, ELEMENT_WISE - {"cuda"})
