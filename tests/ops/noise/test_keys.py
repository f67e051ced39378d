"""Seeds and places: the hash of both, the same bits however a set is cut up, and what a call without a seed draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastsample import (
    DDIM,
    DDPM,
    LCM,
    TCD,
    Batcher,
    Consistency,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Sampler,
    Schedule,
    add_noise,
    ddim,
    ops,
)
from fastsample.ops.noise.keys import sample_keys
from support.levels import LEVELS, at_level, on_threads
from support.splitmix import WRAP, key, mix, signed

pytestmark = pytest.mark.filterwarnings("ignore:the row at t = 999")
CPU = torch.device("cpu")
SCHEDULE = Schedule.linear()
SHAPE = (3, 7)
NOISY = DDIM(SCHEDULE, steps=10, eta=1.0).table
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ddim": lambda: DDIM(SCHEDULE, steps=3, eta=1.0),
    "ddpm": lambda: DDPM(SCHEDULE, steps=3),
    "dpm_solver": lambda: DPMSolver(SCHEDULE, steps=3),
    "euler": lambda: Euler(SCHEDULE, steps=3),
    "flow": lambda: Euler(steps=3, prediction="flow"),
    "euler_ancestral": lambda: EulerAncestral(SCHEDULE, steps=3),
    "heun": lambda: Heun(SCHEDULE, steps=3),
    "lcm": lambda: LCM(SCHEDULE, steps=3),
    "tcd": lambda: TCD(SCHEDULE, steps=3),
    "consistency": lambda: Consistency(sigmas=(80.0, 5.0)),
}
Draw = Callable[..., Tensor]


def model(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5  # exact, so that it adds no rounding of its own


def zeros(n: int) -> Tensor:
    return torch.zeros(n, *SHAPE)


def in_place(n: int, **given: Any) -> Tensor:
    x = zeros(n)
    return ops.step(x, zeros(n), NOISY, 2, out=x, **given)


def each_row(n: int, **given: Any) -> Tensor:
    return ops.step(zeros(n), zeros(n), NOISY, torch.full((n,), 2), **given)


def painted(n: int, **given: Any) -> Tensor:
    return ddim(model, (n, *SHAPE), schedule=SCHEDULE, steps=3, mask=torch.full((7,), 0.5), known=zeros(n), **given)


def strong(n: int, **given: Any) -> Tensor:
    return ddim(model, zeros(n), schedule=SCHEDULE, steps=3, strength=0.7, **given)


def called(make: Callable[[], Sampler]) -> Draw:
    return lambda n, **given: make()(model, (n, *SHAPE), **given)


def walked(make: Callable[[], Sampler]) -> Draw:
    def draw(n: int, **given: Any) -> Tensor:
        *_, last = make().iterate(model, (n, *SHAPE), **given)
        return last.x

    return draw


# Each makes n samples for a seed and an index.
ENTRIES: dict[str, Draw] = {
    "randn": lambda n, **given: ops.randn((n, *SHAPE), **given),
    "randn-out": lambda n, **given: ops.randn((n, *SHAPE), out=zeros(n), **given),
    "step": lambda n, **given: ops.step(zeros(n), zeros(n), NOISY, 2, **given),
    "step-in-place": in_place,
    "step-rows": each_row,
    "step-reference": lambda n, **given: ops.step(zeros(n), zeros(n), NOISY, 2, backend="reference", **given),
    "add_noise": lambda n, **given: add_noise(zeros(n), 500, schedule=SCHEDULE, **given),
    "strength": strong,
    "inpainting": painted,
    **{name: called(make) for name, make in SAMPLERS.items()},
    **{f"{name}-iterate": walked(make) for name, make in SAMPLERS.items()},
}
every_entry = pytest.mark.parametrize("draw", ENTRIES.values(), ids=ENTRIES.keys())


# The hash.

SEEDS = [0, 1, 7, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), 2**64 + 5, 3**60]
PLACES = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 2]


@pytest.mark.parametrize("seed", SEEDS, ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_hash(seed: int, place: int) -> None:
    want = signed(key(seed, (place + i) % WRAP) for i in range(3))
    assert torch.equal(sample_keys(seed, place, 3, CPU), want)
    of_each = sample_keys([seed] * 3, [(place + i) % WRAP for i in range(3)], 3, CPU)
    assert torch.equal(of_each, want), "torch's arithmetic and that of C++"


@pytest.mark.parametrize(
    ("seed", "index", "want"),
    [
        pytest.param([5, 9], 0, [(5, 0), (9, 0)], id="seeds"),
        pytest.param((5, 9), 4, [(5, 4), (9, 4)], id="seeds-at-a-place"),
        pytest.param(range(5, 7), 4, [(5, 4), (6, 4)], id="range"),
        pytest.param(5, [4, 0], [(5, 4), (5, 0)], id="places"),
        pytest.param([5, 9], [4, 0], [(5, 4), (9, 0)], id="both"),
        pytest.param(torch.tensor([5, -1]), torch.tensor([4, 0]), [(5, 4), (-1, 0)], id="tensors"),
        pytest.param(torch.tensor(5), torch.tensor(4), [(5, 4), (5, 5)], id="0-d-tensors"),
        pytest.param(torch.tensor([5]).expand(2), 4, [(5, 4), (5, 4)], id="expanded"),
        pytest.param(torch.tensor([5, 9], dtype=torch.uint8), 1, [(5, 1), (9, 1)], id="uint8"),
        pytest.param(torch.tensor([2**64 - 1, 3], dtype=torch.uint64), 1, [(-1, 1), (3, 1)], id="uint64"),
        pytest.param(1, torch.tensor([2**64 - 1, 3], dtype=torch.uint64), [(1, 2**64 - 1), (1, 3)], id="uint64-places"),
        pytest.param(np.int32(5), np.uint8(4), [(5, 4), (5, 5)], id="numpy-numbers"),
        pytest.param(np.array(5), np.array(4), [(5, 4), (5, 5)], id="0-d-arrays"),
        pytest.param(np.array([2**64 - 1, 9], np.uint64), np.array([4, 0]), [(-1, 4), (9, 0)], id="arrays"),
        pytest.param([np.int64(5), 2**64 - 1], 0, [(5, 0), (-1, 0)], id="mixed-list"),
        pytest.param([torch.tensor(5), 9], [torch.tensor(1), torch.tensor(2)], [(5, 1), (9, 2)], id="lists-of-tensors"),
        pytest.param(5, 2**64 - 1, [(5, 2**64 - 1), (5, 0)], id="after-the-last-place-the-first"),
    ],
)
def test_every_kind_of_seed_and_place(seed: Any, index: Any, want: list[tuple[int, int]]) -> None:
    assert torch.equal(sample_keys(seed, index, 2, CPU), signed(key(*one) for one in want))


def test_two_places_of_a_seed_never_share_a_key() -> None:
    """Each step of the hash can be undone, so the place can be told from seed and key."""

    def unshifted(value: int, bits: int) -> int:
        found = value
        for _ in range(64 // bits):
            found = value ^ found >> bits
        return found

    def unmix(value: int) -> int:
        value = unshifted(value, 31) * pow(0x94D049BB133111EB, -1, WRAP) % WRAP
        value = unshifted(value, 27) * pow(0xBF58476D1CE4E5B9, -1, WRAP) % WRAP
        return unshifted(value, 30)

    drawn = np.random.default_rng(0).integers(0, 2**64, (2, 1000), dtype=np.uint64).tolist()
    found = sample_keys(drawn[0], drawn[1], 1000, CPU).tolist()
    assert [(unmix(one % WRAP) - mix(seed)) % WRAP for one, seed in zip(found, drawn[0], strict=True)] == drawn[1]


@pytest.mark.parametrize("places", ["seed=rank", "index=rank*B"])
def test_four_ranks_of_64_have_256_samples(places: str) -> None:
    ranks = [
        ddim(model, (64, 4), schedule=SCHEDULE, steps=2, **({"seed": r} if places == "seed=rank" else given))
        for r in range(4)
        for given in [{"seed": 0, "index": 64 * r}]
    ]
    assert len(torch.cat(ranks).unique(dim=0)) == 256
    if places != "seed=rank":
        assert torch.equal(torch.cat(ranks), ddim(model, (256, 4), schedule=SCHEDULE, steps=2, seed=0))


def test_a_hundred_steps_of_training_have_6400_noises() -> None:
    drawn = [add_noise(torch.zeros(64, 4), 999, schedule=SCHEDULE, seed=step) for step in range(100)]
    assert len(torch.cat(drawn).unique(dim=0)) == 6400


# However a set is cut up.


@every_entry
def test_a_sample_does_not_depend_on_batch_order_threads_or_level(draw: Draw) -> None:
    want = draw(7, seed=9, index=3)
    assert len(want.flatten(1).unique(dim=0)) == 7
    parts = [(5, 2), (0, 1), (1, 4)]  # first sample and how many, in another order
    for count in (1, 3):
        with on_threads(count):
            for first, n in parts:
                assert torch.equal(draw(n, seed=9, index=3 + first), want[first : first + n])
    for level in LEVELS:
        with at_level(level):
            assert torch.equal(draw(7, seed=9, index=3), want), level


@every_entry
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array], ids=["list", "tensor", "array"])
def test_a_seed_per_sample_is_a_set_per_sample(draw: Draw, kind: Callable[[list[int]], Any]) -> None:
    seeds, places = [4, 2**62, -1], [7, 0, 2**40]
    alone = [draw(1, seed=seed, index=2) for seed in seeds]
    assert torch.equal(draw(3, seed=kind(seeds), index=2), torch.cat(alone))
    alone = [draw(1, seed=5, index=place) for place in places]
    assert torch.equal(draw(3, seed=5, index=kind(places)), torch.cat(alone))
    alone = [draw(1, seed=seed, index=place) for seed, place in zip(seeds, places, strict=True)]
    assert torch.equal(draw(3, seed=kind(seeds), index=kind(places)), torch.cat(alone))


def test_a_batcher_makes_any_part_of_a_set() -> None:
    sampler = SAMPLERS["ddim"]()
    want = sampler(model, (7, *SHAPE), seed=9, index=3)
    for batch in (1, 3):
        batcher = Batcher(model, sampler, batch=batch)
        requests = [batcher.submit(SHAPE, seed=9, index=3 + i) for i in (5, 6, 0, 1, 2, 3, 4)]
        assert all(torch.equal(one.result(), want[i]) for one, i in zip(requests, (5, 6, 0, 1, 2, 3, 4), strict=True))


# Without a seed.


def batched(n: int, **given: Any) -> Tensor:
    batcher = Batcher(model, SAMPLERS["ddim"](), batch=2)
    return torch.stack([one.result() for one in [batcher.submit(SHAPE, **given) for _ in range(n)]])


@pytest.mark.parametrize("draw", [*ENTRIES.values(), batched], ids=[*ENTRIES, "batcher"])
@pytest.mark.parametrize("given", [{}, {"seed": None}, {"index": 5}], ids=["", "none", "index"])
def test_without_a_seed_calls_differ_and_torchs_seed_repeats_them(draw: Draw, given: dict[str, Any]) -> None:
    torch.manual_seed(3)
    first, second = draw(2, **given), draw(2, **given)
    torch.manual_seed(3)
    assert torch.equal(draw(2, **given), first) and torch.equal(draw(2, **given), second)
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(
    "draw", [ENTRIES[name] for name in ("randn", "randn-out", "step", "step-in-place", "add_noise")]
)
def test_with_a_seed_nothing_is_drawn_from_torchs_generator(draw: Draw) -> None:
    state = torch.get_rng_state()
    draw(2, seed=3)
    ops.step(zeros(2), zeros(2), NOISY, 9)  # which adds none
    ops.step(zeros(2), zeros(2), NOISY, 2, noise=zeros(2))
    add_noise(zeros(2), 5, schedule=SCHEDULE, noise=zeros(2))
    assert torch.equal(torch.get_rng_state(), state)


# Compiled.


COMPILED: dict[str, Draw] = {name: ENTRIES[name] for name in ("randn", "step", "step-in-place")}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("through", ["aot_eager", "inductor"])
def test_compiled_calls_without_a_seed_differ_and_are_the_eager_ones(through: str) -> None:
    def twice(weight: Tensor) -> Tensor:
        return torch.stack([weight * ops.randn((2, 3)), weight * ops.randn((2, 3))])

    # With gradients the graph is partitioned, and calls with equal arguments merged.
    weight = torch.ones(2, 3, requires_grad=True)
    compiled = torch.compile(twice, backend=through, fullgraph=True)
    torch.manual_seed(0)
    first, second = compiled(weight), compiled(weight)
    first.sum().backward()
    torch.manual_seed(0)
    assert torch.equal(twice(weight), first) and torch.equal(twice(weight), second)
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 4


@pytest.mark.usefixtures("compiler")
def test_inductor_takes_seeds_and_places_beyond_int64() -> None:
    compiled = torch.compile(lambda seed, index: ops.randn((2, 3), seed=seed, index=index), fullgraph=True)
    for seed, index in ((5, 0), (6, 1), (2**63 + 5, 2), (-1, 3), (2**64 + 3, 2**63 + 1), (2**64 - 1, 0)):
        assert torch.equal(compiled(seed, index), ops.randn((2, 3), seed=seed, index=index)), (seed, index)


@torch.no_grad()
@pytest.mark.parametrize("draw", COMPILED.values(), ids=COMPILED.keys())
def test_one_graph_follows_seeds_and_places(compiler: Any, draw: Draw) -> None:
    compiled = torch.compile(lambda seed, index: draw(2, seed=seed, index=index), backend=compiler, fullgraph=True)
    for seeds, places in (([5, 9], [0, 0]), ([-1, 2**62], [7, 2**40]), ([0, 1], [3, 0])):
        given = torch.tensor(seeds), torch.tensor(places)
        assert torch.equal(compiled(*given), draw(2, seed=seeds, index=places))
    assert compiler.frame_count == 1
    for seed, index in ((5, 4), (6, 9), (-7, 2**62), (2**62, 0)):
        assert torch.equal(compiled(seed, index), draw(2, seed=seed, index=index))
    assert compiler.frame_count <= 3, "numbers are tied down once, and then open"


@pytest.mark.parametrize("draw", COMPILED.values(), ids=COMPILED.keys())
def test_recorded_programs_follow_seeds_and_places(draw: Draw) -> None:
    program = make_fx(lambda seed, index: draw(2, seed=seed, index=index))(torch.tensor([1, 2]), torch.tensor(4))
    assert torch.equal(program(torch.tensor([7, -1]), torch.tensor(9)), draw(2, seed=[7, -1], index=9))
    fresh = make_fx(lambda x: x + draw(2))(zeros(2))
    torch.manual_seed(0)
    got = fresh(zeros(2))
    torch.manual_seed(0)
    assert torch.equal(got, draw(2)) and not torch.equal(fresh(zeros(2)), got)


# What is no seed and no place.

BAD = [
    pytest.param({"seed": 1.0}, TypeError, "seed must be an int", id="seed-float"),
    pytest.param({"seed": True}, TypeError, "seed must be an int", id="seed-bool"),
    pytest.param({"seed": np.bool_(True)}, TypeError, "seed must be an int", id="seed-numpy-bool"),
    pytest.param({"seed": "12"}, TypeError, "seed must be an int", id="seed-text"),
    pytest.param({"seed": b"ab"}, TypeError, "seed must be an int", id="seed-bytes"),
    pytest.param({"seed": {1, 2}}, TypeError, "seed must be an int", id="seed-set"),
    pytest.param({"seed": {1: 2, 2: 3}}, TypeError, "seed must be an int", id="seed-mapping"),
    pytest.param({"seed": torch.Generator()}, TypeError, "seed must be an int", id="seed-generator"),
    pytest.param({"seed": [1, 2.0]}, TypeError, "seed must be an int", id="seeds-float"),
    pytest.param({"seed": [1, None]}, TypeError, "seed must be an int", id="seeds-none"),
    pytest.param({"seed": [torch.tensor(1.0), 2]}, TypeError, "seed must be .* integers", id="seeds-float-tensor"),
    pytest.param({"seed": torch.tensor([1.0, 2.0])}, TypeError, "seed must be .* integers", id="float-tensor"),
    pytest.param({"seed": torch.tensor([True, False])}, TypeError, "seed must be .* integers", id="bool-tensor"),
    pytest.param({"seed": np.array([1.0, 2.0])}, TypeError, "seed must be an int", id="float-array"),
    pytest.param({"seed": [1, 2, 3]}, ValueError, "seed must be one int or 2", id="too-many-seeds"),
    pytest.param({"seed": []}, ValueError, "seed must be one int or 2", id="no-seeds"),
    pytest.param({"seed": torch.ones(2, 1, dtype=torch.int64)}, ValueError, "seed must be one int or 2", id="seeds-2d"),
    pytest.param({"seed": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, "seed lies on meta", id="meta"),
    pytest.param({"index": -1}, ValueError, r"index must lie in \[0, 2\^64\)", id="place-below-0"),
    pytest.param({"index": 2**64}, ValueError, r"index must lie in \[0, 2\^64\)", id="place-too-large"),
    pytest.param({"index": [0, -1]}, ValueError, r"index must lie in \[0, 2\^64\)", id="places-below-0"),
    pytest.param({"index": torch.tensor([0, -1])}, ValueError, "index must be at least 0", id="place-tensor-below-0"),
    pytest.param({"index": None}, TypeError, "index must be an int", id="place-none"),
    pytest.param({"index": 1.0}, TypeError, "index must be an int", id="place-float"),
    pytest.param({"index": True}, TypeError, "index must be an int", id="place-bool"),
    pytest.param({"index": [0, 1, 2]}, ValueError, "index must be one int or 2", id="too-many-places"),
]


@pytest.mark.parametrize("seed", [3, None], ids=["seed", "fresh"])
@pytest.mark.parametrize(("given", "error", "message"), BAD)
@pytest.mark.parametrize(
    "draw",
    [ENTRIES[name] for name in ("randn", "step", "step-rows", "add_noise", "ddim", "ddim-iterate")],
    ids=["randn", "step", "step-rows", "add_noise", "ddim", "ddim-iterate"],
)
def test_what_is_no_seed_or_place_is_named(
    draw: Draw, given: dict[str, Any], error: type[Exception], message: str, seed: int | None
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        draw(2, **{"seed": seed, **given})
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn for a call that is refused"
