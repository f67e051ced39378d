"""One result from every backend, and where their kernels run."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, DDPM, IPNDM, Batcher, DPMSolver, DynamicThreshold, Schedule, Table, ops
from fastsample.ops.device_table import encoded
from fastsample.ops.noise.keys import sample_keys
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan
from fastsample.ops.step.reference import step_reference
from support.cuda_on_cpu import build
from support.devices import DEVICE, Target

pytestmark = pytest.mark.ahead(build.undefined)


CPU = torch.device("cpu")


SHAPE = (2, 3, 5, 7)


SCHEDULE = Schedule.linear()


def operand(*shape: int, seed: int = 0) -> Tensor:
    return ops.randn(shape, seed=seed, stream=9, backend="reference")


PLAIN = DDIM(SCHEDULE, steps=4, eta=1.0).table


LEARNED = DDPM(SCHEDULE, steps=4, variance="learned_range", clip=1.0).table


X, M, DOUBLED = operand(*SHAPE), operand(*SHAPE, seed=2), operand(4, 6, 5, 7, seed=4)


EPSILONS = IPNDM(SCHEDULE, steps=5, clip=1.0)


def step_and_entry(to: Callable[[Tensor], Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """A row that reads three entries, over the oldest of which it writes its own."""
    history = [to(operand(*SHAPE, seed=seed)) for seed in (6, 7, 8)]
    out = ops.step(to(X), to(M), EPSILONS.table, 4, history=history, x0_out=history[2], backend=backend)
    return out, history[2]


CALLS: dict[str, Callable[..., Any]] = {
    "randn": lambda to, backend: ops.randn(
        (3, 5, 7), seed=[1, 2**64 - 1, 7], step=3, stream=1, device=to(X).device, backend=backend
    ),
    "step": lambda to, backend: ops.step(to(X), to(M), PLAIN, 1, seed=5, backend=backend),
    "step-guided-learned": lambda to, backend: ops.step(
        to(X), to(DOUBLED), LEARNED, 2, seed=5, guidance=[2.0, 7.5], guidance_rescale=0.7, backend=backend
    ),
    "step-rows": lambda to, backend: ops.step(
        to(X), to(DOUBLED[:2]).half(), LEARNED, to(torch.tensor([3, -4])), seed=[5, 9], backend=backend
    ),
    "step-entry": step_and_entry,
    "posterior": lambda to, backend: ops.posterior(to(X), to(M), DDPM(SCHEDULE, steps=4).table, 2, backend=backend),
    "posterior-rows": lambda to, backend: ops.posterior(
        to(X), to(DOUBLED[:2]), LEARNED, to(torch.tensor([1, -1])), backend=backend
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_backend_gives_the_references_values(any_backend: Target, name: str) -> None:
    want = CALLS[name](lambda tensor: tensor, "reference")
    got = CALLS[name](lambda tensor: tensor.to(any_backend.device), any_backend.backend)
    for one, reference in zip(*((both if isinstance(both, tuple) else (both,)) for both in (got, want)), strict=True):
        assert one.device.type == any_backend.device
        # A dozen roundings of numbers up to 10 or so; the references' sums round once more per term.
        torch.testing.assert_close(one.cpu(), reference, rtol=2e-6, atol=1e-5)


RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIM(SCHEDULE, steps=3, eta=1.0), {}),
    "threshold": (DDIM(SCHEDULE, steps=3, clip=DynamicThreshold()), {}),
    "three-epsilons": (EPSILONS, {}),
    "guided-half": (DPMSolver(SCHEDULE, steps=4), {"guidance": 3.0, "uncond": {}, "model_dtype": torch.float16}),
}


@pytest.mark.parametrize("name", RUNS)
def test_whole_samplers_on_every_backend(any_backend: Target, name: str) -> None:
    sampler, options = RUNS[name]

    def run(backend: str, device: str) -> Tensor:
        return sampler(lambda x, t: 0.1 * x, SHAPE, seed=3, backend=backend, device=device, **options).cpu()

    # The model of the half-precision run rounds inputs that differ in their last bit.
    digits = 1e-2 if "model_dtype" in options else 2e-5
    torch.testing.assert_close(run(*any_backend), run("reference", "cpu"), rtol=digits, atol=digits)


def test_batcher_on_every_backend(any_backend: Target) -> None:
    class Tenth(torch.nn.Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.1 * x

    model = Tenth(1, 1, device=any_backend.device)
    batcher = Batcher(model, DDIM(SCHEDULE, steps=3, eta=1.0), batch=2, backend=any_backend.backend)
    requests = [batcher.submit(SHAPE[1:], seed=seed) for seed in range(3)]
    while batcher.step():
        pass
    for seed, request in enumerate(requests):
        alone = fastsample.ddim(
            lambda x, t: 0.1 * x, (1, *SHAPE[1:]), steps=3, eta=1.0, seed=seed, schedule=SCHEDULE, backend="reference"
        )
        torch.testing.assert_close(request.result().cpu(), alone[0], rtol=2e-5, atol=2e-5)


GPU_KERNELS = pytest.mark.parametrize("any_backend", ["triton", "cuda"], indirect=True)


@GPU_KERNELS
def test_rows_are_read_by_the_kernel_at_every_call(any_backend: Target) -> None:
    backend, device = any_backend
    x, m, rows = X.to(device), M.to(device), torch.tensor([0, 1], device=device)
    keys = sample_keys([5, 6], 0, 2, x.device)
    plan = StepPlan(Operands(x, PLAIN, keys=keys, rows=rows), backend)
    for now in ([0, 1], [3, -1], [2, 2]):
        rows.copy_(torch.tensor(now))
        want = ops.step(X, M, PLAIN, torch.tensor(now), seed=[5, 6], backend="reference")
        torch.testing.assert_close(plan(m, 0).cpu(), want, rtol=2e-6, atol=1e-5)


@GPU_KERNELS
def test_what_rows_on_a_device_may_need_is_found_once(any_backend: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, device = any_backend
    rows = torch.tensor([0, 1], device=device)
    plan = StepPlan(Operands(X.to(device), PLAIN, keys=rows, rows=rows), backend)
    first = plan(M.to(device), 0).clone()

    def searched(self: StepPlan, row: int) -> Sequence[int]:
        raise AssertionError("a call went through all rows of the table")

    monkeypatch.setattr(StepPlan, "_visited", searched)
    assert torch.equal(plan(M.to(device), 0), first)


@GPU_KERNELS
def test_rows_that_do_not_exist_make_nan_of_their_samples(any_backend: Target) -> None:
    backend, device = any_backend
    rows = torch.tensor([4, 1], device=device)
    x, x0, model_input = X.to(device), torch.zeros(SHAPE, device=device), torch.zeros(SHAPE, device=device)
    noise = torch.zeros(SHAPE, device=device)
    plan = StepPlan(Operands(x, PLAIN, rows=rows, x0_out=x0, input_out=model_input), backend)
    for wrong in (4, -5, 2**40):
        rows[0] = wrong
        references = step_reference(x, M.to(device), PLAIN, rows, noise)
        for one in (plan(M.to(device), 0, noise), x0, model_input, *references[:2]):
            assert one[0].isnan().all() and one[1].isfinite().all()


@GPU_KERNELS
def test_what_any_row_needs_must_be_there(any_backend: Target) -> None:
    backend, device = any_backend
    x, last = X.to(device), torch.tensor([3, 3], device=device)
    assert not PLAIN.stochastic[3]
    with pytest.raises(TypeError, match="noise must be a tensor"):
        StepPlan(Operands(x, PLAIN, rows=last), backend)(M.to(device), 0)
    solver = DPMSolver(SCHEDULE, steps=3).table
    with pytest.raises(ValueError, match="needs the entries of 1 earlier row"):
        StepPlan(Operands(x, solver, rows=torch.zeros_like(last)), backend)(M.to(device), 0)
    with pytest.raises(ValueError, match="reads a learned variance"):
        StepPlan(Operands(x, LEARNED, keys=last, rows=last), backend)(M.to(device), 0)


@GPU_KERNELS
def test_strided_and_double_operands(any_backend: Target) -> None:
    backend, device = any_backend
    wide = torch.full((2, 6, 5, 7), float("nan"), device=device)
    x, out = X.to(device).to(memory_format=torch.channels_last), wide[:, ::2]
    got = ops.step(x, M.double().to(device), PLAIN, 1, seed=5, out=out, backend=backend)
    assert got is out and wide[:, 1::2].isnan().all()
    want = ops.step(X, M, PLAIN, 1, seed=5, backend="reference")
    torch.testing.assert_close(out.cpu(), want, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("any_backend", ["cpu", "triton", "cuda"], indirect=True)
def test_copies_of_strided_outputs_stay_where_they_are(any_backend: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph that was captured over one shape reads them after calls with another."""
    backend, device = any_backend
    x, weights = X.to(device), torch.full((2,), 2.0, device=device)
    plan = StepPlan(Operands(x, PLAIN, guidance=weights), backend)
    seen: dict[int, Tensor] = {}
    copy = Tensor.copy_

    def watched(target: Tensor, *source: Any, **options: Any) -> Tensor:
        seen[target.shape[0]] = target
        return copy(target, *source, **options)

    monkeypatch.setattr(Tensor, "copy_", watched)
    places = []
    for m in 2 * (M, operand(4, 3, 5, 7), M.half()):
        strided = m.to(device).transpose(2, 3).contiguous().transpose(2, 3)
        torch.testing.assert_close(plan(strided, 3), plan(m.to(device), 3), rtol=0, atol=0)
        places.append(seen[m.shape[0]].data_ptr())
    assert places[:3] == places[3:] and len(set(places)) == 3


