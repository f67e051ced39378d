"""mask= and known=: the known region on its way through the noise levels, and the rest around it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, DynamicThreshold, Sampler, Schedule, Step, Table, ddim, ops
from support.formula import UNIT
from support.whole_runs import never

SHAPE = (3, 2, 6, 5)
KNOWN = 0.5 * ops.randn(SHAPE, seed=77)
MASK = torch.ones(SHAPE)
MASK[..., 2:5] = 0.0  # 1 is what is to be filled in
SOFT = torch.linspace(0, 1, 5).expand(SHAPE)
STREAM = 2


def model(x: Tensor, t: Tensor, **_: object) -> Tensor:
    return 0.5 * torch.tanh(x)


def by_callback(mask: Tensor, known: Tensor, seed: int) -> Any:
    """The same after every row, from outside the loop."""

    def paint(step: Step) -> None:
        z = ops.randn(step.x.shape, seed=seed, step=step.index, stream=STREAM).to(step.x.dtype)
        rest = 1 - mask
        step.x.mul_(mask).add_(rest * known, alpha=step.alpha)
        if step.sigma > 0:
            step.x.addcmul_(rest, z, value=step.sigma)

    return paint


OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"eta": 1.0, "clip": 1.0}, id="noise-clip"),
    pytest.param({"clip": DynamicThreshold(0.9)}, id="threshold"),
    pytest.param({"model_dtype": torch.bfloat16, "eta": 0.5}, id="half-precision"),
    pytest.param({"guidance": 3.0, "uncond": {}}, id="guided"),
    pytest.param({"guidance": 3.0, "uncond": {}, "guidance_interval": (300, 700)}, id="guided-at-times"),
    pytest.param({"correct_x0": lambda x0, t: 0.9 * x0}, id="correct-x0"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", [MASK, SOFT], ids=["hard", "soft"])
def test_equals_a_callback_that_paints(backend: str, options: dict[str, Any], mask: Tensor) -> None:
    common: dict[str, Any] = dict(steps=5, seed=3, backend=backend, **options)
    got = ddim(model, SHAPE, mask=mask, known=KNOWN, **common)
    assert torch.equal(got, ddim(model, SHAPE, callback=by_callback(mask, KNOWN, 3), **common))
    assert torch.equal(got[mask == 0], KNOWN[mask == 0]), "the last level has no noise: exactly what is known"
    watched = ddim(model, SHAPE, mask=mask, known=KNOWN, callback=lambda step: None, **common)
    *_, last = DDIM(
        Schedule.linear(),
        **{name: common.pop(name) for name in ("steps", "eta", "clip", "correct_x0") if name in common},
    ).iterate(model, SHAPE, mask=mask, known=KNOWN, **common)
    assert torch.equal(watched, got) and torch.equal(last.x, got), "looking changes nothing"
    assert got.untyped_storage().nbytes() == 4 * got.numel()


@pytest.mark.parametrize("mask", [MASK, SOFT], ids=["hard", "soft"])
def test_every_level_is_the_forward_process_of_what_is_known(backend: str, mask: Tensor) -> None:
    sampler = DDIM(Schedule.linear(), steps=5, timesteps="leading", eta=1.0)
    alpha = np.sqrt([*Schedule.linear().alphas_cumprod[[600, 400, 200, 0]], 1.0])
    before: list[Tensor] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        before.append(x.clone())
        return model(x, t)

    for step in sampler.iterate(spy, SHAPE, seed=3, mask=mask, known=KNOWN, backend=backend):
        assert step.alpha == pytest.approx(alpha[step.index], rel=1e-15)
        assert step.sigma == pytest.approx(math.sqrt(1 - alpha[step.index] ** 2), abs=1e-15)
        z = ops.randn(SHAPE, seed=3, step=step.index, stream=STREAM)
        unpainted = ops.step(before[-1], model(before[-1], None), sampler.table, step.index, seed=3, backend=backend)  # type: ignore[arg-type]
        parts = (
            mask * unpainted.double(),
            (1 - mask) * step.alpha * KNOWN.double(),
            (1 - mask) * step.sigma * z.double(),
        )
        # Each part is rounded three times, and then the sums.
        assert ((step.x - sum(parts)).abs() <= 5 * UNIT * sum(part.abs() for part in parts)).all()
    assert step.sigma == 0.0 and step.alpha == 1.0
    assert len(before) == 5


def test_nothing_is_known_or_everything(backend: str) -> None:
    common: dict[str, Any] = dict(steps=4, eta=1.0, seed=3, backend=backend)
    assert torch.equal(ddim(model, SHAPE, mask=torch.ones(1), known=KNOWN, **common), ddim(model, SHAPE, **common))
    assert torch.equal(ddim(model, SHAPE, mask=torch.zeros(1), known=KNOWN, **common), KNOWN)


def test_what_is_known_outside_its_region_does_not_matter(backend: str) -> None:
    spoilt = KNOWN.masked_fill(MASK == 1, math.nan)
    common: dict[str, Any] = dict(steps=4, seed=3, mask=MASK, backend=backend)
    assert torch.equal(ddim(model, SHAPE, known=spoilt, **common), ddim(model, SHAPE, known=KNOWN, **common))


@pytest.mark.parametrize(
    ("mask", "known"),
    [
        pytest.param(MASK[:1, :1], KNOWN, id="one-mask"),
        pytest.param(MASK[0, 0], KNOWN[:1], id="mask-of-space"),
        pytest.param(MASK.bool(), KNOWN, id="bool"),
        pytest.param(MASK.long(), KNOWN, id="integers"),
        pytest.param(MASK.half(), KNOWN.half(), id="half"),
        pytest.param(MASK.double(), KNOWN.double(), id="float64"),
        pytest.param(MASK, torch.tensor(0.25), id="one-value"),
        pytest.param(MASK.mT.contiguous().mT, KNOWN.to(memory_format=torch.channels_last), id="strided"),
    ],
)
def test_both_broadcast_and_are_converted(backend: str, mask: Tensor, known: Tensor) -> None:
    common: dict[str, Any] = dict(steps=3, seed=3, backend=backend)
    kept = mask.clone(), known.clone()
    got = ddim(model, SHAPE, mask=mask, known=known, **common)
    whole = ddim(model, SHAPE, mask=MASK, known=known.float().expand(SHAPE).contiguous(), **common)
    assert torch.equal(got, whole)
    assert torch.equal(mask, kept[0]) and torch.equal(known, kept[1])


SQUARE = (4, 4, 4, 4)  # every size fits every axis


@pytest.mark.parametrize(
    ("mask", "as_whole"),
    [
        pytest.param((4, 4, 4), (4, 1, 4, 4), id="without-channels"),
        pytest.param((1, 4, 4), (1, 1, 4, 4), id="without-channels-for-all"),
        pytest.param((4, 4), (1, 1, 4, 4), id="space-alone"),
        pytest.param((4,), (1, 1, 1, 4), id="last-axis-alone"),
        pytest.param((), (1, 1, 1, 1), id="one-value"),
        pytest.param((1, 4, 1, 1), (1, 4, 1, 1), id="channels"),
        pytest.param((4, 1, 1, 1), (4, 1, 1, 1), id="samples"),
    ],
)
def test_how_many_axes_a_mask_has_says_which_they_are(
    backend: str, mask: tuple[int, ...], as_whole: tuple[int, ...]
) -> None:
    values = torch.linspace(0.1, 0.9, math.prod(mask)).reshape(mask)
    known = 0.5 * ops.randn(SQUARE, seed=78)
    common: dict[str, Any] = dict(known=known, steps=2, seed=3, backend=backend)
    whole = values.reshape(as_whole).expand(SQUARE).contiguous()
    assert torch.equal(ddim(model, SQUARE, mask=values, **common), ddim(model, SQUARE, mask=whole, **common))


@pytest.mark.parametrize("shape", [(3, 16, 7), (2, 3, 4, 5, 6)], ids=len)
def test_states_with_other_axes(shape: tuple[int, ...]) -> None:
    known, common = ops.randn(shape, seed=1), {"steps": 2, "seed": 3}
    values = torch.linspace(0, 1, math.prod(shape) // shape[1]).reshape(shape[0], *shape[2:])
    got = ddim(model, shape, mask=values, known=known, **common)  # type: ignore[arg-type]
    assert torch.equal(got, ddim(model, shape, mask=values[:, None], known=known, **common))  # type: ignore[arg-type]
    got = ddim(model, shape, mask=values[0], known=known, **common)  # type: ignore[arg-type]
    assert torch.equal(got, ddim(model, shape, mask=values[:1, None], known=known, **common))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "mask", "known", "message"),
    [
        pytest.param(
            (2, 4, 5, 5), (4, 5, 5), None, r"to \(2, 5, 5\), got \(4, 5, 5\).*give \(1, 4, 5, 5\)", id="channels"
        ),
        pytest.param(SQUARE, None, (4, 4, 4), r"known\[None\].*known\[:, None\]", id="known-either-way"),
        pytest.param((4, 4), (4,), None, "mask must broadcast to x's shape", id="vectors"),
        pytest.param((4, 4), None, (4,), "known must broadcast to x's shape", id="known-of-vectors"),
        pytest.param((2, 4, 5, 5), (1, 2, 4, 5, 5), None, "mask must broadcast to x's shape", id="too-many"),
        pytest.param((2, 4, 5, 6), (6, 5), None, r"channels to \(5, 6\), got \(6, 5\)", id="space"),
    ],
)
def test_what_could_be_read_two_ways_is_refused(shape: Any, mask: Any, known: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddim(never, shape, steps=2, mask=torch.ones(mask or shape), known=torch.zeros(known or shape))


def test_samples_do_not_depend_on_their_batch(backend: str) -> None:
    got = ddim(model, SHAPE, steps=4, eta=1.0, seed=20, mask=SOFT, known=KNOWN, backend=backend)
    for i in range(3):
        alone = ddim(
            model,
            (1, *SHAPE[1:]),
            steps=4,
            eta=1.0,
            seed=20,
            index=i,
            mask=SOFT[:1],
            known=KNOWN[i : i + 1],
            backend=backend,
        )
        assert torch.equal(got[i : i + 1], alone)


def test_the_known_regions_noise_is_its_own(backend: str) -> None:
    """Stream 2: neither x_T's (0) nor that which rows add (1), and the same where the rows' noise is the caller's."""
    z = ops.randn(SHAPE, seed=9, step=1, stream=STREAM)
    for stream in (0, 1):
        assert not torch.equal(z, ops.randn(SHAPE, seed=9, step=1, stream=stream))
    silent = lambda k: torch.zeros(SHAPE)  # noqa: E731
    states = [
        step.x.clone()
        for step in DDIM(Schedule.linear(), steps=3, eta=1.0).iterate(
            model, SHAPE, seed=9, noise=silent, mask=MASK, known=KNOWN, backend=backend
        )
    ]
    want = ddim(
        model, SHAPE, steps=3, eta=1.0, seed=9, noise=silent, callback=by_callback(MASK, KNOWN, 9), backend=backend
    )
    assert torch.equal(states[-1], want)


