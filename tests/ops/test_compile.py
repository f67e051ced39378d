"""The ops under torch.compile: no graph break, one graph for all rows, and the bits of eager calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, DDPM, IPNDM, DPMSolver, DynamicThreshold, Schedule, Table, ops
from fastsample.ops.device_table import decoded, encoded

SHAPE = (2, 4, 5, 3)
SCHEDULE = Schedule.linear()
NOISY = DDIM(SCHEDULE, steps=10, eta=1.0).table
PLAIN = DDPM(SCHEDULE, steps=10).table
LEARNED = DDPM(SCHEDULE, steps=10, variance="learned_range", clip=1.0).table
SOLVER = DPMSolver(SCHEDULE, steps=10).table
EPSILONS = IPNDM(SCHEDULE, steps=10, clip=1.0).table
THRESHOLDED = DDIM(SCHEDULE, steps=10, clip=DynamicThreshold()).table

pytestmark = [
    pytest.mark.usefixtures("one_thread_and_seed"),
    # Of a test that goes without caches.
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
]


def operand(*shape: int, seed: int = 0) -> Tensor:
    return ops.randn(shape, seed=seed, stream=9)


X, M, Z = operand(*SHAPE), operand(*SHAPE, seed=2), operand(*SHAPE, seed=4)
BOTH, DOUBLED = operand(4, 4, 5, 3, seed=6), operand(2, 8, 5, 3, seed=10)


PACKED = ops.pack_linear([operand(5, 3, seed=20), operand(2, 3, seed=30)])
ADAPTERS = ops.pack_adapters(
    PACKED,
    [
        [ops.LowRank(operand(2, 3, seed=40), operand(n, 2, seed=50), torch.tensor(0.5)) for n in (5, 2)],
        [None, ops.LowRank(operand(1, 3, seed=60), operand(2, 1, seed=70), torch.tensor(2.0))],
    ],
)


def at(k: int) -> Tensor:
    """A row as compiled loops give it."""
    return torch.tensor(k)


def into_outputs(x: Tensor, m: Tensor, row: Tensor) -> tuple[Tensor, ...]:
    out, x0, model_input = torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(4, *SHAPE[1:], dtype=torch.float16)
    result = ops.step(x, m, NOISY, row, seed=3, out=out, x0_out=x0, input_out=model_input)
    return result, out, x0, model_input


def beside_the_result(x: Tensor, m: Tensor, row: Tensor) -> tuple[Tensor, ...]:
    x0 = torch.zeros_like(x)
    return ops.step(x, m, NOISY, row, seed=3, x0_out=x0), x0


def in_place(x: Tensor, m: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    x = x + 0
    return ops.step(x, m, SOLVER, row, history=[m], out=x, x0_out=(kept := torch.zeros_like(x))), kept


# A function and the arguments of its calls: one graph serves them all.
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]] = {
    "step": (lambda x, m, row: ops.step(x, m, NOISY, row, seed=3), [(X, M, at(k)) for k in (0, 1, 5, -1)]),
    "rows": (
        lambda x, m, rows: ops.step(x, m, NOISY, rows, seed=[3, 2**64 - 1]),
        [(X, M, torch.tensor(rows)) for rows in ([0, 1], [5, -1])],
    ),
    "noise": (lambda x, m, row, z: ops.step(x, m, NOISY, row, noise=z), [(X, M, at(k), Z) for k in (2, 3)]),
    "seeds": (
        lambda x, m, seeds: ops.step(x, m, NOISY, 2, seed=seeds),
        [(X, M, torch.tensor(seeds)) for seeds in ([1, 2], [-1, 2**62])],
    ),
    "guided": (
        lambda x, m, row, w: ops.step(x, m, NOISY, row, seed=3, guidance=w, guidance_rescale=0.7),
        [(X, BOTH, at(k), torch.tensor([2.0 + k, 7.5])) for k in (2, 3)],
    ),
    "three-entries": (
        lambda x, m, row, h: (
            ops.step(x, m, EPSILONS, row, history=[h, m, x], x0_out=(kept := torch.zeros_like(x))),
            kept,
        ),
        [(X, M, at(k), Z) for k in (0, 3, 5)],
    ),
    "history": (
        lambda x, m, row, h: ops.step(x, m, SOLVER, row, history=[h]),
        [(X, M, at(k), Z) for k in (2, 3, 9)],
    ),
    "learned": (lambda x, m, row: ops.step(x, m, LEARNED, row, seed=3), [(X, DOUBLED, at(k)) for k in (2, 9)]),
    "half": (lambda x, m, row: ops.step(x, m, NOISY, row, seed=3), [(X, M.bfloat16(), at(k)) for k in (2, 3)]),
    "threshold": (lambda x, m, row: ops.step(5 * x, m, THRESHOLDED, row), [(X, M, at(k)) for k in (2, 3)]),
    "reference": (
        lambda x, m, row: ops.step(x, m, NOISY, row, seed=3, backend="reference"),
        [(X.double(), M.double(), at(k)) for k in (2, 3)],
    ),
    "outputs": (into_outputs, [(X, M, at(k)) for k in (2, 3)]),
    "x0": (beside_the_result, [(X, M, at(k)) for k in (2, 3)]),
    "in-place": (in_place, [(X, M, at(k)) for k in (2, 3)]),
    "strided": (
        lambda x, m, row: ops.step(x.transpose(2, 3), m.transpose(2, 3), NOISY, row, seed=3),
        [(X, M, at(k)) for k in (2, 3)],
    ),
    "randn": (lambda seeds: ops.randn(SHAPE, seed=seeds, step=7, stream=1), [(torch.tensor([3, 5]),)]),
    "randn-out": (lambda x: ops.randn(SHAPE, seed=3, out=torch.zeros_like(x)), [(X,)]),
    "lora_linear": (
        lambda x, index: ops.lora_linear(x, PACKED, ADAPTERS, adapter_index=index),
        [(X, torch.tensor(index)) for index in ([0, -1], [1, 0])],
    ),
    "likelihood": (
        lambda x, m, row: ops.likelihood(0.1 * x, x, m, LEARNED, row),
        [(X, DOUBLED, at(k)) for k in (2, 9)],
    ),
    "posterior": (
        lambda x, m, row: ops.posterior(x, m, PLAIN, row),
        [(X, M, at(k)) for k in (2, 9)],
    ),
    "posterior-learned": (
        lambda x, m, row: ops.posterior(x, m, LEARNED, row),
        [(X, DOUBLED, row) for row in (at(2), at(9))],
    ),
}


def same(got: Any, want: Any) -> None:
    assert isinstance(got, tuple) == isinstance(want, tuple)
    for one, other in zip(*((both if isinstance(both, tuple) else (both,)) for both in (got, want)), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "through"), [*((name, "aot_eager") for name in FUNCTIONS), ("step", "eager"), ("outputs", "eager")]
)
def test_one_graph_with_the_bits_of_eager_calls(compiler: Any, name: str, through: str) -> None:
    function, calls = FUNCTIONS[name]
    compiled = torch.compile(function, backend=_counting(compiler, through), fullgraph=True)
    for arguments in calls:
        same(compiled(*arguments), function(*arguments))
    assert compiler.frame_count == 1


def _counting(compiler: Any, through: str) -> Any:
    if through == "eager":
        return compiler
    from torch._dynamo.backends.debugging import aot_eager

    def both(graph: Any, examples: list[Tensor], **options: Any) -> Any:
        compiler.frame_count += 1
        return aot_eager(graph, examples, **options)

    return both


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda k: ops.step(X, M, NOISY, k, seed=k + 5), id="step"),
        pytest.param(lambda k: ops.posterior(X, M, PLAIN, k)[0], id="posterior"),
        pytest.param(lambda k: ops.randn(SHAPE, seed=k, step=k), id="randn"),
    ],
)
def test_a_row_that_is_an_int_makes_a_second_graph_and_no_third(compiler: Any, function: Callable[..., Any]) -> None:
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    for k in (0, 1, 2, 5, 9, 3):
        assert torch.equal(compiled(k), function(k))
    assert compiler.frame_count == 2


@torch.no_grad()
def test_a_guidance_that_is_a_number_makes_a_second_graph_and_no_third(compiler: Any) -> None:
    def function(w: float) -> Tensor:
        return ops.step(X, BOTH, NOISY, at(2), seed=3, guidance=w)

    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    for w in (7.5, 2.25, 3.1, 1.0):
        assert torch.equal(compiled(w), function(w))
    assert compiler.frame_count == 2


@torch.no_grad()
def test_another_table_is_another_graph(compiler: Any) -> None:
    def function(x: Tensor, table: Table) -> Tensor:
        return ops.step(x, M, table, at(2), seed=3)

    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    other = NOISY.replace(s=0.25)
    for table in (NOISY, other, NOISY, other):
        assert torch.equal(compiled(X, table), function(X, table))
    assert compiler.frame_count == 2


@torch.no_grad()
def test_other_batch_sizes_share_a_graph(compiler: Any) -> None:
    def function(x: Tensor, m: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        kept = torch.zeros_like(x)
        mean, log_variance = ops.posterior(x, m, LEARNED, row)
        return ops.step(x, m, LEARNED, row, seed=5, x0_out=kept), kept, mean, log_variance

    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x, m = operand(batch, 3, 5), operand(batch, 6, 5, seed=9)
        same(compiled(x, m, at(batch)), function(x, m, at(batch)))
    assert compiler.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("through", ["aot_eager", "inductor"])
def test_a_whole_step_of_a_sampler(compiler: Any, through: str) -> None:
    """Model and step, run over all rows: what a user compiles."""
    from torch._inductor import config

    model, seeds = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False), torch.tensor([3, 4])
    # A single term in every sum: Inductor's convolutions add in another order than torch's on some CPUs.
    torch.nn.init.dirac_(model.weight).mul_(0.5)

    def one(x: Tensor, row: Tensor) -> Tensor:
        return ops.step(x, model(x), NOISY, row, seed=seeds)

    compiled = torch.compile(one, backend=through, fullgraph=True)
    got = want = ops.randn(SHAPE, seed=1)
    # Inductor's cache on disk knows an op by its name, also one of yesterday's signature. Nothing is vectorised here.
    with config.patch({"force_disable_caches": True, "cpp.vec_isa_ok": True}):
        for k in range(len(NOISY)):
            got, want = compiled(got, at(k)), one(want, at(k))
    assert torch.equal(got, want)


def test_gradients_are_refused_while_compiling_and_flow_otherwise(compiler: Any) -> None:
    x = X.clone().requires_grad_()

    def function(x: Tensor) -> Tensor:
        return ops.step(x, M, NOISY, 2, seed=3)

    with pytest.raises(Exception, match="compiled, step has no gradients"):
        torch.compile(function, backend=compiler, fullgraph=True)(x)
    torch.compile(function, backend=compiler)(x).sum().backward()
    want = torch.zeros_like(X) + float(NOISY.a[2] + NOISY.b[2] * NOISY.p[2])
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want, rtol=1e-6, atol=0)


@torch.no_grad()
def test_errors_of_a_compiled_step_are_those_of_an_eager_one(compiler: Any) -> None:
    compiled = torch.compile(lambda x, m, row: ops.step(x, m, NOISY, row), backend=compiler, fullgraph=True)
    with pytest.raises(ValueError, match="row 10 is outside a table of 10 rows"):
        compiled(X, M, at(10))
    assert torch.equal(compiled(X, M, at(9)), ops.step(X, M, NOISY, 9)), "the last row adds none"
    twice = torch.compile(lambda x, m, row: ops.step(x, m, NOISY, row, noise=x, seed=3), backend=compiler)
    with pytest.raises(ValueError, match="row 3 adds noise once: give noise= or seed=, not both"):
        twice(X, M, at(3))


def test_exported_programs_bring_their_table_along() -> None:
    class Once(torch.nn.Module):
        def forward(self, x: Tensor, m: Tensor, row: Tensor) -> Tensor:
            return ops.step(x, m, NOISY, row, seed=3)

    with torch.no_grad():
        exported = torch.export.export(Once(), (X, M, at(2))).module()
        assert torch.equal(exported(X, M, at(5)), ops.step(X, M, NOISY, 5, seed=3))


# The registered ops themselves.


def step_arguments(
    x: Tensor, m: Tensor, table: Table, row: int | Tensor, history: Sequence[Tensor] = (), **given: Any
) -> tuple[Any, ...]:
    rows = row if isinstance(row, Tensor) else None
    index = 0 if isinstance(row, Tensor) else row
    optional = (given.get(name) for name in ("noise", "keys", "guidance"))
    rest = given.get("rescale", 0.0), [*history], given.get("backend")
    return x, m, encoded(table, x.device), index, rows, *optional, *rest


KEYS = torch.tensor([3, -1])
STEPS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "plain": lambda: step_arguments(X, M, NOISY, 2, keys=KEYS),
    "row-tensor": lambda: step_arguments(X, M, NOISY, at(-1)),
    "rows": lambda: step_arguments(X, M, NOISY, torch.tensor([2, 9]), noise=Z),
    "guided": lambda: step_arguments(X, BOTH, NOISY, 2, keys=KEYS, guidance=torch.tensor([2.0, 3.0]), rescale=0.5),
    "history": lambda: step_arguments(X, M, SOLVER, 3, [Z]),
    "learned-half": lambda: step_arguments(X, DOUBLED.half(), LEARNED, 2, keys=KEYS),
    "reference": lambda: step_arguments(X.double(), M.double(), NOISY, 2, noise=Z.double(), backend="reference"),
    "strided": lambda: step_arguments(X.transpose(1, 3), M.transpose(1, 3), NOISY, 9, backend="reference"),
}
RANDN: dict[str, Callable[[], tuple[Any, ...]]] = {
    "image": lambda: (KEYS, [3, 5], 0, 0, torch.device("cpu"), None),
    "odd": lambda: (torch.tensor([5]), [7], 2**32 - 1, 1, torch.device("cpu"), "reference"),
}
POSTERIORS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "fixed": lambda: (X, M, encoded(PLAIN, X.device), 3, None, False, None),
    "learned": lambda: (X, DOUBLED, encoded(LEARNED, X.device), 0, torch.tensor([2, -1]), True, None),
    "reference": lambda: (X.double(), DOUBLED.double(), encoded(LEARNED, X.device), 0, at(4), True, "reference"),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_is_a_sound_op(name: str) -> None:
    torch.library.opcheck(torch.ops.fastsample.step.default, STEPS[name]())


@pytest.mark.parametrize("name", ["history", "learned-half"])
@pytest.mark.parametrize("extra", [False, True], ids=["out", "all-outputs"])
def test_step_out_is_a_sound_op(name: str, extra: bool) -> None:
    outputs = (torch.zeros(SHAPE), torch.zeros(4, *SHAPE[1:], dtype=torch.float16)) if extra else (None, None)
    torch.library.opcheck(torch.ops.fastsample.step_out.default, (*STEPS[name](), torch.zeros(SHAPE), *outputs))


@pytest.mark.parametrize("name", RANDN)
def test_randn_is_a_sound_op(name: str) -> None:
    keys, shape, step, stream, _, backend = arguments = RANDN[name]()
    torch.library.opcheck(torch.ops.fastsample.randn.default, arguments)
    out = torch.zeros(len(keys), *shape)
    torch.library.opcheck(torch.ops.fastsample.randn_out.default, (out, keys, step, stream, backend))


@pytest.mark.parametrize("name", POSTERIORS)
def test_posterior_is_a_sound_op(name: str) -> None:
    torch.library.opcheck(torch.ops.fastsample.posterior.default, POSTERIORS[name]())


def test_a_tables_tensor_has_all_of_it() -> None:
    for table in (NOISY, LEARNED, SOLVER, EPSILONS, THRESHOLDED):
        tensor = encoded(table, torch.device("cpu"))
        assert decoded(tensor) is table
        again = decoded(tensor.clone())
        assert again is not table and again == table.replace(t=again.t, alpha=None, sigma=None)