class Elsewhere:
    """As much of a tensor on the second GPU as a device guard asks for."""

    is_cuda, device = True, torch.device("cuda:1")

    def get_device(self) -> int:
        return 1


def test_triton_launches_where_the_tensors_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = pytest.importorskip("fastsample.kernels.blocks")
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    assert not isinstance(blocks.on(X), torch.cuda.device)
    guard: Any = blocks.on(Elsewhere())
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1
    current[0] = 1
    assert not isinstance(blocks.on(Elsewhere()), torch.cuda.device)


@pytest.mark.parametrize("name", CALLS)
def test_every_triton_op_guards_its_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if reason := fastsample.backends()["triton"]["reason"]:
        pytest.skip(reason)
    guarded: list[Tensor] = []

    def guard(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
        guarded.append(tensor)
        return contextlib.nullcontext()

    for module in ("step", "noise", "posterior"):
        kernels = importlib.import_module(f"fastsample.kernels.{module}")
        monkeypatch.setattr(kernels, "on", guard)
    CALLS[name](lambda tensor: tensor.to(DEVICE), "triton")
    assert len(guarded) == 1


def test_seeds_on_a_gpu_stay_there_whatever_its_name() -> None:
    seeds = torch.empty(2, dtype=torch.int64, device="meta")  # a device whose values cannot be read
    for device in (torch.device("meta", 0), torch.device("meta")):
        assert sample_keys(seeds, 0, 2, device).device == seeds.device


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_loop_on_a_gpu_waits_for_nothing(backend: str) -> None:
    if reason := fastsample.backends()[backend]["reason"]:
        pytest.skip(reason)
    x, m, row = X.cuda(), M.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    ops.step(x, m, PLAIN, row, seed=5, backend=backend)  # uploads the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(len(PLAIN)):
            x = ops.step(x, m, PLAIN, row, seed=5, guidance=None, backend=backend)
            row.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = X
    for k in range(len(PLAIN)):
        want = ops.step(want, M, PLAIN, k, seed=5, backend="reference")
    torch.testing.assert_close(x.cpu(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
def test_rows_beside_x_are_taken_and_others_refused() -> None:
    x, m = X.cuda(), M.cuda()
    want = ops.step(X, M, PLAIN, 1, seed=5, backend="reference")
    for row in (torch.tensor(1), torch.tensor([1, 1]), torch.tensor(-3).cuda(), torch.tensor([1, -3]).cuda()):
        torch.testing.assert_close(ops.step(x, m, PLAIN, row, seed=5).cpu(), want, rtol=2e-6, atol=1e-5)
    with pytest.raises(TypeError, match="row must be an int or an int64 tensor on the CPU or beside x"):
        ops.step(X, M, PLAIN, torch.tensor([1, 1]).cuda(), seed=5)


def test_tables_are_uploaded_once(cuda_on_cpu: None) -> None:
    table = Table([0], a=1.0, p=1.0)
    ops.step(X, M, table, 0, backend="cuda")
    first = encoded(table, CPU)
    ops.step(X, M, table, 0, backend="cuda")
    assert encoded(table, CPU) is first and first[:16].tolist() == table.packed[0].tolist()