def test_what_is_known_is_clean_in_the_end_also_where_the_last_level_has_noise(backend: str) -> None:
    final = float(Schedule.linear().alphas_cumprod[0])
    got = ddim(model, SHAPE, steps=4, final_alpha_cumprod=final, seed=3, mask=MASK, known=KNOWN, backend=backend)
    assert torch.equal(got[MASK == 0], KNOWN[MASK == 0])


def test_from_a_partly_noised_input(backend: str) -> None:
    got = ddim(model, KNOWN, steps=6, strength=0.5, seed=3, mask=MASK, known=KNOWN, backend=backend)
    assert torch.equal(got[MASK == 0], KNOWN[MASK == 0]) and not torch.equal(got, KNOWN)


@pytest.mark.parametrize("mask", [MASK, SOFT], ids=["hard", "soft"])
def test_gradients(mask: Tensor) -> None:
    x = ops.randn(SHAPE, seed=3)
    common: dict[str, Any] = dict(timesteps=[400, 200, 50], seed=3, mask=mask, known=KNOWN)
    given = x.clone().requires_grad_()
    got = ddim(model, given, **common)
    assert got.requires_grad
    # Three rows of at most 16 roundings of values below 8, carried on with factors that multiply to less than 4.
    assert (got - ddim(model, x, **common)).abs().max() <= 3 * 16 * UNIT * 8 * 4
    got.sum().backward()
    assert (given.grad[mask == 0] == 0).all() and (given.grad[mask == 1] != 0).all()
    # The first line of two samples, where the mask has all of its values: the chain runs twice for every element.
    lines = [one[:2, :, :1] for one in (x, mask, KNOWN)]
    double, common["mask"], common["known"] = lines[0].double().requires_grad_(), *lines[1:]
    assert torch.autograd.gradcheck(
        lambda x: ddim(model, x, model_dtype=torch.float64, **common), (double,), eps=1e-6, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"mask": MASK}, TypeError, "both mask= and known=", id="mask-alone"),
        pytest.param({"known": KNOWN}, TypeError, "both mask= and known=", id="known-alone"),
        pytest.param(
            {"mask": 1.0, "known": KNOWN},
            TypeError,
            "both mask= and known=, two tensors; got float and Tensor",
            id="number",
        ),
        pytest.param({"mask": MASK, "known": np.zeros(SHAPE)}, TypeError, "got Tensor and ndarray", id="numpy"),
        pytest.param(
            {"mask": MASK[..., :2], "known": KNOWN}, ValueError, "mask must broadcast to x's shape", id="mask"
        ),
        pytest.param({"mask": MASK[None], "known": KNOWN}, ValueError, "mask must broadcast", id="mask-5d"),
        pytest.param({"mask": MASK, "known": KNOWN[:2]}, ValueError, "known must broadcast", id="known"),
        pytest.param({"mask": 2 * MASK, "known": KNOWN}, ValueError, r"mask must lie in \[0, 1\]", id="above-1"),
        pytest.param({"mask": -MASK, "known": KNOWN}, ValueError, r"mask must lie in \[0, 1\]", id="below-0"),
        pytest.param({"mask": MASK + 0j, "known": KNOWN}, TypeError, "mask must hold real numbers", id="complex-mask"),
        pytest.param({"mask": MASK, "known": KNOWN + 0j}, TypeError, "known must hold real", id="complex-known"),
        pytest.param(
            {"mask": MASK.to_sparse(), "known": KNOWN}, TypeError, "mask must be a dense tensor", id="sparse-mask"
        ),
        pytest.param(
            {"mask": MASK, "known": KNOWN.to_sparse()}, TypeError, "known must be a dense tensor", id="sparse-known"
        ),
        pytest.param({"mask": MASK * math.nan, "known": KNOWN}, ValueError, r"mask must lie in \[0, 1\]", id="nan"),
    ],
)
def test_refused_before_the_model_is_called(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ddim(never, SHAPE, steps=3, **options)


def test_a_table_without_levels_cannot_inpaint() -> None:
    with pytest.raises(
        ValueError, match=r"inpainting needs a table with noise levels: Table\(\.\.\., alpha=, sigma=\)"
    ):
        Sampler(Table([1, 0], a=1.0))(model, SHAPE, mask=MASK, known=KNOWN)
    levels = Table([1, 0], a=1.0, alpha=[0.1, 0.5, 1.0], sigma=[1.0, 0.5, 0.0])
    got = Sampler(levels)(model, SHAPE, mask=MASK, known=KNOWN)
    assert torch.equal(got[MASK == 0], KNOWN[MASK == 0])
