"""fastsample.graph: replays give what the plain call gives, for other seeds, starts and conditions.

Without a GPU the pretended device tapes what a capture launches, and a replay runs the tape: none of the loop's Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, LCM, DDIMInverse, DPMSolver, Graph, Shared, graph
from fastsample.loop import workspace
from support.pretend_device import Device, pretended
from support.whole_runs import COND, GUIDED, PAINTED, RUNS, SCHEDULE, SHAPE, UNCOND, X, model, moved

OTHER = X.flip(0).mul(0.7).contiguous()
NOISY = DDIM(SCHEDULE, steps=3, eta=1.0)


@contextmanager
def cuda_graphs(monkeypatch: pytest.MonkeyPatch, kernels: bool = True) -> Iterator[Device]:
    """The pretended device, with torch.cuda's graphs and streams as it can have them."""

    class Taped:
        def __init__(self) -> None:
            self.tape: list[Callable[[], None]] = []

        def replay(self) -> None:
            with torch.inference_mode():  # what was made in it may be written in it alone
                for one in self.tape:
                    one()

    with pretended(monkeypatch, kernels) as device:

        @contextmanager
        def capture(taped: Taped, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            device.tape = taped.tape
            try:
                with device.refusing():
                    yield
            finally:
                device.tape = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        replaced = {
            "CUDAGraph": Taped,
            "graph": capture,
            "Stream": lambda where: stream,
            "stream": nullcontext,
            "current_stream": lambda: stream,
            "device": nullcontext,
        }
        for name, stand_in in replaced.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        yield device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with cuda_graphs(monkeypatch) as device:
        yield device


def host(tensor: Any) -> Tensor:
    assert tensor.device.type == "cuda"
    return tensor.host


# The reference draws its noise in hundreds of operations, which a tape is slow to run.
REFERENCE = ("ddim-threshold", "guided-rescaled", "dpm-solver-3-guided")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *(pytest.param(name, True, id=f"{name}-kernels") for name in RUNS),
        *(pytest.param(name, False, id=f"{name}-reference") for name in REFERENCE),
    ],
)
def test_replays_have_the_bits_of_the_plain_call(monkeypatch: pytest.MonkeyPatch, name: str, kernels: bool) -> None:
    make, options, inner, x = RUNS[name]
    sampler, backend, calls = make(), "cpu" if kernels else "reference", 0

    def counted(*arguments: Any, **keywords: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(*arguments, **keywords)

    seeds = [[3, 2**63], 11, [3, 2**63]]
    want = [sampler(inner, x, backend=backend, **{**options, "seed": seed}) for seed in seeds]
    as_captured = sampler(inner, x, backend=backend, **options)
    from_other = sampler(inner, OTHER, backend=backend, **{**options, "seed": 11})
    with cuda_graphs(monkeypatch, kernels):
        captured = graph(sampler, counted, moved(x, "cuda"), device="cuda", **moved(options, "cuda"))
        at_capture = calls
        got = [captured(seed=seed) for seed in seeds]
        again, other = captured(), captured(moved(OTHER, "cuda"), seed=11)
        assert all(torch.equal(host(one), expected) for one, expected in zip(got, want, strict=True))
        assert torch.equal(host(again), as_captured)
        assert torch.equal(host(other), from_other)
    assert calls == at_capture, "a replay runs no Python"


def test_a_start_from_the_cpu(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda")
    assert torch.equal(host(captured(X, seed=4)), NOISY(model, X, seed=4))
    half = X.to(torch.float16)
    assert torch.equal(host(captured(half, seed=4)), NOISY(model, half, seed=4))


def nested(x: Tensor, t: Tensor, parts: dict[str, Any], scale: float) -> Tensor:
    return model(x, t, parts["pair"][0]) + scale * parts["c"] * x


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_conditions_are_replaced(device: Device, guided: bool) -> None:
    def keywords(a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"parts": {"pair": (a, 1.0), "c": b}, "scale": 0.5}

    first, second = keywords(COND, UNCOND + 0.1), keywords(COND * -0.3, COND * 0.7)
    third = keywords(UNCOND - 0.2, COND)
    also: dict[str, Any] = {"guidance": 2.0, "uncond": first, "guidance_interval": (300, 1000)} if guided else {}
    captured = graph(NOISY, nested, SHAPE, device="cuda", cond=moved_all(first), **moved_all(also))
    assert torch.equal(host(captured(seed=1)), NOISY(nested, SHAPE, seed=1, cond=first, **also))
    captured.update(cond=moved_all(second))
    assert torch.equal(host(captured(seed=1)), NOISY(nested, SHAPE, seed=1, cond=second, **also))
    if guided:
        captured.update(uncond=moved_all(third), guidance=[4.0, -1.0])
        also = {**also, "uncond": third, "guidance": [4.0, -1.0]}
        assert torch.equal(host(captured(seed=1)), NOISY(nested, SHAPE, seed=1, cond=second, **also))
    captured.update(cond=moved_all(first))
    assert torch.equal(host(captured(seed=2)), NOISY(nested, SHAPE, seed=2, cond=first, **also))


def moved_all(value: Any) -> Any:
    """`moved`, through tuples too."""
    if isinstance(value, dict):
        return {name: moved_all(one) for name, one in value.items()}
    return tuple(map(moved_all, value)) if isinstance(value, tuple) else moved(value, "cuda")


def test_model_kwargs_are_replaced(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", model_kwargs={"c": COND.to("cuda")})
    captured.update(model_kwargs={"c": (COND * 2).to("cuda")})
    assert torch.equal(host(captured(seed=0)), NOISY(model, SHAPE, seed=0, model_kwargs={"c": COND * 2}))


def test_shared_values_are_replaced(device: Device) -> None:
    def looked_up(x: Tensor, t: Tensor, c: Tensor, table: Tensor) -> Tensor:
        assert table.shape == (3,)
        return model(x, t, c) + 0.1 * table[1] * x

    def keywords(a: Tensor, table: Tensor) -> dict[str, Any]:
        return {"c": a.to("cuda"), "table": Shared(table.to("cuda"))}

    def on_cpu(a: Tensor, table: Tensor) -> dict[str, Any]:
        return {"c": a, "table": Shared(table)}

    first, second = torch.arange(3.0), torch.arange(3.0) * -2
    options: dict[str, Any] = {"guidance": 2.0}
    captured = graph(
        NOISY, looked_up, SHAPE, device="cuda", cond=keywords(COND, first), uncond=keywords(UNCOND, first), **options
    )
    want = NOISY(looked_up, SHAPE, seed=1, cond=on_cpu(COND, first), uncond=on_cpu(UNCOND, first), **options)
    assert torch.equal(host(captured(seed=1)), want)
    captured.update(cond=keywords(COND, second), uncond=keywords(UNCOND, second))
    want = NOISY(looked_up, SHAPE, seed=1, cond=on_cpu(COND, second), uncond=on_cpu(UNCOND, second), **options)
    assert torch.equal(host(captured(seed=1)), want)


def test_keywords_of_another_dtype_are_replaced(device: Device) -> None:
    options: dict[str, Any] = {"device": "cuda", "model_dtype": torch.float16}
    captured = graph(NOISY, model, SHAPE, model_kwargs={"c": COND.to("cuda")}, **options)
    captured.update(model_kwargs={"c": (COND * 2).to("cuda")})
    want = NOISY(model, SHAPE, seed=3, model_kwargs={"c": COND * 2}, model_dtype=torch.float16)
    assert torch.equal(host(captured(seed=3)), want)


def test_what_is_known_is_replaced(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", **PAINTED)
    mask = 1 - PAINTED["mask"]
    captured.update(mask=mask)
    assert torch.equal(host(captured(seed=2)), NOISY(model, SHAPE, seed=2, mask=mask, known=X))
    captured.update(known=OTHER)
    assert torch.equal(host(captured(seed=2)), NOISY(model, SHAPE, seed=2, mask=mask, known=OTHER))


def test_the_callers_tensors_are_neither_written_nor_watched(device: Device) -> None:
    cond, uncond, x, weights = COND.to("cuda"), UNCOND.to("cuda"), X.to("cuda"), torch.tensor([2.0, 3.0]).to("cuda")
    given: dict[str, Any] = {"guidance": weights, "cond": {"c": cond}, "uncond": {"c": uncond}}
    interval = {"guidance_interval": (300, 1000)}
    captured = graph(NOISY, model, x, **given, **interval)
    replaced = (cond * 3).clone()
    captured.update(cond={"c": replaced})
    captured()
    assert torch.equal(host(cond), COND) and torch.equal(host(uncond), UNCOND) and torch.equal(host(x), X)
    for tensor in (cond, uncond, x, weights, replaced):
        tensor.fill_(50)
    want = NOISY(
        model, X, seed=0, guidance=[2.0, 3.0], cond={"c": COND * 3}, uncond={"c": UNCOND}, guidance_interval=(300, 1000)
    )
    assert torch.equal(host(captured(seed=0)), want)


def test_results_own_their_memory(device: Device) -> None:
    with torch.inference_mode():
        captured = graph(NOISY, model, SHAPE, device="cuda")
        first = captured(seed=1)
    assert not first.is_inference() and not first.requires_grad
    out = torch.zeros(SHAPE, device="cuda")
    assert captured(seed=2, out=out) is out
    assert torch.equal(host(first), NOISY(model, SHAPE, seed=1))
    assert torch.equal(host(out), NOISY(model, SHAPE, seed=2))


def test_weights_changed_in_place_count(device: Device) -> None:
    weight = torch.full((1, 3, 1, 1), 0.5).to("cuda")
    captured = graph(NOISY, lambda x, t: weight * x, SHAPE, device="cuda")
    weight.fill_(0.25)
    want = NOISY(lambda x, t: torch.full((1, 3, 1, 1), 0.25) * x, SHAPE, seed=9)
    assert torch.equal(host(captured(seed=9)), want)


def test_a_model_that_is_told_its_guidance(device: Device) -> None:
    class Told:
        config = SimpleNamespace(time_cond_proj_dim=8)

        def __call__(self, x: Tensor, t: Tensor, timestep_cond: Tensor) -> Tensor:
            return 0.3 * x + timestep_cond[:, :1, None, None]

    sampler = LCM(SCHEDULE, steps=2)
    captured = graph(sampler, Told(), SHAPE, device="cuda", guidance_embedding=4.0)  # type: ignore[call-arg]
    assert torch.equal(host(captured(seed=5)), sampler(Told(), SHAPE, seed=5, guidance_embedding=4.0))


def test_a_rerun_starts_from_the_same_turn(device: Device) -> None:
    """An odd number of rows, and two histories that plans take turns to write."""
    sampler = DPMSolver(SCHEDULE, steps=5, order=3)
    captured = graph(sampler, model, SHAPE, device="cuda")
    want = sampler(model, SHAPE, seed=3)
    assert [torch.equal(host(captured(seed=3)), want) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"callback": print}, ValueError, "cannot capture callback: nothing can look in", id="callback"),
        pytest.param({"progress": True}, ValueError, "cannot capture progress", id="progress"),
        pytest.param({"decode": abs}, ValueError, "cannot capture decode: .* decode what the graph", id="decode"),
        pytest.param({"out": X}, ValueError, "cannot capture out: each call", id="out"),
        pytest.param({"noise": lambda k: X}, ValueError, "cannot capture noise: .* from the seed", id="noise"),
        pytest.param({"noise": [torch.Generator()]}, ValueError, "cannot capture noise", id="generator"),
        pytest.param({"device": "cpu"}, ValueError, "needs a CUDA device, .* would lie on cpu", id="cpu"),
        pytest.param({"steps": 5}, TypeError, "steps belongs to DDIM", id="unknown"),
        pytest.param({"guidance": 2.0}, ValueError, "needs uncond=", id="bad-option"),
    ],
)
def test_refused_before_the_model_is_called(
    device: Device, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(error, match=message):
        graph(NOISY, never, SHAPE, **{"device": "cuda", **options})


def test_refused_samplers_and_gradients(device: Device) -> None:
    with pytest.raises(TypeError, match="sampler must be"):
        graph(model, model, SHAPE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example requires gradients"):
        graph(NOISY, model, X.clone().requires_grad_())
    with pytest.raises(TypeError, match="x0 must be a tensor"):
        graph(DDIMInverse(SCHEDULE, steps=2), model, SHAPE)


def test_options_that_are_not_in_force_are_none(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", callback=None, progress=False, noise=None, out=None, cond=None)
    assert isinstance(captured, Graph)
    assert torch.equal(host(captured(seed=1)), NOISY(model, SHAPE, seed=1))


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"x": X[:1]}, ValueError, r"run's shape \(2, 3, 4, 5\), got \(1, 3, 4, 5\)"),
    "not-a-tensor": ({"x": SHAPE}, TypeError, "x must be a tensor, got tuple"),
    "integers": ({"x": X.long()}, TypeError, "x must be a shape or a floating-point tensor"),
    "float64": ({"x": X.double()}, ValueError, "x is torch.float64, and the run"),
    "gradients": ({"x": X.clone().requires_grad_()}, ValueError, "x requires gradients"),
    "seeds": ({"seed": [1, 2, 3]}, ValueError, "seed must be one int or 2"),
    "seed": ({"seed": 0.5}, TypeError, "seed must be an int"),
    "out": ({"out": torch.zeros(SHAPE)}, ValueError, "out must have shape"),
    "out-dtype": ({"out": X.double()}, TypeError, "out must be a torch.float32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_change_nothing(device: Device, name: str) -> None:
    arguments, error, message = BAD_CALLS[name]
    captured = graph(NOISY, model, SHAPE, device="cuda")
    with pytest.raises(error, match=message):
        captured(**arguments)
    assert torch.equal(host(captured(seed=6)), NOISY(model, SHAPE, seed=6))


BAD_UPDATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"start_step": 1}, TypeError, "cannot change start_step; it can change model_kwargs"),
    "absent": ({"model_kwargs": {"c": COND}}, ValueError, "model_kwargs can be changed only"),
    "absent-mask": ({"mask": X}, ValueError, "mask can be changed only"),
    "none": ({"cond": None}, ValueError, "cond can be changed only to a value"),
    "keywords": ({"cond": {"c": COND, "d": 1}}, ValueError, "captured; only one call has d"),
    "shape": ({"cond": {"c": COND[:1]}}, ValueError, r"cond.c must be torch.float32 of shape \(2, 3, 1, 1\) on cuda"),
    "dtype": ({"uncond": {"c": COND.double()}}, ValueError, "uncond.c must be torch.float32"),
    "not-a-tensor": ({"cond": {"c": 1.0}}, ValueError, "cond.c is captured as it was"),
    "one": ({"guidance": 1.0}, ValueError, "guidance other than 1 needs both halves"),
    "weights": ({"guidance": [1.0, 2.0, 3.0]}, ValueError, "guidance must be one number or 2"),
    "second-of-two": (
        {"cond": {"c": COND * 5}, "uncond": {"c": COND[:1]}},
        ValueError,
        "uncond.c must be torch.float32",
    ),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_bad_updates_change_nothing(device: Device, name: str) -> None:
    inputs, error, message = BAD_UPDATES[name]
    captured = graph(NOISY, model, SHAPE, device="cuda", **moved_all(GUIDED))
    with pytest.raises(error, match=message):
        captured.update(**moved_all(inputs))
    assert torch.equal(host(captured(seed=6)), NOISY(model, SHAPE, seed=6, **GUIDED))


def test_a_condition_from_another_device_is_refused(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", **moved_all(GUIDED))
    with pytest.raises(ValueError, match=r"cond\.c must be .* on cuda:0, as at capture; got .* on cpu"):
        captured.update(cond={"c": COND})


def test_a_model_that_cannot_be_captured(device: Device) -> None:
    def reads(x: Tensor, t: Tensor) -> Tensor:
        if device.strict:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(RuntimeError, match="the model cannot be captured: does it read results") as caught:
        graph(NOISY, reads, SHAPE, device="cuda")
    assert "stream is capturing" in str(caught.value.__cause__)


def test_autocast_with_its_cache_is_refused(device: Device) -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    with autocast(cache=True), pytest.raises(ValueError, match=r'torch.autocast\("cuda", cache_enabled=False\)'):
        graph(NOISY, never, SHAPE, device="cuda")
    with autocast(cache=False):
        captured = graph(NOISY, model, SHAPE, device="cuda")
    assert torch.equal(host(captured(seed=6)), NOISY(model, SHAPE, seed=6))


@contextmanager
def autocast(cache: bool) -> Iterator[None]:
    """What torch.autocast("cuda") sets: without a GPU it warns, and sets nothing."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_cache_enabled(cache)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(cached)


def test_the_loops_buffers_are_made_on_the_callers_stream(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Memory of the warm-up's stream could go to others while a replay on the caller's uses it."""
    order: list[str] = []
    make_plans = workspace.plans_in_turn

    def plans(*args: Any, **options: Any) -> Any:
        order.append("buffers")
        return make_plans(*args, **options)

    def stream(one: object) -> Any:
        order.append("side stream")
        return nullcontext()

    monkeypatch.setattr(workspace, "plans_in_turn", plans)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    graph(NOISY, model, SHAPE, device="cuda")
    assert order == ["buffers", "side stream"]


def test_a_replay_over_freed_memory_is_found(device: Device) -> None:
    """The tests above would pass on a tape that kept whatever it was shown."""
    kept = [COND.to("cuda")]
    captured = graph(NOISY, lambda x, t: model(x, t, kept[0]), SHAPE, device="cuda")
    captured()
    kept.clear()
    with pytest.raises(AssertionError, match="freed since"):
        captured()


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_on_a_gpu_replays_have_the_bits_of_the_plain_call(name: str) -> None:
    make, options, inner, x = RUNS[name]
    sampler, start, given = make(), moved(x, "cuda"), moved(options, "cuda")
    captured = graph(sampler, inner, start, device="cuda", **given)
    for seed in (3, 11, 3):
        assert torch.equal(captured(seed=seed), sampler(inner, start, device="cuda", **{**given, "seed": seed}))
